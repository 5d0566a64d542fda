"""Trainers for the flat teacher and for the DeiT-LT student."""

from .arguments import DeiTLTTrainingArguments, FlatTeacherTrainingArguments
from .distillation import DeiTLTTrainer
from .sam import SAM
from .teacher import FlatTeacherTrainer

__all__ = [
    "SAM",
    "DeiTLTTrainer",
    "DeiTLTTrainingArguments",
    "FlatTeacherTrainer",
    "FlatTeacherTrainingArguments",
]
