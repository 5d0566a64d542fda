"""The long-tail metric, for `evaluate.load(deitlt_hf.evaluation.METRIC_PATH)`."""

import datasets
import evaluate
import numpy

from deitlt_hf.evaluation.metrics import long_tail_figures

DESCRIPTION = "Accuracy overall, of head, mid and tail classes, balanced accuracy and more, for one or several experts."
CITATION = "Rangwani et al., DeiT-LT: Distillation Strikes Back for Vision Transformer Training, CVPR 2024."
INPUTS = """
Args:
    predictions: Predicted class of each image, a list with one for each expert.
    references: True class of each image.
    confidences: Probability of each predicted class, a list with one for each expert; 1 if they are not known.
    groups: Class indices of each group, by its name.
    experts: Names of the experts.
Returns:
    The figures of the first expert by name, and those of all as EXPERT_FIGURE.
"""


class LongTailMetric(evaluate.Metric):
    """Figures of [`long_tail_figures`] for several experts on the same images."""

    def _info(self):
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

    def _compute(self, predictions, confidences, references, groups, experts=("mean", "cls", "distillation")):
        predictions, confidences = numpy.asarray(predictions), numpy.asarray(confidences)
        if predictions.ndim != 2 or predictions.shape[1] != len(experts):
            raise ValueError(f"predictions have shape {predictions.shape}, but there are {len(experts)} experts.")
        found = {
            expert: long_tail_figures(predictions[:, column], references, groups, confidences[:, column])
            for column, expert in enumerate(experts)
        }
        return found[experts[0]] | {
            f"{expert}_{name}": value for expert, figures in found.items() for name, value in figures.items()
        }
