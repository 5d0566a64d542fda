"""Losses and class weights for long-tailed training: tensors in, tensors out."""

from .class_weights import effective_number_weights
from .distillation import DistillationLoss, DistillationLossOutput
from .ldam import LDAMLoss

__all__ = ["DistillationLoss", "DistillationLossOutput", "LDAMLoss", "effective_number_weights"]
