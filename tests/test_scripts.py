"""Tests of the scripts as a user runs them: complete runs, some in new processes, and messages for invalid input."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BeitConfig, BeitModel

from deitlt_hf import DeiTLTForImageClassification, FlatTeacherConfig, FlatTeacherForImageClassification
from deitlt_hf.cli import main
from deitlt_hf.cli.convert import main as convert
from deitlt_hf.losses import TEACHER_LOSSES
from deitlt_hf.original.layouts import student_to_original
from deitlt_hf.recipes import (
    DataArguments,
    StudentArguments,
    TeacherArguments,
    load_recipe,
    parse_arguments,
    recipe_description,
    recipe_names,
    teacher_folder,
)
from deitlt_hf.training import DeiTLTTrainingArguments, FlatTeacherTrainingArguments
from deitlt_hf.training.teacher import _check_heads
from helpers import ROOT, TINY, filled_state_dict, make_student, results


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script in this process and returns what it printed; a new process would take seconds to start."""

    def run_here(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        return capsys.readouterr().out

    return run_here


# A student of one epoch; the recipe's re-weighting would begin after it.
SHORT = ("--num_train_epochs", "1", "--drw_start_epoch", "inf")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of `deitlt distill` without a teacher, and its output."""
    folder = tmp_path_factory.mktemp("run")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(["distill", "--recipe", TINY, "--output_dir", str(folder / "student")])
    return folder, output.getvalue()


def test_distill_trains_the_teacher_first_and_says_so(trained):
    folder, output = trained
    assert f"training the recipe's first, in {folder}/teacher" in output
    assert output.count("This will run") == 2
    assert f'pipeline("image-classification", model="{folder}/student")' in output
    assert len(re.findall(r"^epoch \d+\.\d+  step", output, flags=re.MULTILINE)) >= 20
    files = {path.name for path in (folder / "student").iterdir()}
    assert files >= {
        "config.json",
        "configuration_deitlt.py",
        "modeling_deitlt.py",
        "model.safetensors",
        "preprocessor_config.json",
        "results.json",
    }
    for name in ("teacher", "student"):
        assert results(folder / name)["finished"]


def test_distill_uses_an_existing_teacher_of_the_recipe(trained, tmp_path, script):
    folder, _ = trained
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    before = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns
    command = ("--recipe", TINY, "--output_dir", tmp_path / "student", "--num_train_epochs", "2.5")
    assert "using the recipe's, trained before" in script("distill.py", *command)
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == before
    assert results(tmp_path / "student")["last"]["epoch"] == pytest.approx(2.5, abs=1 / 7)


def test_distill_resumes_an_interrupted_teacher(tmp_path, script):
    """The training of an interrupted teacher resumes.

    Starting again would lose checkpoints that may have taken days.
    """
    recipe = yaml.safe_load(Path(TINY).read_text())
    recipe["teacher"] |= {"save_strategy": "epoch", "num_train_epochs": 10, "logging_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folders = ("--recipe", tmp_path / "recipe.yaml", "--output_dir")
    script("train_teacher.py", *folders, tmp_path / "teacher")
    # The folder looks as if the run had been killed in its last epoch.
    (tmp_path / "teacher" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "teacher" / "checkpoint-70")
    record = results(tmp_path / "teacher") | {"finished": False}
    (tmp_path / "teacher" / "results.json").write_text(json.dumps(record))
    output = script("distill.py", *folders, tmp_path / "student", *SHORT)
    assert "resuming the recipe's, which was interrupted" in output
    steps = [int(step) for step in re.findall(r"step (\d+)/70 ", output)]
    assert steps == [64, 65, 66, 67, 68, 69, 70]
    assert results(tmp_path / "teacher")["finished"]
    assert (tmp_path / "teacher" / "checkpoint-70").is_dir()
    assert results(tmp_path / "student")["finished"]


@pytest.mark.parametrize(("name", "first"), [("student", "mean"), ("teacher", "teacher")])
def test_evaluate_repeats_the_results_of_the_run(trained, tmp_path, script, name, first):
    folder, _ = trained
    output = script("evaluate.py", "--recipe", TINY, "--model", folder / name, "--json", tmp_path / "table.json")
    assert "test images" in output
    table = json.loads((tmp_path / "table.json").read_text())
    assert table[first] == pytest.approx(results(folder / name)["last"]["accuracies"][first], abs=2e-3)


def test_pipeline_without_the_package_agrees_with_evaluation(trained, tmp_path):
    """Transformers alone, as in hosted inference, reaches the run's accuracy from image files."""
    from deitlt_hf.data import load_long_tailed

    folder, _ = trained
    test = load_long_tailed("digits")["test"]
    for index, row in enumerate(test):
        row["image"].save(tmp_path / f"{index:03d}.png")
    (tmp_path / "labels.json").write_text(json.dumps([str(label) for label in test["label"]]))
    code = f"""
import json, sys
from pathlib import Path
sys.modules["deitlt_hf"] = None
from transformers import pipeline
classifier = pipeline("image-classification", model=r"{folder}/student")
files = sorted(map(str, Path(r"{tmp_path}").glob("*.png")))
predicted = [scores[0]["label"] for scores in classifier(files, top_k=1, batch_size=50)]
labels = json.loads(Path(r"{tmp_path}/labels.json").read_text())
print(sum(map(str.__eq__, predicted, labels)) / len(labels))
"""
    accuracy = float(run("-c", code).split()[-1])
    assert accuracy == pytest.approx(results(folder / "student")["last"]["accuracies"]["mean"]["overall"], abs=2e-3)


def test_two_processes_end_with_one_result(trained, tmp_path):
    """Two processes of Accelerate's launcher end with one result; both also train the teacher."""
    folder, _ = trained
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    script = tmp_path / "distill.py"
    threads = "[task.read_text().strip() for task in Path('/proc/self/task').glob('*/comm')]"
    script.write_text(f"""import runpy
from pathlib import Path
runpy.run_path("scripts/distill.py", run_name="__main__")
print("threads:", {threads})
""")
    output = run(
        *launcher,
        script,
        "--recipe",
        TINY,
        "--output_dir",
        tmp_path / "student",
        ACCELERATE_USE_CPU="1",
        OMP_NUM_THREADS="1",
    )
    assert output.count("This will run") == 2
    assert output.count("The student is in") == 1
    assert "32 = 2 process(es) x 16 x 1 accumulation step(s)" in output
    alone, together = results(folder / "student"), results(tmp_path / "student")
    assert together["data"] == alone["data"]
    assert together["last"]["step"] == alone["last"]["step"]
    assert together["last"]["accuracies"].keys() == alone["last"]["accuracies"].keys()
    evaluated = re.findall(r"test images\s+│\s+(\d+)", output)
    assert evaluated
    assert set(evaluated) == {"600"}, "every test image once, whatever the number of processes"
    assert output.count("threads:") == 2
    assert "gloo" not in output, "a thread of the group aborts its process if Python ends first, now and then"


def test_a_folder_of_images_from_a_checkpoint_of_other_classes(trained, tmp_path, script):
    """A student trains on an image folder from a checkpoint of other classes, as in the README.

    Every image is used, whatever its size.
    """
    random = np.random.RandomState(0)
    for split, per_class in (("train", {"cat": 30, "dog": 12, "eel": 6}), ("test", {"cat": 5, "dog": 5, "eel": 5})):
        for name, images in per_class.items():
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(images):
                pixels = random.randint(0, 256, (random.randint(8, 30), random.randint(8, 30), 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index}.jpg")
    command = "--recipe image_folder --distillation none --repeated_augmentation 1 --seed 1"
    short = "--num_train_epochs 2 --warmup_epochs 0 --drw_start_epoch 1 --global_batch_size 16 --eval_steps 0.5"
    folders = (
        "--data_dir",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "student",
        "--init_from",
        trained[0] / "student",
    )
    output = script("distill.py", *command.split(), *short.split(), *folders, "--dataloader_num_workers", "1")
    assert "3 (48): head 1 (30), mid 1 (12), tail 1 (6)" in output
    assert "thirds of the classes sorted by count" in output
    assert results(tmp_path / "student")["data"]["class_counts"] == [30, 12, 6]
    assert results(tmp_path / "student")["data"]["groups"]["tail"] == ["eel"]
    model = DeiTLTForImageClassification.from_pretrained(tmp_path / "student")
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert model.config.hidden_size == 32


def test_the_authors_files_are_converted_evaluated_and_used_for_training(tmp_path, reference, script, capsys):
    """The authors' files are converted, evaluated and used for training.

    A student and a teacher in the authors' layout take part in a new run.
    """
    student = make_student(hidden_size=32, num_hidden_layers=2)
    torch.save({"model": student_to_original(student.state_dict())}, tmp_path / "student.pth")
    torch.save({"state_dict": filled_state_dict(reference["teacher_ldam_cifar"]["keys"])}, tmp_path / "teacher.pth.tar")
    for file, kind in (("student.pth", "DeiTLT"), ("teacher.pth.tar", "FlatTeacher")):
        folder = tmp_path / kind
        convert([str(tmp_path / file), str(folder), "--recipe", TINY])
        output = capsys.readouterr().out
        assert re.search(rf"{folder}: {kind}ForImageClassification, .* 10 classes \(0, 1, ...\)", output)
        assert "test images" in script("evaluate.py", "--recipe", TINY, "--model", folder)
    model = DeiTLTForImageClassification.from_pretrained(tmp_path / "DeiTLT")
    assert model.config.class_counts[:3] == [60, 46, 35]
    script(
        "distill.py",
        *("--recipe", TINY, "--init_from", tmp_path / "student.pth", "--distillation", "none"),
        *("--output_dir", tmp_path / "run", *SHORT),
    )
    trained = DeiTLTForImageClassification.from_pretrained(tmp_path / "run")
    assert trained.config.hidden_size == 32
    # The weights are a few small steps away from the file's; those of a new start would not be.
    drift = (trained.deit.embeddings.position_embeddings - student.deit.embeddings.position_embeddings).abs().max()
    assert 0 < drift < 0.05


# ---- Invalid input: one message, nothing written ----


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a script in this process and returns its error message."""

    def refuse(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        assert stop.value.code == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ")
        assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".safetensors")]
        return lines[-1]

    return refuse


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--recipe", "digits"], r"no recipe 'digits' \(did you mean 'digits_lt'\?\)"),
        (
            ["--recipe", TINY, "--lerning_rate", "1"],
            r"unknown field 'lerning_rate' .* 'learning_rate'\?\)",
        ),
        (["--recipe", TINY, "--teacher", "./nowhere"], r"there is no model folder './nowhere'"),
        (["--recipe", TINY, "--init_from", "/nowhere"], r"there is no model folder '/nowhere'"),
        (["--recipe", TINY, "--init_from", __file__], r"test_scripts.py cannot be loaded: it is not a torch file"),
        (["--recipe", TINY, "--teacher", __file__], r"is a file; convert it .* with 'deitlt convert'"),
        (["--recipe", TINY, "--imbalance_ratio", "0.5"], r"imbalance_ratio .* must be at least 1, got 0.5"),
        (["--recipe", TINY, "--imbalance_ratio", "100"], r"class 9 would get no image"),
        (["--recipe", TINY, "--data_dir", "missing"], r"data_dir 'missing' is not a folder"),
        (["--recipe", "inat18"], r"give data_dir, the folder with its images"),
        (["--recipe", TINY, "--patch_size", "3"], r"patch_size 3 does not divide image_size 8"),
        (["--recipe", TINY, "--global_batch_size", "33"], r"global_batch_size 33 is not a multiple of 1 process"),
        (
            [
                "--recipe",
                TINY,
                "--global_batch_size",
                "15",
                "--per_device_train_batch_size",
                "15",
            ],
            r"must be even, got 15",
        ),
        (
            [
                "--recipe",
                TINY,
                "--global_batch_size",
                "300",
                "--per_device_train_batch_size",
                "300",
            ],
            r"fewer than one batch of 300",
        ),
        (["--recipe", TINY, "--repeated_augmentation", "3"], r"rounds of 256 images"),
        (["--recipe", TINY, "--teacher", ".", "--teacher_loss", "ce"], r"leave out teacher_loss or --teacher"),
        (["--recipe", TINY, "--num_train_epochs", "2"], r"drw_start_epoch 2 is not before"),
        (["--recipe", TINY, "--output_dir", __file__], r"test_scripts.py is a file; choose another folder"),
        (
            ["--recipe", TINY, "--output_dir", f"{__file__}/run"],
            r"test_scripts.py is a file; .* than .*test_scripts.py/run",
        ),
        (["--recipe", TINY, "--report_to", "wandb"], r"cannot report to wandb: WandbCallback requires wandb"),
        (["--recipe", TINY, "--resume_from_checkpoint", "nowhere"], r"resume from .* nowhere: there is no such folder"),
        (["--recipe", TINY, "--image_resize", "4"], r"resized to 4 and cropped to image_size 8; resize to 8 or more"),
        (["--recipe", TINY, "--group_boundaries", "7", "3"], r"two increasing positions among 10 classes"),
    ],
)
def test_distill_refuses_invalid_input(refused, arguments, sentence):
    assert re.search(sentence, refused("distill.py", *arguments))


@pytest.mark.slow
def test_distill_names_an_unreadable_image(monkeypatch, capsys, tmp_path):
    """distill.py names an unreadable image, although a data loader worker wraps the message into a traceback."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (8, 8)).save(tmp_path / "data" / split / name / f"{index}.png")
    (tmp_path / "data" / "train" / "dog" / "3.png").write_bytes(b"no image")
    command = ["distill.py", "--recipe", TINY, "--data_dir", "data", "--distillation", "none", "--imbalance_ratio", "1"]
    command += ["--max_per_class", "8", "--group_boundaries", "1", "1", "--global_batch_size", "4"]
    command += ["--dataloader_num_workers", "1", "--output_dir", "student"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "distill.py"), run_name="__main__")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"error: cannot read .*/train/dog/3\.png: .*--skip_bad_images\.", last)


