"""Sources whose images are files: class folders, list files, iNaturalist's annotations.

Each becomes splits with the columns `image` (paths) and `label`; no image is opened here.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from ..io import MAX_QUOTED, file_errors, one_line
from .image_rule import FORMATS, image_suffixes

logger = logging.getLogger(__name__)

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "validation", "valid", "val", "eval", "dev")
MISSING_NAMED = 3
KINDS_NAMED = 8


class Split(NamedTuple):
    """Images of a split by path, with their labels."""

    paths: list[str]
    labels: np.ndarray

    def dataset(self, names: Sequence[str]) -> datasets.Dataset:
        """Makes the data set, without looking into the files."""
        for path in self.paths:
            if not path.isascii():  # by far the fastest question
                _check_utf8(path)
        features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"image": self.paths, "label": self.labels}, features=features)
        return rows.cast_column("image", datasets.Image())


def find_split(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of `names` that is one of `wanted`, in the order of `wanted`, whatever its case."""
    by_lower = {name.lower(): name for name in sorted(names, reverse=True)}
    return next((by_lower[name.lower()] for name in wanted if name.lower() in by_lower), None)


# ---- Class folders ----


def split_folders(folder: Path) -> dict[str, Path]:
    """Folders of splits: named as one, or with such a word in their name, and with folders in them."""
    places: dict[str, Path] = {}
    folders = [name for name in _folders(folder) if _folders(folder / name)]
    for name in sorted(folders, key=lambda name: name.lower() not in (*TRAIN_NAMES, *TEST_NAMES)):
        split = split_of(name)
        if split is not None:
            places.setdefault(split, folder / name)
    return dict(sorted(places.items(), key=lambda item: item[0] != "train"))


def load_class_folders(folder: Path) -> datasets.DatasetDict:
    """Loads images below `train/CLASS/` and `test/CLASS/`, or all in one split below `CLASS/`.

    A class is a folder at that level, with whatever is below it, as in torchvision. Other files are left alone.

    Raises:
        FileNotFoundError: If there is no image in a class folder.
    """
    places = split_folders(folder)
    if "train" not in places:
        places = {"train": folder}
    found = {split: _scan(place) for split, place in places.items()}
    if not found["train"]:
        raise FileNotFoundError(
            f"{places['train']} has no folders with images; put them below train/CLASS/ and test/CLASS/ (test, val and "
            "the like), or below CLASS/ and give --test_fraction."
        )
    names = sorted(set().union(*found.values()))
    return datasets.DatasetDict(
        {split: _class_split(classes, names).dataset(names) for split, classes in found.items()}
    )


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _scan(folder: Path) -> dict[str, list[str]]:
    """Image files of each class folder, sorted."""
    suffixes = image_suffixes()
    classes, without, others = {}, [], Counter()
    for name in _folders(folder):
        files = [
            os.path.join(root, file)
            for root, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if not file.startswith(".")
        ]
        paths = [path for path in files if path.lower().endswith(suffixes)]
        others.update(os.path.splitext(path)[1].lower() for path in files if not path.lower().endswith(suffixes))
        if paths:
            classes[name] = sorted(paths)
        elif files:
            without.append(name)
    if others:
        logger.warning("%s: %s", folder, not_read(others))
    loose = sum(entry.name.lower().endswith(suffixes) for entry in os.scandir(folder))
    if loose:
        logger.warning("%s: %d images are in no class folder, and are not read", folder, loose)
    if without:
        logger.warning(
            "%d folders of %s have files but no images, left out: %s", len(without), folder, named(without[:5])
        )
    return classes


def not_read(suffixes: Mapping[str, int]) -> str:
    """What is said of files that are no images by their names, counted by suffix."""
    kinds = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    counted = ", ".join(
        f"{number} {one_line(suffix, 20) or 'without a suffix'}" for suffix, number in kinds[:KINDS_NAMED]
    )
    return (
        f"files that are not read: {counted}{', ...' if len(kinds) > KINDS_NAMED else ''}; images among them must be "
        f"converted to {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, with such a suffix"
    )


def _class_split(classes: Mapping[str, list[str]], names: Sequence[str]) -> Split:
    positions = {name: label for label, name in enumerate(names)}
    labels = np.repeat([positions[name] for name in classes], [len(paths) for paths in classes.values()])
    return Split([path for paths in classes.values() for path in paths], labels)


# ---- List files ----


