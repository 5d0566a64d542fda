"""Cross entropy with logits adjusted by the class frequencies."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .class_weights import positive_counts
from .entry import ClsLoss, Counts, TeacherLoss


class LogitAdjustedLoss(nn.Module):
    """Cross entropy of `logits + tau * log(n_c / n)` (Menon et al., ICLR 2021, equation 10).

    The unadjusted logits then predict as for balanced classes. With `tau` 1 this is balanced softmax (Ren et al.,
    NeurIPS 2020, equation 4).

    Args:
        class_counts: Training images of each class.
        tau: Strength of the adjustment.
        class_weights: Weights of the classes in the mean, (classes,), for deferred re-weighting.
        reduction: As in `F.cross_entropy`: `mean` (divided by the weights' sum), `sum` or `none`.

    Raises:
        ValueError: If a class has no image.
    """

    adjustment: torch.Tensor
    class_weights: torch.Tensor | None

    def __init__(
        self,
        class_counts: Sequence[int] | torch.Tensor,
        tau: float = 1.0,
        class_weights: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        counts = positive_counts(class_counts)
        self.reduction = reduction
        self.register_buffer("adjustment", (tau * (counts / counts.sum()).log()).float())
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss.

        Args:
            logits: Unadjusted logits; (batch, classes).
            labels: Class indices (batch,), or probabilities (batch, classes).
        """
        return F.cross_entropy(
            logits.float() + self.adjustment, labels, weight=self.class_weights, reduction=self.reduction
        )


def _build_cls(class_counts: Counts, class_weights: torch.Tensor | None) -> LogitAdjustedLoss:
    assert class_counts is not None  # for the teacher: known whenever training images are given
    return LogitAdjustedLoss(class_counts, class_weights=class_weights, reduction="sum")


TEACHER = TeacherLoss(lambda args, *counts_and_weights: _build_cls(*counts_and_weights), "balanced softmax")
CLS = ClsLoss(_build_cls, "balanced softmax: logits adjusted by the class frequencies", needs_counts=True)