def test_distill_refuses_another_runs_folder_before_training_a_teacher(refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp("used") / "student"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"finished")
    assert "holds another run (model.safetensors)" in refused("distill.py", "--recipe", TINY, "--output_dir", folder)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert not (folder.parent / "teacher").exists()


def test_distill_trains_its_teacher_in_the_same_precision(tmp_path, script):
    """A run in another precision trains its teacher in that precision, too. A process keeps its initial precision."""
    command = ("--recipe", TINY, "--output_dir", tmp_path / "student", *SHORT)
    run("scripts/distill.py", *command, "--use_cpu", "true", "--bf16", "true")
    for name in ("teacher", "student"):
        assert results(tmp_path / name)["settings"]["bf16"]
    assert "using the recipe's, trained before" in script("distill.py", *command, "--overwrite")
    assert not results(tmp_path / "student")["settings"]["bf16"]


def test_distill_points_to_the_teachers_options(refused, tmp_path):
    recipe = load_recipe(TINY)
    recipe["teacher"] |= {"global_batch_size": 512, "per_device_train_batch_size": 512}
    (tmp_path / "big_teacher.yaml").write_text(yaml.safe_dump({name: part for name, part in recipe.items() if part}))
    sentence = refused("distill.py", "--recipe", "big_teacher.yaml")
    assert "the teacher cannot be trained: an epoch has" in sentence
    assert "deitlt train-teacher --recipe big_teacher.yaml --output_dir" in sentence


