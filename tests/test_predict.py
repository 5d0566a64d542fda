"""Tests of `predict` as users run it, and of its functions."""

import csv
import glob
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import pipeline

from deitlt_hf import FlatTeacherConfig, FlatTeacherForImageClassification
from deitlt_hf.cli.evaluate import main as evaluate
from deitlt_hf.cli.export import main as export
from deitlt_hf.cli.model_cards import main as model_cards
from deitlt_hf.cli.predict import _parsed, main
from deitlt_hf.data import image_processor
from deitlt_hf.recipes import StudentArguments
from deitlt_hf.serving import classifiers
from deitlt_hf.serving.handler import is_hub_id
from deitlt_hf.serving.prediction import find_images, load_handler, predict_images
from deitlt_hf.training.starting import check_start
from helpers import ROOT, make_student

NAMES = [
    "b.png",
    "a, b.png",
    'say "hi".jpg',
    "Grüße 🌵.png",
    "new\nline.png",
    "return\r.png",
    "sub/deep/c.PNG",
    "sub/[5].png",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    groups = {"head": [0, 1, 2], "mid": [3, 4, 5], "tail": [6, 7, 8, 9]}
    make_student(class_counts=list(range(100, 0, -10)), class_groups=groups).save_pretrained(folder)
    image_processor(8).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with images of unusual names, and files that are not images."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub" / "deep").mkdir(parents=True)
    for index, name in enumerate(NAMES):
        Image.new("RGB", (8 + index, 8), (30 * index, 255 - 30 * index, 128)).save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def predict(*arguments, stdin=None):
    command = [sys.executable, "-m", "deitlt_hf.cli", "predict", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, check=False)


def json_lines(output):
    return [json.loads(line) for line in output.splitlines()]


def test_a_folder_as_csv_keeps_its_results_despite_a_corrupt_file(model, images):
    done = predict("--model", model, "--csv", "--experts", "--top_k", "2", "--batch_size", "3", images)
    assert done.returncode == 1
    errors = done.stderr.decode().splitlines()
    assert errors[0].startswith(f"error: '{images}/broken.png' cannot be read as an image")
    assert errors[1] == "error: 1 of 9 images could not be read."
    assert errors[2].startswith("warning: files that are not read: 1 .txt;")
    assert len(errors) == 3
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode(), newline="")))
    assert {row["image"] for row in rows} == {f"{images}/{name}" for name in NAMES}
    assert [row["rank"] for row in rows] == ["1", "2"] * len(NAMES)
    native = pipeline("image-classification", model=model)
    for row in rows:
        expected = native(row["image"], top_k=2)[int(row["rank"]) - 1]
        assert row["label"] == expected["label"]
        assert float(row["score"]) == pytest.approx(expected["score"], abs=1e-6)
        label = int(row["label"].removeprefix("LABEL_"))
        assert int(row["training_images"]) == 100 - 10 * label
        assert row["group"] == ("head" if label < 3 else "mid" if label < 6 else "tail")
        for name in ("cls_score", "distillation_score"):
            assert 0 < float(row[name]) < 1
        assert row["cls_label"].startswith("LABEL_")


@pytest.mark.parametrize(
    "options",
    [
        ["b.png", "--experts", "sub"],
        ["--experts", "b.png", "--jsonl", "sub"],
        ["b.png", "sub", "--csv"],
        ["--", "b.png", "sub"],
    ],
)
def test_options_may_appear_between_images(options):
    assert _parsed(["--model", "student", *options]).images == ["b.png", "sub"]


