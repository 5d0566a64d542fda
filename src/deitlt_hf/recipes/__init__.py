"""Recipes: one YAML file per benchmark with all settings of a run, in the sections data, teacher and student."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .usage import recipe_names

if TYPE_CHECKING:
    from .parsing import data_help, field_names, fill_arguments, parse_arguments
    from .recipe_files import load_recipe, paper_accuracies, recipe_description, teacher_folder
    from .sections import DataArguments, PretrainingModelArguments, StudentArguments, TeacherArguments

__all__ = [
    "DataArguments",
    "PretrainingModelArguments",
    "StudentArguments",
    "TeacherArguments",
    "data_help",
    "field_names",
    "fill_arguments",
    "load_recipe",
    "paper_accuracies",
    "parse_arguments",
    "recipe_description",
    "recipe_names",
    "teacher_folder",
]


def __getattr__(name: str) -> Any:
    """Imports a name on first use: a wrong command line is then reported without the heavy libraries."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    of_parsing = ("data_help", "field_names", "fill_arguments", "parse_arguments")
    module = "sections" if name.endswith("Arguments") else "parsing" if name in of_parsing else "recipe_files"
    return getattr(import_module(f".{module}", __name__), name)
