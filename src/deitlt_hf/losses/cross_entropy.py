"""Cross entropy with class indices or probabilities, and binary cross entropy."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from .entry import ClsLoss, Counts, DistillationTarget, TeacherLoss

if TYPE_CHECKING:
    from transformers import TrainingArguments


def cross_entropy_sum(
    logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """Cross entropy summed over images, each multiplied by the weight of its class. The temperature has no effect."""
    return F.cross_entropy(logits, targets, weight=class_weights, reduction="sum")


def binary_cross_entropy_sum(
    logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary cross entropy, averaged over classes and summed over images, each times the weight of its class."""
    num_classes = logits.shape[1]
    probabilities = targets if targets.dim() == 2 else F.one_hot(targets, num_classes).float()
    weights = None if class_weights is None else (probabilities * class_weights).sum(dim=1, keepdim=True)
    return F.binary_cross_entropy_with_logits(logits, probabilities, weights, reduction="sum") / num_classes


def _build_cls(class_counts: Counts, class_weights: torch.Tensor | None) -> nn.Module:
    return nn.CrossEntropyLoss(class_weights, reduction="sum")


def _build_teacher(args: "TrainingArguments", class_counts: Counts, class_weights: torch.Tensor | None) -> nn.Module:
    return nn.CrossEntropyLoss(class_weights, reduction="sum", label_smoothing=args.label_smoothing_factor)


TEACHER = TeacherLoss(_build_teacher, smooths_labels=True)
CLS = ClsLoss(_build_cls)
BINARY_CLS = ClsLoss(lambda class_counts, class_weights: partial(binary_cross_entropy_sum, class_weights=class_weights))
HARD = DistillationTarget(
    lambda labels, teacher_logits: teacher_logits.argmax(dim=1), cross_entropy_sum, weighted_mean=True
)
LABELS = DistillationTarget(
    lambda labels, teacher_logits: labels,
    cross_entropy_sum,
    "the labels instead of a teacher",
    needs_teacher=False,
    weighted_mean=True,
)