def test_names_from_standard_input_as_json_lines(model, images, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff.png"  # a name that is not valid text
    (tmp_path / "x.png").write_bytes((images / "b.png").read_bytes())
    os.rename(tmp_path / "x.png", odd)
    wanted = [os.fsencode(images / "b.png"), b"", odd, os.fsencode(images / "b.png"), os.fsencode(images / "sub")]
    done = predict("--model", model, "--jsonl", "--experts", "-", stdin=b"\n".join(wanted))
    assert done.returncode == 0, done.stderr
    lines = json_lines(done.stdout)
    assert [os.fsencode(line["image"]) for line in lines] == [
        wanted[0],
        odd,
        wanted[0],
        os.fsencode(images / "sub/[5].png"),
        os.fsencode(images / "sub/deep/c.PNG"),
    ]
    (expected,) = load_handler(model)({"inputs": (images / "b.png").read_bytes()})
    for expert in ("cls", "distillation"):
        assert lines[0][expert] == pytest.approx(expected[expert], abs=1e-6)
    for ours, one in zip(lines[0]["predictions"], expected["predictions"], strict=True):
        assert ours == pytest.approx(one, abs=1e-6)
    assert done.stderr == b""


def test_a_closed_pipe_ends_the_command_silently(model, images):
    command = f"{sys.executable} -m deitlt_hf.cli predict --model {model} --jsonl --batch_size 1 - | head -n 1"
    done = subprocess.run(
        command, shell=True, input=f"{images}/b.png\n" * 300, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert len(json_lines(done.stdout)) == 1
    assert done.stderr == ""


def test_results_are_printed_before_the_last_file_is_known(model, images):
    """Results are printed before the last file is known; standard input can be a process that still searches files."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deitlt_hf.cli", "predict", "--model", model, "--jsonl", "--batch_size", "1", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    process.stdin.write(f"{images}/b.png\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["image"] == f"{images}/b.png"
    process.stdin.close()
    assert process.wait() == 0


def test_text_output_is_readable(model, images, capsys):
    main(["--model", model, "--experts", "--top_k", "1", str(images / "b.png"), str(images / "new\nline.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{images}/b.png"
    assert "% " in lines[1]
    assert "training images, cls" in lines[1]
    assert "cls says LABEL_" in lines[2]
    assert lines[3] == f"'{images}/new\\nline.png'"
    main(["--model", model, "--top_k", "10", str(images / "b.png")])
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 11
    assert "cls" not in output


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (["--model", "nowhere", "{images}"], FileNotFoundError, "there is no model folder 'nowhere'"),
        (["--model", "{model}", "{empty}"], ValueError, "no images in '.*empty'; give files, or folders with images"),
        (["--model", "{model}", "--top_k", "0", "{images}"], ValueError, "--top_k and --batch_size must be 1 or more"),
        (["--model", "{model}", "--batch_size", "-1", "{images}"], ValueError, "must be 1 or more"),
    ],
)
def test_invalid_input_gives_a_clear_message(model, images, tmp_path, arguments, error, sentence):
    (tmp_path / "empty").mkdir()
    places = {"model": model, "images": images, "empty": tmp_path / "empty"}
    with pytest.raises(error, match=sentence):
        main([argument.format(**places) for argument in arguments])


DEIT = '{"model_type": "deit", "id2label": %s}'
ODD = ("[1]", "null", "7", '"text"', "{", "{}", DEIT % '["a"]', DEIT % '{"a": "b"}', DEIT % '{"1": "b"}')


@pytest.mark.parametrize("content", ODD)
def test_an_invalid_configuration_is_refused_by_every_command(model, images, tmp_path, content):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "config.json").write_text(content)
    for command, options in (
        (main, [str(images / "b.png")]),
        (evaluate, ["--recipe", "digits_lt", "--use_cpu", "true"]),
        (export, ["--output", str(tmp_path / "out")]),
        (model_cards, []),
    ):
        with pytest.raises((ValueError, OSError), match=r"config\.json|config file|id2label") as caught:
            command(["--model", str(folder), *options])
        assert len(str(caught.value)) < 600
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing.png", "there is no file '{}'."),
        ("*.nothing", "there is no file '{}'."),
        ("pipe", "'{}' is not a file."),
        ("loop.png", "'{}' cannot be read: Too many levels of symbolic links."),
    ],
)
def test_an_unreadable_file_is_named(model, tmp_path, capsys, name, sentence):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("loop.png", tmp_path / "loop.png")
    with pytest.raises(SystemExit) as end:
        main(["--model", model, str(tmp_path / name)])
    assert end.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "error: " + sentence.format(tmp_path / name)


@pytest.mark.parametrize("pattern", ["{}", "{}/**", "{}/**/*", "{}/**/*.png", "{}/*/../**/**/*.png", "{}/round/**"])
def test_loops_of_links_end(tmp_path, pattern):
    """Loops of links end and each image appears once, whatever its path; two links would give 2 to the 40th paths."""
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name)
    for name in ("round", "sub/round"):
        os.symlink(tmp_path / "photos", tmp_path / "photos" / name)
    found = list(itertools.islice(find_images([pattern.format(tmp_path / "photos")]), 100))
    assert sorted(os.path.realpath(path) for path in found) == [
        f"{tmp_path}/photos/a.png",
        f"{tmp_path}/photos/sub/b.png",
    ]


def test_patterns_match_as_in_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "x/b.png", "x/[y]/c.png", "x/.hidden/d.png", "-"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    for pattern in (
        "**/*.png",
        "x/**/*.png",
        "**/x/**/*.png",
        "*/**/c.png",
        "**/[[]y]/**",
        "./**/*.png",
        "*.p*",
        "[-]",
    ):
        paths = sorted(glob.glob(pattern, recursive=True))
        assert list(find_images([pattern])) == [path.removeprefix("./") for path in paths if os.path.isfile(path)]


# root can list a locked folder.
@pytest.fixture(params=["too long", *(["locked"] if os.geteuid() else [])])
def unreadable_folder(request, tmp_path):
    """A folder that cannot be listed, next to an image."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    if request.param == "locked":
        folder = tmp_path / "locked"
        folder.mkdir(mode=0)
        yield tmp_path, str(folder), "Permission denied"
        folder.chmod(0o700)
        return
    folder, place = tmp_path, os.open(tmp_path, os.O_RDONLY)
    while len(str(folder)) < os.pathconf(tmp_path, "PC_PATH_MAX"):
        folder /= "x" * 200
        os.mkdir(folder.name, dir_fd=place)
        place, above = os.open(folder.name, os.O_RDONLY, dir_fd=place), place
        os.close(above)
    os.close(place)
    yield tmp_path, str(folder), "File name too long"


def test_an_unreadable_folder_is_named_and_counted(model, unreadable_folder, capsys):
    top, folder, reason = unreadable_folder
    with pytest.raises(SystemExit) as end:
        main(["--model", model, "--jsonl", str(top)])
    assert end.value.code == 1
    output, errors = capsys.readouterr()
    assert [line["image"] for line in json_lines(output)] == [f"{top}/a.png"]
    assert errors.splitlines() == [
        f"error: {folder!r} cannot be read: {reason}.",
        "error: 1 of 2 images could not be read.",
    ]


def test_a_closed_output_gives_a_clear_message(model, images):
    command = f"{sys.executable} -m deitlt_hf.cli predict --model {model} {images}/b.png >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output is closed;")
    assert len(done.stderr.splitlines()) == 1


def test_files_are_in_the_order_of_the_command_line(images):
    found = list(find_images([f"{images}/sub/[5].png", f"{images}/**/*.png", f"{images}/b.png"]))
    assert found[0] == f"{images}/sub/[5].png"  # an existing file name overrides its meaning as a pattern
    assert found[-1] == f"{images}/b.png"
    assert found[1:-1] == sorted(map(str, images.rglob("[!.]*.png")))


def test_files_that_are_not_images_are_counted(model, images, tmp_path, capsys):
    shutil.copy(images / "b.png", tmp_path)
    for name in ("a.psd", "b.PSD", "c"):
        (tmp_path / name).write_bytes(b"x")
    main(["--model", model, str(tmp_path)])
    assert "warning: files that are not read: 2 .psd, 1 without a suffix" in capsys.readouterr().err
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"no images in .*files that are not read: 2 \.psd"):
        main(["--model", model, str(tmp_path)])


