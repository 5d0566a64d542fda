"""Trains on a folder of images: fits a recipe to it, trains a CNN teacher and a student, evaluates and reports.

deitlt train photos
deitlt train photos --minutes 30 --output_dir outputs/photos
deitlt train photos --dry_run
deitlt train photos --image_size 96 --teacher_epochs 50 --num_train_epochs 100
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..quickstart import train
from ..training.memory import keep_freed_memory
from ..training.recipe import STUDENT, TEACHER
from .parser import command_parser, parse_with_fields


def main(arguments: Sequence[str] | None = None) -> None:
    run_on_folder(train, __doc__ or "", arguments)


def run_on_folder(work: Callable, description: str, arguments: Sequence[str] | None) -> None:
    """Runs a function with the parameters of [`train`] on a folder of images, with the options of `deitlt train`."""
    parser = command_parser(description)
    parser.add_argument("folder", help="folder with the images, such as one folder for each class")
    parser.add_argument("--output_dir", "--output", help="folder of recipe, models and page (default: in outputs/)")
    parser.add_argument("--minutes", type=float, help="time for training; chooses image size and number of epochs")
    parser.add_argument("--teacher_epochs", help="epochs of the teacher; --num_train_epochs are those of the student")
    parser.add_argument("--dry_run", action="store_true", help="print the recipe and the expected time, and end")
    parser.add_argument("--overwrite", action="store_true", help="fit a new recipe and replace an earlier run")
    parser.epilog = (
        "Any field of the data or of the student overrides the fitted value: --field value. 'deitlt distill --help' "
        "lists them. To change more, edit a copy of recipe.yaml, and train with deitlt distill --recipe COPY.yaml."
    )
    args, given = parse_for_folder(parser, arguments)
    if args.teacher_epochs is not None:
        given["teacher_epochs"] = args.teacher_epochs
    if not torch.cuda.is_available():
        keep_freed_memory()  # of the process, which is this command's own
    work(args.folder, args.output_dir, args.minutes, args.dry_run, args.overwrite, **given)


def parse_for_folder(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parses a command that fits a recipe to a folder. Returns its arguments, and the texts of the given fields."""
    parser.add_argument("--recipe", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    args, given = parse_with_fields(parser, (*STUDENT, *TEACHER[1:]), arguments)
    if "recipe" in args:
        raise ValueError("this command fits a recipe to the folder; for another, use deitlt distill --recipe FILE.")
    return args, given
