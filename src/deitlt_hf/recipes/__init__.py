"""Recipes: one YAML file per benchmark with all settings of a run, in the sections data, teacher and student."""

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
from .sections import DataArguments, PretrainingModelArguments, StudentArguments, TeacherArguments

__all__ = [
    "DataArguments",
    "PretrainingModelArguments",
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
