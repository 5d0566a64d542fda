"""From a folder of images to a model: `deitlt train`, `deitlt recipes` and the choice of a recipe."""

import contextlib
import csv
import json
import re
import shutil
import sys

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

import deitlt_hf
from deitlt_hf import Recipe
from deitlt_hf.cli import main
from deitlt_hf.console import duration
from deitlt_hf.quickstart import fitting, folder_training
from deitlt_hf.quickstart.fitted_recipe import (
    Choice,
    FolderFacts,
    Machine,
    fit_recipe,
    sizes_for,
    standard_epochs,
    with_given,
)
from deitlt_hf.quickstart.folder_training import check_continues, comparison, recipe_title
from deitlt_hf.recipes import load_recipe
from deitlt_hf.training import runs
from deitlt_hf.training.trial import START_SECONDS, StepTimes
from helpers import encoded, picture

CLASSES = 16
SHORT = ["--image_size", "16", "--teacher_epochs", "15", "--num_train_epochs", "5"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 16 classes with 16 to 3 images: transparent, with palettes, large, and one that is damaged."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        place = folder / f"class_{label:02}"
        place.mkdir(parents=True)
        for number in range(round(16 * (3 / 16) ** (label / (CLASSES - 1)))):
            first, second = (np.array([80 * (code % 4), 80 * (code // 4), 128]) for code in (label, 15 - label))
            pixels = np.tile(first.astype(np.uint8), (48, 60, 1))
            pixels[random.integers(16, 32) :] = second
            image = Image.fromarray(pixels)
            if number == 0:
                image.putalpha(Image.fromarray(np.tile(np.arange(60, dtype=np.uint8) * 4, (48, 1))))
            elif number == 1:
                image = image.convert("P")
            image.save(place / f"{number}.png")
    Image.fromarray(np.tile(np.arange(3000, dtype=np.uint8)[None], (2000, 1))).save(folder / "class_00" / "large.png")
    (folder / "class_00" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Output folder of a short run on the photos."""
    output = tmp_path_factory.mktemp("out") / "run"
    with (output.parent / "printed.txt").open("w") as file, contextlib.redirect_stdout(file):
        main(["train", str(photos), "--output_dir", str(output), *SHORT])
    return output


def test_a_folder_becomes_models_predictions_and_a_report(trained, photos):
    record = json.loads((trained / "student" / "results.json").read_text())
    assert record["finished"]
    assert json.loads((trained / "teacher" / "results.json").read_text())["finished"]
    printed = re.split(r"\bepoch 5 ", (trained.parent / "printed.txt").read_text())[-1]
    assert printed.count("│ mean ") == 1, "the last table was expected once"
    assert "<html" in (trained / "report" / "index.html").read_text()
    with open(trained / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == record["data"]["test_images"]
    assert all(f"/{row['label']}/" in row["image"] for row in rows)
    right = np.mean([row["label"] == row["predicted"] for row in rows])
    assert right == pytest.approx(record["last"]["accuracies"]["mean"]["overall"])

    with open(trained / "confusion.csv", newline="") as file:
        header, *confusion = csv.reader(file)
    counts = np.array([row[1:] for row in confusion], dtype=int)
    assert counts.trace() / counts.sum() == pytest.approx(right)
    with open(trained / "classes.csv", newline="") as file:
        classes = list(csv.DictReader(file))
    assert [row["class"] for row in classes] == header[1:] == record["data"]["classes"]
    assert [int(row["training_images"]) for row in classes] == record["data"]["class_counts"]
    assert [int(row["test_images"]) for row in classes] == counts.sum(axis=1).tolist()
    tail = [float(row["teacher_accuracy"]) for row in classes if row["group"] == "tail"]
    assert np.mean(tail) == pytest.approx(record["teacher"]["accuracies"]["tail"], abs=1e-3)


def test_a_teacher_at_chance_is_not_used(photos, tmp_path, capsys, monkeypatch):
    """The time for the teacher's training is not lost: the student learns from the labels."""
    monkeypatch.setattr(folder_training, "report", lambda *_, **__: None)
    brief = ["--image_size", "16", "--teacher_epochs", "1", "--num_train_epochs", "1", "--hidden_size", "64"]
    arguments = ["train", str(photos), "--output_dir", str(tmp_path / "run")]
    main([*arguments, *brief])
    assert "no better than chance" in (printed := capsys.readouterr().out)
    assert "the student learns from the labels only" in printed
    record = json.loads((tmp_path / "run" / "student" / "results.json").read_text())
    assert record["finished"]
    assert record["settings"]["distillation"] == "none"
    main(arguments)
    assert "nothing is left to train" in capsys.readouterr().out

    teacher = tmp_path / "run" / "teacher"
    main([*arguments, *brief, "--overwrite"])
    assert json.loads((teacher / "results.json").read_text())["model"] == "FlatTeacherForImageClassification"


def test_the_recipe_says_why(trained, photos):
    text = (trained / "recipe.yaml").read_text()
    sections = load_recipe(str(trained / "recipe.yaml"))
    assert sections["data"]["data_dir"] == str(photos.resolve())
    assert sections["data"]["background"] == "white"
    assert "# the data have no test split" in text
    assert sections["data"]["skip_bad_images"] is True
    assert sections["teacher"]["image_size"] == sections["student"]["image_size"] == 16
    assert list((trained / "images").rglob("*.png")), "copies of the large images were expected"


def test_the_same_command_continues_or_finds_a_finished_run(trained, photos, capsys, monkeypatch):
    monkeypatch.setattr(folder_training, "report", lambda *_, tables: print(f"The report is written again, {tables}."))
    main(["train", str(photos), "--output_dir", str(trained), *SHORT])
    printed = capsys.readouterr().out
    assert "Continuing with" in printed
    assert "The report is written again, True." in printed
    assert "nothing is left to train" in printed


def test_a_fitted_recipe_is_not_changed_by_options(trained, photos, capsys):
    before = (trained / "recipe.yaml").read_bytes()
    with pytest.raises(SystemExit):
        main(["train", str(photos), "--output_dir", str(trained), "--learning_rate", "1"])
    assert "leave out learning_rate to continue with it" in capsys.readouterr().err
    assert (trained / "recipe.yaml").read_bytes() == before


def test_the_same_minutes_continue(photos, tmp_path):
    path = tmp_path / "recipe.yaml"
    place = Choice("data", "data_dir", str(photos))
    path.write_text(
        with_given(fit_recipe(folder(100, 64), Machine(False, 2), 64), [place]).text(recipe_title(photos, 30))
    )
    check_continues(path, photos, 30, {"hidden_size": 128})
    check_continues(path, photos, None, {})
    with pytest.raises(ValueError, match="leave out minutes, hidden_size to continue with it"):
        check_continues(path, photos, 20, {"hidden_size": 64})


def test_python_and_dry_run(photos, tmp_path, capsys):
    assert deitlt_hf.train(photos, tmp_path / "run", dry_run=True, image_size=16, hidden_size=64) is None
    printed = capsys.readouterr().out
    assert "Expected time" in printed
    assert "64" in printed.partition("hidden_size")[2].partition("\n")[0]
    assert not (tmp_path / "run").exists()


def test_recipes_are_listed_shown_and_fitted(photos, tmp_path, capsys):
    main(["recipes"])
    assert "digits_lt_fast" in capsys.readouterr().out
    main(["recipes", "show", "digits_lt_fast"])
    printed = capsys.readouterr().out
    assert printed.startswith("# scikit-learn's digits")
    shown = yaml.safe_load(printed)
    assert (shown["student"]["optim"], shown["teacher"]["backbone"]) == ("muon", "resnet20")
    main(["recipes", "init", str(photos), "--image_size", "16", "--hidden_size", "64"])
    path = tmp_path / "my.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(str(path))["student"]["hidden_size"] == 64
    path.write_text("student: {hidden_size: 64}")
    main(["recipes", "show", str(path)])
    assert capsys.readouterr().out == "student: {hidden_size: 64}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "PHOTOS", "--minutes", "0"], "minutes must be above 0, got 0"),
        (["recipes", "init", "PHOTOS", "--minutes", "nan"], "minutes must be above 0, got nan"),
        (["train", "PHOTOS/none"], "is not a folder"),
        (["train", "PHOTOS", "--lr", "0.1"], "learning_rate"),
        (["train", "PHOTOS", "--epochs", "2"], "num_train_epochs"),
        (["train", "PHOTOS", "--learning_rate", "fast"], "learning_rate cannot be 'fast'"),
        (["train", "PHOTOS", "--hidden_size", "65"], "65"),
        (["train", "PHOTOS", "--image_size", "big"], "image_size must be a whole number above 0, got big"),
        (["train", "PHOTOS", "--teacher_epochs", "0"], "num_train_epochs must be a whole number above 0, got 0"),
        (["train", "PHOTOS", "--minutes", "5", "--num_train_epochs", "5"], "minutes sets the epochs of both models"),
        (["train", "PHOTOS", "--data_dir", "x"], "data_dir is not a field here"),
        (["train", "PHOTOS", "--data", "x"], "did you mean 'data_dir'"),
        (["train", "PHOTOS", "--recipe", "my.yaml"], "use deitlt distill --recipe FILE"),
        (["train", "PHOTOS", "--output", "PHOTOS/x"], "is inside the folder of the images"),
        (["train"], "folder"),
        (["recipes", "show"], "show NAME"),
        (["recipes", "show", "digits_lt_fats"], "digits_lt_fast"),
        (["recipes", "show", "digits_lt", "--hidden_size", "3"], "show takes no options"),
    ],
)
def test_refused_in_one_sentence(photos, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main([word.replace("PHOTOS", str(photos)) for word in arguments])
    assert exit.value.code not in (0, None)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "outputs").exists()


def test_numbers_on_the_command_line_stay_texts_for_fields_of_text():
    values = {name: fitting.given_choice(name, "64").value for name in ("hidden_size", "label_column", "background")}
    assert values == {"hidden_size": 64, "label_column": "64", "background": "64"}
    assert fitting.given_choice("streaming", "true").value is True
    assert fitting.given_choice("train_sizes", ["16", "28"]).value == [16, 28]
    assert fitting.given_choice("class_names", ["1", "2"]).value == ["1", "2"]
    assert fitting.given_choice("background", "[#").value == "[#"  # nothing that a parser would choke on


def test_a_recipe_of_other_images_is_not_continued(trained, photos, tmp_path):
    with pytest.raises(ValueError, match=r"is a recipe for the images in .*photos, not in"):
        deitlt_hf.train(tmp_path, trained)


def test_notes_on_tables_name_no_files_and_no_missing_split(tmp_path):
    cells = [{"bytes": encoded(picture()), "path": None}] * 4
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 0, 1, 1]}).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=rows, extra=rows).save_to_disk(tmp_path)
    unused, twice = fitting._look(tmp_path, [])[0].notes
    assert unused == "The split extra is not used (images: 4); the test images are set apart from the training images."
    assert "of another class; 'deitlt data check --deep' names them" in twice


