"""Loads sources that store images as files: class folders, list files, iNaturalist's annotations.

Each source becomes splits with the columns `image` (paths) and `label`. This module opens no image.
"""

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from PIL import Image

from ...io import one_line, read_json, read_text
from ..image_rule import FORMATS
from .labels import check_class_names, encode_labels, sorted_names

logger = logging.getLogger(__name__)

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
            if not text.isascii():
                with contextlib.suppress(UnicodeEncodeError):
                    text.encode()
                    continue
                raise ValueError(f"the name {one_line(ascii(text))} is not valid UTF-8; rename the file or folder.")
        features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"image": self.paths, "label": self.labels}, features=features)
        return rows.cast_column("image", datasets.Image())


def find_split(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """Finds the first of `wanted` that is in `names`, ignoring case, and returns it as spelled in `names`."""
    by_lower = {name.lower(): name for name in sorted(names, reverse=True)}
    return next((by_lower[name.lower()] for name in wanted if name.lower() in by_lower), None)


# ---- Class folders ----


def split_folders(folder: Path) -> dict[str, Path]:
    """Finds the folders of splits: they are named like a split, or contain such a word, and have subfolders."""
    places: dict[str, Path] = {}
    folders = [name for name in _folders(folder) if _folders(folder / name)]
    for name in sorted(folders, key=lambda name: name.lower() not in (*TRAIN_NAMES, *TEST_NAMES)):
        split = split_of(name)
        if split is not None:
            places.setdefault(split, folder / name)
    return dict(sorted(places.items(), key=lambda item: item[0] != "train"))


def load_class_folders(folder: Path) -> datasets.DatasetDict:
    """Loads images below `train/CLASS/` and `test/CLASS/`, or a single split below `CLASS/`.

    A class is a folder at that level with everything below it, as in torchvision. Other files are ignored. A single
    split is divided if all classes contain folders of splits: `CLASS/train/` and `CLASS/test/`.

    Raises:
        FileNotFoundError: If no class folder contains an image.
        ValueError: If folders that are named like splits would become classes, or a class name is not valid.
    """
    places = split_folders(folder)
    if "train" not in places:
        places = {"train": folder}
    found = {split: _scan(place) for split, place in places.items()}
    if places["train"] == folder:
        _refuse_splits_as_classes(folder, found["train"])
    if not found["train"]:
        raise FileNotFoundError(
            f"{places['train']} has no folders with images; put them below train/CLASS/ and test/CLASS/ (test, val and "
            "the like), or below CLASS/ and give --test_fraction."
        )
    names = sorted_names(name for classes in found.values() for name in classes)
    check_class_names(names, str(folder))
    splits = {split: _class_split(classes, names) for split, classes in found.items()}
    if list(splits) == ["train"] and places["train"] == folder:
        whole = splits["train"]
        below = [os.path.relpath(path, folder).partition(os.sep)[2] for path in whole.paths]
        splits = divided(whole, splits_by_folder(below, str(folder)))
    return datasets.DatasetDict({split: rows.dataset(names) for split, rows in splits.items()})


def images_below(
    folder: str | Path, seen: set[tuple[int, int]] | None = None, others: Counter[str] | None = None
) -> list[str]:
    """Lists the paths of the image files in and below a folder, sorted.

    Each folder is visited once, since links can form cycles. A link to an image file that is also listed itself is left
    out.

    Args:
        folder: Folder to search.
        seen: Folders to skip, by device and inode.
        others: Counter to which files without the suffix of an image are added, by suffix.

    Raises:
        ValueError: If a path with the suffix of an image is a pipe or a device (reading it may never end).
    """
    seen = set() if seen is None else set(seen)
    found, links, folders = [], [], [str(folder)]
    linked: list[str] = []
    while folders or linked:
        place = folders.pop() if folders else linked.pop()  # links last: a folder is then listed under its real path
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
    real = {os.path.realpath(path) for path in found} if links else set()
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


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _refuse_splits_as_classes(folder: Path, names: Collection[str]) -> None:
    """Refuses folders of splits where class folders are expected, in a folder without `train/CLASS/`.

    A class may be named train if no other folder is named like a split.
    """
    alike = [name for name in names if name.lower() in TEST_NAMES] or [name for name in names if split_of(name)]
    if alike and (len(alike) == len(names) or alike[0].lower() in TEST_NAMES):
        raise ValueError(
            f"{folder} has images in the folders {one_line(', '.join(names), 100)}: {one_line(', '.join(alike), 60)} "
            "would be read as a class, but is named like a split. Put images below train/CLASS/ and test/CLASS/, or "
            "beside train/metadata.csv with the columns file_name and label; rename the folder if it is a class."
        )


def _scan(folder: Path) -> dict[str, list[str]]:
    """Lists the image files of each class folder, sorted; warns about files and folders that are left out."""
    above = {(status.st_dev, status.st_ino) for status in map(os.stat, (folder, *folder.parents))}
    classes, without = {}, []
    others: Counter[str] = Counter()
    for name in _folders(folder):
        found: Counter[str] = Counter()
        paths = images_below(folder / name, above, found)
        others += found
        if paths:
            classes[name] = paths
        elif found:
            without.append(name)
    if others:
        logger.warning("%s: %s", folder, not_read(others))
    loose = [entry.name for entry in os.scandir(folder) if entry.is_file() and is_image(entry.name)]
    if classes and loose:
        logger.warning(
            "%d images are in %s itself, beside its class folders, and left out: %s",
            len(loose),
            folder,
            named(sorted(loose)[:MISSING_NAMED]),
        )
    if without:
        logger.warning(
            "%d folders of %s have files but no images, left out: %s", len(without), folder, named(without[:5])
        )
    return classes


def not_read(suffixes: Mapping[str, int]) -> str:
    """Message about files without the suffix of an image, counted by suffix."""
    kinds = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    counted = ", ".join(
        f"{number} {one_line(suffix, 20) or 'without a suffix'}" for suffix, number in kinds[:KINDS_NAMED]
    )
    heif = " (pillow-heif lets Pillow open .heic)" if {".heic", ".heif"} & set(suffixes) else ""
    return (
        f"files that are not read: {counted}{', ...' if len(kinds) > KINDS_NAMED else ''}; images among them must be "
        f"converted to {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, with such a suffix{heif}"
    )


def _class_split(classes: Mapping[str, list[str]], names: Sequence[str]) -> Split:
    positions = {name: label for label, name in enumerate(names)}
    ordered = sorted(classes, key=positions.__getitem__)
    labels = np.repeat([positions[name] for name in ordered], [len(classes[name]) for name in ordered])
    return Split([path for name in ordered for path in classes[name]], labels)


def divided(split: Split, parts: Sequence[str] | None) -> dict[str, Split]:
    """Divides a split by the part of each row; without parts everything is `train`."""
    if parts is None:
        return {"train": split}
    rows: dict[str, list] = {part: [] for part in parts}
    for part, row in zip(parts, zip(split.paths, split.labels, strict=True), strict=True):
        rows[part].append(row)
    return {part: Split([path for path, _ in found], [label for _, label in found]) for part, found in rows.items()}


# ---- List files ----


def find_lists(folder: Path, train_list: str | None = None, test_list: str | None = None) -> dict[str, Path]:
    """Finds the list files of `train` and `test`: the given files, else by name in the folder or directly below it.

    Raises:
        FileNotFoundError: If a given file does not exist.
        ValueError: If several could be the training list.
    """
    given = {"train": train_list, "test": test_list}
    lists = {split: _existing(folder, name) for split, name in given.items() if name is not None}
    texts = [path for kind in ("*.txt", "*/*.txt") for path in sorted(folder.glob(kind)) if path.is_file()]
    candidates = [path for path in texts if re.search("train|test|val", path.stem, re.IGNORECASE) and _is_list(path)]
    if "train" not in lists:
        trains = [path for path in candidates if re.search("train", path.stem, re.IGNORECASE)]
        if len(trains) > 1:
            raise ValueError(f"{folder} has several training lists ({named(trains)}); choose one with --train_list.")
        if not trains:
            return {}
        lists["train"] = trains[0]
    if "test" not in lists:
        others = [path for path in candidates if not re.search("train", path.stem, re.IGNORECASE)]
        tests = [path for kind in ("test", "val") for path in others if re.search(kind, path.stem, re.IGNORECASE)]
        if tests:
            lists["test"] = tests[0]
    return lists


def load_lists(folder: Path, lists: Mapping[str, Path]) -> datasets.DatasetDict:
    """Loads list files with lines `relative/path label`, as those of ImageNet-LT, Places-LT and iNaturalist 2018.

    The name of a class is its entry in `categories.json`, else the folder of its training images (relative to the
    folder that contains all classes), else its number.

    Raises:
        ValueError: If a line does not have that format, or a class has no image.
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    relative = {split: _read_list(path) for split, path in lists.items()}
    if list(lists) == ["train"]:
        relative = divided(relative["train"], splits_by_folder(relative["train"].paths, str(lists["train"])))
    known = set().union(*(map(int, split.labels) for split in relative.values()))
    num_classes = 1 + max(known)
    if len(known) < num_classes:
        gap = next(label for label in range(num_classes) if label not in known)
        raise ValueError(
            f"{named(lists.values())}: {num_classes - len(known):,} classes without images, {gap} the first; labels "
            f"must cover all numbers from 0 to {num_classes - 1:,}."
        )
    numbers = list(map(str, range(num_classes)))
    names = _category_names(folder, numbers) or _folder_names(folder, relative["train"], numbers)
    check_class_names(names, named(lists.values()))
    return located(folder, relative, names)


def _existing(folder: Path, name: str) -> Path:
    path = Path(name).expanduser()
    for candidate in (path, folder / path):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"there is no list file {name!r}, here or in {folder}.")


def _is_list(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return re.fullmatch(r"\S.*\.[A-Za-z]\w*\s+\d+\s*", file.readline()) is not None


def _read_list(path: Path) -> Split:
    paths, labels = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        words = line.rsplit(maxsplit=1)
        if not words:
            continue
        if len(words) != 2 or re.fullmatch("[0-9]{1,18}", words[1]) is None:
            raise ValueError(f"line {number} of {path} is not 'relative/path label': {line.strip()[:80]!r}.")
        paths.append(words[0].strip())
        labels.append(int(words[1]))
    if not paths:
        raise ValueError(f"{path} lists no images.")
    return Split(paths, np.asarray(labels))


def _folder_names(folder: Path, split: Split, numbers: list[str]) -> list[str]:
    folders: dict[int, str] = {}
    for path, label in zip(split.paths, map(int, split.labels), strict=True):
        place = os.path.dirname(path)
        if folders.setdefault(label, place) != place:
            return numbers
    if len(folders) < len(numbers) or "" in folders.values():
        return numbers
    # Absolute paths, since a list file may mix relative and absolute ones.
    whole = [os.path.normpath(folder / folders[label]) for label in range(len(numbers))]
    shared = os.path.commonpath(whole)
    return [os.path.relpath(path, shared) for path in whole] if len(set(whole)) == len(numbers) else numbers


# ---- iNaturalist's annotations ----


def find_annotations(folder: Path) -> dict[str, Path]:
    """Finds the annotations of an iNaturalist competition, such as `train2018.json` and `val2018.json`."""
    found = {}
    for split, start in (("train", "train"), ("test", "val")):
        files = [path for path in folder.glob(f"{start}*.json") if re.fullmatch(rf"{start}\d*", path.stem)]
        if len(files) == 1:
            found[split] = files[0]
    return found if "train" in found else {}


def load_annotations(folder: Path, files: Mapping[str, Path]) -> datasets.DatasetDict:
    """Loads an iNaturalist competition: `train2018.json`, `val2018.json`, `categories.json` and the folder of images.

    Labels are the ranks of the category ids. For 2018 the ids are 0 to 8,141 and equal the labels of the list files.

    Raises:
        ValueError: If a file does not have that format.
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    contents = {split: _annotations(path) for split, path in files.items()}
    sources = {split: str(path) for split, path in files.items()}
    ids, labels = encode_labels({split: categories for split, (_, categories) in contents.items()}, sources)
    relative = {split: Split(paths, labels[split]) for split, (paths, _) in contents.items()}
    names = _category_names(folder, ids) or _category_names(files["train"], ids) or ids
    check_class_names(names, named(files.values()))
    return located(folder, relative, names)


def _annotations(path: Path) -> tuple[list[str], list[int]]:
    """Reads the paths of the images, in the order of the file, and their categories."""
    content = read_json(path, object)
    try:
        category = {row["image_id"]: row["category_id"] for row in content["annotations"]}
        paths = [os.fspath(row["file_name"]) for row in content["images"]]
        return paths, [category[row["id"]] for row in content["images"]]
    except (KeyError, TypeError) as error:
        missing = f"it lacks {error}" if isinstance(error, KeyError) else "an entry is of another kind"
        raise ValueError(
            f"{path} is not an iNaturalist annotation file with labels: {missing}; repair it, or rename it if it does "
            "not describe the images."
        ) from error


def _category_names(source: Path, ids: Iterable[str]) -> list[str] | None:
    """Reads class names from `categories.json` in a folder, or an annotation file; None if they do not fit the ids."""
    path = source / "categories.json" if source.is_dir() else source
    if not path.is_file():
        return None
    content = read_json(path, object)
    try:
        categories = content["categories"] if isinstance(content, dict) else content
        names = {str(row["id"]): str(row["name"]) for row in categories}
    except (KeyError, TypeError):
        return None
    if not set(ids) <= set(names):
        return None
    chosen = [names[category] for category in ids]
    return chosen if len(set(chosen)) == len(chosen) else None


# ---- Shared ----


def split_of(name: str) -> str | None:
    """Finds the split that a name contains as a word: `train`, the name of a test split, or None."""
    words = re.split(r"[^a-z]+", name.lower())
    if any(word.startswith("train") for word in words):
        return "train"
    exact = next((word for word in words if word in TEST_NAMES), None)
    return exact or next((start for word in words for start in ("test", "valid") if word.startswith(start)), None)


def splits_by_folder(paths: Sequence[str], source: str) -> list[str] | None:
    """Finds the split of each path of a single list by its folders, such as `train/` and `val/`; None without splits.

    Args:
        paths: Relative paths.
        source: Source of the paths, for messages.

    Raises:
        ValueError: If only some paths are below a folder that is named like a test split, and the others are not below
            a folder of a split.
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
