"""Tests of streaming training images from shards."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from deitlt_hf.cli import main
from deitlt_hf.cli.data import check
from deitlt_hf.data import image_processor, train_transform
from deitlt_hf.data.streaming import StreamedImages, StreamedSplit, load_streamed
from deitlt_hf.recipes import DataArguments
from helpers import ROOT, shade, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four training shards of nine images and a test shard; within a class, grey values identify the images."""
    return write_shards(tmp_path_factory.mktemp("shards"), shards=4)


@pytest.fixture(scope="module")
def streamed(shards):
    return load_streamed("any", str(shards), shuffle_buffer=4)[1]


def shades(image):
    """Replaces the transform: returns the grey value."""
    pixels = image if isinstance(image, np.ndarray) else image.decode()
    return torch.tensor(int(pixels[0, 0, 0]))


def rows(split, **values):
    return StreamedImages(split, {"shade": shades}, **{"batch_size": 3, **values})


def test_counts_and_classes_are_known_before_training(streamed):
    assert streamed["train"].class_counts.tolist() == [12, 12, 12]
    assert streamed["train"].features["label"].names == ["0", "1", "2"]
    assert len(streamed["train"]) == 36
    assert all(shade(row) // 40 == row["label"] for row in streamed["test"])


def test_each_epoch_has_every_image_once_in_another_order(streamed):
    images = rows(streamed["train"])
    orders = []
    for epoch in (0, 1, 0):
        images.set_epoch(epoch)
        found = list(images)
        assert Counter(int(row["shade"]) for row in found) == dict.fromkeys((0, 3, 6, 41, 44, 47, 82, 85, 88), 4)
        assert all(row["shade"] // 40 == row["labels"] for row in found)
        orders.append([int(row["shade"]) for row in found])
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_and_workers_share_the_shards(streamed, workers, world_size):
    """Processes and workers together use every image once, up to incomplete batches.

    Each process has the same number of complete batches.
    """
    seen, sizes = Counter(), set()
    for rank in range(world_size):
        images = rows(streamed["train"], rank=rank, world_size=world_size)
        batches = list(DataLoader(images, batch_size=3, num_workers=workers))
        assert len(batches) == len(DataLoader(images, batch_size=3)) == images.num_batches
        assert {len(batch["labels"]) for batch in batches} == {3}
        sizes.add(len(batches))
        seen.update(int(value) for batch in batches for value in batch["shade"])
    assert len(sizes) == 1
    assert seen.total() == 36
    if world_size < 3 and 4 % (world_size * max(workers, 1)) == 0:
        assert set(seen.values()) == {4}


def test_persistent_workers_receive_the_epoch(streamed):
    loader = DataLoader(rows(streamed["train"]), batch_size=3, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        loader.dataset.set_epoch(epoch)
        orders.append([int(value) for batch in loader for value in batch["shade"]])
    assert orders[0] == orders[2] != orders[1]


def test_repeats_are_augmented_separately(tmp_path):
    split = load_streamed("any", str(write_shards(tmp_path, shards=2, per_class=50)))[1]["train"]
    images = StreamedImages(split, {"shade": shades, "again": lambda image: torch.rand(1)}, 8, num_repeats=3)
    found = list(images)
    assert len(found) == 256
    for start in range(0, 255, 3):
        copies = found[start : start + 3]
        assert len({int(row["shade"]) for row in copies}) == 1
        assert len({float(row["again"]) for row in copies}) == 3


def test_a_worker_without_a_shard_is_refused(streamed):
    loader = DataLoader(rows(streamed["train"]), batch_size=3, num_workers=5)
    with pytest.raises(ValueError, match="a worker has no shard: there are only 4 shards; lower --dataloader"):
        list(loader)


def test_corrupt_images_are_named_or_left_out(tmp_path, caplog):
    write_shards(tmp_path, shards=1)
    path = tmp_path / "data-train-000000.tar"
    content = path.read_bytes()
    start = content.index(b"\x89PNG")
    path.write_bytes(content[: start + 8] + bytes(8) + content[start + 16 :])
    for skip in (False, True):
        split = load_streamed("any", str(tmp_path), skip_bad_images=skip)[1]["train"]
        if skip:
            assert 0 not in [int(row["shade"]) for row in list(rows(split))[:8]]
            assert "left out: cannot read the image" in caplog.text
        else:
            with pytest.raises(ValueError, match="cannot read the image"):
                list(rows(split))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": 12, "1": 12, "3": 12}', "classes that the training split does not have: '2'"),
        ("[12, 12, 0]", r"classes without a training image: 2 \(1 in all\)"),
        ("[12, 12]", "classes that the training split does not have: '2'"),
        ("[12, 12, null]", "must hold a list of counts"),
        ("[12, 12", "cannot be read: "),
        ('{"cat": 12, "1": 12}', "counts of 'cat' .* but labels are whole numbers"),
    ],
)
def test_counts_from_a_file(shards, tmp_path, content, message):
    (tmp_path / "counts.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(rows(load_streamed("any", str(shards), class_counts=str(tmp_path / "counts.json"))[1]["train"]))


def test_a_label_without_a_count_is_refused(streamed):
    train = streamed["train"]
    split = StreamedSplit(train.stream, "png", "cls", {0: 12, 1: 12})
    with pytest.raises(ValueError, match="has a label that was not counted: 2"):
        list(rows(split))


def test_counts_written_by_check_are_read(shards, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {dataset: shards}\nstudent: {}\n")
    given = {"data_dir": str(shards), "streaming": "true"}
    assert check(str(recipe), given, deep=False, counts_file=str(tmp_path / "counts.json")) == 0
    assert "36 of 3 classes" in capsys.readouterr().out
    monkeypatch.setattr("deitlt_hf.data.streaming.count_classes", lambda *_: pytest.fail("counted again"))
    arguments = DataArguments(data_dir=str(shards), streaming=True, class_counts=str(tmp_path / "counts.json"))
    assert arguments.load()["train"].class_counts.tolist() == [12, 12, 12]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"imbalance_ratio": 10}, "imbalance_ratio needs the whole data set before training; leave"),
        ({"data_dir": None}, "the embedded digits need no streaming"),
        ({"data_dir": str(ROOT / "src")}, "has no webdataset shards or parquet files to stream"),
        ({"test_split": "other"}, "streaming needs a train and a test split"),
    ],
)
def test_layouts_that_cannot_be_streamed_are_refused(shards, values, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**{"data_dir": str(shards), "streaming": True, **values}).load()


