"""Losses and class weights for long-tailed training, as functions and modules of tensors, and their registry."""

from .class_weights import effective_number_weights
from .entry import ClsLoss, DistillationTarget, LossOptions, TeacherLoss
from .ldam import LDAMLoss
from .logit_adjustment import LogitAdjustedLoss
from .paco import PaCoLoss
from .registry import CLS_LOSSES, DISTILLATION_TARGETS, TEACHER_LOSSES
from .student import DistillationLoss, DistillationLossOutput

__all__ = [
    "CLS_LOSSES",
    "DISTILLATION_TARGETS",
    "TEACHER_LOSSES",
    "ClsLoss",
    "DistillationLoss",
    "DistillationLossOutput",
    "DistillationTarget",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "LossOptions",
    "PaCoLoss",
    "TeacherLoss",
    "effective_number_weights",
]