def find_lists(folder: Path, train_list: str | None = None, test_list: str | None = None) -> dict[str, Path]:
    """Finds the list files of `train` and `test`: as given, else by name in the folder or directly below.

    Raises:
        FileNotFoundError: If a given one does not exist.
        ValueError: If several could be the training list.
    """
    given = {"train": train_list, "test": test_list}
    lists = {split: _existing(folder, name) for split, name in given.items() if name is not None}
    texts = [path for pattern in ("*.txt", "*/*.txt") for path in sorted(folder.glob(pattern))]
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
    """Loads list files of lines `relative/path label`, such as those of ImageNet-LT, Places-LT and iNaturalist 2018.

    A class is named after its `categories.json` entry, else after the folder that its training images are in (below
    the folder that all share), else by its number.

    Raises:
        ValueError: If a line is not of that kind.
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    relative = {split: _read_list(path) for split, path in lists.items()}
    num_classes = 1 + max(int(split.labels.max()) for split in relative.values())
    names = _category_names(folder, range(num_classes)) or _folder_names(relative["train"], num_classes)
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
    with file_errors(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            words = line.rsplit(maxsplit=1)
            if not words:
                continue
            if len(words) != 2 or not words[1].isdecimal():
                raise ValueError(f"line {number} of {path} is not 'relative/path label': {line.strip()[:80]!r}.")
            paths.append(words[0].strip())
            labels.append(int(words[1]))
    if not paths:
        raise ValueError(f"{path} lists no images.")
    return Split(paths, np.asarray(labels))


def _folder_names(split: Split, num_classes: int) -> list[str]:
    folders: dict[int, str] = {}
    numbers = [str(label) for label in range(num_classes)]
    for path, label in zip(split.paths, split.labels.tolist(), strict=True):
        folder = os.path.dirname(path)
        if folders.setdefault(label, folder) != folder:
            return numbers
    if len(folders) < num_classes or len(set(folders.values())) < num_classes or "" in folders.values():
        return numbers
    shared = os.path.commonpath(folders.values())
    return [os.path.relpath(folders[label], shared or ".") for label in range(num_classes)]


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

    Labels are the category ids in increasing order; for 2018 these are 0 to 8,141 and the labels of the list files.

    Raises:
        ValueError: If a file is not of that kind.
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    contents = {split: _annotations(path) for split, path in files.items()}
    ids = sorted(set().union(*(set(categories) for _, categories in contents.values())))
    positions = {category: label for label, category in enumerate(ids)}
    relative = {
        split: Split(paths, np.asarray([positions[category] for category in categories]))
        for split, (paths, categories) in contents.items()
    }
    names = _category_names(folder, ids) or _category_names(files["train"], ids) or [str(category) for category in ids]
    return located(folder, relative, names)


def _annotations(path: Path) -> tuple[list[str], list[int]]:
    """Paths of images, in the file's order, and their categories."""
    content = _read_json(path)
    try:
        category = {row["image_id"]: row["category_id"] for row in content["annotations"]}
        paths = [row["file_name"] for row in content["images"]]
        return paths, [category[row["id"]] for row in content["images"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an iNaturalist annotation file with labels: it lacks {error}.") from error


def _category_names(source: Path, ids: Sequence[int]) -> list[str] | None:
    """Names from `categories.json` in a folder, or from the categories of an annotation file, if they fit."""
    path = source / "categories.json" if source.is_dir() else source
    if not path.is_file():
        return None
    content = _read_json(path)
    categories = content.get("categories") if isinstance(content, dict) else content
    try:
        names = {row["id"]: str(row["name"]) for row in categories}
    except (KeyError, TypeError):
        return None
    if not set(ids) <= set(names):
        return None
    chosen = [names[category] for category in ids]
    return chosen if len(set(chosen)) == len(chosen) else None


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


# ---- Shared ----


def split_of(name: str) -> str | None:
    """`train`, or the name of a test split, from a name that contains it as a word."""
    words = re.split(r"[^a-z]+", name.lower())
    if any(word.startswith("train") for word in words):
        return "train"
    exact = next((word for word in words if word in TEST_NAMES), None)
    return exact or next((start for word in words for start in ("test", "valid") if word.startswith(start)), None)


def located(folder: Path, relative: Mapping[str, Split], names: Sequence[str]) -> datasets.DatasetDict:
    """Data sets of splits whose paths are relative to a folder; all files are there.

    Raises:
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    splits = {
        name: Split(list(_locate(folder, split.paths, may_be_flat=name != "train")), split.labels)
        for name, split in relative.items()
    }
    missing = [path for split in splits.values() for path in split.paths if path.startswith(_MISSING)]
    if missing:
        listed = named(path.removeprefix(_MISSING) for path in missing[:MISSING_NAMED])
        total = sum(len(split.paths) for split in splits.values())
        raise FileNotFoundError(f"{len(missing):,} of {total:,} images are not in {folder}: {listed} are the first.")
    return datasets.DatasetDict({name: split.dataset(list(names)) for name, split in splits.items()})


_MISSING = "\0"


def _locate(folder: Path, paths: Iterable[str], may_be_flat: bool) -> Iterator[str]:
    """Whole paths, or a marked path if there is no file; each folder is listed once.

    A test image may also lie without its class folder, as ImageNet's are distributed.
    """
    listings: dict[str, set[str]] = {}

    def exists(directory: str, name: str) -> bool:
        if directory not in listings:
            try:
                listings[directory] = set(os.listdir(os.path.join(folder, directory)))
            except OSError:
                listings[directory] = set()
        return name in listings[directory]

    for path in map(os.path.normpath, paths):
        directory, name = os.path.split(path)
        if exists(directory, name):
            yield os.path.join(folder, path)
        elif may_be_flat and exists(os.path.dirname(directory), name):
            yield os.path.join(folder, os.path.dirname(directory), name)
        else:
            yield _MISSING + path


def named(paths: Iterable[Path | str]) -> str:
    """Paths in a sentence."""
    return ", ".join(one_line(path) for path in paths)


def _check_utf8(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name of {os.fsencode(path)!r:.{MAX_QUOTED}} is not UTF-8; rename it.") from error
