"""Tests of long-tailed subsets, class groups, image sources and transforms."""

import logging
import random

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform
from transformers import ConvNextImageProcessor, ViTImageProcessor

from deitlt_hf.data import (
    ImageCollator,
    ImageDataset,
    class_counts,
    find_columns,
    image_processor,
    load_long_tailed,
    loading,
    long_tailed_indices,
    shot_groups,
    train_transform,
    weak_transform,
)
from deitlt_hf.data.images import decode_all
from deitlt_hf.data.loading import training_counts
from deitlt_hf.data.sampling import TrainBatches, class_balanced_order, seed_streams
from deitlt_hf.data.transforms import ImageFormat, resize_and_renormalize
from deitlt_hf.recipes import DataArguments
from deitlt_hf.recipes.sections import without_folders
from helpers import save_image, seed_all, write_idx

RANDOM = np.random.RandomState(0)

# ---- Subsets and groups ----


@given(
    num_classes=st.integers(2, 12),
    per_class=st.integers(20, 60),
    ratio=st.floats(1, 20),
    kind=st.sampled_from(["exp", "step"]),
    seed=st.integers(0, 5),
)
@example(num_classes=2, per_class=39, ratio=1.3, kind="exp", seed=0)
@settings(deadline=None, max_examples=60)
def test_long_tailed_subsets_of_balanced_data(num_classes, per_class, ratio, kind, seed):
    labels = np.random.RandomState(seed).permutation(np.repeat(np.arange(num_classes), per_class))
    indices = long_tailed_indices(labels, num_classes, ratio, kind, seed)
    counts = class_counts(labels[indices], num_classes)
    assert len(set(indices.tolist())) == len(indices)
    assert indices.dtype == np.int64
    assert np.all(np.diff(counts) <= 0)
    assert counts[0] == per_class
    assert abs(counts[-1] - per_class / ratio) <= 1  # the authors round per_class * (1 / ratio) down: 39, 1.3 gives 29
    assert np.array_equal(indices, long_tailed_indices(labels, num_classes, ratio, kind, seed))


def test_subset_depends_on_seed_and_max_per_class():
    labels = np.repeat(np.arange(4), 50)
    first, second = (long_tailed_indices(labels, 4, 10, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert class_counts(labels[long_tailed_indices(labels, 4, 10, max_per_class=20)]).tolist() == [20, 9, 4, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"imbalance_ratio": 0.01}, "must be at least 1, got 0.01; for the inverse flag"),
        ({"imbalance_ratio": float("nan")}, "must be at least 1, got nan"),
        ({"imbalance_ratio": 10, "imbalance_type": "linear"}, "imbalance_type must be one of exp, step"),
        ({"imbalance_ratio": 1000}, "class 2 would get no image .*imbalance_ratio 1000"),
        ({"imbalance_ratio": 2, "num_classes": 5}, r"class 4 would get no image \(it has 0"),
    ],
)
def test_invalid_long_tailed_subsets_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        long_tailed_indices(np.repeat(np.arange(4), 50), **{"num_classes": 4, **values})


@pytest.mark.parametrize(
    ("counts", "values", "message"),
    [
        (
            [500] * 10,
            {"imbalance_ratio": 100, "max_per_class": 600},
            "class 0 has 500 .* takes 600 of it; set max_per_class to 500,",
        ),
        (
            [20, 100, 100],
            {"imbalance_ratio": 2},
            "class 0 has 20 images, but .* with 73.3333 .* takes 73 of it; .* to 20,",
        ),
        ([100, 20, 100], {"imbalance_ratio": 4, "imbalance_type": "step"}, None),
        ([100, 24, 9], {"imbalance_ratio": 4, "max_per_class": 50}, "class 1 has 24 .* takes 25 of it; .* to 36,"),
        ([100, 24, 9], {"imbalance_ratio": 4, "max_per_class": 36}, None),
    ],
)
def test_an_imbalance_beyond_the_data_is_refused(counts, values, message):
    """A ratio that the data cannot provide is refused; no smaller largest class or other ratio is used instead."""
    labels = np.repeat(np.arange(len(counts)), counts)
    if message is None:
        long_tailed_indices(labels, len(counts), **values)
    else:
        with pytest.raises(ValueError, match=message):
            long_tailed_indices(labels, len(counts), **values)


