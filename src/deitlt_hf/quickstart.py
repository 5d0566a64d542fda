"""From a folder of images to a trained model: fits a recipe to the folder, trains, evaluates and reports."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import operator
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import datasets
import numpy as np
import torch
import yaml
from rich.markup import escape
from rich.table import Table

from .analysis.reporting import AnalysisArguments, report
from .console import duration, quiet_log, show
from .data.images import Decoded, decode_all, open_image, under_several_labels, usable_cores
from .data.loading import training_counts
from .data.long_tail import class_counts
from .data.sources.files import TEST_NAMES, TRAIN_NAMES, find_split
from .evaluation.metrics import paired_leads, points
from .evaluation.prediction_files import CLASSES_FILE, CONFUSION_FILE, PREDICTIONS_FILE, write_predictions
from .io import check_can_be_folder, one_line, read_text
from .losses.class_weights import named_weights
from .recipes import DataArguments, StudentArguments, TeacherArguments, fill_arguments, load_recipe
from .recipes.fit import (
    EVALUATIONS,
    LONGEST,
    SHORTEST,
    TEST_FRACTION,
    Choice,
    FittedRecipe,
    Folder,
    Machine,
    fit_recipe,
    sizes_for,
    with_given,
)
from .recipes.usage import refuse_unknown
from .training import DeiTLTTrainer, DeiTLTTrainingArguments, FlatTeacherTrainingArguments
from .training.arguments import PRECISIONS
from .training.runs import distill, train_teacher
from .training.schedule import low_peak
from .training.starting import FREE_SIZES, SIZES, check_start
from .training.taught import TeacherAtChanceError
from .training.trial import StepTimes, measure_steps

RECIPE_FILE, IMAGES_FOLDER = "recipe.yaml", "images"
BASE = "image_folder"  # recipe that gives the fields of the data before the folder's own recipe exists
SAMPLE = 1000  # images that are decoded before the run
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
STUDENT = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
TEACHER = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)


def train(
    data: str | Path,
    output: str | Path | None = None,
    minutes: float | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    **given: Any,
) -> DeiTLTTrainer | None:
    """Trains a teacher and a student on a folder of images, with a recipe that is fitted to the folder.

    The output folder then holds `recipe.yaml`, the models `teacher` and `student`, `report/index.html`, and the tables
    `predictions.csv`, `classes.csv` and `confusion.csv`. A teacher that is no better than chance is not used. If the
    folder already has a recipe, that recipe is used, and an interrupted run continues.

    ```python
    trainer = deitlt_hf.train("photos", minutes=30)
    ```

    Args:
        data: Folder with the images, in any layout of `deitlt data check`, such as one folder for each class.
        output: Output folder; by default `outputs/NAME` with the name of the folder.
        minutes: Time for training. By default each model sees a standard number of images.
        dry_run: Print the recipe and the expected time, and end. Nothing is written.
        overwrite: Fit a new recipe and replace an earlier run in the output folder.
        **given: Fields of the data, the student or the teacher, which override the fitted values. A field that the
            student and the teacher have is the student's, except the size of the images and the batch.
            `teacher_epochs` are the epochs of the teacher.

    Returns:
        The trainer of the student; None for a dry run.

    Raises:
        FileNotFoundError: If the folder does not exist or has no images.
        ValueError: If a field or its value is not possible, the output folder has a recipe for other images or is
            inside the folder of the images, or several processes run.
    """
    quiet_log()
    source, output = check_places(data, output)
    path = output / RECIPE_FILE
    if path.is_file() and not overwrite and not dry_run:
        check_continues(path, source, minutes, given)
    else:
        fitted = fit(source, minutes, given, str(output / IMAGES_FOLDER))
        if dry_run:
            return None
        fitted.write(path, recipe_title(source, minutes))
        print(f"The recipe is in {path}.\n", flush=True)
    overrides: dict[str, Any] = {"output_dir": str(output / "student"), "overwrite": overwrite}
    if not overwrite:
        overrides["resume_from_checkpoint"] = "auto"
    data_args, model_args, args = fill_arguments("student", STUDENT, str(path), overrides)
    if overwrite and args.needs_teacher:  # `distill` would find the teacher of the replaced recipe
        of_teacher = overrides | {"output_dir": str(output / "teacher")}
        train_teacher(*fill_arguments("teacher", TEACHER, str(path), of_teacher))
    try:
        trainer = distill(str(path), data_args, model_args, args)
    except TeacherAtChanceError as error:
        print(f"Note: {error} Therefore the student learns from the labels only.\n", flush=True)
        parts = fill_arguments("student", STUDENT, str(path), overrides | {"distillation": "none"})
        trainer = distill(str(path), *parts)
    if trainer.is_world_process_zero():
        conclude(trainer, output, path, data_args)
    return trainer


def check_places(data: str | Path, output: str | Path | None) -> tuple[Path, Path]:
    """The folder of the images and the output folder, by default `outputs/NAME`.

    It raises `FileExistsError` if the output folder cannot be created, and `ValueError` if it is inside the folder of
    the images, or several processes run.
    """
    source = Path(data).expanduser()
    output = Path("outputs") / source.resolve().name if output is None else Path(output).expanduser()
    check_can_be_folder(output)
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"the output folder {output} is inside the folder of the images, where its files would count as images; "
            "choose another --output_dir."
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"this command runs in one process; write the recipe with 'deitlt recipes init {data} > my.yaml', and "
            "start several processes with 'deitlt distill --recipe my.yaml'."
        )
    return source, output


def check_continues(path: Path, source: Path, minutes: float | None, given: Mapping[str, Any]) -> None:
    """Checks that a command continues with the recipe in its output folder, and says so.

    The command can be the one that made the recipe, or the one without its values. It raises `ValueError` if the recipe
    is for other images, or the command has values that would change it.
    """
    sections = load_recipe(str(path))
    known = sections["data"].get("data_dir")
    if known is None or Path(known).resolve() != source.resolve():
        raise ValueError(
            f"{path} is a recipe for the images in {known}, not in {source}; choose another --output_dir, or pass "
            "--overwrite to replace it and its run."
        )
    choices = {name: _given(name, value) for name, value in given.items()}
    changed = [name for name, choice in choices.items() if not _is_in(sections, choice)]
    if minutes is not None and yaml.safe_load(read_text(path)).get("description") != recipe_title(source, minutes):
        changed.insert(0, "minutes")
    if changed:
        raise ValueError(
            f"{path} exists, with other values; leave out {', '.join(changed)} to continue with it, edit it, or pass "
            "--overwrite to replace it and its run."
        )
    print(f"Continuing with {path}.", flush=True)


def recipe_title(source: Path, minutes: float | None) -> str:
    """Description of a recipe that is fitted to a folder, and to a time."""
    return f"Recipe for the images in {source.resolve().name}{'' if minutes is None else f', for {minutes:g} minutes'}."


def _is_in(sections: Mapping[str, Mapping], choice: Choice) -> bool:
    """Whether a recipe has the value of a choice."""
    value = list(choice.value) if isinstance(choice.value, tuple) else choice.value
    section = "student" if choice.section == "both" else choice.section
    return choice.name in sections[section] and sections[section][choice.name] == value


def fit(
    source: Path,
    minutes: float | None = None,
    given: Mapping[str, Any] | None = None,
    cache: str | None = None,
    cost: Callable[[float, float], float] = operator.add,
) -> FittedRecipe:
    """Fits a recipe to a folder, and prints it with its reasons and the expected time.

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
    choices = [_given(name, value) for name, value in (given or {}).items()]
    epochs = (_whole(choices, "teacher", "num_train_epochs"), _whole(choices, "student", "num_train_epochs"))
    if minutes is not None and any(epochs):
        raise ValueError("minutes sets the epochs of both models; leave out minutes, or the numbers of epochs.")
    folder, data = _look(source, choices)
    choices += _sizes_of_start(choices)
    if any(choice.name == "validation_fraction" for choice in choices):
        choices = [*CHOSEN_ON_VALIDATION, *choices]
    use_cpu = next((choice.value for choice in choices if choice.name == "use_cpu"), False)
    machine = Machine(torch.cuda.is_available() and not use_cpu, usable_cores())
    images = Choice("data", "data_dir", str(source.resolve()), "the images")
    fitted = None
    for size in sizes_for(folder, machine, _whole(choices, "both", "image_size")):

        def recipe(share: float, size: int = size) -> FittedRecipe:
            chosen = fit_recipe(folder, machine, size, share, cache, epochs)
            return with_given(dataclasses.replace(chosen, choices=[images, *chosen.choices]), choices)

        fitted = _fit_to_time(recipe, folder, data, minutes, cost)
        if minutes is None or fitted.share >= SHORTEST:
            break
    assert fitted is not None  # there is at least one size
    rate, start = (fitted.value("student", name) for name in ("learning_rate", "init_from"))
    if isinstance(rate, int | float) and (note := low_peak(rate, start)):
        fitted.notes.append(note)
    _print_plan(fitted, folder, data)
    return fitted


