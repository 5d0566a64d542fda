"""Finds in seconds what a data set holds, what is missing and, on request, which images cannot be decoded."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import datasets
import numpy as np

from ..io import one_line
from .images import decode_all
from .labels import look_alikes
from .loading import subset_hash, training_counts
from .long_tail import ShotGroups, class_counts

NAMED = 5


class Benchmark(NamedTuple):
    """What a public benchmark should have before any subsampling."""

    classes: int
    train_images: int
    test_images: int


BENCHMARKS = {
    "uoft-cs/cifar10": Benchmark(10, 50_000, 10_000),
    "uoft-cs/cifar100": Benchmark(100, 50_000, 10_000),
    "imagenet_lt": Benchmark(1000, 115_846, 50_000),
    "inat18": Benchmark(8142, 437_513, 24_426),
    "places_lt": Benchmark(365, 62_500, 36_500),
}


@dataclass
class Report:
    """Lines to show, and what is wrong."""

    lines: dict[str, str]
    problems: list[str]


def check_data(
    name: str,
    kind: str,
    source: Mapping[str, datasets.Dataset],
    data: Mapping[str, datasets.Dataset],
    groups: ShotGroups,
    deep: bool = False,
) -> Report:
    """Looks at a data set.

    Args:
        name: Its name, to compare it with what a public benchmark should have.
        kind: What it was loaded as, in words.
        source: The splits as they were loaded.
        data: `train` and `test` as they are trained on.
        groups: Head, mid and tail.
        deep: Decode every image, on all cores, and look for images that are for training and for testing.

    Returns:
        What it is; without problems it can be trained on.

    Raises:
        ValueError: If a stream is to be decoded.
    """
    names = data["train"].features["label"].names
    counts = training_counts(data["train"])
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    in_groups = ", ".join(
        f"{group} {len(members):,} ({counts[members].sum():,} images)" for group, members in groups.items()
    )
    lines = {
        "source": kind,
        "splits": ", ".join(f"{split} {len(rows):,}" for split, rows in source.items()),
        "training images": f"{counts.sum():,} of {len(names):,} classes",
        "test images": f"{len(data['test']):,}",
        "largest class": f"{names[largest]}: {counts[largest]:,}",
        "smallest class": f"{names[smallest]}: {counts[smallest]:,} (imbalance ratio "
        f"{counts[largest] / counts[smallest]:.4g})",
        "groups": f"{in_groups}: {groups.rule}",
        "subset": f"sha256 {subset_hash(data['train'])}",
    }
    problems = [*_against_benchmark(name, source, len(names)), *_tests_of_classes(data["test"], names)]
    problems += [f"classes whose names look alike: {pair}" for pair in look_alikes(names)[:NAMED]]
    if len(names) > 2 and counts.max() == 1:
        problems.append("no class has more than one training image; are the labels those of classes?")
    if not isinstance(data["train"], datasets.Dataset):
        if deep:
            raise ValueError("a stream cannot be decoded beforehand; leave out --deep, and see --skip_bad_images.")
        return Report(lines, problems)
    problems += _paths(data)
    if deep:
        text, found = _decode_all(data)
        lines["decoded"] = text
        problems += found
    return Report(lines, problems)


def _against_benchmark(name: str, source: Mapping[str, datasets.Dataset], num_classes: int) -> Iterator[str]:
    wanted = BENCHMARKS.get(name)
    if wanted is None:
        return
    sizes = {split: len(rows) for split, rows in source.items()}
    test = sum(size for split, size in sizes.items() if split != "train")
    for what, found, expected in (
        ("classes", num_classes, wanted.classes),
        ("training images", sizes["train"], wanted.train_images),
        ("test images", test, wanted.test_images),
    ):
        if found != expected:
            yield f"{name} has {expected:,} {what}, but here are {found:,}"


def _tests_of_classes(test: datasets.Dataset, names: list[str]) -> Iterator[str]:
    untested = [names[label] for label in np.flatnonzero(class_counts(test["label"][:], len(names)) == 0)]
    if untested:
        yield f"{len(untested):,} classes have no test image: {_some(untested)}"


def _paths(data: datasets.DatasetDict) -> Iterator[str]:
    """Files that are empty, or there twice."""
    paths = {split: _stored_paths(rows) for split, rows in data.items()}
    known = {path: _status(path) for split in paths.values() for path in split.values()}
    broken = [path for path, status in known.items() if status is None]
    if broken:
        yield f"{len(broken):,} files cannot be opened (broken links?): {_some(broken)}"
    empty = [path for path, status in known.items() if status is not None and status.st_size == 0]
    if empty:
        yield f"{len(empty):,} files are empty: {_some(empty)}"

    def file_of(path: str) -> object:  # the same by any link to it
        status = known[path]
        return path if status is None else (status.st_dev, status.st_ino)

    tested = {file_of(path) for path in paths["test"].values()}
    both = sorted({path for path in paths["train"].values() if file_of(path) in tested})
    if both:
        yield f"{len(both):,} images are for training and for testing: {_some(both)}"
    labels_of: dict[object, list[int]] = {}
    labels = data["train"]["label"][:]
    for row, path in paths["train"].items():
        labels_of.setdefault(file_of(path), []).append(labels[row])
    first = {file_of(path): path for path in paths["train"].values()}
    twice = [first[file] for file, found in labels_of.items() if len(found) > 1]
    if twice:
        yield f"{len(twice):,} training images are listed more than once: {_some(twice)}"
    several = [first[file] for file, found in labels_of.items() if len(set(found)) > 1]
    if several:
        yield f"{len(several):,} training images are of several classes: {_some(several)}"


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _stored_paths(rows: datasets.Dataset) -> dict[int, str]:
    """Paths of the images that are files of their own, by row."""
    images = rows.select_columns("image").cast_column("image", datasets.Image(decode=False)).with_format("arrow")
    column = images[:].column("image").combine_chunks()
    stored = column.field("bytes").is_valid().to_pylist()
    pairs = zip(column.field("path").to_pylist(), stored, strict=True)
    return {row: path for row, (path, inside) in enumerate(pairs) if not inside and path is not None}


def _decode_all(data: datasets.DatasetDict) -> tuple[str, list[str]]:
    started, problems, seen = time.perf_counter(), [], {}
    for split, rows in data.items():
        results = decode_all(rows)
        bad = [error for error, _ in results if error is not None]
        if bad:
            problems.append(f"{len(bad):,} of {len(rows):,} {split} images: {'; '.join(bad[:NAMED])}")
        seen[split] = [digest for error, digest in results if error is None]
    both = len(set(seen["train"]) & set(seen["test"]))
    if both:
        problems.append(f"{both:,} images have the same bytes in training and testing")
    total = sum(map(len, data.values()))
    return f"{total:,} images, {total / (time.perf_counter() - started):,.0f} a second", problems


def _some(names: list[str]) -> str:
    return ", ".join(one_line(name, 100) for name in names[:NAMED]) + (", ..." if len(names) > NAMED else "")