@pytest.mark.parametrize("kind", ["exp", "step"])
@pytest.mark.parametrize("ratio", [1, 5, 20])
def test_data_that_are_nearly_balanced_may_lack_some_images(kind, ratio):
    """Nearly balanced data may lack a few images: scikit-learn's digits have 116 to 122 training images a class."""
    counts = training_counts(load_long_tailed("digits", imbalance_ratio=ratio, imbalance_type=kind)["train"])
    assert counts.max() == 119
    assert counts[0] >= 0.95 * 119


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.data())
def test_groups_partition_the_classes_by_count(counts, data):
    ends = sorted(data.draw(st.tuples(st.integers(0, len(counts)), st.integers(0, len(counts)))))
    for boundaries, rule in ((None, "shots"), (None, "auto"), (None, "thirds"), (ends, "auto")):
        groups = shot_groups(counts, boundaries, rule)
        assert list(groups) == ["head", "mid", "tail"]
        order = np.concatenate(list(groups.values()))
        assert sorted(order.tolist()) == list(range(len(counts)))
        assert np.all(np.diff(np.asarray(counts)[order]) <= 0)
        sizes = [len(group) for group in groups.values()]
        if rule == "shots" or "training images" in groups.rule:
            assert all(counts[label] > 100 for label in groups["head"])
            assert all(20 <= counts[label] <= 100 for label in groups["mid"])
            assert all(counts[label] < 20 for label in groups["tail"])
            assert rule == "shots" or min(sizes) > 0
        elif boundaries is None:
            assert max(sizes) - min(sizes) <= 1
            assert sizes[0] > 0 or len(counts) < 2
        else:
            assert sizes == [ends[0], ends[1] - ends[0], len(counts) - ends[1]]


@pytest.mark.parametrize("boundaries", [[7, 3], [3], [3, 11], [-1, 2]])
def test_invalid_group_boundaries_are_refused(boundaries):
    with pytest.raises(ValueError, match="two increasing positions among 10 classes"):
        shot_groups(range(10), boundaries)


def test_an_unknown_group_rule_is_refused():
    with pytest.raises(ValueError, match="group_rule must be one of auto, shots, thirds, got 'halves'"):
        shot_groups(range(10), rule="halves")


# ---- Sources ----


def write_folder(folder, splits=("train", "test"), classes=("cat", "dog", "eel"), images=4, size=(12, 10)):
    for split in splits:
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(images):
                pixels = RANDOM.randint(0, 60, (*size, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder


def test_digits_are_those_of_scikit_learn():
    bunch = load_digits()
    indices = train_test_split(range(len(bunch.target)), test_size=600, stratify=bunch.target, random_state=0)
    data = load_long_tailed("digits")
    for split, chosen in zip(("train", "test"), indices, strict=True):
        assert data[split]["label"] == bunch.target[chosen].tolist()
        pixels = np.stack([np.asarray(image) for image in data[split]["image"]])
        np.testing.assert_array_equal(pixels, np.round(bunch.images[chosen] * (255 / 16)))


def test_digits_are_embedded_and_their_test_split_is_complete(digits):
    assert digits["train"].features["label"].names == [str(digit) for digit in range(10)]
    assert class_counts(digits["train"]["label"]).tolist() == [60, 46, 35, 27, 21, 16, 12, 10, 7, 6]
    assert class_counts(digits["test"]["label"]).min() >= 55
    whole = load_long_tailed("digits")["train"]
    row = digits["train"][5]
    assert whole[row["source_index"]]["label"] == row["label"]
    assert np.array_equal(np.asarray(whole[row["source_index"]]["image"]), np.asarray(row["image"]))


def test_image_folder(tmp_path):
    data = load_long_tailed(data_dir=str(write_folder(tmp_path)))
    assert data["train"].features["label"].names == ["cat", "dog", "eel"]
    assert {split: len(rows) for split, rows in data.items()} == {"train": 12, "test": 12}
    pixels = np.asarray(data["train"][11]["image"])
    assert pixels.shape == (12, 10, 3)
    assert pixels.min() >= 120


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(tmp_path, compress):
    data = load_long_tailed("names", str(write_idx(tmp_path, compress)), imbalance_ratio=5, class_names=["a", "b", "c"])
    assert data["train"].features["label"].names == ["a", "b", "c"]
    assert class_counts(data["train"]["label"]).tolist() == [10, 4, 2]
    assert len(data["test"]) == 30


def test_saved_data_set_and_hub_layout(tmp_path):
    """A folder of parquet files is read like a Hub id; its columns may have other names, as those of CIFAR-100."""
    rows = {
        "img": [Image.fromarray(RANDOM.randint(0, 256, (6, 6, 3)).astype(np.uint8)) for _ in range(12)],
        "fine_label": [0, 1, 2] * 4,
        "coarse_label": [0, 1, 1] * 4,
    }
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["a", "b", "c"]),
            "coarse_label": datasets.ClassLabel(names=["x", "y"]),
        }
    )
    data = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(rows, features) for split in ("train", "validation")}
    )
    (tmp_path / "hub").mkdir()
    for split, part in data.items():
        part.to_parquet(tmp_path / "hub" / f"{split}-00000.parquet")
    data.save_to_disk(tmp_path / "disk")
    for source in ({"dataset": str(tmp_path / "hub")}, {"dataset": "any", "data_dir": str(tmp_path / "disk")}):
        with pytest.raises(ValueError, match=r"2 columns have type ClassLabel; .* fine_label"):
            load_long_tailed(**source)
        loaded = load_long_tailed(**source, label_column="fine_label")
        assert loaded["train"].column_names == ["image", "label", "source_index"]
        assert loaded["test"].features["label"].names == ["a", "b", "c"]
        with pytest.raises(ValueError, match="no label column 'labels'; the columns are img"):
            load_long_tailed(**source, label_column="labels")


