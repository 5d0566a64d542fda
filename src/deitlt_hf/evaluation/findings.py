"""Notes on the accuracies of a model: classes never predicted, experts that agree, groups with few test images."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..data.long_tail import Groups, Integers, class_counts

SHOWN = 5  # class names in a sentence
SAME = 0.99  # share of images with the same class from both heads, from which they count as one
FEW = 30  # test images of a group, below which its accuracy is uncertain


def findings(
    predictions: Mapping[str, np.ndarray], labels: np.ndarray, groups: Groups, names: Sequence[str]
) -> list[str]:
    """Sentences about classes that nobody predicts, heads that agree, and groups with few test images.

    `predictions` has the predicted class of each image, (images,), by expert; `labels` has the true classes.
    """
    found = []
    right = np.any([classes == labels for classes in predictions.values()], axis=0)
    tested = class_counts(labels, len(names)) > 0
    never = np.flatnonzero(tested & (np.bincount(labels[right], minlength=len(names)) == 0))
    if len(never):
        shown = ", ".join(names[label] for label in never[:SHOWN]) + (", ..." if len(never) > SHOWN else "")
        who = "no expert predicts" if len(predictions) > 1 else "the model does not predict"
        found.append(
            f"{who} a test image of {len(never)} of {tested.sum()} classes correctly ({shown}): train longer, or check "
            "the images of these classes."
        )
    if {"cls", "distillation"} <= predictions.keys():
        agree = float(np.mean(predictions["cls"] == predictions["distillation"]))
        if agree >= SAME:
            found.append(
                f"CLS and DIST predict the same class for {100 * agree:.1f} % of the test images, so their mean adds "
                "nothing: one head would do."
            )
    return found + few_images(class_counts(labels, len(names)), groups)


def few_images(test_counts: Integers, groups: Groups) -> list[str]:
    """A sentence about groups with few test images; none without such groups."""
    numbers = {
        name: int(np.asarray(test_counts)[np.asarray(classes, np.int64)].sum()) for name, classes in groups.items()
    }
    few = [f"{name} {number}" for name, number in numbers.items() if 0 < number < FEW]
    return [f"groups with few test images, whose accuracies are uncertain: {', '.join(few)}."] if few else []
