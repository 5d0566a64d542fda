"""Tests of `deitlt data check` and `show`, run as a user runs them."""

import io
import json
import os
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from deitlt_hf.analysis.figures import GROUP_COLOURS
from deitlt_hf.cli import main
from deitlt_hf.cli.data import check
from deitlt_hf.cli.data import main as main_of_data
from deitlt_hf.data.check import BENCHMARKS, Benchmark
from deitlt_hf.recipes import DataArguments, parse_arguments
from deitlt_hf.training.schedule import low_peak
from helpers import bomb, cut, save_image, write_cifar, write_lists


@pytest.fixture
def data(monkeypatch, capsys):
    """Runs `deitlt data` in this process, as `run` does in another one, and returns what it printed."""

    def run_here(*command, code=0):
        monkeypatch.setattr(sys, "argv", ["deitlt"])  # the command changes sys.argv
        status = 0
        try:
            main(["data", *map(str, command)])
        except SystemExit as ended:
            status = ended.code
        printed = capsys.readouterr()
        assert status == code, printed
        return printed.out + printed.err

    return run_here


def run(*command, code=0):
    """Runs `deitlt data` in a new process, whose output has the encoding of the terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "deitlt_hf.cli", "data", *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_check_describes_the_data(data):
    output = data("check", "--recipe", "digits_lt", "--deep")
    for text in (
        "scikit-learn's digits",
        "train 1,197, test 600",
        "402 of 10 classes",
        "imbalance ratio 23.8",
        "head 3 (265 images), mid 4 (113 images), tail 3 (24 images): classes sorted by count, cut at [3, 7]",
        "1,002 images",
        "digits_lt: ready to train on",
    ):
        assert text in output
    rows = [re.findall(r"[\w,]+", line) for line in output.splitlines() if line.startswith("│")]
    assert (rows[0], rows[-1]) == (["0", "119", "59", "head"], ["9", "5", "60", "tail"])
    assert re.search(r"sha256 [0-9a-f]{64}", output)


def test_check_reports_each_problem(tmp_path, data):
    """Each problem is reported.

    The data have one of each: a class without a test image, an empty file, a truncated one, a decompression bomb, and
    images in both splits, one by path and one by bytes.
    """
    write_lists(tmp_path, counts=(4, 3, 2))
    lines = (tmp_path / "ImageNet_LT_test.txt").read_text().splitlines()
    lines = [*lines[:2], "train/n03/1.png 0"]
    (tmp_path / "ImageNet_LT_test.txt").write_text("\n".join(lines))
    (tmp_path / "train/n03/0.png").write_bytes(b"")
    (tmp_path / "train/n01/0.png").write_bytes(cut("PNG"))
    (tmp_path / "train/n01/1.png").write_bytes(bomb())
    (tmp_path / "train/n02/0.png").write_bytes((tmp_path / "val/n01/1.png").read_bytes())
    with (tmp_path / "ImageNet_LT_train.txt").open("a") as file:
        file.write("train/n02/1.png 2\n")
    command = ("check", "--recipe", "imagenet_lt", "--data_dir", tmp_path, "--group_boundaries", "1", "2")
    output = " ".join(data(*command, "--deep", code=1).split())
    for text in (
        "imagenet_lt has 1,000 classes, but this data set has 3",
        "imagenet_lt has 115,846 training images, but this data set has 10",
        "imagenet_lt has 50,000 test images, but this data set has 3",
        "1 classes have no test image: n02",
        "1 files are empty: ",
        "1 images are in both the training and the test split: ",
        "1 training images are listed more than once: ",
        "3 of 10 train images: cannot read the image",
        "it has no bytes",
        "truncated",
        "it has more than 89478485 pixels",
        "2 images have the same bytes in training and testing",
        "deitlt train-teacher: an epoch has 10 images, fewer than one batch of 32",
        "rounds of 256 images, but the training set has only 10; pass",
        "deitlt distill: an epoch has 10 images, fewer than one batch of 128",
        "12 problem(s)",
    ):
        assert text in output, text
    assert "decoded" not in data(*command, code=1)


def test_check_without_problems_and_with_missing_images(tmp_path, data):
    write_lists(tmp_path, "lists")
    (tmp_path / "mine.yaml").write_text("data: {dataset: imagefolder}\n")
    command = ("check", "--recipe", tmp_path / "mine.yaml", "--data_dir", tmp_path)
    output = data(*command, "--counts", tmp_path / "counts.json")
    assert "list files (lists_train.txt, lists_test.txt)" in output
    assert "thirds of the classes sorted by count" in output
    assert json.loads((tmp_path / "counts.json").read_text()) == {"n03": 5, "n01": 3, "n02": 2}
    (tmp_path / "train/n03/0.png").unlink()
    output = data(*command, code=1)
    assert output.startswith("error: 1 of 13 images are not in ")
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "inat18"), "error: inat18 has no public copy to load; give data_dir"),
        (("--recipe", "inat"), "error: no recipe 'inat' (did you mean 'inat18'?)"),
        (("--recipe", "digits_lt", "--data_dri", "x"), "error: unknown field 'data_dri' in the command line (did"),
        (("--recipe", "digits_lt", "--max_per_class", "x"), "error: max_per_class cannot be 'x': invalid literal"),
        (("--recipe", "digits_lt", "--group_rule", "halves"), "error: group_rule must be one of auto, shots, thirds"),
        (("--recipe", "digits_lt", "--counts", "nowhere/c.json"), "error: there is no folder for the file --counts"),
        (("--recipe", "digits_lt", "--counts", "."), "error: --counts . is a folder; name a file"),
        (
            ("--recipe", "digits_lt", "--group_rule", "thirds", "--group_boundaries", "3", "7"),
            "error: group_boundaries [3, 7] and group_rule 'thirds' both",
        ),
    ],
)  # fmt: skip
def test_check_refuses_with_one_clear_message(data, arguments, message):
    output = data("check", *arguments, code=1)
    assert output.startswith(message)
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "--recipe digits_lt --group-rule thirds check --counts {counts}",
        "--deep --group_rule=thirds check --recipe digits_lt --counts {counts} --skip_bad_images",
        "check --counts {counts} --group_rule thirds --recipe digits_lt",
    ],
)
def test_options_work_before_and_after_the_command(tmp_path, words, capsys):
    """Options work before and after the command, as in the usage line; their values are not taken for the command."""
    words = words.format(counts=tmp_path / "counts.json").split()
    with pytest.raises(SystemExit) as ended:
        main(["data", *words])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "thirds of the classes" in output
    assert ("decoded" in output) == ("--deep" in words)
    assert (tmp_path / "counts.json").is_file()


def test_show_takes_a_students_fields_in_any_order(tmp_path):
    drawn = tmp_path / "pictures"
    with pytest.raises(ValueError, match="distillation must be one of"):
        main_of_data(["--recipe", "digits_lt", "--distillation", "wrong", "show", "--out", str(drawn)])
    assert not drawn.exists()


SECTIONS = {
    "teacher": "{num_train_epochs: 6, per_device_train_batch_size: 16, bf16: true}",
    "student": "{num_train_epochs: 6, per_device_train_batch_size: 16, repeated_augmentation: 1}",
}


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        ({}, []),
        (
            {"student": "{num_train_epochs: 6, per_device_train_batch_size: 16}"},
            ["distill: repeated augmentation draws"],
        ),
        ({"teacher": "{num_train_epochs: 6, lr_drop_epochs: 7, lr_drops: 0.1}"}, ["train-teacher: lr_drop_epochs"]),
        ({"teacher": "{sam_roh: 0.1}"}, ["train-teacher: unknown field 'sam_roh'"]),
        (
            {"teacher": "{num_train_epochs: 6, class_weights: {class 3: 2}}"},
            ["train-teacher: class_weights names the class 'class 3'"],
        ),
        (
            {"student": "{num_train_epochs: 4, repeated_augmentation: 1}", "teacher": "{num_train_epochs: 4}"},
            ["train-teacher: warmup_epochs 5 is not before", "distill: warmup_epochs 5 is not before"],
        ),
        (
            {"student": "{num_train_epochs: 6, per_device_train_batch_size: 32}"},
            [
                "distill: repeated augmentation draws rounds",
                "distill: an epoch has 24 images, fewer than one batch of 32",
            ],
        ),
    ],
    ids=["none", "rounds", "drops", "field", "weights", "both", "two"],
)
def test_check_reports_what_training_would_refuse(tmp_path, monkeypatch, capsys, changed, problems):
    """The check reports what training would refuse; otherwise it would call data ready that cannot be trained on."""
    for split in ("train", "test"):
        for index in range(24):
            save_image(
                tmp_path / "images" / split / f"class {index % 2}" / f"{index}.png", index + 100 * (split == "test")
            )
    sections = "\n".join(f"{name}: {text}" for name, text in (SECTIONS | changed).items())
    (tmp_path / "mine.yaml").write_text(sections + "\n")
    monkeypatch.chdir(tmp_path)
    code = check("mine.yaml", {"data_dir": "images"}, deep=False, counts_file=None)
    output = " ".join(capsys.readouterr().out.split())
    assert code == bool(problems)
    assert (f"mine.yaml: {len(problems)} problem(s)" if problems else "mine.yaml: ready to train on") in output
    for problem in problems:
        assert f"wrong deitlt {problem}" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "mine.yaml"]


def test_report_is_printed_when_the_counts_cannot_be_written(data):
    output = data("check", "--recipe", "digits_lt", "--counts", "/dev/full", code=1)
    assert "digits_lt: ready to train on" in output
    assert "No space left" in output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "cut at [3, 7]"),
        (["--group_rule", "thirds"], "thirds"),
        (["--group-rule", "shots"], "more than 100 training images, 20 to 100, fewer"),
        (["--group_boundaries", "1", "2"], "cut at [1, 2]"),
    ],
)
def test_groups_of_the_command_line_override_those_of_the_recipe(options, expected):
    _, arguments = parse_arguments("data", (DataArguments,), ["--recipe", "digits_lt", *options])
    assert expected in arguments.groups(arguments.load()).rule


def test_numbers_of_a_recipe_can_be_unset():
    words = ["--recipe", "fashion_mnist_lt_tiny", "--imbalance_ratio", "none", "--max_per_class", "None"]
    _, arguments = parse_arguments("data", (DataArguments,), words)
    assert (arguments.imbalance_ratio, arguments.max_per_class) == (None, None)


def test_the_papers_cifar_counts(tmp_path, monkeypatch, capsys):
    """The recipe makes the paper's class counts from balanced data in the layout of CIFAR's pickles."""
    write_cifar(tmp_path, images=80)
    monkeypatch.setitem(BENCHMARKS, "uoft-cs/cifar10", Benchmark(10, 800, 800))
    given = {"data_dir": str(tmp_path), "imbalance_ratio": "5"}
    assert check("cifar10_lt_rho50", given, deep=False, counts_file=None) == 0
    assert "CIFAR's python version" in capsys.readouterr().out


def test_show_draws_class_counts_and_images(tmp_path, data):
    output = data("show", "--recipe", "digits_lt", "--out", tmp_path / "new" / "pictures")
    assert output.splitlines() == [str(tmp_path / "new" / "pictures" / name) for name in ("classes.png", "images.png")]
    for path in output.splitlines():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[1] > 900
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
        if path.endswith("classes.png"):  # the groups have the same colours as in reports
            for colour in GROUP_COLOURS[:3]:
                assert (pixels == np.round(255 * np.array(to_rgb(colour)))).all(axis=2).sum() > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


@pytest.mark.parametrize("options", [{"teacher_view": "weak"}, {"drw_start_epoch": "inf", "distillation": "none"}])
def test_show_uses_the_options(tmp_path, options):
    from deitlt_hf.analysis import pictures

    drawn = {}

    def keep(rows, title, file):
        drawn.update(rows)

    original, pictures._draw_images = pictures._draw_images, keep
    try:
        pictures.draw_data("digits_lt", options, tmp_path)
    finally:
        pictures._draw_images = original
    if "teacher_view" in options:
        assert list(drawn)[0::2] == ["student, before epoch 180", "student, from epoch 180, re-weighted"]
        student, teacher = (drawn[f"{who}, before epoch 180"][0] for who in ("student", "teacher"))
        assert np.abs(student - teacher).mean() > 0.05
    else:
        assert list(drawn) == ["student, all epochs"]


def test_show_refuses_a_file_before_it_reads_images(tmp_path):
    from deitlt_hf.analysis.pictures import draw_data

    file = tmp_path / "pictures"
    file.touch()
    with pytest.raises(FileExistsError, match="pictures is a file; choose another folder"):
        draw_data("image_folder", {"data_dir": str(tmp_path / "nowhere")}, file)


def test_a_deep_check_handles_unusual_file_names(tmp_path):
    """A deep check works with many file names: lists and messages show names with spaces and non-Latin letters."""
    for split in ("train", "test"):
        for name in ("été chaud", "冬"):
            save_image(tmp_path / split / name / "ein Bild.png", len(name + split))
    (tmp_path / "train" / "冬" / "schlecht.png").write_bytes(b"x")
    output = run("check", "--recipe", "image_folder", "--data_dir", tmp_path, "--deep", code=1)
    assert "schlecht.png: it is damaged, or of none of the formats" in " ".join(output.split())
    assert "largest class    冬: 2" in output


def test_check_names_broken_links(tmp_path, data):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save_image(tmp_path / split / name / "0.png", len(split + name))
    (tmp_path / "train" / "cat" / "1.png").symlink_to(tmp_path / "nowhere.png")
    output = data("check", "--recipe", "image_folder", "--data_dir", tmp_path, code=1)
    assert "1 files cannot be read (broken links" in output


def test_check_counts_empty_cells_transparency_and_frames(tmp_path, capsys):
    """The check counts properties that are easy to overlook.

    Empty cells stop a run. Transparency, uniform images and several frames do not, but users need to know about them.
    """
    clear = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 8, 4))
    flat = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    flat.putpixel((3, 3), (0, 0, 0, 0))
    frames = io.BytesIO()
    clear.convert("RGB").save(frames, "GIF", save_all=True, append_images=[flat.convert("RGB")])
    cells = []
    for image in (clear, flat):
        file = io.BytesIO()
        image.save(file, "PNG")
        cells.append({"bytes": file.getvalue()})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [*cells, *cells, {"bytes": frames.getvalue()}, None], "label": [0, 1] * 3}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / f"{split}.parquet"))
    for options, shown, flat_images in (
        ({}, "ignored; use --background white to composite over white", 4),
        ({"background": "white"}, "over #ffffff", 0),
    ):
        assert check("image_folder", {"data_dir": str(tmp_path), **options}, True, None) == 1
        output = " ".join(capsys.readouterr().out.split())
        assert "1 train images are empty, without bytes and path: rows 5" in output
        assert "1 of 6 train images: row 5 of the column image is empty" in output
        assert f"transparency in 8 images, {shown}" in output
        assert ("one flat colour" in output) == bool(flat_images)
        assert "several frames in 2 images" in output


def test_check_accepts_the_fields_that_it_recommends(tmp_path, capsys):
    """The check accepts the fields that its advice names, such as --repeated_augmentation 1."""
    for split in ("train", "test"):
        for index in range(24):
            save_image(
                tmp_path / "images" / split / f"class {index % 2}" / f"{index}.png", index + 100 * (split == "test")
            )
    (tmp_path / "mine.yaml").write_text(
        "teacher: {num_train_epochs: 4, lr_drop_epochs: 5.0, lr_drops: 0.1}\n"
        "student: {num_train_epochs: 4, per_device_train_batch_size: 32}\n"
    )
    words = ["check", "--recipe", str(tmp_path / "mine.yaml"), "--data_dir", str(tmp_path / "images")]
    advised: list[str] = []

    def code(*options):
        with pytest.raises(SystemExit) as ended:
            main_of_data([*words, *advised, *options])
        return ended.value.code

    for advice, fields in (
        ("pass --repeated_augmentation 1", ["--repeated-augmentation=1"]),
        ("lower per_device_train_batch_size", ["--per_device_train_batch_size", "8"]),
        ("warmup_epochs 0 for none", ["--warmup_epochs", "0"]),
        ("lr_drop_epochs [5.0] are not all before", ["--lr_drop_epochs", "2"]),
    ):
        assert code() == 1
        assert advice in " ".join(capsys.readouterr().out.split())
        advised += fields
    assert code() == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "mine.yaml: ready to train on" in output
    assert "note deitlt distill: the peak learning rate 7.81e-06 is too small" in output
    assert code("--learning_rate", "1e-3") == 0
    assert "note" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown field 'repeated_augmentations'"):
        main_of_data([*words, "--repeated_augmentations", "1"])


@pytest.mark.parametrize(
    ("rate", "init_from", "is_low"), [(1.56e-5, None, True), (1e-4, None, False), (1e-5, "DIR", False)]
)
def test_a_low_peak_learning_rate_is_detected(rate, init_from, is_low):
    assert (low_peak(rate, init_from) is not None) == is_low


def test_check_detects_linked_files_and_shared_classes(tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save_image(tmp_path / split / name / "0.png", len(split + name))
    (tmp_path / "train" / "cat" / "1.png").symlink_to(tmp_path / "test" / "cat" / "0.png")
    (tmp_path / "train" / "cat" / "2.png").hardlink_to(tmp_path / "train" / "dog" / "0.png")
    save_image(tmp_path / "train" / "Cat" / "0.png")
    assert check("image_folder", {"data_dir": str(tmp_path)}, deep=True, counts_file=None) == 1
    output = " ".join(capsys.readouterr().out.split())
    for text in (
        "1 images are in both the training and the test split: ",
        "1 training images are listed more than once: ",
        "1 training images have several classes: ",
        "3 train images have the same bytes as one of another class: ",
        "classes whose names look alike: 'Cat' and 'cat'",
    ):
        assert text in output, text