def _fit_to_time(
    recipe: Callable[[float], FittedRecipe],
    folder: Folder,
    data: Mapping,
    minutes: float | None,
    cost: Callable[[float, float], float],
) -> FittedRecipe:
    """Chooses the share of the standard number of epochs by a trial; `cost` is as in [`fit`].

    Returns the recipe, which `recipe` makes for a share, with the expected seconds of teacher and student.
    """
    fitted = recipe(1.0)
    expected = _trial(fitted, folder, data)
    if minutes is not None:
        # The time is linear in the epochs, apart from reading and evaluation.
        fixed = cost(*expected(dataclasses.replace(fitted, teacher_epochs=0, student_epochs=0)))
        fitted = recipe(min(max(60 * minutes - fixed, 0) / (cost(*expected(fitted)) - fixed), LONGEST))
    return dataclasses.replace(fitted, seconds=expected(fitted))


def _whole(choices: Sequence[Choice], section: str, name: str) -> int | None:
    """A whole number above 0 that the user gives for a field, else a `ValueError`; None if it is not given."""
    value = next((choice.value for choice in choices if (choice.section, choice.name) == (section, name)), None)
    if value is not None and not (isinstance(value, int) and value > 0):
        raise ValueError(f"{name} must be a whole number above 0, got {one_line(value)}.")
    return value