@pytest.mark.parametrize("kind", ["beit", "teacher", "sizes", "part"])
def test_distill_refuses_invalid_starting_weights(refused, tmp_path_factory, kind):
    folder, more = tmp_path_factory.mktemp("start"), []
    if kind == "beit":
        small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        BeitModel(BeitConfig(image_size=8, patch_size=4, **small)).save_pretrained(folder)
        expected = "cannot become a student: its attention has relative position biases"
    elif kind == "teacher":
        FlatTeacherForImageClassification(FlatTeacherConfig(image_size=8)).save_pretrained(folder)
        expected = "a model of type 'flat_teacher' is not a plain ViT"
    else:
        make_student().save_pretrained(folder)
        expected, more = "has hidden_size 16, not 24; .* leave --hidden_size out", ["--hidden_size", "24"]
    if kind == "part":
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if "layer.1" not in name}
        assert len(kept) < len(weights)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        expected, more = r"lacks \d+ weights of a ViT .*\(deit\.", []
    assert re.search(expected, refused("distill.py", "--recipe", TINY, "--init_from", folder, *more))


def test_distill_refuses_a_teacher_of_other_classes(refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    names = dict(enumerate("abcdefghij"))
    FlatTeacherForImageClassification(FlatTeacherConfig(image_size=8, id2label=names)).save_pretrained(folder)
    assert "does not know the classes '0'" in refused("distill.py", "--recipe", TINY, "--teacher", folder)


def test_distill_refuses_a_recipes_teacher_of_other_images(trained, tmp_path_factory, refused):
    folder, _ = trained
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(folder / "teacher", copy / "teacher")
    sentence = refused("distill.py", "--recipe", TINY, "--output_dir", copy / "student", "--subset_seed", "1")
    assert "was trained on other images" in sentence
    assert not (copy / "student" / "results.json").exists()


def test_distill_refuses_a_recipes_teacher_of_other_settings(tmp_path_factory, refused, script):
    """A teacher in the recipe's folder with other settings is refused.

    It was made by the README's first step with other flags.
    """
    tmp_path = tmp_path_factory.mktemp("other")
    folder = ("--output_dir", tmp_path / "teacher")
    script("train_teacher.py", "--recipe", TINY, *folder, "--sam_rho", "0", "--num_train_epochs", "3")
    weights = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    command = ("distill.py", "--recipe", TINY, "--output_dir", tmp_path / "student")
    assert re.search(r"was trained with num_train_epochs 3\.0, but the recipe has 12", refused(*command))
    record = results(tmp_path / "teacher")
    record["settings"]["num_train_epochs"] = 12
    (tmp_path / "teacher" / "results.json").write_text(json.dumps(record))
    assert re.search(r"was trained with sam_rho \[0\.0\], but the recipe has \[0\.05\]", refused(*command))
    record["settings"]["sam_rho"] = [0.05]
    record["architecture"]["backbone"] = "resnet44"
    (tmp_path / "teacher" / "results.json").write_text(json.dumps(record))
    assert "was trained with backbone resnet44, but the recipe has resnet20" in refused(*command)
    record["architecture"] |= {"backbone": "resnet20", "classifier": "cosine"}
    (tmp_path / "teacher" / "results.json").write_text(json.dumps(record))
    assert "was trained with classifier cosine, but the recipe has linear" in refused(*command)
    (tmp_path / "teacher" / "results.json").unlink()
    assert "holds a model (model.safetensors) without a record of its training" in refused(*command, "--overwrite")
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == weights


def test_overwriting_a_student_keeps_its_teacher(trained, tmp_path, script):
    """Overwriting a student keeps its teacher, which on real data took longer to train."""
    folder, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    before = (tmp_path / "run" / "teacher" / "model.safetensors").stat().st_mtime_ns
    command = ("--recipe", TINY, "--output_dir", tmp_path / "run" / "student", *SHORT)
    assert "using the recipe's, trained before" in script("distill.py", *command, "--overwrite")
    assert (tmp_path / "run" / "teacher" / "model.safetensors").stat().st_mtime_ns == before


def test_distill_trains_a_teacher_of_another_loss_next_to_the_recipes(trained, tmp_path, script):
    folder, _ = trained
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    command = ("--recipe", TINY, "--output_dir", tmp_path / "student", "--teacher_loss", "paco")
    output = script("distill.py", *command, *SHORT)
    assert f"training the recipe's first, in {tmp_path}/teacher_paco" in output
    config = json.loads((tmp_path / "teacher_paco" / "config.json").read_text())
    assert config["projection_size"] == 32
    assert results(tmp_path / "student")["finished"]


def test_evaluate_and_teacher_refuse_invalid_input(refused, tmp_path):
    assert "there is no model folder 'nowhere'" in refused("evaluate.py", "--recipe", TINY, "--model", "nowhere")
    assert "unknown backbone 'resnet18'" in refused("train_teacher.py", "--recipe", TINY, "--backbone", "resnet18")
    (tmp_path / "broken.yaml").write_text("student: {lerning_rate: 1}")
    sentence = refused("train_teacher.py", "--recipe", tmp_path / "broken.yaml")
    assert "error: " in sentence
    (tmp_path / "broken.yaml").write_text("teacher: {backbon: resnet20}")
    sentence = refused("train_teacher.py", "--recipe", tmp_path / "broken.yaml")
    assert re.search(r"unknown field 'backbon' in recipe .* 'backbone'\?\)", sentence)
    (tmp_path / "broken.yaml").write_text("[1, 2")
    assert "cannot be read: " in refused("train_teacher.py", "--recipe", tmp_path / "broken.yaml")


def test_help_lists_every_field(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "distill.py"), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in ("--recipe", "--imbalance_ratio", "--patch_size", "--drw_start_epoch", "--seed", "--overwrite"):
        assert name in text


# ---- Recipes ----


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_set_their_arguments(name, tmp_path):
    folder = ["--recipe", name, "--output_dir", str(tmp_path)]
    recipe, data, model, args = parse_arguments(
        "student", (DataArguments, StudentArguments, DeiTLTTrainingArguments), folder
    )
    assert recipe == name
    assert (args.drw_start_epoch or 0) < args.num_train_epochs
    assert model.image_size % model.patch_size == 0
    assert load_recipe(name)["data"]["dataset"] == data.dataset


FAST = [name for name in recipe_names() if name.endswith("_fast")]


def test_every_benchmark_has_a_fast_recipe():
    """Every benchmark has a fast recipe with its data and teacher, and with the method that docs/beyond.md tests."""
    benchmarks = {name for name in recipe_names() if not name.endswith("_fast") and "folder" not in name}
    assert {name.removesuffix("_fast") for name in FAST} == benchmarks
    method = ("optim", "distillation", "cls_loss", "drw_start_epoch")
    for name in FAST:
        recipe, base = load_recipe(name), load_recipe(name.removesuffix("_fast"))
        assert [recipe["student"][field] for field in method] == ["muon", "soft_sum", "logit_adjusted", None]
        assert (recipe["data"], recipe["teacher"]) == (base["data"], base["teacher"])
        assert recipe["student"]["num_train_epochs"] <= base["student"]["num_train_epochs"]


def teacher_arguments(name, folder, *arguments):
    classes = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)
    return parse_arguments("teacher", classes, ["--recipe", name, "--output_dir", str(folder), *arguments])[2:]


