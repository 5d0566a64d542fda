"""Accuracies of groups of classes."""

import math

import numpy as np

from ..data.long_tail import Groups, Integers


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