def _trial(fitted: FittedRecipe, folder: Folder, data: Mapping) -> Callable[[FittedRecipe], tuple[float, float]]:
    """Measures the steps of a recipe. Returns a function from the recipe to the seconds of teacher and student."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / RECIPE_FILE
        path.write_text(fitted.text("trial"), encoding="utf-8")
        cached = {"image_cache": str(Path(place) / "images")} if fitted.value("student", "image_cache") else {}
        options = {"output_dir": place, **cached}
        student_model, student_args = section_arguments("student", str(path), options)
        teacher_model, teacher_args = section_arguments(
            "teacher", str(path), options | {"use_cpu": student_args.use_cpu}
        )
        num_images = len(folder.labels)
        student_args.check_data(num_images)
        teacher_args.check_data(num_images)
        named_weights(student_args.class_weights, data["train"].features["label"].names)  # refuses unknown names
        times: StepTimes = measure_steps(teacher_model, teacher_args, student_model, student_args, data)

    def expected(recipe: FittedRecipe) -> tuple[float, float]:
        return times.seconds(
            num_images,
            sum(folder.test_counts),
            student_args.per_device_train_batch_size,  # the trial has steps of one micro-batch
            recipe.teacher_epochs,
            recipe.student_epochs,
            EVALUATIONS + 1,
            student_args.dataloader_num_workers,
        )

    return expected


def section_arguments(section: str, path: str, overrides: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and training arguments of a section of a recipe file, `teacher` or `student`."""
    _, model, args = fill_arguments(section, STUDENT if section == "student" else TEACHER, path, overrides)
    return model, args


def _given(name: str, value: Any) -> Choice:
    """A value of the user as a choice, with the section that its field belongs to."""
    if isinstance(value, str):  # from the command line
        with contextlib.suppress(ValueError):
            plain = json.loads(value)
            value = plain if isinstance(plain, int | float) and not _takes_text(name) else value
    if name == "teacher_epochs":
        return Choice("teacher", "num_train_epochs", value, "given")
    in_section = {
        "data": _names((DataArguments,)),
        "student": _names(STUDENT[1:]),
        "teacher": _names(TEACHER[1:]),
    }
    if name in ("output_dir", "overwrite", "data_dir", "resume_from_checkpoint"):
        raise ValueError(f"{name} is not a field here; use the folder, output and overwrite of this command.")
    if name in OF_BOTH:
        section = "both"
    else:
        refuse_unknown([name], set().union(*in_section.values()), "the options", listed_by="deitlt distill --help")
        section = next(section for section, names in in_section.items() if name in names)
    return Choice(section, name, value, "given")


def _names(classes: Sequence[type]) -> set[str]:
    return {item.name for cls in classes for item in dataclasses.fields(cls) if item.init}


def _takes_text(name: str) -> bool:
    """Whether a field takes a text, so that a number or a truth value on the command line is one."""
    hints = {name: hint for cls in (*STUDENT, *TEACHER) for name, hint in get_type_hints(cls).items()}
    return str in (hints.get(name), *get_args(hints.get(name)))