@pytest.mark.parametrize("loss", [None, *TEACHER_LOSSES])
@pytest.mark.parametrize("name", recipe_names())
def test_recipes_have_teachers_of_every_loss(name, loss, tmp_path):
    """Recipes have teachers of every loss, with the right classifier and projection, and class weights used once."""
    model, args = teacher_arguments(name, tmp_path, *([] if loss is None else ["--teacher_loss", loss]))
    own = load_recipe(name)["teacher"].get("teacher_loss", "ce")
    assert args.teacher_loss == (loss or own)
    config = model.config(args.teacher_loss, num_labels=10)
    _check_heads(args.teacher_loss, config)
    assert (args.drw_start_epoch is None) == (args.teacher_loss in ("paco", "logit_adjusted"))
    assert max(args.sam_rho) > 0
    epochs = args.num_train_epochs
    assert all(epoch < epochs for epoch in (*args.sam_rho_epochs, *args.lr_drop_epochs, args.drw_start_epoch or 0))
    assert set(load_recipe(name)["teacher_losses"]) <= set(TEACHER_LOSSES)


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ({"lda": {}}, r"unknown loss 'lda' in teacher_losses .* 'ldam'\?\)"),
        ({"ldam": {"ldam_margn": 3}}, r"unknown field 'ldam_margn' in teacher_losses .* 'ldam_margin'\?\)"),
    ],
)
def test_values_of_all_losses_in_a_recipe_are_checked(losses, sentence, tmp_path):
    """The values that a recipe gives for each loss are checked, also for losses that the run does not use."""
    recipe = yaml.safe_load(Path(TINY).read_text()) | {"teacher_losses": losses}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=sentence):
        teacher_arguments(str(tmp_path / "recipe.yaml"), tmp_path)


