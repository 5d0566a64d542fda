"""Checks or draws the data of a recipe before a run.

deitlt data check --recipe imagenet_lt --data_dir DIR [--deep]
deitlt data show --recipe cifar10_lt_rho100 --data_dir DIR --out pictures

`check` reports what the data contain, what is missing and what is wrong. It also reports the errors that training the
teacher and the student of the recipe would raise in one process. `--deep` decodes every image. `check` accepts every
field of teacher and student, and exits with status 1 if it finds a problem. `show` draws the class counts and the
training images of student and teacher, and accepts every field of a student.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..console import quiet_log
from ..losses.class_weights import named_weights
from ..recipes import DataArguments, data_help, field_names, load_recipe
from ..recipes.usage import refuse_unknown
from ..training.recipe import STUDENT, TEACHER, Recipe, StudentRun, TeacherRun
from ..training.schedule import low_peak
from .json_output import check_file
from .parser import command_parser, parse_with_fields


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__, data_help())
    parser.add_argument("command", choices=["check", "show"])
    parser.add_argument("--deep", action="store_true", help="check: decode every image")
    parser.add_argument("--counts", help="check: write the number of images of each class to this JSON file")
    parser.add_argument("--out", default="pictures", help="show: folder for the pictures (default: pictures)")
    parser.add_argument("--recipe", required=True, help=argparse.SUPPRESS)  # the fields are listed with it
    args, given = parse_with_fields(parser, (*STUDENT, *TEACHER), arguments)
    quiet_log()
    if args.command == "check":
        sys.exit(check(args.recipe, given, args.deep, args.counts))
    from ..analysis.pictures import draw_data

    refuse_unknown(given, field_names(STUDENT), "the command line", listed_by="deitlt distill --help")
    for path in draw_data(args.recipe, given, args.out):
        print(path)


def check(recipe: str, given: Mapping[str, Any], deep: bool, counts_file: str | None) -> int:
    """Prints a report and writes the counts; returns 1 if there are problems, else 0.

    `given` are values of fields of data and training.
    """
    from rich.console import Console

    from ..data.check import check_data, class_table
    from ..data.loading import training_counts

    arguments = Recipe.load(recipe).data(**_of([DataArguments], given))
    file = None if counts_file is None else check_file("--counts", counts_file)
    kind, source = arguments.source()
    data = arguments.load(source)
    class_names = data["train"].features["label"].names
    groups = arguments.groups(data)
    lines, problems = check_data(arguments.dataset, kind, source, data, groups, deep, arguments.background)
    problems += training_problems(recipe, given, len(data["train"]), class_names)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    for label, text in lines.items():
        console.print(f"[bold]{label:16}[/bold] ", end="")
        console.print(text, markup=False)
    console.print(class_table(data, groups))
    for note in training_notes(recipe, given):
        console.print("[yellow]note[/yellow]             ", end="")
        console.print(note, markup=False)
    for problem in problems:
        console.print("[red]wrong[/red]            ", end="")
        console.print(problem, markup=False)
    console.print(f"{recipe}: {len(problems)} problem(s)" if problems else f"{recipe}: ready to train on")
    if file is not None:
        counts = dict(zip(class_names, training_counts(data["train"]).tolist(), strict=True))
        file.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return int(bool(problems))


def training_problems(
    recipe: str, given: Mapping[str, Any], num_images: int, class_names: Sequence[str]
) -> Iterator[str]:
    """Yields the errors that training the teacher and the student of a recipe would raise. Creates no folder.

    A recipe may have only one of the two. `given` are values of fields of data and training.
    """
    sections, runs = load_recipe(recipe), Recipe(recipe)
    for section, command, make, classes in (
        ("teacher", "train-teacher", runs.teacher, TEACHER),
        ("student", "distill", runs.student, STUDENT),
    ):
        if sections[section]:
            found = dict.fromkeys(_refusals(make, _of(classes, given), num_images, class_names))
            yield from (f"deitlt {command}: {problem}" for problem in found)


def training_notes(recipe: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Yields notes on valid settings with which the student of a recipe would hardly learn."""
    if load_recipe(recipe)["student"]:
        with contextlib.suppress(ValueError):  # training_problems reports these errors
            run = Recipe(recipe).student(**_of(STUDENT, given) | {"use_cpu": True})
            if note := low_peak(run.args.peak_learning_rate, run.model.init_from):
                yield f"deitlt distill: {note}"


def _refusals(
    make: Callable[..., StudentRun | TeacherRun],
    given: Mapping[str, Any],
    num_images: int,
    class_names: Sequence[str],
) -> Iterator[str]:
    try:  # on the CPU, because this machine may not have a GPU that supports half precision
        args = make(**{**given, "use_cpu": True}).args
    except ValueError as error:
        yield str(error)
        return
    for _ in range(2):
        try:
            args.check_data(num_images)
            named_weights(args.class_weights, class_names)
        except ValueError as error:
            yield str(error)
        # check_data checks the rounds of repeated augmentation first; without them, a second call finds other errors.
        args.repeated_augmentation = 1


def _of(classes: Sequence[type], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of given fields that belong to dataclasses."""
    names = field_names(classes)
    return {name: value for name, value in given.items() if name in names}
