"""Fusion of the two heads of a student: rules that combine their logits better than the mean does.

Every rule is a weight for each head's logit of a class, and a bias: fused = a_c * cls_c + b_c * dist_c + d_c. It can
therefore be folded into the two classifiers; their mean is then the fused prediction. Rules are fitted on labelled
logits of images other than the test images. All classes have equal weight: the objective is the mean over classes of
the cross entropy.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.long_tail import Groups, Integers, random_ranks

FIT_IMAGES = 20_000  # their logits fit into memory even with 8,142 classes


class Fusion(NamedTuple):
    """A fitted rule: weights of the two heads' logits and a bias for each class, (classes,) each."""

    cls_weights: torch.Tensor
    distillation_weights: torch.Tensor
    bias: torch.Tensor

    def __call__(self, cls_logits: torch.Tensor, distillation_logits: torch.Tensor) -> torch.Tensor:
        """Fuses logits; all have the shape (images, classes)."""
        return self.cls_weights * cls_logits + self.distillation_weights * distillation_logits + self.bias


class Rule(NamedTuple):
    """A family of fusions with parameters to fit; with zeros as parameters, a fusion is the mean of the heads.

    Args:
        size: Number of parameters, from the number of groups.
        parts: Maps the parameters, the centred logarithms of the training counts, and the index of each class's group
            to the fields of [`Fusion`], each a number or (classes,).
    """

    size: Callable[[int], int]
    parts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple]

    def fusion(self, parameters: torch.Tensor, log_counts: torch.Tensor, group_of: torch.Tensor) -> Fusion:
        """Makes the fusion of given parameters."""
        parts = self.parts(parameters, log_counts, group_of)
        return Fusion(*(torch.as_tensor(part, dtype=log_counts.dtype).expand_as(log_counts) for part in parts))


def _weighted(share_of_cls: torch.Tensor) -> tuple:
    return share_of_cls, 1 - share_of_cls, 0.0


RULES: dict[str, Rule] = {
    "mean": Rule(lambda groups: 0, lambda p, log_counts, group_of: (0.5, 0.5, 0.0)),
    # The logits of each head are divided by a separate temperature.
    "temperatures": Rule(lambda groups: 2, lambda p, log_counts, group_of: (*(0.5 * p.exp()), 0.0)),
    "weight": Rule(lambda groups: 1, lambda p, counts, group_of: _weighted(torch.sigmoid(p[0]).expand_as(counts))),
    "group_weights": Rule(lambda groups: groups, lambda p, log_counts, group_of: _weighted(torch.sigmoid(p[group_of]))),
    "count_weights": Rule(lambda groups: 2, lambda p, counts, group_of: _weighted(torch.sigmoid(p[0] + p[1] * counts))),
    # Post-hoc logit adjustment (Menon et al., ICLR 2021): the training prior is subtracted.
    "logit_adjustment": Rule(lambda groups: 1, lambda p, log_counts, group_of: (0.5, 0.5, -p[0] * log_counts)),
}


def fit_fusion(
    rule: str,
    cls_logits: torch.Tensor,
    distillation_logits: torch.Tensor,
    labels: torch.Tensor,
    class_counts: Integers,
    groups: Groups,
) -> Fusion:
    """Fits one of `RULES` to the labelled logits of both heads, (images, classes).

    Raises:
        ValueError: If the rule is unknown, or a class is in no group.
    """
    if rule not in RULES:
        raise ValueError(f"fusion must be one of {', '.join(RULES)}, got {rule!r}.")
    # In float64: the gradient tolerance of LBFGS below, 1e-9, is under the rounding of float32.
    cls_logits, distillation_logits = cls_logits.double(), distillation_logits.double()
    log_counts = torch.as_tensor(class_counts, dtype=torch.float64).clamp(min=1).log()
    log_counts = log_counts - log_counts.mean()
    group_of = torch.full((len(log_counts),), -1)
    for index, group in enumerate(groups.values()):
        group_of[torch.as_tensor(group, dtype=torch.long)] = index
    if (group_of < 0).any():
        raise ValueError(f"class {int((group_of < 0).nonzero()[0])} is in none of the groups {', '.join(groups)}.")
    weights = 1.0 / torch.bincount(labels, minlength=len(log_counts)).clamp(min=1).double()
    family = RULES[rule]
    parameters = torch.zeros(family.size(len(groups)), dtype=torch.float64, requires_grad=True)
    if len(parameters) == 0:
        return family.fusion(parameters, log_counts, group_of)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = family.fusion(parameters, log_counts, group_of)(cls_logits, distillation_logits)
        value = F.cross_entropy(logits, labels, weights)
        # Without this penalty the scale would grow without bound if all images are classified correctly.
        value = value + 1e-4 * parameters.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return Fusion(*(value.detach() for value in family.fusion(parameters, log_counts, group_of)))


def balanced_rows(labels: Integers, limit: int = FIT_IMAGES, seed: int = 0) -> np.ndarray:
    """Chooses at most `limit` random rows, as balanced over the classes as possible, and returns them sorted."""
    labels = np.asarray(labels)
    # By rank: the first row of every class, then the second of every class, and so on.
    return np.sort(np.lexsort((labels, random_ranks(labels, seed)))[:limit])


def fold(model: PreTrainedModel, fusion: Fusion) -> PreTrainedModel:
    """Copies a student and folds a fusion into its heads: the mean of the new heads is the fused prediction.

    Plain transformers can load the saved copy. The two heads of the copy are no longer the experts on head and tail
    classes.
    """
    folded = copy.deepcopy(model)
    folded.config.prediction_sets = None  # their thresholds hold for the unfused scores
    shares = {"cls_classifier": fusion.cls_weights, "distillation_classifier": fusion.distillation_weights}
    with torch.no_grad():
        for name, weights in shares.items():
            head: nn.Linear = getattr(folded, name)
            weights = 2 * weights.to(head.weight)  # the mean of the heads halves each logit
            head.weight.mul_(weights[:, None])
            head.bias.mul_(weights).add_(fusion.bias.to(head.bias))
    return folded
