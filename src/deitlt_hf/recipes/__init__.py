"""Recipes: one YAML file per benchmark with all settings of a run, in the sections data, teacher and student."""

from .arguments import DataArguments, StudentArguments, TeacherArguments
from .parsing import (
    command_line_errors,
    data_help,
    fill_arguments,
    load_recipe,
    own_loss,
    paper_accuracies,
    parse_arguments,
    recipe_description,
    recipe_names,
    teacher_folder,
)

__all__ = [
    "DataArguments",
    "StudentArguments",
    "TeacherArguments",
    "command_line_errors",
    "data_help",
    "fill_arguments",
    "load_recipe",
    "own_loss",
    "paper_accuracies",
    "parse_arguments",
    "recipe_description",
    "recipe_names",
    "teacher_folder",
]
