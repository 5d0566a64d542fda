"""Group accuracies and the table that shows them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text
from sklearn.metrics import accuracy_score, confusion_matrix


def group_accuracies(
    predictions: Sequence[int], labels: Sequence[int], groups: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Accuracy overall and in groups of classes.

    `overall` is the share of images; a group's is the mean of its classes' accuracies, over the classes that have test
    images, as in the paper.

    Args:
        predictions: Predicted class of each image.
        labels: True class of each image.
        groups: Class indices of each group.

    Returns:
        Fractions in [0, 1]: `overall`, then one a group; NaN for a group without test images.
    """
    num_classes = 1 + max(max(group, default=-1) for group in groups.values())
    matrix = confusion_matrix(labels, predictions, labels=np.arange(num_classes))
    totals = np.bincount(np.asarray(labels), minlength=num_classes)
    accuracies = {"overall": float(accuracy_score(labels, predictions))}
    for name, classes in groups.items():
        tested = np.asarray(classes, dtype=np.int64)
        tested = tested[totals[tested] > 0]
        accuracies[name] = float(np.mean(matrix[tested, tested] / totals[tested])) if len(tested) else math.nan
    return accuracies


@dataclass
class ExpertTable:
    """Accuracies of several experts on the same test images; in a terminal the best of a column is coloured.

    Args:
        title: What was measured.
        accuracies: Fractions by expert, then by `overall` and group.
        groups: Class indices of each group.
        test_counts: Test images of each class.
    """

    title: str
    accuracies: Mapping[str, Mapping[str, float]]
    groups: Mapping[str, Sequence[int]]
    test_counts: Sequence[int]

    def __rich__(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption="accuracy in %", caption_justify="left")
        table.add_column("expert")
        for name in ("overall", *self.groups):
            table.add_column(name, justify="right")
        best = {
            name: max((row[name] for row in self.accuracies.values() if not math.isnan(row[name])), default=math.inf)
            for name in ("overall", *self.groups)
        }
        several = len(self.accuracies) > 1
        for expert, accuracies in self.accuracies.items():
            cells = (
                "-"
                if math.isnan(value)
                else Text(f"{100 * value:.1f}", "bold green" if several and value == best[name] else "")
                for name, value in accuracies.items()
            )
            table.add_row(expert, *cells)
        table.add_section()
        images = [sum(self.test_counts), *(sum(self.test_counts[c] for c in group) for group in self.groups.values())]
        table.add_row("test images", *map(str, images))
        return table