def test_empty_parts_of_a_recipe_are_ignored(tmp_path):
    (tmp_path / "recipe.yaml").write_text(Path(TINY).read_text() + "\nteacher_losses:\n  paco:\n")
    assert (
        teacher_arguments(str(tmp_path / "recipe.yaml"), tmp_path, "--teacher_loss", "paco")[1].teacher_loss == "paco"
    )
    (tmp_path / "recipe.yaml").write_text(Path(TINY).read_text() + "\nteacher_losses:\n")
    assert teacher_arguments(str(tmp_path / "recipe.yaml"), tmp_path)[1].teacher_loss == "ce"


def test_the_command_line_overrides_values_of_a_loss(tmp_path):
    _, args = teacher_arguments(
        "cifar10_lt_rho100", tmp_path, "--teacher_loss", "ldam", "--num_train_epochs", "190", "--sam_rho", "0.3"
    )
    assert (args.num_train_epochs, args.learning_rate, args.lr_drop_epochs) == (190, 0.1, [160, 180])
    assert args.sam_rho == [0.3]
    model, args = teacher_arguments("inat18", tmp_path, "--projection_size", "16", "--sam_rho", "0.3")
    assert model.config("paco", num_labels=10).projection_size == 16
    args = teacher_arguments("inat18", tmp_path, "--teacher_loss", "ldam", "--sam_rho", "0")[1]
    assert (args.sam_rho, args.sam_rho_epochs) == ([0], [0]), "one radius holds for the whole run"


