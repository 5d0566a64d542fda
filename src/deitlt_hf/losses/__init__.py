"""Losses and class weights for long-tailed training: tensors in, tensors out."""

from .class_weights import effective_number_weights
from .distillation import DistillationLoss, DistillationLossOutput
from .ldam import LDAMLoss
from .logit_adjustment import LogitAdjustedLoss
from .paco import PaCoLoss

__all__ = [
    "DistillationLoss",
    "DistillationLossOutput",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "PaCoLoss",
    "effective_number_weights",
]
