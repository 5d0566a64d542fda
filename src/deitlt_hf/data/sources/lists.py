"""Loads images that a list of paths and labels names: text files and the JSON files of iNaturalist."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
import numpy as np

from ...io import read_json, read_text
from .files import Split, divided, located, named, splits_by_folder
from .labels import check_class_names, encode_labels

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
    places = [os.path.normpath(folder / folders[label]) for label in range(len(numbers))]
    shared = os.path.commonpath(places)
    return [os.path.relpath(path, shared) for path in places] if len(set(places)) == len(numbers) else numbers


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
