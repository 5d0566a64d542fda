"""Import and export of checkpoints of the authors' code."""

from .conversion import convert_original, export_original_student, load_original_student, load_original_teacher

__all__ = ["convert_original", "export_original_student", "load_original_student", "load_original_teacher"]
