"""PaCo loss: parametric contrastive learning."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..options import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, option
from .class_weights import positive_counts
from .entry import Counts, LossOptions, TeacherLoss


@dataclass
class PaCoOptions(LossOptions):
    """Training arguments of PaCo and its momentum encoder."""

    limits: ClassVar = {
        "paco_alpha": AT_LEAST_0,
        "paco_temperature": ABOVE_0,
        "paco_queue": AT_LEAST_1,
        "paco_momentum": SHARE,
    }
    paco_alpha: float = option(0.01, "PaCo: weight of an image of the same class as a positive.")
    paco_temperature: float = option(
        0.05, "PaCo: temperature, by which similarities are divided. 0.05 for CIFAR, 0.2 for others."
    )
    paco_queue: int = option(
        1024, "PaCo: number of keys of earlier batches in the queue. 1024 for CIFAR, 8192 for others."
    )
    paco_momentum: float = option(
        0.999, "PaCo: share of the old weights in an update of the momentum encoder, in [0, 1]."
    )


class PaCoLoss(nn.Module):
    """Parametric contrastive loss (PaCo; Cui et al., ICCV 2021, equations 4 to 6).

    The loss pulls an image to the learnt centre of its class and to other images of the class, and away from all other
    centres and images. The similarity to a centre is the classifier's logit plus the logarithm of the class's share of
    the training images. Without images of the same class, the loss is the cross entropy over those logits and the
    similarities.

    Args:
        class_counts: Training images of each class.
        alpha: Weight of an image of the same class as a positive; 0.01 for the CIFAR teachers of DeiT-LT.
        beta: Weight of the class's centre as a positive.
        gamma: Weight of the images in the denominator; centres have weight 1.
        temperature: Divisor of the similarities between images; 0.05 for CIFAR, 0.2 for ImageNet-LT and iNaturalist.
        class_weights: Weights of the classes in the mean, (classes,), for deferred re-weighting.
        reduction: `mean` (divided by the weights' sum), `sum` or `none`.

    Raises:
        ValueError: If a class has no image, or beta or gamma is not above 0.
    """

    log_prior: torch.Tensor
    class_weights: torch.Tensor | None

    def __init__(
        self,
        class_counts: Sequence[int] | torch.Tensor,
        alpha: float = 0.01,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 0.05,
        class_weights: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if beta <= 0 or gamma <= 0:
            raise ValueError(f"beta and gamma must be above 0, got {beta} and {gamma}.")
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.temperature = temperature
        self.reduction = reduction
        counts = positive_counts(class_counts)
        self.register_buffer("log_prior", (counts / counts.sum()).log().float())
        self.register_buffer("class_weights", class_weights)

    def forward(
        self,
        logits: torch.Tensor,
        queries: torch.Tensor,
        labels: torch.Tensor,
        keys: torch.Tensor,
        key_labels: torch.Tensor,
    ) -> torch.Tensor:
        """Computes the loss.

        Args:
            logits: Logits of the classifier for the queries' images; (batch, classes).
            queries: Projected features of length 1; (batch, features). They are also compared with each other.
            labels: Class indices; (batch,).
            keys: Projected features of length 1 that the queries are compared with: those of the momentum encoder for
                this batch, and the queue; (keys, features).
            key_labels: Class indices of the keys; (keys,).
        """
        batch = len(queries)
        similarities = queries.float() @ torch.cat([queries, keys]).float().T / self.temperature
        # An image is not compared with itself: neither as a positive nor in the denominator.
        itself = torch.zeros_like(similarities, dtype=torch.bool)
        itself[:, :batch].fill_diagonal_(True)
        similarities = similarities.masked_fill(itself, -torch.inf)
        # As in balanced softmax: the classifier then does not have to learn how frequent the classes are.
        centres = logits.float() + self.log_prior
        # Adding log(gamma) before the exponential multiplies the image terms of the denominator by gamma.
        terms = torch.cat([centres, similarities + math.log(self.gamma)], dim=1)
        log_denominator = terms.logsumexp(dim=1, keepdim=True)

        same_class = (labels[:, None] == torch.cat([labels, key_labels])) & ~itself
        of_centre = centres.gather(1, labels[:, None]) - log_denominator
        # Filled, not multiplied by the mask: for the image itself, -inf times 0 would be NaN.
        of_images = (similarities - log_denominator).masked_fill(~same_class, 0.0).sum(dim=1)
        # A weighted mean over the positives: images of a frequent class have more of them, in batch and queue.
        positives = self.beta + self.alpha * same_class.sum(dim=1)
        losses = -(self.beta * of_centre.squeeze(1) + self.alpha * of_images) / positives
        if self.class_weights is not None:
            weights = self.class_weights[labels]
            losses = losses * weights
            if self.reduction == "mean":
                return losses.sum() / weights.sum()
        reductions: dict[str, Callable[[], torch.Tensor]] = {"mean": losses.mean, "sum": losses.sum}
        return losses if self.reduction == "none" else reductions[self.reduction]()


def _build_teacher(args: PaCoOptions, class_counts: Counts, class_weights: torch.Tensor | None) -> PaCoLoss:
    assert class_counts is not None  # known whenever training images are given
    return PaCoLoss(
        class_counts,
        args.paco_alpha,
        temperature=args.paco_temperature,
        class_weights=class_weights,
        reduction="sum",
    )


TEACHER = TeacherLoss(_build_teacher, "needs projection_size", PaCoOptions, contrast=True, drops_last=True)
