"""Fits a recipe to a folder of images: looks at the images, measures a few steps, and prints the recipe."""

import contextlib
import dataclasses
import json
import operator
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import datasets
import torch
from rich.markup import escape
from rich.table import Table

from ..console import duration, show
from ..data.images import Decoded, decode_all, open_image, under_several_labels, usable_cores
from ..data.loading import training_counts
from ..data.long_tail import class_counts
from ..data.sources.files import TEST_NAMES, TRAIN_NAMES, find_split
from ..io import one_line
from ..losses.class_weights import named_weights
from ..recipes import DataArguments, StudentArguments, field_names
from ..recipes.usage import refuse_unknown
from ..training.arguments import PRECISIONS
from ..training.recipe import STUDENT, TEACHER, Recipe
from ..training.schedule import low_peak
from ..training.starting import FIXED_SIZE_FIELDS, FREE_SIZE_FIELDS, check_start
from ..training.trial import StepTimes, measure_steps
from .fitted_recipe import (
    EVALUATIONS,
    LONGEST,
    SHORTEST,
    TEST_FRACTION,
    Choice,
    FittedRecipe,
    FolderFacts,
    Machine,
    fit_recipe,
    sizes_for,
    with_given,
)

RECIPE_FILE = "recipe.yaml"
BASE = "image_folder"  # recipe that gives the fields of the data before the folder's own recipe exists
SAMPLE = 1000  # images that are decoded before the run
WORTH_BFLOAT16 = 0.9  # share of the time in float32 below which a step in bfloat16 is worth its rounding
# With validation images, the weights of the best evaluation are kept. Values of the user come later and override these.
CHOSEN_ON_VALIDATION = (
    Choice("both", "load_best_model_at_end", True, "the validation images choose the best evaluation"),
    Choice("both", "metric_for_best_model", "balanced_accuracy"),
    Choice("both", "save_steps", 1 / EVALUATIONS),
)
# Fields that a user sets for teacher and student together.
OF_BOTH = (
    "image_size",
    "global_batch_size",
    "train_crop",
    "use_cpu",
    *PRECISIONS,
    "seed",
    "image_cache",
    "save_minutes",
)


