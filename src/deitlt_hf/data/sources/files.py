"""Images that are files: finding them, the splits that their names and folders say, and data sets of their paths.

No image is opened here.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from PIL import Image

from ...io import one_line
from ..image_rule import FORMATS

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "validation", "valid", "val", "eval", "dev")
MISSING_NAMED = 3
KINDS_NAMED = 8


class Split(NamedTuple):
    """Paths and labels of the images of a split."""

    paths: list[str]
    labels: Sequence | np.ndarray

    def dataset(self, names: Sequence[str]) -> datasets.Dataset:
        """Makes the data set without opening the image files.

        Raises:
            ValueError: If the name of a file or class is not valid UTF-8.
        """
        for text in (*names, *self.paths):
            try:
                text.encode()
            except UnicodeEncodeError as error:  # a file name of other bytes, which pyarrow refuses without naming it
                message = f"the name {one_line(ascii(text))} is not valid UTF-8; rename the file or folder."
                raise ValueError(message) from error
        features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"image": self.paths, "label": self.labels}, features=features)
        return rows.cast_column("image", datasets.Image())


def find_split(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """Finds the first of `wanted` that is in `names`, ignoring case, and returns it as spelled in `names`."""
    by_lower = {name.lower(): name for name in sorted(names, reverse=True)}
    return next((by_lower[name.lower()] for name in wanted if name.lower() in by_lower), None)


def images_below(
    folder: str | Path, seen: set[tuple[int, int]] | None = None, others: Counter[str] | None = None
) -> list[str]:
    """Lists the paths of the image files in and below a folder, sorted.

    Each folder is visited once, since links can form cycles. A link to an image file that is also listed itself is left
    out. Folders in `seen`, by device and inode, are skipped. `others` counts other files, by suffix.

    Raises:
        ValueError: If a path with the suffix of an image is a pipe or a device (reading it may never end).
    """
    seen = set(seen or ())
    found, links, folders = [], [], [str(folder)]
    linked: list[str] = []
    while folders or linked:
        # Links last: a folder that is also below without a link is then listed under its real path.
        place = folders.pop() if folders else linked.pop()
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        linked.sort(reverse=True)
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir():
                    (linked if entry.is_symlink() else folders).append(entry.path)
                elif is_image(entry.name):
                    if entry.is_symlink():
                        links.append(entry.path)
                    elif entry.is_file():
                        found.append(entry.path)
                    else:
                        raise ValueError(f"{entry.path} is not a file (a pipe or device?); remove it.")
                elif others is not None and not entry.name.startswith("."):
                    others[os.path.splitext(entry.name)[1].lower()] += 1
    real = {os.path.realpath(path) for path in found} if links else set()  # slow for millions of files, so on demand
    for path in sorted(links):
        target = os.path.realpath(path)
        if os.path.exists(target) and not os.path.isfile(target):
            raise ValueError(f"{path} is a link to something that is not a file ({target}); remove it.")
        if target not in real:
            real.add(target)
            found.append(path)
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an accepted format and is not hidden. The file is not opened."""
    Image.init()
    return not name.startswith(".") and Image.EXTENSION.get(os.path.splitext(name)[1].lower()) in FORMATS


def not_read(suffixes: Mapping[str, int]) -> str:
    """Message about files without the suffix of an image, counted by suffix."""
    kinds = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    counted = ", ".join(
        f"{number} {one_line(suffix, 20) or 'without a suffix'}" for suffix, number in kinds[:KINDS_NAMED]
    )
    heif = "; 'pip install pillow-heif' makes .heic readable" if {".heic", ".heif"} & set(suffixes) else ""
    return (
        f"files that are not read: {counted}{', ...' if len(kinds) > KINDS_NAMED else ''}; images among them must be "
        f"converted to {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, with such a suffix{heif}"
    )


