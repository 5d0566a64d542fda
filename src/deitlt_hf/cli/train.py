"""Trains on a folder of images: fits a recipe to it, trains a CNN teacher and a student, evaluates and reports.

deitlt train photos
deitlt train photos --minutes 30 --output_dir outputs/photos
deitlt train photos --dry_run
deitlt train photos --image_size 96 --teacher_epochs 50 --num_train_epochs 100
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..fitting import STUDENT, TEACHER
from ..quickstart import train
from ..recipes.usage import refuse_unknown
from ..training.memory import keep_freed_memory
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
    args, rest = parse_with_fields(parser, (*STUDENT, *TEACHER[1:]), arguments)
    given = fields_of(rest, parser)
    if args.teacher_epochs is not None:
        given["teacher_epochs"] = args.teacher_epochs
    if not torch.cuda.is_available():
        keep_freed_memory()  # of the process, which is this command's own
    work(args.folder, args.output_dir, args.minutes, args.dry_run, args.overwrite, **given)


def fields_of(words: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Fields and their values, as texts, from the remaining words of a command line; an unknown field is refused."""
    fields: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            fields[name] = [value] if equals else []
        elif not fields:
            parser.error(f"unrecognized argument {word!r}")
        else:
            fields[name].append(word)
    if "recipe" in fields:
        raise ValueError("this command fits a recipe to the folder; for another, use deitlt distill --recipe FILE.")
    known = {field.name for cls in (*STUDENT, *TEACHER) for field in dataclasses.fields(cls) if field.init}
    refuse_unknown(fields, known, "the command line", listed_by="deitlt distill --help")
    return {name: values[0] if len(values) == 1 else values or "true" for name, values in fields.items()}
