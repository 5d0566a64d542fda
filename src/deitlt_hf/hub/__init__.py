"""Publication on the Hugging Face Hub: model cards and pushes.

It also exports functions for the authors' checkpoints from [`deitlt_hf.original`], because version 0.1.0 had them here.
"""

from ..data import read_class_map, read_class_names
from ..original import convert_original, export_original_student, load_original_student, load_original_teacher

__all__ = [
    "convert_original",
    "export_original_student",
    "load_original_student",
    "load_original_teacher",
    "read_class_map",
    "read_class_names",
]
