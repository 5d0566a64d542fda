"""Trains the flat CNN teacher of a recipe, or fits a linear head on a frozen model (tune heads).

deitlt train-teacher --recipe digits_lt
deitlt train-teacher --recipe image_folder --data_dir DIR --backbone facebook/dinov2-small --tune heads
accelerate launch --no_python deitlt train-teacher --recipe fashion_mnist_lt_tiny --data_dir DIR --sam_rho 0.1
"""

from collections.abc import Sequence

from ..recipes import parse_arguments
from ..training.memory import keep_freed_memory_of_command
from ..training.recipe import TEACHER, TeacherRun


def main(arguments: Sequence[str] | None = None) -> None:
    _, *parts = parse_arguments("teacher", TEACHER, arguments, __doc__)
    run = TeacherRun(*parts)
    keep_freed_memory_of_command(run.args)
    run.train()
