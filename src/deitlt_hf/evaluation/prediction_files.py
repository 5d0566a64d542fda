"""CSV files of test predictions: of each image, of each class, and of the confusions between classes."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from sklearn.metrics import confusion_matrix

from ..data.columns import find_columns
from ..io import atomic_write

PREDICTIONS_FILE, CLASSES_FILE, CONFUSION_FILE = "predictions.csv", "classes.csv", "confusion.csv"


def write_predictions(
    folder: Path,
    test: datasets.Dataset,
    by_model: Mapping[str, np.ndarray],
    scores: np.ndarray,
    training_images: Sequence[int] | np.ndarray,
    groups: Mapping[str, Sequence[int]],
) -> None:
    """Writes three tables into a folder.

    - `predictions.csv` has a row for each test image: its path, its class, and the predicted classes;
    - `classes.csv` has a row for each class: its group, its number of training and test images, and the share of its
      test images that each model classifies correctly;
    - `confusion.csv` has a row for each true class and a column for each predicted class, with numbers of images.

    `by_model` has the predicted class of each image, (images,), by model or expert; the first is the prediction, whose
    scores are `scores`.
    """
    image, label = find_columns(test)
    names, labels = test.features[label].names, np.asarray(test[label][:])
    paths = test.select_columns(image).cast_column(image, datasets.Image(decode=False)).flatten()[f"{image}.path"][:]
    first, *others = by_model
    _write(
        folder / PREDICTIONS_FILE,
        ["image", "label", "predicted", "score", *(f"{name}_predicted" for name in others)],
        (
            [path or f"row {row}", names[true], names[by_model[first][row]], f"{scores[row]:.4f}"]
            + [names[by_model[name][row]] for name in others]
            for row, (path, true) in enumerate(zip(paths, labels, strict=True))
        ),
    )
    group_of = {int(index): group for group, indices in groups.items() for index in indices}
    _write(
        folder / CLASSES_FILE,
        ["class", "group", "training_images", "test_images", "accuracy", *(f"{name}_accuracy" for name in others)],
        (
            [name, group_of.get(index, ""), int(training_images[index]), int((labels == index).sum())]
            + [_accuracy(found, labels, index) for found in by_model.values()]
            for index, name in enumerate(names)
        ),
    )
    confusion = confusion_matrix(labels, by_model[first], labels=range(len(names)))
    _write(
        folder / CONFUSION_FILE,
        ["label", *names],
        ([name, *row.tolist()] for name, row in zip(names, confusion, strict=True)),
    )


def _accuracy(found: np.ndarray, labels: np.ndarray, index: int) -> str:
    """Share of a class's test images that are classified correctly; empty without test images."""
    own = labels == index
    return f"{(found[own] == index).mean():.4f}" if own.any() else ""


def _write(file: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with atomic_write(file) as place, open(place, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