def divided(split: Split, parts: Sequence[str] | None) -> dict[str, Split]:
    """Divides a split by the part of each row; without parts everything is `train`."""
    if parts is None:
        return {"train": split}
    rows: dict[str, list] = {part: [] for part in parts}
    for part, row in zip(parts, zip(split.paths, split.labels, strict=True), strict=True):
        rows[part].append(row)
    return {part: Split([path for path, _ in found], [label for _, label in found]) for part, found in rows.items()}


def split_of(name: str, exactly: bool = False) -> str | None:
    """Finds the split that the name of a file or folder contains as a word: `train`, the name of a test split, or None.

    With `exactly`, words that only begin like a split, such as `trainset` or `testdata`, do not count.
    """
    words = re.split(r"[^a-z]+", name.lower())
    if any(word in TRAIN_NAMES if exactly else word.startswith("train") for word in words):
        return "train"
    exact = next((word for word in words if word in TEST_NAMES), None)
    if exact is not None or exactly:
        return exact
    return next((start for word in words for start in ("test", "valid") if word.startswith(start)), None)


def splits_by_folder(paths: Sequence[str], source: str) -> list[str] | None:
    """Finds the split of each path of a single list by its folders, such as `train/` and `val/`; None without splits.

    Raises:
        ValueError: If only some paths are below a folder that is named like a test split, and the others are not below
            a folder of a split. The message names the `source` of the paths.
    """
    places = {place: os.path.normpath(place).split(os.sep) for place in set(map(os.path.dirname, paths))}
    for depth in range(max(map(len, places.values()), default=0)):
        named_so = {}
        for place, words in places.items():
            if depth < len(words) and (split := split_of(words[depth])) is not None:
                named_so[place] = split
        kinds = set(named_so.values())
        if "train" in kinds and len(kinds) > 1 and len(named_so) == len(places):
            return [named_so[os.path.dirname(path)] for path in paths]
    tests = [place for place, words in places.items() if any(word.lower() in TEST_NAMES for word in words)]
    if 0 < len(tests) < len(places):
        raise ValueError(
            f"{source}: some images are below a folder that is named like a test split ({min(tests)}), and others are "
            "not below train/; mark the test images in a column or list, or rename the folder."
        )
    return None


def located(folder: Path, relative: Mapping[str, Split], names: Sequence[str]) -> datasets.DatasetDict:
    """Makes data sets from splits with paths relative to a folder, and checks that all files exist.

    Raises:
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    files_in = cache(_files_in)
    splits: dict[str, Split] = {}
    missing: list[str] = []
    for name, split in relative.items():
        paths = [os.path.normpath(path) for path in split.paths]
        # A test image may also be outside its class folder, as in ImageNet's distribution.
        found = [_find(folder, path, files_in, may_be_flat=name != "train") for path in paths]
        missing += [path for path, place in zip(paths, found, strict=True) if place is None]
        splits[name] = Split([place for place in found if place is not None], split.labels)
    if missing:
        listed = named(one_line(path, 100) for path in missing[:MISSING_NAMED])
        total = sum(len(split.paths) for split in relative.values())
        raise FileNotFoundError(f"{len(missing):,} of {total:,} images are not in {folder}: {listed} are the first.")
    return datasets.DatasetDict({name: split.dataset(list(names)) for name, split in splits.items()})


def _find(folder: Path, path: str, files_in: Callable[[str], set[str]], may_be_flat: bool) -> str | None:
    """Finds the absolute path of a file, in its folder or the folder above; None if it does not exist."""
    directory, name = os.path.split(path)
    for place in [directory, os.path.dirname(directory)][: 1 + may_be_flat]:
        if name in files_in(os.path.join(folder, place)):
            return os.path.join(folder, place, name)
    return None


def _files_in(folder: str) -> set[str]:
    """Names of the files in a folder: one listing is faster than a request for each file."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def named(paths: Iterable[Path | str]) -> str:
    """Joins paths for a message."""
    return ", ".join(one_line(path) for path in paths)
