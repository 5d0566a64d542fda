"""Reduced copies of images: training and evaluation see the same pixels with them, whenever they were written."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from deitlt_hf.data import ImageCollator, ImageDataset, image_processor, train_transform
from deitlt_hf.data.copies import ReducedCopies
from helpers import student_arguments


@pytest.fixture
def large_files(tmp_path):
    """Rows of a JPEG, a transparent PNG and an image that is smaller than a copy, as files."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (150, 220, 3), dtype=np.uint8)
    (tmp_path / "files").mkdir()
    paths = [str(tmp_path / "files" / name) for name in ("a.jpg", "b.png", "c.png")]
    Image.fromarray(pixels).save(paths[0], quality=95)
    transparent = Image.fromarray(pixels)
    transparent.putalpha(Image.fromarray(random.integers(0, 255, (150, 220), dtype=np.uint8)))
    transparent.save(paths[1])
    Image.fromarray(pixels[:20, :30]).save(paths[2])
    rows = datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 0]})
    return rows.cast_column("image", datasets.Image())


def with_copies(rows, copies, background=None, views=None):
    return ImageDataset(rows, "image", "label", views, background, copies)


def test_training_reads_a_copy_as_it_read_the_image_that_made_it(large_files, tmp_path):
    def crops():
        copies = ReducedCopies.for_training(tmp_path / "copies", 16)
        view = train_transform(image_processor(16), "padded", None, hflip=0)
        dataset = with_copies(large_files, copies, "white", {"pixel_values": view})
        torch.manual_seed(0)
        return torch.stack([dataset[row]["pixel_values"] for row in range(3)])

    first, files = crops(), sorted((tmp_path / "copies").rglob("*.png"))
    assert len(files) == 2, "the image that is not larger than a copy needs none"
    assert {min(Image.open(file).size) for file in files} == {32}
    for path in large_files.cast_column("image", datasets.Image(decode=False))["image"][:2]:
        status = os.stat(path["path"])
        Path(path["path"]).write_bytes(b"x" * status.st_size)
        os.utime(path["path"], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(crops(), first)  # from the copies alone


@pytest.mark.parametrize("side", [16, 32, 224])
@pytest.mark.parametrize("background", [None, "white"])
def test_evaluation_by_copies_gives_the_same_model_inputs(large_files, tmp_path, side, background):
    processor = image_processor(side, background=background)
    collator = ImageCollator(processor)
    plain = with_copies(large_files, None, background)
    wanted = collator([plain[row] for row in range(3)])["pixel_values"]
    for _ in range(2):  # writes the copies, and reads them
        copied = with_copies(large_files, ReducedCopies.for_evaluation(tmp_path, processor), background)
        assert torch.equal(collator([copied[row] for row in range(3)])["pixel_values"], wanted)


def test_a_changed_image_and_another_background_get_another_copy(large_files, tmp_path):
    def copies():
        return len(list((tmp_path / "copies").rglob("*.png")))

    def read(background):
        dataset = with_copies(large_files, ReducedCopies.for_training(tmp_path / "copies", 16), background)
        return [dataset[row]["image"] for row in range(3)]

    read("white")
    assert copies() == 2
    read("#000000")
    assert copies() == 4
    path = large_files.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"]
    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(path)
    assert read("white")[0].max() == 0
    assert copies() == 5


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_run(large_files, tmp_path):
    (tmp_path / "copies").write_text("a file")
    dataset = with_copies(large_files, ReducedCopies.for_training(tmp_path / "copies", 16))
    with pytest.warns(UserWarning, match="image_cache .* cannot be written"):
        images = [dataset[row]["image"] for row in range(3)]
    assert [min(image.shape[:2]) for image in images] == [32, 32, 20]


def test_a_run_records_whether_it_used_copies(tmp_path):
    """A run that is resumed without its copies, or with new ones, sees other pixels and reports it."""
    settings = [student_arguments(tmp_path, image_cache=cache).method_settings() for cache in (None, str(tmp_path))]
    assert [found["image_cache"] for found in settings] == [False, True]
