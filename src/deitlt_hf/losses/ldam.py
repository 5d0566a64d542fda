"""LDAM loss: label-distribution-aware margins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..options import ABOVE_0, option
from .class_weights import positive_counts
from .entry import Counts, LossOptions, TeacherLoss


@dataclass
class LDAMOptions(LossOptions):
    """Training arguments of LDAM."""

    limits: ClassVar = dict.fromkeys(("ldam_margin", "ldam_scale"), ABOVE_0)
    ldam_margin: float = option(0.5, "LDAM: margin of the rarest class, which is the largest margin.")
    ldam_scale: float = option(30.0, "LDAM: factor by which the cosine classifier multiplies the cosines.")


class LDAMLoss(nn.Module):
    """Cross entropy with a margin that is larger for rarer classes (LDAM; Cao et al., NeurIPS 2019, equation 13).

    Margins are proportional to `n_c ** -1/4`; the largest is `max_margin`. They apply to the cosines of a normalised
    classifier, whose logits are the cosines times `scale`.

    Args:
        class_counts: Training images of each class.
        max_margin: Margin of the rarest class; 0.5 for CIFAR, 0.3 for ImageNet-LT and iNaturalist.
        scale: Factor between the classifier's cosines and its logits.
        class_weights: Weights of the classes in the mean, (classes,), for deferred re-weighting.
        reduction: As in `F.cross_entropy`: `mean` (divided by the weights' sum), `sum` or `none`.

    Raises:
        ValueError: If a class has no image.
    """

    margins: torch.Tensor
    class_weights: torch.Tensor | None

    def __init__(
        self,
        class_counts: Sequence[int] | torch.Tensor,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weights: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        margins = positive_counts(class_counts) ** -0.25
        self.scale = scale
        self.reduction = reduction
        self.register_buffer("margins", (margins * (max_margin / margins.max())).float())
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss.

        Args:
            logits: Cosines times `scale`; (batch, classes).
            labels: Class indices; (batch,).
        """
        margins = F.one_hot(labels, logits.shape[1]) * self.margins[labels].unsqueeze(1)
        # The margins are distances of cosines, but the logits are already scaled (config.logit_scale), so that a saved
        # model gives probabilities without its loss. The scale matters: softmax of bare cosines is almost uniform.
        shifted = logits.float() - self.scale * margins
        return F.cross_entropy(shifted, labels, weight=self.class_weights, reduction=self.reduction)


def _build_teacher(args: LDAMOptions, class_counts: Counts, class_weights: torch.Tensor | None) -> LDAMLoss:
    assert class_counts is not None  # known whenever training images are given
    return LDAMLoss(class_counts, args.ldam_margin, args.ldam_scale, class_weights, "sum")


TEACHER = TeacherLoss(
    _build_teacher, "needs a cosine classifier", LDAMOptions, classifier="cosine", logit_scale="ldam_scale"
)
