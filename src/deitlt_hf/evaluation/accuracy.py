"""Accuracies of groups of classes, and a table that shows them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..data.long_tail import Groups, Integers

# Colours of the experts, the same in all figures and pages.
COLOURS = {"mean": "#4c72b0", "cls": "#dd8452", "distillation": "#55a868"}


def class_accuracies(predictions: Integers, labels: Integers, num_classes: int) -> np.ndarray:
    """Accuracy of each class; float64 of shape (num_classes,), NaN for a class without test images.

    Memory grows linearly with the number of classes, unlike that of a confusion matrix.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    totals = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels[predictions == labels], minlength=num_classes)
    return np.divide(right, totals, out=np.full(num_classes, np.nan), where=totals > 0)


def number_of_classes(labels: Integers, groups: Groups) -> int:
    """Number of classes: one more than the largest label in the test images and the groups."""
    return 1 + max(max(members, default=-1) for members in (np.asarray(labels).tolist(), *groups.values()))


def group_accuracies(predictions: Integers, labels: Integers, groups: Groups) -> dict[str, float]:
    """Accuracy overall and in groups of classes.

    `overall` is the share of correctly classified images. The accuracy of a group is the mean of the accuracies of its
    classes that have test images, as in the paper.

    Args:
        predictions: Predicted class of each image.
        labels: True class of each image.
        groups: Class indices of each group.

    Returns:
        Fractions in [0, 1]: `overall`, then one per group; NaN for a group without test images.
    """
    of_classes = class_accuracies(predictions, labels, number_of_classes(labels, groups))
    accuracies = {"overall": float(np.mean(np.asarray(predictions) == np.asarray(labels)))}
    for name, classes in groups.items():
        tested = of_classes[np.asarray(classes, dtype=np.int64)]
        tested = tested[~np.isnan(tested)]
        accuracies[name] = float(tested.mean()) if len(tested) else math.nan
    return accuracies


@dataclass
class ExpertTable:
    """Table of the accuracies of several experts or models on the same test images; the best of a column is green."""

    title: str
    accuracies: Mapping[str, Mapping[str, float]]  # fractions by expert, then by `overall` and group
    groups: Groups
    test_counts: Integers  # test images of each class
    notes: Sequence[str] = ()  # sentences about the evaluation, see [`findings`]
    # the ends of each, by expert and group
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    of: str = "expert"  # what the rows are

    def __rich__(self) -> Table:
        caption = "accuracy in %" + ", with 95 % bootstrap intervals" * bool(self.intervals)
        table = Table(title=escape(self.title), title_justify="left", caption=caption, caption_justify="left")
        table.add_column(self.of)
        for name in ("overall", *self.groups):
            table.add_column(escape(name), justify="right")
        best = {
            name: max((row[name] for row in self.accuracies.values() if not math.isnan(row[name])), default=math.inf)
            for name in ("overall", *self.groups)
        }
        several = len(self.accuracies) > 1
        for expert, accuracies in self.accuracies.items():
            cells = (
                "-"
                if math.isnan(value)
                else Text(
                    f"{100 * value:.1f}{self._interval(expert, name)}",
                    "bold green" if several and value == best[name] else "",
                )
                for name, value in accuracies.items()
            )
            table.add_row(escape(expert), *cells)
        table.add_section()
        images = [sum(self.test_counts), *(sum(self.test_counts[c] for c in group) for group in self.groups.values())]
        table.add_row("test images", *map(str, images))
        return table

    def _interval(self, expert: str, name: str) -> str:
        low, high = self.intervals.get(expert, {}).get(name, (math.nan, math.nan))
        return "" if math.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]"
