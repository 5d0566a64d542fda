"""Loads images in class folders: `train/CLASS/` and `test/CLASS/`, or `CLASS/`. No image is opened."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np

from ...io import one_line
from .files import (
    TEST_NAMES,
    TRAIN_NAMES,
    Split,
    divided,
    images_below,
    is_image,
    named,
    not_read,
    split_of,
    splits_by_folder,
)
from .labels import check_class_names, sorted_names

logger = logging.getLogger(__name__)

NAMED = 3  # files of each kind that a warning names


def split_folders(folder: Path) -> dict[str, Path]:
    """Finds the folders of splits: they are named like a split, or contain such a word, and have subfolders."""
    places: dict[str, Path] = {}
    folders = [name for name in _folders(folder) if _folders(folder / name)]
    # Beside boots/BRAND/, trainers/BRAND/ is a class, although its name begins like that of a split.
    has_classes = any(split_of(name) is None for name in folders)
    for name in sorted(folders, key=lambda name: name.lower() not in (*TRAIN_NAMES, *TEST_NAMES)):
        split = split_of(name, exactly=has_classes)
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
        split = splits["train"]
        below = [os.path.relpath(path, folder).partition(os.sep)[2] for path in split.paths]
        splits = divided(split, splits_by_folder(below, str(folder)))
    return datasets.DatasetDict({split: rows.dataset(names) for split, rows in splits.items()})


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
            named(sorted(loose)[:NAMED]),
        )
    if without:
        logger.warning(
            "%d folders of %s have files but no images, left out: %s", len(without), folder, named(without[:5])
        )
    return classes


def _class_split(classes: Mapping[str, list[str]], names: Sequence[str]) -> Split:
    positions = {name: label for label, name in enumerate(names)}
    ordered = sorted(classes, key=positions.__getitem__)
    labels = np.repeat([positions[name] for name in ordered], [len(classes[name]) for name in ordered])
    return Split([path for name in ordered for path in classes[name]], labels)
