"""The DeiT-LT loss: the CLS head learns from labels, the DIST head from a flat teacher."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .entry import find
from .registry import CLS_LOSSES, DISTILLATION_TARGETS


class DistillationLossOutput(NamedTuple):
    """The loss and its two parts, already multiplied by `1 - alpha` and `alpha`: the parts add up to the loss."""

    loss: torch.Tensor
    cls_loss: torch.Tensor
    distillation_loss: torch.Tensor


class DistillationLoss(nn.Module):
    """`(1 - alpha) * L_cls(CLS head, labels) + alpha * L_dist(DIST head, teacher)` (DeiT-LT, equation 2).

    Each part is a (weighted) mean over images. Gradient accumulation and data-parallel processes split a batch into
    micro-batches. With weights, the mean over the batch is not the mean of the micro-batch means:
    `F.cross_entropy(weight=...)` divides by the weight sum of the micro-batch. The caller can therefore pass the
    denominators: see `denominators`.

    Args:
        alpha: Share of the DIST head's part, in [0, 1]; 0.5 in the paper.
        distillation: A name in `DISTILLATION_TARGETS`: `hard`, cross entropy with the teacher's prediction (the
            paper); `soft`, Kullback-Leibler divergence from the teacher's probabilities, times temperature squared,
            averaged over images and classes as in the authors' code; `soft_sum`, the same but summed over classes, of
            the same strength as `hard` (Hinton et al., 2015); `none`, cross entropy with the labels: two tokens, no
            teacher.
        temperature: Softens both distributions of `soft` and `soft_sum`.
        cls_loss: A name in `CLS_LOSSES`: `ce`, cross entropy; `bce`, binary cross entropy, averaged over images and
            classes; `logit_adjusted`, cross entropy of logits that are adjusted by the class frequencies (balanced
            softmax, see [`LogitAdjustedLoss`]).
        class_weights: Weights of the DIST head's targets, (classes,), for deferred re-weighting, times those of a user.
            With soft labels they re-weight the teacher's distribution: `p_c * w_c`, renormalised. (The authors' code
            multiplies the log-probabilities instead; all their results use `hard`.)
        reweight_cls: Apply the class weights to the CLS head too (an ablation).
        class_counts: Training images of each class, for losses that need them: `logit_adjusted`.
        cls_weights: Weights of the CLS head's classes, (classes,), without `reweight_cls`: those of a user.

    Raises:
        ValueError: If an argument is outside its range, or `class_counts` are missing.
    """

    class_weights: torch.Tensor | None
    cls_weights: torch.Tensor | None

    def __init__(
        self,
        alpha: float = 0.5,
        distillation: str = "hard",
        temperature: float = 1.0,
        cls_loss: str = "ce",
        class_weights: torch.Tensor | None = None,
        reweight_cls: bool = False,
        class_counts: Sequence[int] | torch.Tensor | None = None,
        cls_weights: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}.")
        target = find(DISTILLATION_TARGETS, distillation, "distillation")
        of_cls = find(CLS_LOSSES, cls_loss, "cls_loss")
        if temperature <= 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if of_cls.needs_counts and class_counts is None:
            raise ValueError(f"cls_loss={cls_loss!r} needs class_counts; got None.")
        self.alpha = alpha
        self.distillation = distillation
        self.temperature = temperature
        self.target = target
        self.register_buffer("class_weights", class_weights)
        # Equation 2 re-weights the DIST head alone: CLS stays the expert on head classes.
        self.register_buffer("cls_weights", class_weights if reweight_cls else cls_weights)
        self.cls_criterion = of_cls.build(class_counts, self.cls_weights)

    def forward(
        self,
        cls_logits: torch.Tensor,
        distillation_logits: torch.Tensor,
        labels: torch.Tensor,
        teacher_logits: torch.Tensor | None = None,
        denominators: torch.Tensor | None = None,
    ) -> DistillationLossOutput:
        """Computes the loss in float32.

        Args:
            cls_logits: Logits of the CLS head; (batch, classes).
            distillation_logits: Logits of the DIST head; (batch, classes).
            labels: Class indices (batch,), or probabilities (batch, classes) after mixing and smoothing.
            teacher_logits: Logits of the teacher; (batch, classes). Not needed for `none`.
            denominators: Divisors of the two sums, (2,); by default those of this batch. For a micro-batch of a
                larger batch, add up [`denominators`] over all micro-batches.

        Raises:
            ValueError: If the teacher's logits are missing or have another shape than the student's.
        """
        # Sums over a batch in half precision would lose digits, and can overflow in fp16.
        cls_logits, distillation_logits = cls_logits.float(), distillation_logits.float()
        if self.target.needs_teacher:
            if teacher_logits is None:
                raise ValueError(f"distillation={self.distillation!r} needs teacher_logits; got None.")
            if teacher_logits.shape != distillation_logits.shape:
                found = f"{tuple(teacher_logits.shape)}, the student's {tuple(distillation_logits.shape)}"
                raise ValueError(f"teacher_logits have shape {found}.")
        if denominators is None:
            denominators = self.denominators(labels, teacher_logits)

        cls_sum = self.cls_criterion(cls_logits, labels)
        targets = self.target.targets(labels, teacher_logits)
        distillation_sum = self.target.loss(distillation_logits, targets, self.class_weights, self.temperature)
        cls_loss = (1.0 - self.alpha) * cls_sum / denominators[0]
        distillation_loss = self.alpha * distillation_sum / denominators[1]
        return DistillationLossOutput(cls_loss + distillation_loss, cls_loss, distillation_loss)

    def denominators(self, labels: torch.Tensor, teacher_logits: torch.Tensor | None = None) -> torch.Tensor:
        """Divisors of the CLS and DIST sums of this batch, (2,): the batch size or the sum of weights.

        The weights of the DIST head are those of its targets, the classes that the teacher predicts, not of the labels.
        """
        # Made on the device: a copy from the host would wait for it in every step.
        batch_size = torch.full((), float(labels.shape[0]), device=labels.device)
        cls_total = batch_size if self.cls_weights is None else _weight_sum(self.cls_weights, labels)
        # Re-weighted soft targets are a distribution again, so each image counts once.
        if self.class_weights is None or not self.target.weighted_mean:
            return torch.stack([cls_total, batch_size])
        targets = self.target.targets(labels, teacher_logits)
        return torch.stack([cls_total, _weight_sum(self.class_weights, targets)])


def _weight_sum(weights: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return weights[targets].sum() if targets.dim() == 1 else (targets * weights).sum()