def test_parquet_is_streamed_with_its_class_names(tmp_path):
    import datasets
    from PIL import Image

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split in ("train", "test"):
        for shard in range(2):
            content = {"img": [Image.new("RGB", (4, 4), (label,) * 3) for label in (1, 0, 1)], "label": [1, 0, 1]}
            datasets.Dataset.from_dict(content, features).to_parquet(tmp_path / f"{split}-{shard}.parquet")
    kind, data = load_streamed("any", str(tmp_path))
    assert kind == "parquet files, streamed"
    assert data["train"].features["label"].names == data["test"].features["label"].names == ["cat", "dog"]
    assert data["train"].class_counts.tolist() == [2, 4]
    assert all(row["shade"] == row["labels"] for row in rows(data["train"], batch_size=2))


def test_batches_use_the_trainers_transform(streamed):
    transform = train_transform(image_processor(8), "padded")
    loader = DataLoader(StreamedImages(streamed["train"], {"pixel_values": transform}, 4), batch_size=4)
    batch = next(iter(loader))
    assert transform.finish(batch["pixel_values"]).shape == (4, 3, 8, 8)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_student_trains_on_a_stream_and_resumes(tmp_path, capsys, processes):
    """A student trains on a stream, read by workers, in this process or in two.

    The run that is interrupted and resumed takes as many steps and sees the same images.
    """
    write_shards(tmp_path, shards=4, per_class=30)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {dataset: shards, streaming: true}\n"
        "student: {image_size: 8, patch_size: 4, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,"
        " distillation: none, num_train_epochs: 2, drw_start_epoch: 1, warmup_epochs: 0, global_batch_size: 16,"
        " per_device_train_batch_size: 16, train_crop: padded, eval_strategy: epoch, save_strategy: steps,"
        " save_steps: 20, logging_steps: 5, dataloader_num_workers: 2}\n"
    )
    options = ["--recipe", str(recipe), "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "student")]

    def run(*extra):
        if processes == 1:
            main(["distill", *options, *extra])
            return capsys.readouterr().out
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "scripts/distill.py"]
        command = [*launcher, *options, "--use_cpu", "true", *extra]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    output = run()
    assert "3 (360): head 1 (120), mid 1 (120), tail 1 (120)" in output
    results = json.loads((tmp_path / "student" / "results.json").read_text())
    assert results["last"]["step"] == 2 * (256 // 16)
    assert results["data"]["class_counts"] == [120, 120, 120]
    resumed = run("--resume_from_checkpoint", str(tmp_path / "student" / "checkpoint-20"))
    assert "step 25/32" in resumed
    assert "step 20/32" not in resumed


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"cat": 2, "dog": 4}, [2, 4]),
        ([2, 4], [2, 4]),
        ({"1": 4, "0": 2}, [2, 4]),
        ({"cat": 2, "dog": 4, "cow": 1}, "there are counts of 'cow' .*, but classes go from 'cat' to 'dog'"),
        ({"0": 2, "dog": 4}, "there are counts of '0' .*, but classes go from 'cat' to 'dog'"),
        ([2, 4, 1], "there are counts of 2 .*, but classes go from 0 to 1"),
        ({"cat": 2}, "classes without a training image: dog"),
    ],
)
def test_counts_of_named_classes(tmp_path, content, expected):
    """Counts of named classes are given by name or by label; other keys are refused."""
    import datasets
    from PIL import Image

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split in ("train", "test"):
        images = {"img": [Image.new("RGB", (4, 4))] * 6, "label": [1, 0, 1, 1, 0, 1]}
        datasets.Dataset.from_dict(images, features).to_parquet(tmp_path / f"{split}-0.parquet")
    (tmp_path / "counts.json").write_text(json.dumps(content))
    options = {"class_counts": str(tmp_path / "counts.json")}
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            load_streamed("any", str(tmp_path), **options)
    else:
        assert load_streamed("any", str(tmp_path), **options)[1]["train"].class_counts.tolist() == expected