def fit(
    source: Path,
    minutes: float | None = None,
    given: Mapping[str, Any] | None = None,
    cache: str | None = None,
    cost: Callable[[float, float], float] = operator.add,
) -> FittedRecipe:
    """Fits a recipe to a folder, with the reasons and the expected time; [`print_fitted`] prints it.

    Args:
        source: The folder.
        minutes: Time for training.
        given: Fields that override the fitted values.
        cache: Folder for reduced copies of large images; None for no copies.
        cost: Seconds that must fit in `minutes`, from those of teacher and student; linear. By default their sum.

    Raises:
        FileNotFoundError: If the folder does not exist or has no images.
        ValueError: If a field or its value is not possible.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes:g}.")
    choices = [given_choice(name, value) for name, value in (given or {}).items()]
    epochs = (_whole(choices, "teacher", "num_train_epochs"), _whole(choices, "student", "num_train_epochs"))
    if minutes is not None and any(epochs):
        raise ValueError("minutes sets the epochs of both models; leave out minutes, or the numbers of epochs.")
    folder, data = _look(source, choices)
    choices += _sizes_of_start(choices)
    if any(choice.name == "validation_fraction" for choice in choices):
        choices = [*CHOSEN_ON_VALIDATION, *choices]
    use_cpu = next((choice.value for choice in choices if choice.name == "use_cpu"), False)
    machine = this_machine(bool(use_cpu))
    compares_bfloat16 = machine.has_bfloat16 and not any(choice.name in ("bf16", "fp16") for choice in choices)
    images = Choice("data", "data_dir", str(source.resolve()), "the images")
    fitted = None
    for size in sizes_for(folder, machine, _whole(choices, "both", "image_size")):

        def recipe(share: float, size: int = size) -> FittedRecipe:
            chosen = fit_recipe(folder, machine, size, share, cache, epochs)
            return with_given(dataclasses.replace(chosen, choices=[images, *chosen.choices]), choices)

        fitted = _fit_to_time(recipe, folder, data, minutes, cost, compares_bfloat16)
        if minutes is None or fitted.share >= SHORTEST:
            break
    assert fitted is not None  # there is at least one size
    rate, start = (fitted.value("student", name) for name in ("learning_rate", "init_from"))
    if isinstance(rate, int | float) and (note := low_peak(rate, start)):
        fitted.notes.append(note)
    return dataclasses.replace(fitted, data=_data_line(folder, data))


def this_machine(use_cpu: bool) -> Machine:
    """What a run can use of this machine."""
    has_gpu = torch.cuda.is_available() and not use_cpu
    return Machine(has_gpu, usable_cores(), has_gpu and torch.cuda.is_bf16_supported())


def _fit_to_time(
    recipe: Callable[[float], FittedRecipe],
    folder: FolderFacts,
    data: Mapping,
    minutes: float | None,
    cost: Callable[[float, float], float],
    compares_bfloat16: bool,
) -> FittedRecipe:
    """Chooses the share of the standard number of epochs, and the precision, by a trial; `cost` is as in [`fit`].

    Returns the recipe, which `recipe` makes for a share, with the expected seconds of teacher and student.
    """
    fitted = recipe(1.0)
    expected, precision = _trial(fitted, folder, data, compares_bfloat16)
    if minutes is not None:
        # The time is linear in the epochs, apart from reading and evaluation.
        fixed = cost(*expected(dataclasses.replace(fitted, teacher_epochs=0, student_epochs=0)))
        fitted = recipe(min(max(60 * minutes - fixed, 0) / (cost(*expected(fitted)) - fixed), LONGEST))
    return dataclasses.replace(fitted, choices=[*fitted.choices, *precision], seconds=expected(fitted))


def _whole(choices: Sequence[Choice], section: str, name: str) -> int | None:
    """A whole number above 0 that the user gives for a field, else a `ValueError`; None if it is not given."""
    value = next((choice.value for choice in choices if (choice.section, choice.name) == (section, name)), None)
    if value is not None and not (isinstance(value, int) and value > 0):
        raise ValueError(f"{name} must be a whole number above 0, got {one_line(value)}.")
    return value


def _trial(
    fitted: FittedRecipe, folder: FolderFacts, data: Mapping, compares_bfloat16: bool
) -> tuple[Callable[[FittedRecipe], tuple[float, float]], list[Choice]]:
    """Measures the steps of a recipe.

    Returns a function from the recipe to the seconds of teacher and student, and the choice of bfloat16 for the student
    if it was compared and is faster.
    """
    with tempfile.TemporaryDirectory() as place:
        cached = {"image_cache": str(Path(place) / "images")} if fitted.value("student", "image_cache") else {}
        options, recipe = {"output_dir": place, **cached}, Recipe("of the folder", fitted.sections())
        student = recipe.student(**options)
        teacher = recipe.teacher(**options, use_cpu=student.args.use_cpu)
        named_weights(student.args.class_weights, data["train"].features["label"].names)  # refuses unknown names
        times: StepTimes = measure_steps(teacher, student, data, compares_bfloat16)
    precision, faster = [], times.student_step_bfloat16
    if faster is not None and faster < WORTH_BFLOAT16 * times.student_step:
        reason = f"a step of the student takes {100 * faster / times.student_step:.0f} % of its time in float32"
        precision, times = [Choice("student", "bf16", True, reason)], dataclasses.replace(times, student_step=faster)

    def expected(recipe: FittedRecipe) -> tuple[float, float]:
        num_images, epochs = len(folder.labels), (recipe.teacher_epochs, recipe.student_epochs)
        return times.seconds(teacher, student, num_images, sum(folder.test_counts), epochs, more_evaluations=1)

    return expected, precision


def given_choice(name: str, value: Any) -> Choice:
    """A value of the user as a choice, with the section that its field belongs to."""
    if isinstance(value, tuple):
        value = list(value)
    if not _takes_text(name):
        value = [_number(item) for item in value] if isinstance(value, list) else _number(value)
    if name == "teacher_epochs":
        return Choice("teacher", "num_train_epochs", value, "given")
    in_section = {
        "data": field_names([DataArguments]),
        "student": field_names(STUDENT[1:]),
        "teacher": field_names(TEACHER[1:]),
    }
    if name in ("output_dir", "overwrite", "data_dir", "resume_from_checkpoint"):
        raise ValueError(f"{name} is not a field here; use the folder, output and overwrite of this command.")
    if name in OF_BOTH:
        section = "both"
    else:
        refuse_unknown([name], set().union(*in_section.values()), "the options", listed_by="deitlt distill --help")
        section = next(section for section, names in in_section.items() if name in names)
    return Choice(section, name, value, "given")


def _number(value: Any) -> Any:
    """A number or truth value of the command line, which are texts there; other values are returned unchanged."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            plain = json.loads(value)
            return plain if isinstance(plain, int | float) else value
    return value


def _takes_text(name: str) -> bool:
    """Whether a field takes a text, so that a number or a truth value on the command line is one."""
    hints = {name: hint for cls in (*STUDENT, *TEACHER) for name, hint in get_type_hints(cls).items()}
    kinds = [hints.get(name), *get_args(hints.get(name))]
    return str in kinds or any(str in get_args(kind) for kind in kinds)


