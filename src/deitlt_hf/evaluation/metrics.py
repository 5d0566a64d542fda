"""Metrics of a classifier on long-tailed classes, computed from its predictions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.long_tail import Groups, Integers
from .accuracy import class_accuracies, group_accuracies, number_of_classes

BINS = 15  # number of bins of the calibration error, as in Guo et al. (ICML 2017)


class Estimate(NamedTuple):
    """Metrics by name, and the lower and upper end of the interval of each; NaN where a metric is not defined."""

    values: dict[str, float]
    ends: dict[str, tuple[float, float]]


def calibration_error(correct: Sequence[bool] | np.ndarray, confidences: Sequence[float] | np.ndarray) -> float:
    """Expected calibration error (Guo et al., ICML 2017): mean distance between accuracy and confidence.

    They are compared within each of `BINS` bins of equal width.

    Args:
        correct: Whether each prediction is right.
        confidences: Probability of each predicted class, in [0, 1].

    Raises:
        ValueError: If a confidence is outside [0, 1].
    """
    correct, confidences = np.asarray(correct, dtype=float), np.asarray(confidences, dtype=float)
    # A softmax in float32 can round to a little more than 1.
    if len(confidences) and not (confidences.min() >= 0 and confidences.max() <= 1 + 1e-6):
        raise ValueError(f"confidences must be in [0, 1], got {confidences.min():g} to {confidences.max():g}.")
    # The upper edge belongs to the bin, as in the original definition.
    places = np.clip(np.ceil(confidences * BINS).astype(int) - 1, 0, BINS - 1)
    # The sum over a bin is its number of images times the difference between accuracy and mean confidence.
    gaps = np.bincount(places, weights=correct - confidences, minlength=BINS)
    return float(np.abs(gaps).sum() / len(correct))


def long_tail_figures(
    predictions: Integers,
    labels: Integers,
    groups: Groups,
    confidences: Sequence[float] | np.ndarray | None = None,
) -> dict[str, float]:
    """Computes all metrics of one expert.

    Args:
        predictions: Predicted class of each image.
        labels: True class of each image.
        groups: Class indices of each group, such as head, mid and tail.
        confidences: Probability of each predicted class; without it the calibration error is left out.

    Returns:
        Fractions: `overall` and one per group (see [`group_accuracies`]); `balanced_accuracy`, the mean over classes;
        `geometric_mean` of the class accuracies, 0 if the accuracy of a class is 0; `macro_f1`; `calibration_error`.
        Only classes with test images count.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    accuracies = class_accuracies(predictions, labels, number_of_classes(labels, groups))
    tested = np.flatnonzero(~np.isnan(accuracies))
    with np.errstate(divide="ignore"):  # log 0 is meant: the mean is then 0
        geometric_mean = float(np.exp(np.log(accuracies[tested]).mean()))
    figures = {
        **group_accuracies(predictions, labels, groups),
        "balanced_accuracy": float(accuracies[tested].mean()),
        "geometric_mean": geometric_mean,
        "macro_f1": _macro_f1(predictions, labels, tested),
    }
    if confidences is not None:
        figures["calibration_error"] = calibration_error(predictions == labels, confidences)
    return figures


def _macro_f1(predictions: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> float:
    """Mean F1 of the classes, which is scikit-learn's `f1_score`; its import takes longer than a short training."""
    number = 1 + max(predictions.max(), labels.max())
    right, predicted, true = (
        np.bincount(of, minlength=number)[classes] for of in (labels[predictions == labels], predictions, labels)
    )
    return float((2 * right / (predicted + true)).mean())


def bootstrap_intervals(
    figures: Callable[[np.ndarray], Mapping[Any, float]],
    labels: Integers,
    level: float = 0.95,
    resamples: int = 1000,
) -> dict[Any, tuple[float, float]]:
    """Confidence intervals by the percentile bootstrap (Efron, 1979) over test images.

    Images are resampled within their class: every sample has the class counts of the test set. From a class of n images
    n - 1 are drawn (Rao and Wu, 1988), and one of these counts twice. Without this, samples of two or three images vary
    too little. The uncertainty of a class with a single image cannot be estimated; it adds nothing to the intervals.

    Args:
        figures: Computes metrics for images, given by their indices (with repetitions).
        labels: True class of each image.
        level: Share of the samples that an interval covers.
        resamples: Number of bootstrap samples, always the same ones.

    Returns:
        Lower and upper end for each metric; NaN if the metric is NaN in a sample.

    Raises:
        ValueError: If the level is not between 0 and 1, or `resamples` is below 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}.")
    random, labels = np.random.default_rng(0), np.asarray(labels)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    samples = [figures(np.concatenate([_drawn(member, random) for member in members])) for _ in range(resamples)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    intervals = {}
    for name in samples[0]:
        values = np.array([sample[name] for sample in samples])
        intervals[name] = (math.nan, math.nan) if np.isnan(values).any() else tuple(np.quantile(values, tails).tolist())
    return intervals


def with_intervals(
    figures: Callable[[np.ndarray], Mapping[str, Mapping[str, float]]],
    labels: Integers,
    level: float = 0.95,
    resamples: int = 1000,
) -> dict[str, Estimate]:
    """Metrics of several models with their intervals. All models see the same bootstrap samples.

    The arguments are those of [`bootstrap_intervals`], but `figures` computes metrics by model.
    """

    def flat(rows: np.ndarray) -> dict[tuple[str, str], float]:
        return {(model, name): value for model, row in figures(rows).items() for name, value in row.items()}

    values, ends = figures(np.arange(len(labels))), bootstrap_intervals(flat, labels, level, resamples)
    return {model: Estimate(dict(row), {name: ends[model, name] for name in row}) for model, row in values.items()}


def paired_leads(
    predictions: Mapping[str, Integers],
    reference: Integers,
    labels: Integers,
    groups: Groups,
    level: float = 0.95,
    resamples: int = 1000,
) -> dict[str, Estimate]:
    """Accuracies of models minus those of another model on the same test images, in points, overall and by group.

    Every bootstrap sample has the same images for all models, so what makes an image hard for all of them cancels out.

    Args:
        predictions: Predicted class of each image, by model.
        reference: Classes predicted by the other model.
        labels: True class of each image; see [`bootstrap_intervals`] for the last two parameters.
        groups: Class indices of each group.
    """
    classes = {name: np.asarray(found) for name, found in predictions.items()}
    other, labels = np.asarray(reference), np.asarray(labels)

    def leads(rows: np.ndarray) -> dict[str, dict[str, float]]:
        behind = group_accuracies(other[rows], labels[rows], groups)
        ahead = {name: group_accuracies(found[rows], labels[rows], groups) for name, found in classes.items()}
        return {name: {group: 100 * (row[group] - behind[group]) for group in row} for name, row in ahead.items()}

    return with_intervals(leads, labels, level, resamples)


def points(value: float, interval: tuple[float, float]) -> str:
    """A difference in points with its interval, such as `+6.0 [+2.0, +10.0]`."""
    return f"{value:+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}]"


def _drawn(member: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draws a bootstrap sample of a class: n - 1 of its n images, the first drawn image twice."""
    drawn = random.choice(member, max(len(member) - 1, 1))
    return np.concatenate([drawn[: len(member) - 1], drawn[:1]])