@pytest.mark.parametrize("named", [True, False])
def test_counts_by_name_whatever_the_order_of_the_labels(tmp_path, named):
    """Counts by name do not depend on the order of the labels.

    Sorted as text, class "10" has label 2; a file of names must not be read as one of labels.
    """
    import datasets
    from PIL import Image

    names = sorted(str(label) for label in range(12))
    feature = datasets.ClassLabel(names=names) if named else datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    values = [value for label, name in enumerate(names) for value in [label if named else name] * (label + 1)]
    for split in ("train", "test"):
        rows = {"image": [Image.new("RGB", (4, 4))] * len(values), "label": values}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}-0.parquet")
    counted = load_streamed("any", str(tmp_path))[1]["train"]
    file = tmp_path / "counts.json"
    by_name = dict(zip(counted.features["label"].names, counted.class_counts.tolist(), strict=True))
    file.write_text(json.dumps(by_name))
    read = load_streamed("any", str(tmp_path), class_counts=str(file))[1]["train"]
    assert read.class_counts.tolist() == counted.class_counts.tolist()
    assert by_name["2"] == names.index("2") + 1
    assert len(list(rows_of(read))) == len(read) // 2 * 2


def rows_of(split):
    return StreamedImages(split, {"shade": shades}, batch_size=2)


def test_a_stream_of_only_corrupt_images_ends(tmp_path, monkeypatch):
    """A stream with only corrupt images ends; leaving out all images of a shard must not continue for ever."""
    from deitlt_hf.data import streaming

    def refuse(*args):
        raise ValueError("cannot read the image")

    split = load_streamed("any", str(write_shards(tmp_path, shards=1)), skip_bad_images=True)[1]["train"]
    monkeypatch.setattr(streaming, "open_image", refuse)
    with pytest.raises(ValueError, match="none of the images that a worker has read can be decoded"):
        list(rows_of(split))


def test_tables_of_paths_are_not_streamed(tmp_path):
    (tmp_path / "train.csv").write_text("path,label\na.png,1")
    with pytest.raises(ValueError, match="has no webdataset shards or parquet files to stream"):
        load_streamed("any", str(tmp_path))
