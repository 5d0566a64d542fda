"""The DeiT-LT loss: the CLS head learns from labels, the DIST head from a flat teacher."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .logit_adjustment import LogitAdjustedLoss

SOFT_TYPES = ("soft", "soft_sum")
DISTILLATION_TYPES = ("hard", *SOFT_TYPES, "none")
CLS_LOSSES = ("ce", "bce", "logit_adjusted")


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
        distillation: `hard`, cross entropy with the teacher's prediction (the paper); `soft`, Kullback-Leibler
            divergence from the teacher's probabilities, times temperature squared, averaged over images and classes
            as in the authors' code; `soft_sum`, the same but summed over classes, of the same strength as `hard`
            (Hinton et al., 2015); `none`, cross entropy with the labels: two tokens, no teacher.
        temperature: Softens both distributions of `soft` and `soft_sum`.
        cls_loss: `ce`, cross entropy; `bce`, binary cross entropy, averaged over images and classes;
            `logit_adjusted`, cross entropy of logits that are adjusted by the class frequencies (balanced softmax, see
            [`LogitAdjustedLoss`]).
        class_weights: Weights of the DIST head's targets, (classes,), for deferred re-weighting. With soft labels they
            re-weight the teacher's distribution: `p_c * w_c`, renormalised. (The authors' code multiplies the
            log-probabilities instead; all their results use `hard`.)
        reweight_cls: Apply the class weights to the CLS head too (an ablation; needs `cls_loss="ce"`).
        class_counts: Training images of each class, for `cls_loss="logit_adjusted"`.

    Raises:
        ValueError: If an argument is outside its range, or `class_counts` are missing.
    """

    class_weights: torch.Tensor | None

    def __init__(
        self,
        alpha: float = 0.5,
        distillation: str = "hard",
        temperature: float = 1.0,
        cls_loss: str = "ce",
        class_weights: torch.Tensor | None = None,
        reweight_cls: bool = False,
        class_counts: Sequence[int] | torch.Tensor | None = None,
    ):
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}.")
        if distillation not in DISTILLATION_TYPES:
            raise ValueError(f"distillation must be one of {', '.join(DISTILLATION_TYPES)}, got {distillation!r}.")
        if cls_loss not in CLS_LOSSES:
            raise ValueError(f"cls_loss must be one of {', '.join(CLS_LOSSES)}, got {cls_loss!r}.")
        if temperature <= 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if reweight_cls and cls_loss != "ce":
            raise ValueError("reweight_cls needs cls_loss='ce'.")
        self.alpha = alpha
        self.distillation = distillation
        self.temperature = temperature
        self.cls_loss = cls_loss
        self.reweight_cls = reweight_cls
        self.logit_adjusted = None
        if cls_loss == "logit_adjusted":
            if class_counts is None:
                raise ValueError("cls_loss='logit_adjusted' needs class_counts; got None.")
            self.logit_adjusted = LogitAdjustedLoss(class_counts, reduction="sum")
        self.register_buffer("class_weights", class_weights)

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
        cls_logits, distillation_logits = cls_logits.float(), distillation_logits.float()
        if self.distillation != "none":
            teacher_logits = _checked(self.distillation, teacher_logits, distillation_logits)
        if denominators is None:
            denominators = self.denominators(labels, teacher_logits)

        if self.cls_loss == "bce":
            cls_targets = _probabilities(labels, cls_logits.shape[1])
            cls_sum = F.binary_cross_entropy_with_logits(cls_logits, cls_targets, reduction="sum")
            cls_sum = cls_sum / cls_logits.shape[1]
        elif self.logit_adjusted is not None:
            cls_sum = self.logit_adjusted(cls_logits, labels)
        else:
            cls_sum = _cross_entropy_sum(cls_logits, labels, self.class_weights if self.reweight_cls else None)

        if self.distillation in SOFT_TYPES and teacher_logits is not None:
            distillation_sum = self._divergence(distillation_logits, teacher_logits)
        else:
            targets = self._distillation_targets(labels, teacher_logits)
            distillation_sum = _cross_entropy_sum(distillation_logits, targets, self.class_weights)

        cls_loss = (1.0 - self.alpha) * cls_sum / denominators[0]
        distillation_loss = self.alpha * distillation_sum / denominators[1]
        return DistillationLossOutput(cls_loss + distillation_loss, cls_loss, distillation_loss)

    def denominators(self, labels: torch.Tensor, teacher_logits: torch.Tensor | None = None) -> torch.Tensor:
        """Divisors of the CLS and DIST sums of this batch, (2,): the batch size or the sum of weights."""
        batch_size = torch.full((), float(labels.shape[0]), device=labels.device)
        if self.class_weights is None:
            return torch.stack([batch_size, batch_size])
        cls_total = _weight_sum(self.class_weights, labels) if self.reweight_cls else batch_size
        if self.distillation in SOFT_TYPES:
            return torch.stack([cls_total, batch_size])
        targets = self._distillation_targets(labels, teacher_logits)
        return torch.stack([cls_total, _weight_sum(self.class_weights, targets)])

    def _distillation_targets(self, labels: torch.Tensor, teacher_logits: torch.Tensor | None) -> torch.Tensor:
        if self.distillation == "none":
            return labels
        assert teacher_logits is not None  # checked in `forward` for all types but `none`
        return teacher_logits.argmax(dim=1)

    def _divergence(self, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        student = F.log_softmax(logits / self.temperature, dim=1)
        teacher = F.log_softmax(teacher_logits.float() / self.temperature, dim=1)
        if self.class_weights is not None:
            # The softmax renormalises the weighted probabilities.
            teacher = F.log_softmax(teacher + self.class_weights.log(), dim=1)
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
        return divergence * self.temperature**2 / (logits.shape[1] if self.distillation == "soft" else 1)


def _checked(distillation: str, teacher_logits: torch.Tensor | None, student_logits: torch.Tensor) -> torch.Tensor:
    if teacher_logits is None:
        raise ValueError(f"distillation={distillation!r} needs teacher_logits; got None.")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits have shape {tuple(teacher_logits.shape)}, the student's {tuple(student_logits.shape)}."
        )
    return teacher_logits


def _weight_sum(weights: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return weights[targets].sum() if targets.dim() == 1 else (targets * weights).sum()


def _probabilities(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    return targets if targets.dim() == 2 else F.one_hot(targets, num_classes).float()


def _cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return F.cross_entropy(logits, targets, weight=weights, reduction="sum")
