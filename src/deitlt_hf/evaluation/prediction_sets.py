"""Prediction sets: for an image, the classes that it may have, so that the sets hold a wanted share of true classes.

The sets are conformal and have their own threshold for each group of classes (head, mid and tail). Take `n` labelled
images of a group that the model was not trained on, and one new image of the group. If all `n + 1` are equally likely
to be in any order (exchangeable, as random images of one source are), then the set of the new image has its true class
with at least the wanted probability, whatever the model. The probability is over the choice of the `n` images and of
the new one. This is conformal prediction with a condition on the class (Mondrian; Vovk, Gammerman and Shafer, 2005),
where groups take the place of single classes, as do the clusters of Ding et al., "Class-Conditional Conformal
Prediction with Many Classes", NeurIPS 2023: a rare class alone has too few images for a useful threshold. The groups
are known before the images are seen, so none are needed to find them.

What is not promised: the share of a single class in a group; a share when classes of a group are more or less frequent
in use than among the `n` images; and a share when the images themselves differ.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..data.long_tail import Groups, Integers

ALL = "all"  # the group of all classes of a model without groups


@dataclass(frozen=True)
class PredictionSets:
    """The rule of the sets: a class is in the set if its score reaches the threshold of its group.

    The class with the highest score is always in the set: no set is empty, and the share can only rise.

    Args:
        coverage: The wanted share of sets that hold the true class, in (0, 1).
        thresholds: Threshold of each group, in [0, 1]; 0 puts all classes of a group into every set.
        images: Number of images of each group that the threshold was fitted on.
        num_labels: Number of classes of the model.
    """

    coverage: float
    thresholds: Mapping[str, float]
    images: Mapping[str, int]
    num_labels: int

    def to_dict(self) -> dict[str, Any]:
        """The content of the field `prediction_sets` of a model's configuration."""
        return asdict(self)

    def members(self, scores: np.ndarray, groups: Groups) -> np.ndarray:
        """Which classes are in the set of each image; bool of shape (images, classes), as `scores`."""
        thresholds = np.ones(self.num_labels)
        for name, classes in _or_all(groups, self.num_labels).items():
            thresholds[np.asarray(classes, np.int64)] = self.thresholds[name]
        return (scores >= thresholds) | (scores == scores.max(axis=1, keepdims=True))


def needed_images(coverage: float) -> int:
    """The least number of images of a group for which its threshold can be above 0: 9 for a coverage of 0.9."""
    return next(number for number in range(1, 10**6) if _rank(number, coverage) <= number)


def fit_prediction_sets(scores: np.ndarray, labels: Integers, groups: Groups, coverage: float = 0.9) -> PredictionSets:
    """Fits the thresholds to images that the model was not trained on.

    The threshold of a group is the `ceil((n + 1) * coverage)`-th highest score of the true class of its `n` images, and
    0 if `n` is smaller than that (Sadinle, Lei and Wasserman, "Least Ambiguous Set-Valued Classifiers with Bounded
    Error Levels", JASA 2019, with the quantile of conformal prediction).

    Args:
        scores: Softmax of the logits; (images, classes).
        labels: True class of each image.
        groups: Class indices of each group, which together contain every class once; empty for one group of all.
        coverage: Wanted share of sets that hold the true class, in (0, 1).

    Raises:
        ValueError: If the coverage is not in (0, 1), or a class is in no group.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be between 0 and 1, such as 0.9, got {coverage}.")
    num_labels, labels = scores.shape[1], np.asarray(labels)
    groups = _or_all(groups, num_labels)
    left = sorted(set(range(num_labels)) - {label for classes in groups.values() for label in classes})
    if left:
        raise ValueError(f"class {left[0]} is in none of the groups {', '.join(groups)}.")
    thresholds, images = {}, {}
    of_truth = scores[np.arange(len(labels)), labels]
    for name, classes in groups.items():
        found = np.sort(of_truth[np.isin(labels, np.asarray(classes, np.int64))])[::-1]
        rank = _rank(len(found), coverage)
        thresholds[name], images[name] = float(found[rank - 1]) if rank <= len(found) else 0.0, len(found)
    return PredictionSets(coverage, thresholds, images, num_labels)


def _rank(number: int, coverage: float) -> int:
    return math.ceil(round((number + 1) * coverage, 9))  # 0.1 * 3 would be more than 0.3


def _or_all(groups: Groups, num_labels: int) -> Groups:
    return groups or {ALL: range(num_labels)}
