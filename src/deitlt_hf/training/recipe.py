"""Recipes from Python: their data, teacher and student, with values overridden by keyword."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..recipes import DataArguments, StudentArguments, TeacherArguments, fill_arguments, load_recipe
from ..recipes.recipe_files import check_values
from .student_arguments import DeiTLTTrainingArguments
from .teacher_arguments import FlatTeacherTrainingArguments

if TYPE_CHECKING:
    from .distillation import DeiTLTTrainer
    from .teacher import FlatTeacherTrainer

# The dataclasses that hold every value of a run.
STUDENT = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
TEACHER = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)


@dataclass(frozen=True)
class TeacherRun:
    """The arguments of a teacher's training."""

    data: DataArguments
    model: TeacherArguments
    args: FlatTeacherTrainingArguments

    def train(self) -> FlatTeacherTrainer:
        """Trains the teacher, saves it in `args.output_dir` and returns its trainer, as `deitlt train-teacher`."""
        from .runs import train_teacher  # which makes the teacher's arguments with this module

        return train_teacher(self.data, self.model, self.args)


@dataclass(frozen=True)
class StudentRun:
    """The arguments of a student's training."""

    recipe: str
    data: DataArguments
    model: StudentArguments
    args: DeiTLTTrainingArguments

    def train(self) -> DeiTLTTrainer:
        """Trains the student, saves it in `args.output_dir` and returns its trainer, as `deitlt distill`.

        Without `teacher` the recipe's teacher is trained first, unless it exists next to `args.output_dir`.
        """
        from .runs import distill

        return distill(self.recipe, self.data, self.model, self.args)


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs, from one YAML file.

    ```python
    recipe = Recipe.load("digits_lt_fast")
    trainer = recipe.student(output_dir="outputs/python/student").train()
    ```

    Overrides are the fields of [`DataArguments`], [`StudentArguments`] or [`TeacherArguments`], and of the training
    arguments: the options of the command line by their names.

    Args:
        name: Name of a recipe of the package, or path of a YAML file. Use [`Recipe.load`], which checks it.
        sections: Values by section and field, for a recipe that is in no file.
    """

    name: str
    sections: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if self.sections is not None:
            check_values(self.sections, f"recipe {self.name!r}")

    @classmethod
    def load(cls, name_or_path: str) -> Recipe:
        """Finds a recipe of the package by name, or any recipe by the path of its YAML file.

        Raises:
            FileNotFoundError: If it does not exist; the message suggests the most similar name.
            ValueError: If the file is not a recipe.
        """
        load_recipe(name_or_path)
        return cls(name_or_path)

    def data(self, **overrides: Any) -> DataArguments:
        """The arguments of the data; their `load()` gives a `DatasetDict` with `train` and `test`.

        It raises `ValueError` if an override is not a field of the data.
        """
        (data,) = fill_arguments("data", (DataArguments,), self.name, overrides, self.sections)
        return data

    def teacher(self, loss: str | None = None, **overrides: Any) -> TeacherRun:
        """The arguments of the teacher's training; its `train()` starts it.

        Args:
            loss: A name in [`~deitlt_hf.losses.TEACHER_LOSSES`], such as `paco`; by default the recipe's.
            **overrides: Fields of data, model and training.

        Raises:
            ValueError: If an override is not a field, or a value is not possible.
        """
        if loss is not None:
            overrides["teacher_loss"] = loss
        return TeacherRun(*fill_arguments("teacher", TEACHER, self.name, overrides, self.sections))

    def student(self, **overrides: Any) -> StudentRun:
        """The arguments of the student's training; its `train()` starts it.

        Raises:
            ValueError: If an override is not a field, or a value is not possible.
        """
        return StudentRun(self.name, *fill_arguments("student", STUDENT, self.name, overrides, self.sections))