@pytest.mark.parametrize(
    ("splits", "classes", "values", "message"),
    [
        (
            ("train",),
            ("cat", "dog"),
            {},
            "the splits are train.* or give test_fraction",
        ),
        (("train", "test"), ("cat",), {}, r"the data have 1 class \(cat\)"),
        (("train", "test"), ("cat", "dog"), {"class_names": ["a"]}, "class_names has 1 names but the data have 2"),
        (("train", "test"), ("cat", "dog"), {"imbalance_ratio": 99}, "class 1 would get no image"),
        (("train", "test"), ("cat", "dog"), {"test_split": "dev"}, r"no test \(dev\) split"),
    ],
)
def test_unusable_folders_are_refused(tmp_path, splits, classes, values, message):
    write_folder(tmp_path, splits, classes)
    with pytest.raises(ValueError, match=message):
        load_long_tailed(data_dir=str(tmp_path), **values)


def test_splits_with_different_classes_are_refused(tmp_path):
    write_folder(tmp_path, ("train",), ("cat", "dog"))
    write_folder(tmp_path, ("test",), ("cat", "eel"))
    with pytest.raises(ValueError, match="classes without a training image: eel"):
        load_long_tailed(data_dir=str(tmp_path))

    def split(names):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [Image.new("RGB", (4, 4))] * 2, "label": [0, 1]}
        return datasets.Dataset.from_dict(rows, features)

    data = datasets.DatasetDict({"train": split(["cat", "dog"]), "test": split(["cat", "eel"])})
    data.save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match=r"classes that the training split does not have: 'eel'"):
        load_long_tailed(data_dir=str(tmp_path / "disk"))


