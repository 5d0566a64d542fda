"""Losses and class weights for long-tailed training: tensors in, tensors out."""

from .class_weights import effective_number_weights
from .distillation import DistillationLoss, DistillationLossOutput
from .ldam import LDAMLoss
from .logit_adjustment import LogitAdjustedLoss
from .paco import PaCoLoss

# What a teacher can be trained with.
TEACHER_LOSSES = ("ce", "ldam", "logit_adjusted", "paco")

__all__ = [
    "TEACHER_LOSSES",
    "DistillationLoss",
    "DistillationLossOutput",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "PaCoLoss",
    "effective_number_weights",
]