def test_unused_splits_and_images_of_several_classes_are_noted(tmp_path):
    for number, split in enumerate(("train", "val", "test")):
        for label in range(2):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for image in range(2):
                colour = (100 * number, 100 * label, 100 * image)
                Image.new("RGB", (8, 8), colour).save(tmp_path / split / str(label) / f"{image}.png")
    shutil.copy(tmp_path / "train" / "0" / "1.png", tmp_path / "train" / "1" / "copy.png")
    folder, _ = fitting._look(tmp_path, [])
    unused, twice = folder.notes
    assert unused == "The split val is not used (images: 4); the test images are those of test."
    assert twice.startswith("2 training images have the same bytes as one of another class, such as ")
    assert "0/1.png and " in twice
    assert twice in fit_recipe(folder, Machine(False, 2), 8).notes


def test_the_output_does_not_go_among_the_images(photos, monkeypatch):
    for output in (photos, photos / "out"):
        with pytest.raises(ValueError, match="inside the folder of the images"):
            deitlt_hf.train(photos, output)
    monkeypatch.chdir(photos)
    with pytest.raises(ValueError, match="inside the folder of the images"):
        deitlt_hf.train(".")  # outputs/NAME would be a class of the next run
    assert not (photos / "outputs").exists()


def test_overwriting_trains_the_teacher_again(trained, photos, tmp_path, monkeypatch):
    """The teacher of the replaced recipe would otherwise be used, or refused, for the new one."""
    calls = []
    monkeypatch.setattr(runs, "train_teacher", lambda data, model, args: calls.append(args))
    monkeypatch.setattr(runs, "distill", lambda *_: sys.exit("not trained here"))
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(SystemExit):
        deitlt_hf.train(photos, tmp_path / "run", overwrite=True, image_size=16, hidden_size=64)
    assert [(args.overwrite, args.output_dir) for args in calls] == [(True, str(tmp_path / "run" / "teacher"))]
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml"))["student"]["hidden_size"] == 64


