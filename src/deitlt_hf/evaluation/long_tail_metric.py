"""The long-tail metric as a module of Hugging Face evaluate, for `evaluate.load(deitlt_hf.evaluation.METRIC_PATH)`."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy
from numpy.typing import ArrayLike

# Absolute, and a module a line: `evaluate` copies this file elsewhere, and reads its imports by lines.
from deitlt_hf.data.long_tail import Groups
from deitlt_hf.evaluation.accuracy import class_accuracies, number_of_classes
from deitlt_hf.evaluation.metrics import bootstrap_intervals, long_tail_figures

DESCRIPTION = "Accuracy overall and of head, mid and tail classes, balanced accuracy and more, for one or more experts."
CITATION = "Rangwani et al., DeiT-LT: Distillation Strikes Back for Vision Transformer Training, CVPR 2024."
EXPERTS = ("mean", "cls", "distillation")
INPUTS = """
Args:
    predictions: Predicted class of each image, a list with one for each expert.
    references: True class of each image.
    confidences: Probability of each predicted class, a list with one for each expert. NaN if they are not
        known: the calibration error is then left out.
    groups: Class indices of each group, by group name.
    experts: Names of the experts.
    resamples: Number of bootstrap samples for 95 % intervals; 0 for no intervals.
Returns:
    The figures of the first expert by their names, and the figures of all experts as EXPERT_FIGURE. EXPERT_per_class is
    the accuracy of each class, NaN without test images. EXPERT_intervals is the lower and upper end for each figure.
"""


class LongTailMetric(evaluate.Metric):
    """Metric that computes [`long_tail_figures`] for several experts on the same images."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("int64")),
                "confidences": datasets.Sequence(datasets.Value("float32")),
                "references": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(
        self,
        predictions: ArrayLike,
        confidences: ArrayLike,
        references: ArrayLike,
        groups: Groups,
        experts: Sequence[str] = EXPERTS,
        resamples: int = 0,
    ) -> dict[str, Any]:
        predictions, confidences = numpy.asarray(predictions), numpy.asarray(confidences)
        if predictions.ndim != 2 or predictions.shape[1] != len(experts):
            raise ValueError(f"predictions have shape {predictions.shape}, but there are {len(experts)} experts.")
        references = numpy.asarray(references)
        found = {}
        for expert, classes, scores in zip(experts, predictions.T, confidences.T, strict=True):
            found[expert] = _figures(classes, references, groups, scores, resamples)
        return found[experts[0]] | {
            f"{expert}_{name}": value for expert, figures in found.items() for name, value in figures.items()
        }


def _figures(
    predictions: numpy.ndarray,
    references: numpy.ndarray,
    groups: Groups,
    confidences: numpy.ndarray,
    resamples: int,
) -> dict[str, Any]:
    def of(rows: numpy.ndarray) -> dict[str, float]:
        known = None if numpy.isnan(confidences).any() else confidences[rows]
        return long_tail_figures(predictions[rows], references[rows], groups, known)

    figures = of(numpy.arange(len(references)))
    per_class = class_accuracies(predictions, references, number_of_classes(references, groups))
    intervals = {"intervals": bootstrap_intervals(of, references, resamples=resamples)} if resamples else {}
    return figures | {"per_class": per_class.tolist()} | intervals
