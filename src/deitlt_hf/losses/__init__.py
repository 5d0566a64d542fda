"""Losses and class weights for long-tailed training, as functions and modules of tensors."""

from .class_weights import effective_number_weights
from .distillation import DistillationLoss, DistillationLossOutput
from .ldam import LDAMLoss
from .logit_adjustment import LogitAdjustedLoss
from .paco import PaCoLoss

# Losses that a teacher can be trained with.
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
