"""Checks or draws the data of a recipe before a run.

deitlt data check --recipe imagenet_lt --data_dir DIR [--deep]
deitlt data show --recipe cifar10_lt_rho100 --data_dir DIR --out pictures

`check` reports what the data contain, what is missing and what is wrong. It also reports the errors that training the
teacher and the student of the recipe would raise in one process. `--deep` decodes every image. `check` accepts every
field of teacher and student, and exits with status 1 if it finds a problem. `show` draws the class counts and the
training images of student and teacher, and accepts every field of a student.
"""

import contextlib
import json
import sys
from collections.abc import Collection, Iterator, Sequence

from ..console import quiet_log
from ..losses.class_weights import named_weights
from ..recipes import (
    DataArguments,
    StudentArguments,
    TeacherArguments,
    data_help,
    load_recipe,
    parse_arguments,
)
from ..recipes.parsing import field_names
from ..training import DeiTLTTrainingArguments, FlatTeacherTrainingArguments
from ..training.schedule import low_peak
from .json_output import check_file
from .parser import command_parser, parse_with_fields

STUDENT = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
TEACHER = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__, data_help())
    parser.add_argument("command", choices=["check", "show"])
    parser.add_argument("--deep", action="store_true", help="check: decode every image")
    parser.add_argument("--counts", help="check: write the number of images of each class to this JSON file")
    parser.add_argument("--out", default="pictures", help="show: folder for the pictures (default: pictures)")
    args, rest = parse_with_fields(parser, (*STUDENT, *TEACHER), arguments)
    quiet_log()
    if args.command == "check":
        sys.exit(check(rest, args.deep, args.counts))
    from ..analysis.pictures import draw_data

    for path in draw_data(rest, args.out):
        print(path)


def check(argv: list[str], deep: bool, counts_file: str | None) -> int:
    """Prints a report and writes the counts; returns 1 if there are problems, else 0."""
    from rich.console import Console

    from ..data.check import check_data, class_table
    from ..data.loading import training_counts

    of_training = field_names((*STUDENT, *TEACHER)) - field_names((DataArguments,))
    # Fields of training are left out here: training_problems checks them. The data refuse unknown fields.
    name, arguments = parse_arguments("data", (DataArguments,), _without(of_training, argv))
    file = None if counts_file is None else check_file("--counts", counts_file)
    kind, source = arguments.source()
    data = arguments.load(source)
    class_names = data["train"].features["label"].names
    groups = arguments.groups(data)
    lines, problems = check_data(arguments.dataset, kind, source, data, groups, deep, arguments.background)
    problems += training_problems(name, argv, len(data["train"]), class_names)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    for label, text in lines.items():
        console.print(f"[bold]{label:16}[/bold] ", end="")
        console.print(text, markup=False)
    console.print(class_table(data, groups))
    for note in training_notes(name, argv):
        console.print("[yellow]note[/yellow]             ", end="")
        console.print(note, markup=False)
    for problem in problems:
        console.print("[red]wrong[/red]            ", end="")
        console.print(problem, markup=False)
    console.print(f"{name}: {len(problems)} problem(s)" if problems else f"{name}: ready to train on")
    if file is not None:
        counts = dict(zip(class_names, training_counts(data["train"]).tolist(), strict=True))
        file.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return int(bool(problems))


def training_problems(recipe: str, argv: Sequence[str], num_images: int, class_names: Sequence[str]) -> Iterator[str]:
    """Yields the errors that training the teacher and the student of a recipe would raise. Creates no folder.

    A recipe may have only one of the two. `argv` is a command line with the recipe and fields of data and training.
    """
    sections = load_recipe(recipe)
    for section, command, classes in (("teacher", "train-teacher", TEACHER), ("student", "distill", STUDENT)):
        if not sections[section]:
            continue
        others = (field_names(STUDENT) | field_names(TEACHER)) - field_names(classes)
        found = dict.fromkeys(_refusals(section, classes, _without(others, argv), num_images, class_names))
        yield from (f"deitlt {command}: {problem}" for problem in found)


def training_notes(recipe: str, argv: Sequence[str]) -> Iterator[str]:
    """Yields notes on valid settings with which the student of a recipe would hardly learn."""
    if load_recipe(recipe)["student"]:
        argv = _without(field_names(TEACHER) - field_names(STUDENT), argv)
        with contextlib.suppress(ValueError):  # training_problems reports these errors
            _, _, student, args = parse_arguments("student", STUDENT, [*argv, "--use_cpu", "true"])
            if note := low_peak(args.learning_rate, student.init_from):
                yield f"deitlt distill: {note}"


def _refusals(
    section: str, classes: Sequence[type], argv: Sequence[str], num_images: int, class_names: Sequence[str]
) -> Iterator[str]:
    try:  # on the CPU, because this machine may not have a GPU that supports half precision
        args = parse_arguments(section, classes, [*argv, "--use_cpu", "true"])[-1]
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


def _without(names: Collection[str], argv: Sequence[str]) -> list[str]:
    """Returns a command line without the named options and their values."""
    kept, is_kept = [], True
    for word in argv:
        if word.startswith("--"):
            is_kept = word.removeprefix("--").partition("=")[0].replace("-", "_") not in names
        if is_kept:
            kept.append(word)
    return kept