def test_files_are_opened_one_batch_at_a_time(model, images):
    """Files are opened one batch at a time, after the previous batch. Any number of files therefore fits in memory."""
    taken = []

    def paths():
        for _ in range(10):
            taken.append(f"{images}/b.png")
            yield taken[-1]

    results = predict_images(load_handler(model), paths(), batch_size=4)
    next(results)
    assert len(taken) == 4
    assert len(list(results)) == 9


def test_a_flat_teacher_predicts_too(images, tmp_path, capsys):
    config = FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10)
    FlatTeacherForImageClassification(config).save_pretrained(tmp_path)
    image_processor(8).save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--csv", "--experts", str(images / "b.png")])
    (first, *_) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert first["label"].startswith("LABEL_")
    assert first["cls_score"] == ""


@pytest.mark.parametrize("name", ["outputs/nope", "models/nope", "./nope", "/nope", "nope", "nope/", "~/nope"])
def test_a_path_is_not_requested_from_the_hub(tmp_path, monkeypatch, name):
    """A path is not requested from the Hub, which offline would take five requests before the error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))

    def start(path):
        check_start(StudentArguments(init_from=path), {})

    for load in (load_handler, classifiers.load_model, classifiers.load_classifier, start):
        with pytest.raises(FileNotFoundError, match=r"no model folder"):
            load(name)


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name-1.5")
    (tmp_path / "org").mkdir()
    assert not is_hub_id("org/name-1.5")
    monkeypatch.setattr("deitlt_hf.serving.handler.try_to_load_from_cache", lambda *_: "config.json")
    assert is_hub_id("org/name-1.5")