def _look(source: Path, given: Sequence[Choice]) -> tuple[FolderFacts, Mapping]:
    """Looks at a data set. Returns what a recipe depends on, and its splits."""
    fields = {choice.name: choice.value for choice in given if choice.section == "data"}
    args = Recipe(BASE).data(**{"data_dir": str(source), **fields})
    splits = args.source()[1]
    if args.streaming:
        raise ValueError("a stream cannot be examined before a run; write a recipe for it, see docs/data.md.")
    test = find_split(splits, [args.test_split] if args.test_split else TEST_NAMES)
    has_test = test is not None
    if not has_test and args.test_fraction is None:
        args.test_fraction = TEST_FRACTION
    skips, args.skip_bad_images = args.skip_bad_images, False
    data = args.load(splits)
    train = data["train"]
    step = max(len(train) // SAMPLE, 1)
    sample = train.select(range(0, len(train), step))
    decoded = decode_all(sample, args.background)
    readable = [row for row, result in enumerate(decoded) if result.error is None]
    if not readable:
        raise ValueError(f"none of the {len(sample)} images of a sample can be read: {decoded[0].error}.")
    sizes = _sizes(sample.select(readable))
    num_classes = train.features["label"].num_classes
    unreadable = [one_line(result.error) for result in decoded if result.error is not None]
    if unreadable:
        args.skip_bad_images = True
        data = args.load(splits)
    folder = FolderFacts(
        labels=data["train"]["label"][:],
        num_classes=num_classes,
        test_counts=class_counts(data["test"]["label"][:], num_classes).tolist(),
        has_test=has_test or any(choice.name == "test_fraction" for choice in given),
        shorter_sides=[min(size) for size in sizes],
        longer_sides=[max(size) for size in sizes],
        transparent=sum(result.is_transparent for result in decoded) / len(decoded),
        unreadable=() if skips else unreadable,
        notes=[*_unused(splits, test), *_twice(sample, decoded)],
    )
    return folder, data


def _unused(splits: Mapping, test: str | None) -> Iterator[str]:
    """Sentences about splits that are neither the training nor the test split."""
    source = "set apart from the training images" if test is None else f"those of {test}"
    for name in splits:
        if name not in (find_split(splits, TRAIN_NAMES), test):
            yield f"The split {name} is not used (images: {len(splits[name]):,}); the test images are {source}."


def _twice(sample: datasets.Dataset, decoded: Sequence[Decoded]) -> Iterator[str]:
    """A sentence about images that are in several classes."""
    rows = under_several_labels(decoded, sample["label"][:])
    if rows:
        cells = sample.select(rows[:2]).cast_column("image", datasets.Image(decode=False))["image"][:]
        paths = [cell["path"] for cell in cells if cell["path"]]  # images in tables may have none
        such = f", such as {one_line(' and '.join(paths))}" if paths else ""
        yield (
            f"{len(rows)} training images have the same bytes as one of another class{such}; "
            "'deitlt data check --deep' names them."
        )


def _sizes_of_start(given: Sequence[Choice]) -> list[Choice]:
    """The sizes of the model that a student starts from, if it does, since they replace those of a recipe."""
    values = {choice.name: choice.value for choice in given if choice.section in ("student", "both")}
    start = values.get("init_from")
    if start is None:
        return []
    config = check_start(StudentArguments(init_from=start), values).config
    return [Choice("student", name, config[name], f"as {start}") for name in (*FIXED_SIZE_FIELDS, *FREE_SIZE_FIELDS)]


def _sizes(rows: datasets.Dataset) -> list[tuple[int, int]]:
    """Width and height of each image, from its header."""
    cells = rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
    return [open_image(cell["image"]).size for cell in cells]


def _data_line(folder: FolderFacts, data: Mapping) -> str:
    names = data["train"].features["label"].names
    counts = training_counts(data["train"])
    largest, smallest = f"{counts.max():,}", f"{counts.min():,}"
    if largest != smallest:
        largest += f" ({names[int(counts.argmax())]}) to {smallest} ({names[int(counts.argmin())]})"
    return (
        f"{counts.sum():,} training and {sum(folder.test_counts):,} test images of {len(names):,} classes, {largest} "
        "training images a class."
    )


def print_fitted(fitted: FittedRecipe) -> None:
    """Prints a recipe of [`fit`]: a sentence about the data, values with reasons, notes, and the expected time."""
    print(f"{fitted.data}\n")
    table = Table(title="Recipe: the values that depend on the folder", title_justify="left")
    for column in ("for", "field", "value", "reason"):
        table.add_column(column, overflow="fold", no_wrap=column in ("for", "field"))
    for choice in fitted.choices:
        if choice.reason:
            section = "both models" if choice.section == "both" else choice.section
            table.add_row(section, choice.name, escape(str(choice.value)), escape(choice.reason))
    show(table)
    for note in fitted.notes:
        print(f"Note: {note}")
    teacher, student = fitted.seconds
    print(
        f"\nExpected time, from a trial of a few steps: teacher {duration(teacher)}, student {duration(student)}, "
        f"together {duration(teacher + student)}.\n",
        flush=True,
    )