def test_a_test_split_without_labels_is_refused(tmp_path):
    """A test split without labels is refused; ImageNet's test split on the Hub has the label -1 everywhere."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    image = Image.new("RGB", (4, 4))
    splits = {"train": [0, 1], "test": [-1, -1], "validation": [1, 0]}
    data = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"image": [image] * 2, "label": labels}, features)
            for name, labels in splits.items()
        }
    )
    data.save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match=r"the test split: 2 of 2 images have no label \(-1\)"):
        load_long_tailed(data_dir=str(tmp_path / "disk"))
    assert load_long_tailed(data_dir=str(tmp_path / "disk"), test_split="validation")["test"]["label"][:] == [1, 0]


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_long_tailed(data_dir=str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="has no files"):
        load_long_tailed(data_dir=str(tmp_path))


def test_broken_idx_files_are_refused(tmp_path):
    write_idx(tmp_path, compress=False)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:-3])
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte should hold"):
        load_long_tailed(data_dir=str(tmp_path))
    labels.write_bytes(b"\x00\x00\x0d\x01" + content[4:])
    with pytest.raises(ValueError, match="is not an IDX file of unsigned bytes"):
        load_long_tailed(data_dir=str(tmp_path))
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="neither t10k-labels-idx1-ubyte nor"):
        load_long_tailed(data_dir=str(tmp_path))


# ---- Images ----


def test_unreadable_image_is_named_or_skipped_and_counted(tmp_path, caplog):
    write_folder(tmp_path)
    bad = tmp_path / "train" / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    data = load_long_tailed(data_dir=str(tmp_path))
    rows = ImageDataset(data["train"], "image", "label")
    index = data["train"]["label"].index(1) + 2
    with pytest.raises(ValueError, match=r"cannot read the image .*dog/2\.png: .*--skip_bad_images"):
        rows[index]
    with caplog.at_level(logging.WARNING):
        kept = load_long_tailed(data_dir=str(tmp_path), skip_bad_images=True)
    assert len(kept["train"]) == 11
    assert "train split: left out 1 unreadable images of 12" in caplog.text
    for row in range(11):
        ImageDataset(kept["train"], "image", "label")[row]


def test_views_and_collator(digits):
    processor = image_processor(16)
    views = {"pixel_values": train_transform(processor, "padded"), "teacher_pixel_values": weak_transform(processor)}
    rows = ImageDataset(digits["train"], *find_columns(digits["train"]), views)
    batch = ImageCollator(processor)([rows[index] for index in range(4)])
    assert batch["pixel_values"].shape == batch["teacher_pixel_values"].shape == (4, 16, 16, 3)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].tolist() == digits["train"]["label"][:4]
    plain = ImageDataset(digits["train"], "image", "label")
    batch = ImageCollator(processor)([plain[index] for index in range(4)])
    expected = processor(digits["train"][2]["image"].convert("RGB"), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(batch["pixel_values"][2], expected)


# ---- Transforms ----


def test_evaluation_resizes_and_crops_like_the_paper():
    processor = image_processor(224)
    assert processor.size["shortest_edge"] == 256
    image = Image.fromarray(RANDOM.randint(0, 256, (300, 500, 3)).astype(np.uint8))
    pixel_values = processor(image, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 224, 224)
    timm_transform = create_transform(224, interpolation="bicubic", crop_pct=224 / 256)
    # Pillow rounds to whole grey levels between its two resize passes; torchvision does not.
    assert (pixel_values[0] - timm_transform(image)).abs().mean() < 0.02


def test_strongest_augmentation_does_not_crash():
    """The strongest augmentation does not crash.

    timm's implementation of the paper's policy raises `ValueError` after some hundred images, when it draws 0 bits.
    """
    transform = train_transform(image_processor(16), "padded", auto_augment="rand-m10-mstd0.5-inc1")
    image = Image.fromarray(RANDOM.randint(0, 256, (16, 16, 3)).astype(np.uint8))
    seed_all(0)
    for _ in range(1500):
        assert torch.isfinite(transform.finish(transform(image)[None])).all()


def test_padded_crop_keeps_the_aspect_ratio():
    """The padded crop keeps the aspect ratio.

    Squeezing wide images in training only would train on other shapes than those of evaluation.
    """
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    transform = train_transform(image_processor(16), "padded", auto_augment=None, hflip=0, random_erasing=0)
    slopes = transform(image)[8, :, 0].float().diff()
    assert torch.isclose(slopes, torch.tensor(1.0), atol=0.05).sum() >= 12


def test_color_jitter_changes_brightness_but_no_shape():
    transform = train_transform(
        image_processor(16), "random_resized", auto_augment=None, hflip=0, random_erasing=0, color_jitter=0.4
    )
    image = Image.new("RGB", (16, 16), (100, 100, 100))
    torch.manual_seed(0)
    middles = torch.stack([transform(image)[8, 8].float() for _ in range(50)])
    assert 59 <= middles.min() < 75
    assert 125 < middles.max() <= 141


def test_unknown_crop_and_small_resize_are_refused():
    with pytest.raises(ValueError, match="train_crop must be one of random_resized, padded, got 'centre'"):
        train_transform(image_processor(16), "centre")
    with pytest.raises(ValueError, match="square, but the image processor makes 16 x 12 px"):
        train_transform(ViTImageProcessor(size={"height": 12, "width": 16}))
    with pytest.raises(ValueError, match="resized to 10 and cropped to image_size 16"):
        image_processor(16, 10)


def test_renormalising_equals_normalising_with_the_new_values():
    raw = torch.rand(2, 3, 16, 16)
    old, new = ([0.5, 0.4, 0.3], [0.2, 0.2, 0.3]), ([0.1, 0.2, 0.3], [0.5, 1.0, 0.7])
    normalised = [
        (raw - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1) for mean, std in (old, new)
    ]
    source, target = (ImageFormat((16, 16), *pair) for pair in (old, new))
    torch.testing.assert_close(resize_and_renormalize(normalised[0], source, target), normalised[1])
    assert resize_and_renormalize(raw, source, ImageFormat((8, 6), *old)).shape == (2, 3, 8, 6)
    assert resize_and_renormalize(raw, source, source) is raw


@pytest.mark.parametrize(
    "processor",
    [
        image_processor(16, 20, [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]),
        ViTImageProcessor(size={"height": 12, "width": 16}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.3]),
        ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=1.0),
        ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False),
        ViTImageProcessor(size={"height": 16, "width": 16}, rescale_factor=1 / 127.5, image_mean=[1.0] * 3),
        ViTImageProcessor(size={"height": 16, "width": 16}, do_rescale=False, image_mean=[100.0] * 3),
    ],
    ids=["deit", "rectangle", "convnext", "not normalised", "to 2", "not rescaled"],
)
def test_format_of_a_processor(processor):
    """The format found for an image processor is that of the images that it makes, however its settings express it."""
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = processor(images, return_tensors="pt").pixel_values
    form = ImageFormat.of(processor)
    assert form.size == expected.shape[-2:]
    if form.size == (16, 16) and not getattr(processor, "do_center_crop", False):
        plain = ImageFormat((16, 16), (0.0,) * 3, (1.0,) * 3)
        torch.testing.assert_close(resize_and_renormalize(images / 255, plain, form), expected)


def test_format_of_a_processor_without_a_size():
    with pytest.raises(ValueError, match="has no height and width for its images"):
        ImageFormat.of(ViTImageProcessor(size={"longest_edge": 16}))


# ---- Order of the images ----


def steps_of(arrangement, images, repeats, epoch, seed=0):
    """The draws of each optimiser step, over all processes and micro-batches."""
    processes, batch_size, micro_batches = arrangement
    ranks = [
        TrainBatches(images, batch_size, rank, processes, micro_batches, num_repeats=repeats, seed=seed)
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.set_epoch(epoch)
    batches = [[draw for batch in batches for draw in batch] for batches in zip(*ranks, strict=True)]
    assert len(batches) == len(ranks[0])
    return [
        [draw for batch in batches[start : start + micro_batches] for draw in batch]
        for start in range(0, len(batches), micro_batches)
    ]


@given(images=st.integers(256, 1200), repeats=st.integers(1, 4), epoch=st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_a_step_does_not_depend_on_processes_and_micro_batches(images, repeats, epoch):
    """A step has the same images and augmentation seeds for any number of processes and micro-batches.

    An epoch has the same number of steps, too.
    """
    alone = steps_of((1, 24, 1), images, repeats, epoch)
    for arrangement in ((2, 12, 1), (1, 8, 3), (3, 8, 1), (2, 3, 4)):
        spread = steps_of(arrangement, images, repeats, epoch)
        assert [sorted(step) for step in spread] == [sorted(step) for step in alone]
    draws = [draw for step in alone for draw in step]
    counts = class_counts([index for index, _ in draws])
    assert counts.max() <= repeats
    assert len({seed for _, seed in draws}) == len(draws)  # copies of an image have different augmentation seeds
    kept = images if repeats == 1 else images // 256 * 256
    assert kept - 24 < len(draws) <= kept


@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=8), epoch=st.integers(0, 50))
@settings(deadline=None, max_examples=40)
def test_balanced_classes_appear_equally_often_and_use_all_their_images(counts, epoch):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = class_balanced_order(labels, epoch)
    assert len(order) == len(labels)
    drawn = np.bincount(labels[order], minlength=len(counts))
    assert np.ptp(drawn) <= 1
    of_images = np.bincount(order, minlength=len(labels))
    for label, number in enumerate(counts):
        of_class = of_images[labels == label]
        assert np.ptp(of_class) <= 1
        assert (of_class > 0).sum() == min(number, drawn[label])


def test_balanced_steps_do_not_depend_on_processes_and_change_with_epoch_and_seed():
    labels = np.repeat([0, 1, 2], [90, 20, 4])

    def steps(processes, epoch=0, seed=0):
        ranks = [
            TrainBatches(114, 12 // processes, rank, processes, seed=seed, balanced_labels=labels)
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.set_epoch(epoch)
        return [sorted(draw for batch in batches for draw in batch) for batches in zip(*ranks, strict=True)]

    assert steps(1) == steps(2) == steps(3)
    assert steps(1) == steps(1)
    assert steps(1) != steps(1, epoch=1)
    assert steps(1) != steps(1, seed=1)
    draws = [draw for step in steps(1) for draw in step]
    assert len({seed for _, seed in draws}) == len(draws) == 108  # copies of an image are augmented differently
    with pytest.raises(ValueError, match="needs --repeated_augmentation 1"):
        TrainBatches(300, 12, num_repeats=3, balanced_labels=np.zeros(300, int))


def test_copies_of_an_image_are_distributed_over_the_processes():
    first, second = (
        {index for batch in TrainBatches(300, 16, rank, 2, num_repeats=2) for index, _ in batch} for rank in range(2)
    )
    assert first == second


@pytest.mark.parametrize("repeats", [1, 3])
def test_order_and_augmentation_depend_on_epoch_and_seed(repeats):
    draws = [
        tuple(draw for step in steps_of((1, 16, 1), 300, repeats, epoch, seed) for draw in step)
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert draws[0] == draws[3]
    for other in draws[1:3]:
        assert [index for index, _ in other] != [index for index, _ in draws[0]]
        assert {seed for _, seed in other}.isdisjoint(seed for _, seed in draws[0])


def test_fewer_images_than_a_batch_make_one_step():
    """Fewer images than a batch still make one step; an epoch without a step would never end."""
    assert len(steps_of((1, 16, 8), 100, 1, 0)) == 1
    assert len(TrainBatches(100, 16, micro_batches=8)) == 6
    assert len(TrainBatches(100, 16, micro_batches=4)) == 4


def test_repeated_augmentation_refuses_small_data():
    with pytest.raises(ValueError, match="rounds of 256 images, but the training set has only 255"):
        TrainBatches(255, 16, num_repeats=3)


def test_all_random_streams_are_seeded():
    def numbers():
        return random.random(), np.random.rand(), torch.rand(1).item()

    found = []
    for key in ((1, 2), (1, 2), (2, 1), (7,)):
        seed_streams(*key)
        found.append(numbers())
    assert found[0] == found[1]
    assert len({value for values in found[1:] for value in values}) == 9


def test_records_contain_no_paths_of_this_machine(tmp_path, monkeypatch):
    """Records contain no paths of this machine, because they are published with the model."""
    (tmp_path / "data" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text, published in (
        (str(tmp_path / "photos"), "photos"),
        ("~/photos", "photos"),
        ("../somebody/photos", "photos"),
        ("data/photos", "photos"),
        ("org/photos", "org/photos"),
        ("digits", "digits"),
        ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
    ):
        assert without_folders(text) == published
    local, hub = (DataArguments(dataset=name).record() for name in ("data/photos", "org/photos"))
    assert (local["dataset"], local["local_files"]) == ("photos", True)
    assert (hub["dataset"], hub["local_files"]) == ("org/photos", False)


def test_unreadable_files_are_looked_for_once_in_a_process(tmp_path, monkeypatch, caplog):
    for split in ("train", "test"):
        for name in ("a", "b"):
            for index in range(3):
                save_image(tmp_path / split / name / f"{index}.png", index)
    broken = tmp_path / "train" / "a" / "0.png"
    broken.write_bytes(b"nothing")
    decoded = []
    monkeypatch.setattr(loading, "decode_all", lambda rows: decoded.append(len(rows)) or decode_all(rows))

    def train_images():
        return len(load_long_tailed("imagefolder", str(tmp_path), skip_bad_images=True)["train"])

    assert [train_images(), train_images()] == [5, 5]
    assert decoded == [6, 6], "the second load decodes no split again"
    assert caplog.text.count("left out: cannot read the image") == 1
    save_image(broken, 0)
    assert train_images() == 6
