"""Comparing ways to train: `deitlt compare`, its advice and its page."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import deitlt_hf
from deitlt_hf.cli import main
from deitlt_hf.comparison import comparing
from deitlt_hf.comparison.verdict import Outcome, judge
from deitlt_hf.data import image_processor
from deitlt_hf.quickstart import fitted_recipe, fitting
from deitlt_hf.quickstart.fitted_recipe import Choice
from deitlt_hf.recipes import load_recipe
from deitlt_hf.training import runs
from deitlt_hf.training.taught import TeacherAtChanceError
from deitlt_hf.training.trial import StepTimes
from helpers import make_student

SHORT = ["--image_size", "16", "--teacher_epochs", "6", "--num_train_epochs", "2", "--hidden_size", "32"]
WAYS = ["cnn", "labels", "deit_lt", "ours"]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder of 6 classes with 20 to 5 images of a colour each, and 3 test images of each."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    random = np.random.default_rng(0)
    for label in range(6):
        colour = np.array([90 * (label % 3), 120 * (label // 3), 100])
        for split, number in (("train", 20 - 3 * label), ("test", 3)):
            place = folder / split / f"class_{label}"
            place.mkdir(parents=True)
            for row in range(number):
                pixels = np.clip(colour + random.integers(-9, 9, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{row}.png")
    return folder


@pytest.fixture(scope="module")
def compared(colours, tmp_path_factory):
    """Output folder of a comparison that was interrupted before DeiT-LT, with the record of that moment."""
    output = tmp_path_factory.mktemp("out") / "run"
    distill = runs.distill
    # Runs of a second: neither checkpoints nor workers.
    running = {"eval_strategy": "no", "save_strategy": "no", "dataloader_num_workers": 0, "logging_steps": 100}

    def interrupted(recipe, *arguments):
        if "deit_lt" in recipe:
            raise KeyboardInterrupt
        return distill(recipe, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "distill", interrupted)
        patch.setattr(fitted_recipe, "RUNNING", [Choice("both", *value) for value in running.items()])
        with pytest.raises(SystemExit):
            main(["compare", str(colours), "--output_dir", str(output), *SHORT])
    earlier = json.loads((output / "comparison.json").read_text())
    weights = {name: (output / name / "model.safetensors").stat().st_mtime_ns for name in ("teacher", "cnn", "labels")}
    main(["compare", str(colours), "--output_dir", str(output)])
    return output, earlier, weights


def test_a_comparison_continues_and_trains_nothing_twice(compared):
    output, earlier, weights = compared
    assert {name: (output / name / "model.safetensors").stat().st_mtime_ns for name in weights} == weights
    record = json.loads((output / "comparison.json").read_text())
    for name in weights:
        assert record["arms"][name] == earlier["arms"][name]
    assert "ours" not in earlier["arms"]
    assert not any(entry["is_running"] or entry["is_least"] for entry in record["arms"].values())


def test_a_way_whose_teacher_is_at_chance_is_left_out(compared, colours, tmp_path, monkeypatch, capsys):
    """The other ways are judged: their trainings are not lost."""
    output = tmp_path / "copy"
    shutil.copytree(compared[0], output)
    shutil.rmtree(output / "ours")

    def refused(*_):
        raise TeacherAtChanceError("the teacher is no better than chance.")

    monkeypatch.setattr(runs, "distill", refused)
    main(["compare", str(colours), "--output_dir", str(output)])
    assert "Note: the teacher is no better than chance. ours is left out." in capsys.readouterr().out
    assert list(json.loads((output / "comparison.json").read_text())["ways"]) == ["cnn", "labels", "deit_lt"]


def test_price_and_accuracy_of_each_way_are_recorded(compared):
    output, *_ = compared
    record = json.loads((output / "comparison.json").read_text())
    assert list(record["ways"]) == WAYS
    teacher = record["arms"]["teacher"]["seconds"]
    for name, way in record["ways"].items():
        own = record["arms"][name]["seconds"]
        assert own > 0
        assert way["seconds"] == pytest.approx(own + teacher * (name in ("deit_lt", "ours")), abs=0.11)
        run = json.loads((output / name / "results.json").read_text())
        overall = next(iter(run["last"]["accuracies"].values()))["overall"]
        assert way["accuracies"]["overall"] == pytest.approx(overall, abs=0.06)  # one of 18 images
    assert "leads" not in record["ways"]["cnn"]
    assert record["level"] == pytest.approx(1 - 0.05 / 6)


def test_the_page_shows_advice_table_and_figure(compared):
    output, *_ = compared
    page = (output / "index.html").read_text()
    record = json.loads((output / "comparison.json").read_text())
    for text in (record["advice"], "CNN alone", "DeiT-LT", "labels only", "ours", "data:image/png;base64,"):
        assert text in page
    assert "The tail classes have 6 test images" in page  # a note of the plan
    assert "Muon. 2 epochs." in page
    assert " nan" not in page


def test_each_way_has_its_recipe(compared):
    output, *_ = compared
    recipes = {name: load_recipe(str(output / "recipes" / f"{name}.yaml")) for name in WAYS}
    assert recipes["ours"] == load_recipe(str(output / "recipe.yaml"))
    assert recipes["labels"]["student"]["distillation"] == "none"
    paper = recipes["deit_lt"]["student"]
    assert (paper["distillation"], paper["cls_loss"], paper["optim"]) == ("hard", "ce", "adamw_torch")
    assert paper["hidden_size"] == recipes["ours"]["student"]["hidden_size"] == 32
    assert recipes["cnn"]["teacher"]["num_train_epochs"] > recipes["ours"]["teacher"]["num_train_epochs"] == 6
    teachers = [recipe["teacher"] for name, recipe in recipes.items() if name != "cnn"]
    assert all(teacher == teachers[0] for teacher in teachers), "one teacher must serve all"


def test_a_killed_part_makes_the_price_a_lower_bound(tmp_path):
    file = tmp_path / "comparison.json"
    file.write_text(
        json.dumps({"name": "photos", "arms": {"cnn": {"seconds": 5.0, "is_least": False, "is_running": True}}})
    )
    prices = comparing.ComparisonRecord(file)
    with pytest.raises(ValueError, match="an error"), prices.measured("cnn"):
        raise ValueError("an error")
    outcome = comparing.ComparisonRecord(file).outcome("cnn", comparing.ARMS["cnn"], [0])
    assert outcome.price.startswith("at least 5")


def test_time_is_for_all_ways_together(colours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "measure_steps", lambda *_: StepTimes(1.0, 2.0, 0, 0, 0, 0))
    assert deitlt_hf.compare(colours, tmp_path / "out", 60, dry_run=True, image_size=16) is None
    printed = capsys.readouterr().out
    assert "is expected to take 60 min" in printed
    assert not (tmp_path / "out").exists()


def test_a_start_is_probed_and_gives_the_student_its_sizes(colours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "measure_steps", lambda *_: StepTimes(1.0, 2.0, 0, 0, 0, 0))
    make_student().save_pretrained(tmp_path / "start")
    image_processor(8).save_pretrained(tmp_path / "start")
    start = {"init_from": str(tmp_path / "start")}
    assert deitlt_hf.compare(colours, tmp_path / "out", dry_run=True, image_size=8, **start) is None
    assert "linear probe" in capsys.readouterr().out
    (tmp_path / "start" / "preprocessor_config.json").rename(tmp_path / "processor.json")
    assert deitlt_hf.compare(colours, tmp_path / "out", dry_run=True, image_size=8, **start) is None
    assert "has no image processor, so the linear probe is left out" in capsys.readouterr().out
    config = (tmp_path / "start" / "config.json").read_text()
    (tmp_path / "start" / "config.json").write_text(
        config.replace('"intermediate_size": 32', '"intermediate_size": 48')
    )
    with pytest.raises(ValueError, match="weights of other shapes"):
        deitlt_hf.compare(colours, tmp_path / "out", dry_run=True, image_size=8, **start)
    (tmp_path / "start" / "config.json").write_text(config)
    (tmp_path / "processor.json").rename(tmp_path / "start" / "preprocessor_config.json")
    fitted = fitting.fit(colours, given=start)
    assert [fitted.value("student", name) for name in ("image_size", "hidden_size", "num_hidden_layers")] == [8, 16, 3]
    assert fitted.value("teacher", "image_size") == 16
    monkeypatch.setattr(comparing, "_conclude", lambda output, record, outcomes, *_: outcomes)
    monkeypatch.setattr(comparing, "_train", lambda *_: None)
    monkeypatch.setattr(comparing, "_predictions", lambda folder, data: [0] * len(data["test"]))
    first, *others = deitlt_hf.compare(colours, tmp_path / "out", image_size=8, **start)
    assert (first.title, len(first.predictions), [way.name for way in others]) == (
        "linear probe",
        18,
        ["cnn", "labels", "lora", "deit_lt", "ours"],
    )
    lora = load_recipe(str(tmp_path / "out" / "recipes" / "lora.yaml"))["student"]
    assert (lora["tune"], lora["init_from"], lora["distillation"]) == ("lora", start["init_from"], "none")
    record = comparing.ComparisonRecord(tmp_path / "out" / "comparison.json")
    assert record.content["arms"]["probe"]["seconds"] > 0


def test_validation_images_choose_the_best_evaluation_of_every_way(colours, monkeypatch):
    monkeypatch.setattr(fitting, "measure_steps", lambda *_: StepTimes(1.0, 2.0, 0, 0, 0, 0))
    fitted = fitting.fit(colours, given={"validation_fraction": 0.2})
    for section in ("teacher", "student"):
        assert fitted.value(section, "load_best_model_at_end") is True
        assert fitted.value(section, "save_steps") == fitted.value(section, "eval_steps")
    assert fitted.value("data", "validation_fraction") == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "-1"], "minutes must be above 0, got -1"),
        (["--output_dir", "COLOURS/out"], "inside the folder of the images"),
        (["--init_from", "nothing/at/all"], "nothing/at/all"),
        (["--streaming", "true"], "stream"),
        (["--epochs", "3"], "num_train_epochs"),
    ],
)
def test_refused_in_one_sentence(colours, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["compare", str(colours), *(word.replace("COLOURS", str(colours)) for word in options)])
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "outputs").exists()


def test_a_comparison_is_not_changed_by_options(compared, colours):
    output, *_ = compared
    before = (output / "comparison.json").read_bytes()
    with pytest.raises(ValueError, match="leave out learning_rate to continue"):
        deitlt_hf.compare(colours, output, learning_rate=1)
    assert (output / "comparison.json").read_bytes() == before


def test_another_run_is_not_replaced(compared, colours, tmp_path):
    output, *_ = compared
    (tmp_path / "cnn").mkdir()
    (tmp_path / "cnn" / "results.json").write_bytes((output / "cnn" / "results.json").read_bytes())
    with pytest.raises(FileExistsError, match="holds another run"):
        deitlt_hf.compare(colours, tmp_path)
    assert not (tmp_path / "recipe.yaml").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text("data: {}")
    with pytest.raises(FileExistsError, match=r"recipe\.yaml does not belong to a comparison"):
        deitlt_hf.compare(colours, other, overwrite=True)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"name": "photos", "arms": {"../cnn": 3}}',
        '{"name": "photos", "arms": {"cnn": {"seconds": "12", "is_least": false, "is_running": false}}}',
    ],
)
def test_a_file_of_another_program_is_not_continued(content, colours, tmp_path):
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(ValueError, match=r"comparison\.json (is not the record|cannot be read)"):
        deitlt_hf.compare(colours, tmp_path, overwrite=True)


def test_overwriting_removes_only_the_ways_of_the_comparison(colours, tmp_path, monkeypatch):
    entry = {"seconds": 1.0, "is_least": False, "is_running": False}
    arms = {"cnn": entry, "../photos": entry}
    output = tmp_path / "out"
    for folder in (output / "cnn", output / "notes", tmp_path / "photos", output / "recipes"):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (output / "comparison.json").write_text(json.dumps({"name": "colours", "arms": arms}))
    monkeypatch.setattr(fitting, "measure_steps", lambda *_: StepTimes(1.0, 2.0, 0, 0, 0, 0))
    monkeypatch.setattr(comparing, "_run", lambda output: output)
    assert deitlt_hf.compare(colours, output, overwrite=True, image_size=16) == output
    assert [(output / "notes" / "file").exists(), (tmp_path / "photos" / "file").exists()] == [True, True]
    assert not (output / "cnn").exists()
    assert not (output / "recipes" / "file").exists()
    assert json.loads((output / "comparison.json").read_text())["arms"] == {}


# ---- The advice ----


LABELS = np.repeat(np.arange(4), 100)
GROUPS = {"head": [0], "mid": [1, 2], "tail": [3]}


def outcome(title, *accuracies, seconds=10.0):
    """An outcome with the given accuracy on each of the four classes."""
    right = np.concatenate([np.arange(100) < round(100 * accuracy) for accuracy in accuracies])
    return Outcome(title, title, "", np.where(right, LABELS, (LABELS + 1) % 4).tolist(), seconds)


CNN = outcome("CNN alone", 0.9, 0.8, 0.7, 0.5)


def test_equal_ways_give_the_simplest():
    verdict = judge(
        [CNN, outcome("labels only", 0.9, 0.81, 0.7, 0.5), outcome("ours", 0.91, 0.8, 0.7, 0.5)], LABELS, GROUPS
    )
    assert verdict.advice == ("Take CNN alone: these test images do not show that another way is better overall.")


def test_a_better_way_is_advised_with_interval_and_price():
    verdict = judge([CNN, outcome("ours", 0.95, 0.9, 0.85, 0.8, seconds=25)], LABELS, GROUPS)
    assert verdict.advice.startswith("Take ours: +15.0 [")
    assert "+30.0 [" in verdict.advice
    assert verdict.advice.endswith("at 2.5 times the price.")
    low, high = verdict.leads["ours"].ends["overall"]
    assert 0 < low < 15 < high


def test_a_gain_on_the_tail_alone_is_said_with_its_cost():
    verdict = judge([CNN, outcome("DeiT-LT", 0.5, 0.7, 0.7, 0.75)], LABELS, GROUPS)
    assert verdict.advice.startswith("Take CNN alone: it is better overall than every other way (DeiT-LT comes next")
    assert "On your tail classes DeiT-LT pays: +25.0 [" in verdict.advice
    assert verdict.advice.endswith("but it is worse overall.")


def test_the_simplest_way_can_be_shown_to_be_the_best():
    ways = [CNN, outcome("labels only", 0.4, 0.4, 0.4, 0.2), outcome("ours", 0.7, 0.6, 0.5, 0.2)]
    advice = judge(ways, LABELS, GROUPS).advice
    assert advice.startswith("Take CNN alone: it is better overall than every other way (ours comes next: -22.5 [")


def test_more_ways_need_stronger_evidence():
    """The more ways are compared, the likelier the best one is ahead by chance."""
    close = outcome("ours", 0.95, 0.85, 0.75, 0.5)
    alone = judge([CNN, close], LABELS, GROUPS)
    among = judge([CNN, close, *(outcome(f"other {index}", 0.9, 0.8, 0.7, 0.5) for index in range(6))], LABELS, GROUPS)
    assert among.level > alone.level
    assert among.leads["ours"].ends["overall"][0] < alone.leads["ours"].ends["overall"][0]


def test_a_group_without_test_images_is_not_judged():
    few = LABELS < 3
    outcomes = [
        Outcome(way.name, way.title, "", np.asarray(way.predictions)[few].tolist(), 1.0)
        for way in (CNN, outcome("ours", 0.9, 0.8, 0.7, 1))
    ]
    assert judge(outcomes, LABELS[few], GROUPS).advice.startswith("Take CNN alone")
