"""Checks a data set in seconds: contents, missing parts and, on request, images that cannot be decoded."""

import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import datasets
import numpy as np
from rich.markup import escape
from rich.table import Table

from ..io import one_line
from .images import ROWS_A_TASK, Decoded, decode_all, source_rows, under_several_labels
from .loading import subset_hash, training_counts
from .long_tail import ShotGroups, class_counts
from .sources.labels import look_alikes

NAMED = 5
CLASSES_SHOWN = 15  # at each end of a table of many classes


class Benchmark(NamedTuple):
    """Expected sizes of a public benchmark before any subsampling."""

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


def check_data(
    name: str,
    kind: str,
    source: Mapping[str, datasets.Dataset],
    data: Mapping[str, datasets.Dataset],
    groups: ShotGroups,
    deep: bool = False,
    background: str | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Checks a data set; returns lines that describe it, by their title, and its problems.

    Args:
        name: Name of the data set, for the comparison with a public benchmark of that name.
        kind: Description of the source that was loaded.
        source: The splits as they were loaded.
        data: The splits `train`, `test` and, if there is one, `validation` that training uses.
        groups: Head, mid and tail classes.
        deep: Decode every image, on all cores, and search for identical images in training and testing.
        background: See [`EncodedImage`].

    Raises:
        ValueError: If `deep` is set for a stream.
    """
    names = data["train"].features["label"].names
    counts = training_counts(data["train"])
    lines = {"source": kind} | _description(source, data, groups, counts)
    problems = [*_against_benchmark(name, source, len(names)), *_tests_of_classes(data["test"], names)]
    problems += [f"classes whose names look alike: {pair}" for pair in look_alikes(names)[:NAMED]]
    if len(names) > 2 and counts.max() == 1:
        problems.append("no class has more than one training image; does the label column really hold classes?")
    if not isinstance(data["train"], datasets.Dataset):
        if deep:
            raise ValueError("a stream cannot be decoded beforehand; leave out --deep, and see --skip_bad_images.")
        return lines, problems
    problems += _paths(data)
    if deep:
        found, wrong = _decode_all(data, background)
        lines |= found
        problems += wrong
    return lines, problems


def _description(
    source: Mapping[str, datasets.Dataset], data: Mapping[str, datasets.Dataset], groups: ShotGroups, counts: np.ndarray
) -> dict[str, str]:
    """Numbers of splits, classes and groups, by title."""
    names = data["train"].features["label"].names
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    in_groups = ", ".join(
        f"{group} {len(members):,} ({counts[members].sum():,} images)" for group, members in groups.items()
    )
    return {
        "splits": ", ".join(f"{split} {len(rows):,}" for split, rows in source.items()),
        "training images": f"{counts.sum():,} of {len(names):,} classes",
        **({"validation": f"{len(data['validation']):,} images"} if "validation" in data else {}),
        "test images": f"{len(data['test']):,}",
        "largest class": f"{names[largest]}: {counts[largest]:,}",
        "smallest class": f"{names[smallest]}: {counts[smallest]:,} (imbalance ratio "
        f"{counts[largest] / counts[smallest]:.4g})",
        "groups": f"{in_groups}: {groups.rule}",
        "subset": f"sha256 {subset_hash(data['train'])}",
    }


def class_table(data: Mapping[str, datasets.Dataset], groups: ShotGroups) -> Table:
    """Training and test images of each class, the largest class first; of many classes, the first and the last."""
    names = data["train"].features["label"].names
    counts, tested = training_counts(data["train"]), class_counts(data["test"]["label"][:], len(names))
    group_of = {int(label): group for group, members in groups.items() for label in members}
    order = np.argsort(-counts, kind="stable")
    left_out = len(order) - 2 * CLASSES_SHOWN
    table = Table()
    for column in ("class", "training images", "test images", "group"):
        table.add_column(column, justify="right" if "images" in column else "left", overflow="fold")
    for place, label in enumerate(order.tolist()):
        if left_out <= 1 or not CLASSES_SHOWN <= place < len(order) - CLASSES_SHOWN:
            table.add_row(escape(names[label]), f"{counts[label]:,}", f"{tested[label]:,}", group_of.get(label, ""))
        elif place == CLASSES_SHOWN:
            table.add_row(f"... ({left_out:,} more)")
    return table


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
            yield f"{name} has {expected:,} {what}, but this data set has {found:,}"


def _tests_of_classes(test: datasets.Dataset, names: list[str]) -> Iterator[str]:
    untested = [names[label] for label in np.flatnonzero(class_counts(test["label"][:], len(names)) == 0)]
    if untested:
        yield f"{len(untested):,} classes have no test image: {_some(untested)}"


def _paths(data: datasets.DatasetDict) -> Iterator[str]:
    """Finds images without bytes and path, and files that are empty, unreadable or listed twice."""
    paths = {}
    for split, rows in data.items():
        paths[split], absent = _stored_paths(rows)
        if absent:
            numbers = _some(map(str, source_rows(rows)[absent]))
            yield f"{len(absent):,} {split} images are empty, without bytes and path: rows {numbers}"
    known = {path: _status(path) for split in paths.values() for path in split.values()}
    broken = [path for path, status in known.items() if status is None]
    if broken:
        yield f"{len(broken):,} files cannot be read (broken links, no permission, or not files): {_some(broken)}"
    empty = [path for path, status in known.items() if status is not None and status.st_size == 0]
    if empty:
        yield f"{len(empty):,} files are empty: {_some(empty)}"

    def file_of(path: str) -> object:  # by device and inode, since different links can lead to the same file
        status = known[path]
        return path if status is None else (status.st_dev, status.st_ino)

    tested = {file_of(path) for path in paths["test"].values()}
    both = sorted({path for path in paths["train"].values() if file_of(path) in tested})
    if both:
        yield f"{len(both):,} images are in both the training and the test split: {_some(both)}"
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
        yield f"{len(several):,} training images have several classes: {_some(several)}"


def _status(path: str) -> os.stat_result | None:
    """The status of a regular file; None if it cannot be read, or is a folder, a pipe or a device."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found if stat.S_ISREG(found.st_mode) and os.access(path, os.R_OK) else None


def _stored_paths(rows: datasets.Dataset) -> tuple[dict[int, str], list[int]]:
    """Paths of the images that are stored as files, by row, and the rows that have neither bytes nor a path."""
    images = rows.select_columns("image").cast_column("image", datasets.Image(decode=False)).with_format("arrow")
    paths, empty = {}, []
    for start, batch in enumerate(images.iter(ROWS_A_TASK)):
        cells = batch.column("image").combine_chunks()
        # `flatten` makes the fields null where the whole cell is null.
        parts = dict(zip((field.name for field in cells.type), cells.flatten(), strict=True))
        found = zip(parts["bytes"].is_valid().to_pylist(), parts["path"].to_pylist(), strict=True)
        for row, (inside, path) in enumerate(found, start=start * ROWS_A_TASK):
            if path and not inside:
                paths[row] = path
            elif not inside:
                empty.append(row)
    return paths, empty


def _decode_all(data: datasets.DatasetDict, background: str | None) -> tuple[dict[str, str], list[str]]:
    started, problems, seen = time.perf_counter(), [], {}
    readable: list[Decoded] = []
    for split, rows in data.items():
        results = decode_all(rows, background)
        readable += [result for result in results if result.error is None]
        bad = [result.error for result in results if result.error is not None]
        if bad:
            problems.append(f"{len(bad):,} of {len(rows):,} {split} images: {'; '.join(bad[:NAMED])}")
        seen[split] = [result.digest for result in results if result.error is None]
        if several := under_several_labels(results, rows["label"][:]):
            names = _some(_stored_paths(rows)[0].get(row, f"row {source_rows(rows)[row]}") for row in several)
            problems.append(f"{len(several):,} {split} images have the same bytes as one of another class: {names}")
    both = len(set(seen["train"]) & set(seen["test"]))
    if both:
        problems.append(f"{both:,} images have the same bytes in training and testing")
    total = sum(map(len, data.values()))
    lines = {"decoded": f"{total:,} images, {total / (time.perf_counter() - started):,.0f} a second"}
    transparent = sum(result.is_transparent for result in readable)
    flat = sum(result.is_flat for result in readable)
    if transparent:
        how = "ignored; use --background white to composite over white" if background is None else f"over {background}"
        lines["transparency"] = f"in {transparent:,} images, {how}"
    if flat:
        of_these = sum(result.is_flat and result.is_transparent for result in readable)
        lines["one flat colour"] = f"{flat:,} images, {of_these:,} with transparency"
    frames = sum(result.has_frames for result in readable)
    if frames:
        lines["several frames"] = f"in {frames:,} images; only the first frame is read"
    return lines, problems


def _some(names: Iterable[str]) -> str:
    names = [one_line(name) for name in names]
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