def _look(source: Path, given: Sequence[Choice]) -> tuple[Folder, Mapping]:
    """Looks at a data set. Returns what a recipe depends on, and its splits."""
    fields = {choice.name: choice.value for choice in given if choice.section == "data"}
    (args,) = fill_arguments("data", (DataArguments,), BASE, {"data_dir": str(source), **fields})
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
    folder = Folder(
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
    return [Choice("student", name, config[name], f"as {start}") for name in (*SIZES, *FREE_SIZES)]


def _sizes(rows: datasets.Dataset) -> list[tuple[int, int]]:
    """Width and height of each image, from its header."""
    cells = rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
    return [open_image(cell["image"]).size for cell in cells]


def _print_plan(fitted: FittedRecipe, folder: Folder, data: Mapping) -> None:
    names = data["train"].features["label"].names
    counts = training_counts(data["train"])
    largest, smallest = f"{counts.max():,}", f"{counts.min():,}"
    if largest != smallest:
        largest += f" ({names[int(counts.argmax())]}) to {smallest} ({names[int(counts.argmin())]})"
    print(
        f"{counts.sum():,} training and {sum(folder.test_counts):,} test images of {len(names):,} classes, {largest} "
        "training images a class.\n"
    )
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


def conclude(trainer: DeiTLTTrainer, output: Path, recipe: Path, data_args: DataArguments) -> None:
    """Writes predictions and report, and prints how student and teacher compare and how to use the model."""
    student = output / "student"
    data = data_args.load()
    test = data["test"]
    logits, teacher = _logits(trainer, test)
    by_expert = {name: values.argmax(axis=1) for name, values in logits.items()}
    scores = torch.from_numpy(next(iter(logits.values()))).softmax(dim=1).amax(dim=1).numpy()
    by_model = by_expert if teacher is None else by_expert | {"teacher": teacher}
    write_predictions(output, test, by_model, scores, training_counts(data["train"]), trainer.groups)
    if teacher is not None:
        print(comparison(by_expert["mean"], teacher, np.asarray(test["label"][:]), trainer.groups, output))
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed, so there is no report page; install it and run the same command again.")
    else:
        options = AnalysisArguments(model=str(student), output=str(output / "report"))
        # A run that has just trained has printed the same table.
        report(str(recipe), options, data_args, tables=trainer.beginning.is_finished)
    print(
        f"""The test images are in three tables in {output}: {PREDICTIONS_FILE} by image, {CLASSES_FILE} by class, and
{CONFUSION_FILE} by true and predicted class. To use the student, you need only transformers:

    from transformers import pipeline
    classifier = pipeline("image-classification", model="{student}")
    print(classifier("image.png"))
""",
        flush=True,
    )


@torch.inference_mode()
def _logits(trainer: DeiTLTTrainer, test: datasets.Dataset) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Logits of each expert for the test images, (images, classes), and the classes that the teacher predicts."""
    model, found, by_teacher = trainer.model.eval(), [], []
    for batch in trainer.get_eval_dataloader(test):
        images = batch["pixel_values"].to(trainer.args.device)
        outputs = model(pixel_values=images)
        found.append([outputs[field].float().cpu() for field in trainer.experts.values()])
        if trainer.teacher is not None:
            by_teacher.append(trainer.teacher_logits(images).argmax(dim=1).cpu())
    logits = {
        name: torch.cat(parts).numpy() for name, parts in zip(trainer.experts, zip(*found, strict=True), strict=True)
    }
    return logits, torch.cat(by_teacher).numpy() if by_teacher else None


def comparison(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, groups: Mapping[str, Sequence[int]], output: Path
) -> str:
    """Compares student and teacher by the classes that they predict for the same test images, and says which to use."""
    (lead,) = paired_leads({"student": student}, teacher, labels, groups, resamples=500).values()
    parts = [f"{name} {points(value, lead.ends[name])}" for name, value in lead.values.items() if not math.isnan(value)]
    low, high = lead.ends["overall"]
    if low > 0:
        advice = "The student is better overall: use it."
    elif high < 0:
        advice = (
            f"The teacher, a CNN, is better overall: use it (deitlt predict --model {output / 'teacher'} IMAGE), or "
            "train longer."
        )
    else:
        advice = "These test images do not show which one is better overall."
    return f"Student minus teacher in points, with 95 % intervals: {', '.join(parts)}.\n{advice}"
