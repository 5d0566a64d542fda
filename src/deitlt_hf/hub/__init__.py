"""The authors' checkpoints, in and out."""

from ..data.class_lists import read_class_map, read_class_names
from .original import convert_original, export_original_student, load_original_student, load_original_teacher

__all__ = [
    "convert_original",
    "export_original_student",
    "load_original_student",
    "load_original_teacher",
    "read_class_map",
    "read_class_names",
]
