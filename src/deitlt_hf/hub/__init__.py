"""The authors' checkpoints."""

from .original import load_original_student

__all__ = ["load_original_student"]
