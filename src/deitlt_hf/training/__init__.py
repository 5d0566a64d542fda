"""Trainers for the flat teacher and for the DeiT-LT student."""

from .distillation import DeiTLTTrainer
from .sam import SAM
from .student_arguments import DeiTLTTrainingArguments
from .teacher import FlatTeacherTrainer
from .teacher_arguments import FlatTeacherTrainingArguments

__all__ = [
    "SAM",
    "DeiTLTTrainer",
    "DeiTLTTrainingArguments",
    "FlatTeacherTrainer",
    "FlatTeacherTrainingArguments",
]
