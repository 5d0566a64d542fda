"""Tests of predictions that are written into a folder: the same answers, resumption, processes, features, refusals."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, pipeline

from deitlt_hf import DeiTLTForImageClassification, FlatTeacherConfig, FlatTeacherForImageClassification
from deitlt_hf.cli import main as command
from deitlt_hf.cli.predict import main
from deitlt_hf.data import image_processor
from deitlt_hf.serving.classifiers import load_model
from deitlt_hf.serving.prediction import load_handler, read_batches
from deitlt_hf.serving.shards import MANIFEST, Contents, Shards, Tabulator, predict_shards
from helpers import ROOT, make_student, picture

GROUPS = {"head": [0, 1, 2], "mid": [3, 4, 5], "tail": [6, 7, 8, 9]}
UNREADABLE = "c broken.png"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student = make_student(class_counts=list(range(100, 0, -10)), class_groups=GROUPS)
    torch.nn.init.normal_(student.cls_classifier.weight)
    student.save_pretrained(folder)
    image_processor(8).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images of several sizes, one of them large, and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(10):
        size = (1100, 1000) if index == 4 else (9 + index % 3, 9)
        picture(*size).save(folder / f"{'abcdefghij'[index]}.{'png' if index % 2 else 'jpg'}")
    (folder / UNREADABLE).write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    return str(folder)


def write(model, images, output, *options):
    workers = [] if "--num_workers" in options else ["--num_workers", "0"]
    options = ("--batch_size", "2", "--shard_size", "4", *workers, *options)
    main(["--model", model, images, "--output", str(output), *options])
    return table(output)


def table(folder):
    if any(folder.glob("*.csv")):
        return [row for file in sorted(folder.glob("*.csv")) for row in pyarrow.csv.read_csv(file).to_pylist()]
    return [row for file in sorted(folder.glob("*.parquet")) for row in pyarrow.parquet.read_table(file).to_pylist()]


def test_a_folder_holds_the_answers_of_the_native_pipeline(model, images, tmp_path, capsys):
    rows = write(model, images, tmp_path / "out", "--top_k", "3", "--experts", "--num_workers", "2")
    assert [row["image"] for row in rows] == sorted(f"{images}/{name}" for name in os.listdir(images))
    assert len(list((tmp_path / "out").glob("predictions-*-of-00003.parquet"))) == 3
    native, classifier = pipeline("image-classification", model=model), load_handler(model)
    for row in rows:
        if row["image"].endswith(UNREADABLE):
            assert "broken.png' cannot be read as an image" in row.pop("error")
            row.pop("image")
            assert set(row.values()) == {None}
            continue
        assert row["error"] is None
        (ours,) = classifier({"inputs": Path(row["image"]).read_bytes()})
        for rank, expected in enumerate(native(row["image"], top_k=3)):
            end = f"_{rank + 1}" if rank else ""
            assert row[f"label{end}"] == expected["label"]
            assert row[f"score{end}"] == pytest.approx(expected["score"], abs=1e-6)
        assert row["group"] == ours["predictions"][0]["group"]
        assert row["training_images"] == ours["predictions"][0]["training_images"]
        for expert in ("cls", "distillation"):
            assert row[f"{expert}_label"] == ours[expert]["label"]
            assert row[f"{expert}_label_score"] == pytest.approx(ours[expert]["score"], abs=1e-6)
    output, errors = capsys.readouterr()
    assert output.startswith("11 images, ")
    assert "warning: 1 images could not be read" in errors
    assert table(tmp_path / "out") == write(model, images, tmp_path / "alone", "--top_k", "3", "--experts")


def test_csv_has_the_same_rows_as_parquet(model, images, tmp_path):
    tables = {name: write(model, images, tmp_path / name, "--format", name) for name in ("csv", "parquet")}
    for one, other in zip(tables["csv"], tables["parquet"], strict=True):
        assert {name: value or None for name, value in one.items()} == pytest.approx(other)


@pytest.mark.parametrize("layout", ["saved", "parquet", "lists"])
def test_a_data_set_is_read_as_in_training(model, images, tmp_path, layout):
    """Any source of training gives the answers of its files, in the order of its rows, whatever holds the images."""
    files = sorted(Path(images).iterdir())
    features = datasets.Features(photo=datasets.Image(), text=datasets.Value("string"))
    cells = [{"bytes": path.read_bytes(), "path": None} for path in files]
    rows = datasets.Dataset.from_dict({"photo": cells, "text": ["?"] * len(files)}, features)
    data = tmp_path / "data"
    if layout == "saved":
        datasets.DatasetDict(train=rows.select([0]), test=rows).save_to_disk(data)
    elif layout == "parquet":
        data.mkdir()
        rows.to_parquet(data / "test.parquet")  # predictions need no other split
        with pytest.raises(ValueError, match=r"no images in .* tables and archives are read with --data_dir"):
            main(["--model", model, str(data)])
    else:
        data.mkdir()
        for file in files:
            shutil.copy(file, data)
        lines = [f"{file.name} {index % 2}\n" for index, file in enumerate(files)]
        (data / "mine_test.txt").write_text("".join(lines))
        (data / "mine_train.txt").write_text("".join(lines[:2]))
    options = ["--output", str(tmp_path / "out"), "--batch_size", "2", "--shard_size", "4", "--num_workers", "1"]
    main(["--model", model, "--data_dir", str(data), *options])
    found, expected = table(tmp_path / "out"), write(model, images, tmp_path / "files")
    names = [str(data / file.name) for file in files] if layout == "lists" else [f"test/{row}" for row in range(11)]
    assert [row.pop("image") for row in found] == names
    assert [row.pop("image") for row in expected] == [str(file) for file in files]
    assert [name for name, row in zip(names, found, strict=True) if row["error"]] == [names[2]]
    for row in (found[2], expected[2]):
        assert "is damaged" in row.pop("error")
    assert found == expected


def test_a_data_set_continues_only_with_the_same_images(model, tmp_path, capsys):
    """Rows have the same names in any data set, so the folder also knows some of their content."""
    rows = datasets.Dataset.from_dict({"image": [picture(9, 9)] * 5}, datasets.Features(image=datasets.Image()))
    rows.save_to_disk(tmp_path / "data")
    words = ["--model", model, "--split", "train", "--output", str(tmp_path / "out"), "--shard_size", "2"]
    main([*words, "--data_dir", str(tmp_path / "data")])
    main([*words, "--data_dir", str(tmp_path / "data")])
    assert "3 of 3 tables" in capsys.readouterr().out
    others = datasets.Dataset.from_dict({"image": [picture(9, 8)] * 5}, rows.features)
    others.save_to_disk(tmp_path / "others")
    with pytest.raises(ValueError, match="predictions of other files"):
        main([*words, "--data_dir", str(tmp_path / "others")])
    with pytest.raises(ValueError, match="no split 'exam'; the splits are train"):
        main(["--model", model, "--data_dir", str(tmp_path / "data"), "--split", "exam"])
    main(["--model", model, "--dataset", "digits", "--csv", "--top_k", "1", "--num_workers", "0"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 600


def test_an_interrupted_folder_is_completed_and_nothing_is_computed_twice(model, images, tmp_path, capsys):
    undisturbed = write(model, images, tmp_path / "whole")
    capsys.readouterr()
    folder = tmp_path / "parts"
    paths = sorted(f"{images}/{name}" for name in os.listdir(images))
    classifier, contents = load_handler(model), Contents(shard_size=4)
    shards = Shards(folder, paths, contents)
    shards.claim(classifier)
    batches = predict_shards(Tabulator(classifier, contents), shards, shards.missing(), batch_size=2)
    for _ in range(4):  # two tables of two batches; the second one is not written yet
        next(batches)
    batches.close()
    shards.path(1).with_suffix(".parquet.part").write_bytes(b"half a file")
    assert shards.missing() == [1, 2]
    before = shards.path(0).stat()
    assert write(model, images, folder) == undisturbed
    assert "1 of 3 tables" in capsys.readouterr().out
    assert shards.path(0).stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(path.name for path in folder.iterdir()) == [
        MANIFEST,
        *(shards.path(index).name for index in range(3)),
    ]
    assert write(model, images, folder) == undisturbed
    assert "3 of 3 tables" in capsys.readouterr().out


def test_another_run_is_refused(model, images, tmp_path):
    folder = tmp_path / "out"
    write(model, images, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    make_student(1).save_pretrained(tmp_path / "other")
    image_processor(8).save_pretrained(tmp_path / "other")
    for arguments, sentence in (
        ((model, images, folder, "--top_k", "2"), "holds predictions with top_k 5, not 2"),
        ((model, images, folder, "--format", "csv"), "with format parquet, not csv"),
        ((str(tmp_path / "other"), images, folder), "predictions of another model"),
        ((model, f"{images}/a.jpg", folder), "predictions of other files"),
        ((model, images, tmp_path / "other"), "other is not empty"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=sentence):
            write(*arguments)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--features", "cls"], "--features needs --output"),
        (["--output", "out", "--jsonl"], "leave --jsonl and --csv out"),
        (["--output", "out", "--features", "cls", "--format", "csv"], "features are written as parquet only"),
        (["--output", "out", "--shard_size", "0"], "shard_size must be 1 or more"),
        (["--output", "out", "--num_workers", "-1"], "--num_workers 0 or more"),
        (["--dataset", "digits"], "give either images .* or a data set"),
        (["--split", "test"], "are of a data set; give --dataset"),
        (["--output", "out", "--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--output", "out", "--features", "head"], "has no features 'head'; give cls or distillation or mean or"),
    ],
)
def test_options_that_do_not_fit_are_refused(model, images, tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        main(["--model", model, images, *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "columns"), [("tokens", ("cls", "distillation")), ("mean", ("mean",))])
def test_features_of_a_student_are_its_final_tokens(model, images, tmp_path, name, columns):
    rows = write(model, images, tmp_path / "out", "--features", name)
    classifier, student = load_handler(model), load_model(model).eval()
    paths = [row["image"] for row in rows if row["error"] is None]
    for batch in read_batches(classifier, [[path] for path in paths]):
        with torch.no_grad():
            tokens = student(batch.stacks[0][1]).token_features[0]
        expected = {"cls": tokens[0], "distillation": tokens[1], "mean": tokens.mean(dim=0)}
        row = next(row for row in rows if row["image"] == batch.paths[0])
        for column in columns:
            np.testing.assert_allclose(row[f"{column}_features"], expected[column], atol=1e-6)
    broken = next(row for row in rows if row["error"] is not None)
    assert [broken[f"{column}_features"] for column in columns] == [None] * len(columns)


@pytest.mark.parametrize("kind", ["flat_teacher", "resnet"])
def test_features_of_other_classifiers_are_the_input_of_the_last_layer(images, tmp_path, kind):
    if kind == "resnet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=10)
        classifier = ResNetForImageClassification(config)
    else:  # the projection has as many outputs as there are classes
        config = FlatTeacherConfig(
            backbone="resnet20", image_size=8, num_labels=10, projection_size=10, classifier="cosine"
        )
        classifier = FlatTeacherForImageClassification(config)
    classifier.eval().save_pretrained(tmp_path / "model")
    image_processor(8).save_pretrained(tmp_path / "model")
    rows = write(str(tmp_path / "model"), images, tmp_path / "out", "--features", "head", "--experts")
    head = classifier.classifier if kind == "flat_teacher" else classifier.classifier[-1]
    scale = config.logit_scale if kind == "flat_teacher" else 1.0
    for row in rows:
        if row["error"] is None:
            with torch.no_grad():
                scores = (scale * head(torch.tensor([row["head_features"]]))).softmax(dim=-1)
            assert row["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    with pytest.raises(ValueError, match="no features 'tokens'; give head"):
        write(str(tmp_path / "model"), images, tmp_path / "other", "--features", "tokens")


def test_a_table_without_a_readable_image_has_the_same_columns(model, tmp_path):
    names = ["missing.png", os.fsdecode(b"odd\xff.png")]
    main(["--model", model, *(str(tmp_path / name) for name in names), "--output", str(tmp_path / "out")])
    rows = table(tmp_path / "out")
    assert [row["image"] for row in rows] == [f"{tmp_path}/missing.png", f"{tmp_path}/odd\\xff.png"]
    assert rows[0]["error"] == f"there is no file '{tmp_path}/missing.png'."
    assert {"label", "score_5", "training_images"} < rows[0].keys()


@pytest.mark.parametrize("options", [[], ["--output", "out"]])
def test_a_full_memory_says_which_batch_to_make_smaller(model, images, tmp_path, monkeypatch, capsys, options):
    def is_full(*args, **kwargs):
        if len(kwargs.get("pixel_values", args[-1])) > 2:  # the first forward pass, of one image, fits
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    forward = DeiTLTForImageClassification.forward
    monkeypatch.setattr(DeiTLTForImageClassification, "forward", is_full)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command(["predict", "--model", model, images, "--batch_size", "6", *options])
    assert "error: the memory of the GPU is full; use a --batch_size below 6.\n" in capsys.readouterr().err


def test_two_processes_share_the_tables(model, images, tmp_path):
    alone = write(model, images, tmp_path / "alone")
    command = [sys.executable, "-m", "deitlt_hf.cli", "predict", "--model", model, images]
    command += ["--output", str(tmp_path / "shared"), "--batch_size", "2", "--shard_size", "4", "--device", "cpu"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | group | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [text.split(" in ")[-2] for text in said] == ["2 tables", "1 table"]
    assert table(tmp_path / "shared") == alone


def test_an_answer_depends_on_everything_that_the_manifest_names(model, images, tmp_path):
    """The image processor and the class names count as the model: a resumed folder would mix answers."""
    folder = shutil.copytree(model, tmp_path / "model")
    write(str(folder), images, tmp_path / "out")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"image_mean": [0.0, 0.0, 0.0]}))
    with pytest.raises(ValueError, match="another model"):
        write(str(folder), images, tmp_path / "out")