def test_teachers_of_other_losses_have_folders_of_their_own():
    """Each other loss has its own teacher folder; `distill.py` looks for the one that `train_teacher.py` writes."""
    for loss, folder in ((None, "teacher"), ("paco", "teacher"), ("ldam", "teacher_ldam")):
        assert teacher_folder("cifar10_lt_rho100", loss) == folder
        command = ["--recipe", "cifar10_lt_rho100", *([] if loss is None else ["--teacher_loss", loss])]
        classes = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)
        args = parse_arguments("teacher", classes, command)[-1]
        assert Path(args.output_dir) == Path("outputs", "cifar10_lt_rho100", folder)


# From run.sh and the training scripts of Saddle-LongTail, and from sh/ and the training scripts of PaCo: epochs, peak
# learning rate, batch, weight decay, rho and its starting epochs, warm-up, learning-rate drops and DRW.
PHASES = [0, 5, 60]
TEACHERS = {
    ("cifar10_lt_rho100", "ldam"): (200, 0.1, 128, 2e-4, [0.8], [0], 5, [160, 180], 160),
    ("cifar10_lt_rho100", "ce"): (200, 0.1, 128, 2e-4, [0.5], [0], 5, [160, 180], 160),
    ("cifar100_lt_rho50", "ldam"): (200, 0.1, 128, 2e-4, [0.8], [0], 5, [160, 180], 160),
    ("cifar100_lt_rho50", "ce"): (200, 0.1, 128, 2e-4, [0.8], [0], 5, [160, 180], 160),
    ("cifar100_lt_rho50", "paco"): (400, 0.05, 128, 5e-4, [0.05], [0], 10, [321, 361], None),
    ("imagenet_lt", "ldam"): (90, 0.2, 256, 2e-4, [0.05, 0.1, 0.5], PHASES, 0, [], 60),
    ("imagenet_lt", "ce"): (90, 0.2, 256, 2e-4, [0.05, 0.1, 0.5], PHASES, 0, [], 60),
    ("imagenet_lt", "paco"): (400, 0.02, 128, 5e-4, [0.05], [0], 10, [], None),
    ("inat18", "ldam"): (90, 0.1, 256, 1e-4, [0.05, 0.1, 0.5], PHASES, 0, [], 60),
    ("inat18", "ce"): (90, 0.1, 256, 2e-4, [0.05, 0.1, 0.2], [0, 5, 75], 0, [], 60),
    ("inat18", "paco"): (400, 0.02, 128, 1e-4, [0.05], [0], 10, [], None),
}


