"""Compares the predictions of the two experts: how often both, one or none of them is correct."""

import numpy as np

from ..data.long_tail import Groups, Integers
from ..evaluation.accuracy import class_accuracies

OUTCOMES = ("both", "only_cls", "only_distillation", "neither")


def expert_outcomes(
    cls_predictions: Integers,
    distillation_predictions: Integers,
    labels: Integers,
    groups: Groups,
) -> dict[str, dict[str, float]]:
    """Shares of the images for which both experts are correct, only one, or neither; overall and by group of classes.

    The shares of a group are means over its classes, like the accuracy of a group: `both` and `only_cls` add up to the
    accuracy of CLS.

    Returns:
        For `overall` and each group: `both`, `only_cls`, `only_distillation` and `neither`, which add up to 1;
        `oracle`, the accuracy if the correct expert were always chosen; `agreement`, the share of images with the same
        prediction from both. NaN for a group without images.
    """
    labels = np.asarray(labels)
    cls_predictions, distillation_predictions = np.asarray(cls_predictions), np.asarray(distillation_predictions)
    cls, distillation = cls_predictions == labels, distillation_predictions == labels
    masks = (cls & distillation, cls & ~distillation, ~cls & distillation, ~cls & ~distillation)
    of_class = 1.0 / np.bincount(labels)[labels]
    weights = {"overall": np.ones(len(labels))}
    weights |= {name: np.isin(labels, np.asarray(group)) * of_class for name, group in groups.items()}
    found = {}
    for name, weight in weights.items():
        total = weight.sum() or np.nan
        shares = {outcome: float(weight @ mask / total) for outcome, mask in zip(OUTCOMES, masks, strict=True)}
        same = float(weight @ (cls_predictions == distillation_predictions) / total)
        found[name] = {**shares, "oracle": 1.0 - shares["neither"], "agreement": same}
    return found


def gain_by_class(
    cls_predictions: Integers, distillation_predictions: Integers, labels: Integers, num_classes: int
) -> np.ndarray:
    """Accuracy of the DIST head minus accuracy of the CLS head per class; (num_classes,), NaN without test images."""
    cls, distillation = (
        class_accuracies(predictions, labels, num_classes)
        for predictions in (cls_predictions, distillation_predictions)
    )
    return distillation - cls
