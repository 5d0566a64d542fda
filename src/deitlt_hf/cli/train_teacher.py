"""Trains the flat CNN teacher of a recipe.

deitlt train-teacher --recipe digits_lt
accelerate launch --no_python deitlt train-teacher --recipe fashion_mnist_lt_tiny --data_dir DIR --sam_rho 0.1
"""

from collections.abc import Sequence

from ..recipes import DataArguments, TeacherArguments, parse_arguments
from ..training import FlatTeacherTrainingArguments
from ..training.memory import keep_freed_memory
from ..training.runs import train_teacher


def main(arguments: Sequence[str] | None = None) -> None:
    classes = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)
    _, data_args, model_args, args = parse_arguments("teacher", classes, arguments, __doc__)
    if args.keep_freed_memory is not False and args.device.type == "cpu":
        keep_freed_memory()  # of the process, which is this command's own
    train_teacher(data_args, model_args, args)