@pytest.mark.parametrize(("name", "loss"), TEACHERS)
def test_recipes_have_the_teachers_values(name, loss, tmp_path):
    model, args = teacher_arguments(name, tmp_path, "--teacher_loss", loss)
    assert TEACHERS[name, loss] == (
        *(args.num_train_epochs, args.learning_rate, args.global_batch_size, args.weight_decay),
        *(args.sam_rho, args.sam_rho_epochs, args.warmup_epochs, args.lr_drop_epochs, args.drw_start_epoch),
    )
    if loss == "ldam":
        assert (args.ldam_margin, args.color_jitter) == ((0.5, 0) if model.image_size == 32 else (0.3, 0.4))
        assert (args.ldam_scale, args.auto_augment, args.random_erasing) == (30, None, 0)
    if loss == "paco":
        small = model.image_size == 32
        expected = (1024, 0.05, 0.01, 32) if small else (8192, 0.2, 0.05, 128)
        projection = model.config("paco", num_labels=10).projection_size
        assert (args.paco_queue, args.paco_temperature, args.paco_alpha, projection) == expected
        assert args.paco_momentum == 0.999


# From the paper and the authors' code: epochs, DRW epoch, peak learning rate, global batch, groups, mixing after DRW.
PAPER = {
    "cifar10_lt_rho100": (1200, 1100, 2.5e-4, 1024, [3, 7], False),
    "cifar10_lt_rho50": (1200, 1100, 2.5e-4, 1024, [3, 7], False),
    "cifar100_lt_rho100": (1200, 1100, 2.5e-4, 1024, [36, 71], False),
    "cifar100_lt_rho50": (1200, 1100, 2.5e-4, 1024, [36, 71], False),
    "imagenet_lt": (1400, 1200, 5e-4, 2048, [390, 835], True),
    "inat18": (1000, 900, 5e-4, 2048, [842, 4543], True),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers_belong_to_paco_teachers(name, tmp_path):
    """The paper's numbers belong to PaCo teachers: every training script of DeiT-LT has `--paco`."""
    assert teacher_arguments(name, tmp_path)[1].teacher_loss == "paco"
    assert "best epoch on the test set, with a PaCo + SAM teacher" in recipe_description(name)


@pytest.mark.parametrize("name", PAPER)
def test_recipes_have_the_papers_values(name, tmp_path):
    _, data, model, args = parse_arguments(
        "student",
        (DataArguments, StudentArguments, DeiTLTTrainingArguments),
        ["--recipe", name, "--output_dir", str(tmp_path)],
    )
    values = (args.num_train_epochs, args.drw_start_epoch, pytest.approx(args.learning_rate), args.global_batch_size)
    assert PAPER[name] == (*values, data.group_boundaries, args.mixing_in_drw)
    assert (model.image_size, model.patch_size, model.hidden_size, model.num_hidden_layers) == (224, 16, 768, 12)
    assert (args.mixup, args.cutmix, args.label_smoothing_factor, args.repeated_augmentation) == (0.8, 1.0, 0.1, 3)
    assert (args.weight_decay, args.min_learning_rate, args.warmup_epochs, args.alpha) == (0.05, 1e-5, 5, 0.5)
    assert (args.auto_augment, args.random_erasing, args.train_crop) == ("rand-m9-mstd0.5-inc1", 0.25, "random_resized")


def test_tiny_recipe_is_valid():
    assert set(load_recipe(TINY)) == {"data", "teacher", "teacher_losses", "pretraining", "student"}
    assert yaml.safe_load(Path(TINY).read_text())["student"]["num_train_epochs"] == 3