def test_time_is_counted_for_all_images_of_a_batch(photos, monkeypatch):
    """The trial has steps of one micro-batch, and a batch can have several."""
    monkeypatch.setattr(fitting, "measure_steps", lambda *_: StepTimes(1, 1, 0, 0, 0, 0))
    epochs = {"teacher_epochs": 5, "num_train_epochs": 5}
    seconds = [
        sum(fitting.fit(photos, None, {"per_device_train_batch_size": size, **epochs}).seconds)
        for size in (24, 12)  # images of a micro-batch, in a batch of 24
    ]
    assert seconds[1] - seconds[0] == 10 * (99 // 12 - 99 // 24)


def test_several_processes_need_a_recipe_first(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="deitlt recipes init"):
        deitlt_hf.train(photos, tmp_path / "run")


# ---- The choice ----


def folder(num_images: int, side: int, **changed) -> FolderFacts:
    facts = {
        "labels": [row % 4 for row in range(num_images)],
        "num_classes": 4,
        "test_counts": [100] * 4,
        "has_test": True,
        "shorter_sides": [side],
        "longer_sides": [2 * side],
    }
    return FolderFacts(**facts | changed)


@pytest.mark.parametrize(
    ("side", "has_gpu", "size"),
    [(28, False, 28), (32, True, 32), (30, False, 28), (50, False, 64), (48, False, 64), (42, False, 48),
     (500, False, 64), (500, True, 224), (100, True, 128)],
)  # fmt: skip
def test_the_image_size_follows_images_and_machine(side, has_gpu, size):
    assert sizes_for(folder(1000, side), Machine(has_gpu, 2))[0] == size
    assert sizes_for(folder(1000, side), Machine(has_gpu, 2), 96) == [96]


@pytest.mark.parametrize("num_images", [8, 100, 3_720, 100_000, 2_000_000])
@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("share", [0.001, 0.5, 1, 3])
def test_every_recipe_can_be_trained(num_images, has_gpu, share, tmp_path):
    """The values of a fitted recipe pass the checks that a training does at its start."""
    images = folder(num_images, 300)
    for size in sizes_for(images, Machine(has_gpu, 4)):
        path = tmp_path / "recipe.yaml"
        path.write_text(fit_recipe(images, Machine(has_gpu, 4), size, share).text("a test"))
        recipe = Recipe.load(str(path))
        for make in (recipe.teacher, recipe.student):
            make(output_dir=str(tmp_path / "run"), use_cpu=True).args.check_data(num_images)


@pytest.mark.parametrize(
    ("share", "reason"),
    [(0.001, "the least number"), (0.5, "50 % of the standard"), (3, "3 times the standard number;")],
)
def test_the_reason_for_the_epochs_is_true(share, reason):
    choices = fit_recipe(folder(1000, 64), Machine(False, 2), 64, share).choices
    reasons = [choice.reason for choice in choices if choice.name == "num_train_epochs"]
    assert all(text.startswith(reason) for text in reasons)


def test_more_images_need_fewer_epochs():
    epochs = [standard_epochs(number) for number in (100, 3_720, 1_000_000)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[1] == (30, 59)  # about the lengths of docs/claims.md: 30 and 60


def test_large_images_get_copies_and_transparent_ones_a_background():
    recipe = fit_recipe(folder(1000, 2000, transparent=0.1), Machine(False, 2), 64, cache="images").sections()
    assert recipe["teacher"]["image_cache"] == recipe["student"]["image_cache"] == "images"
    assert recipe["data"]["background"] == "white"
    for side, size in ((64, 64), (40, 16)):  # not much larger than a copy; so small that images stay in memory
        small = fit_recipe(folder(1000, side), Machine(False, 2), size, cache="images").sections()
        assert "image_cache" not in small["student"]
    assert "background" not in small["data"]


def test_given_values_replace_chosen_ones():
    fitted = fit_recipe(folder(1000, 64), Machine(False, 2), 64)
    changed = with_given(fitted, [Choice("both", "image_size", 48), Choice("student", "hidden_size", 64)])
    assert changed.image_size == changed.value("teacher", "image_size") == changed.value("student", "image_size") == 48
    assert changed.value("student", "hidden_size") == 64


def test_the_packaged_recipe_for_small_folders_is_the_fitted_one():
    packaged = {name: values for name, values in load_recipe("image_folder_small").items() if values}
    assert packaged == fit_recipe(folder(2500, 256), Machine(False, 4), 64).sections()


@pytest.mark.parametrize(("loss", "drw"), [("ce", 35), ("ldam", 35), ("paco", None), ("logit_adjusted", None)])
def test_a_fitted_recipe_weights_the_classes_once(tmp_path, loss, drw):
    fitted = fit_recipe(folder(2500, 256), Machine(False, 4), 64)
    with_given(fitted, [Choice("teacher", "teacher_loss", loss)]).write(tmp_path / "mine.yaml", "Mine")
    assert Recipe.load(str(tmp_path / "mine.yaml")).teacher().args.drw_start_epoch == drw
    fitted.write(tmp_path / "mine.yaml", "Mine")
    assert Recipe.load(str(tmp_path / "mine.yaml")).teacher(loss).args.drw_start_epoch == drw


def test_the_learning_rate_is_of_the_optimiser():
    fitted = fit_recipe(folder(1000, 64), Machine(False, 2), 64)
    optim, own = Choice("student", "optim", "adamw_torch"), Choice("student", "learning_rate", 2e-4)
    rates = [with_given(fitted, given).value("student", "learning_rate") for given in ([], [optim], [own, optim])]
    assert rates == [3e-3, 1e-3, 2e-4]
    assert with_given(fitted, [optim, Choice("both", "image_size", 96)]).value("student", "learning_rate") == 5e-4


def test_given_epochs_change_what_depends_on_them():
    fitted = fit_recipe(folder(1000, 64), Machine(False, 2), 64, epochs=(10, 4))
    assert (fitted.value("teacher", "num_train_epochs"), fitted.value("teacher", "drw_start_epoch")) == (10, 8)
    assert (fitted.value("student", "num_train_epochs"), fitted.value("student", "warmup_epochs")) == (4, 0)


def test_less_time_gives_fewer_epochs_and_then_smaller_images(photos, monkeypatch):
    def measured(teacher, student, data, compares_bfloat16):
        step = (student.model.image_size / 32) ** 2
        return StepTimes(step, step, 0, 0, 0, 0)

    monkeypatch.setattr(fitting, "measure_steps", measured)
    fitted = [fitting.fit(photos, minutes) for minutes in (60, 30, 20, 8, 0.05)]
    assert [recipe.image_size for recipe in fitted] == [64, 64, 48, 32, 32]
    epochs = [recipe.student_epochs / standard_epochs(100)[1] for recipe in fitted]
    assert epochs[0] > epochs[1] >= 0.4
    assert any("give more --minutes" in note for note in fitted[-1].notes)


def test_durations_are_words():
    assert [duration(seconds) for seconds in (5, 89.6, 600, 5399, 7200)] == ["5 s", "90 s", "10 min", "90 min", "2.0 h"]


@pytest.mark.parametrize(
    ("student", "teacher", "advice"),
    [(1.0, 0.2, "The student is better overall"), (0.2, 1.0, "The teacher, a CNN, is better"), (0.5, 0.5, "do not")],
)
def test_the_advice_follows_the_interval(student, teacher, advice, tmp_path):
    labels = np.repeat([0, 1], 50)

    def predicted(share):
        return np.where(np.tile(np.arange(50), 2) < 50 * share, labels, 1 - labels)

    text = comparison(predicted(student), predicted(teacher), labels, {"head": [0], "tail": [1]}, tmp_path)
    assert advice in text
    assert f"overall {100 * (student - teacher):+.1f} [" in text


@pytest.mark.parametrize(
    ("bfloat16", "given", "chosen", "seconds"),
    [(1.0, {}, True, 1.0), (1.9, {}, None, 2.0), (1.0, {"bf16": "false"}, False, 2.0)],
)
def test_a_gpu_trains_in_bfloat16_if_a_step_is_faster(photos, monkeypatch, bfloat16, given, chosen, seconds):
    def measured(teacher, student, data, compares_bfloat16):
        return StepTimes(0, 2.0, 0, 0, 0, 0, bfloat16 if compares_bfloat16 else None)

    monkeypatch.setattr(fitting, "measure_steps", measured)
    monkeypatch.setattr(fitting, "this_machine", lambda use_cpu: Machine(False, 2, has_bfloat16=True))
    fitted = fitting.fit(photos, None, {"per_device_train_batch_size": 4, **given})
    assert fitted.value("student", "bf16") is chosen
    assert fitted.seconds[1] == pytest.approx(fitted.student_epochs * (99 // 4) * seconds + START_SECONDS)
