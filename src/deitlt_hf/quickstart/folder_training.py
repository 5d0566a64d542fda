"""From a folder of images to a trained model: trains with a fitted recipe, evaluates and reports."""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml

from ..analysis.reporting import AnalysisArguments, report
from ..console import quiet_log
from ..data.loading import training_counts
from ..evaluation.metrics import paired_leads, points
from ..evaluation.prediction_files import CLASSES_FILE, CONFUSION_FILE, PREDICTIONS_FILE, write_predictions
from ..io import check_can_be_folder, read_text
from ..recipes import DataArguments, load_recipe
from ..training import DeiTLTTrainer
from ..training.recipe import Recipe
from ..training.taught import TeacherAtChanceError
from .fitted_recipe import Choice
from .fitting import RECIPE_FILE, fit, given_choice, print_fitted

IMAGES_FOLDER = "images"  # of reduced copies


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
        print_fitted(fitted)
        if dry_run:
            return None
        fitted.write(path, recipe_title(source, minutes))
        print(f"The recipe is in {path}.\n", flush=True)
    overrides: dict[str, Any] = {"output_dir": str(output / "student"), "overwrite": overwrite}
    if not overwrite:
        overrides["resume_from_checkpoint"] = "auto"
    recipe = Recipe.load(str(path))
    student = recipe.student(**overrides)
    if overwrite and student.args.needs_teacher:  # the student would find the teacher of the replaced recipe
        recipe.teacher(**overrides | {"output_dir": str(output / "teacher")}).train()
    try:
        trainer = student.train()
    except TeacherAtChanceError as error:
        print(f"Note: {error} Therefore the student learns from the labels only.\n", flush=True)
        trainer = recipe.student(**overrides, distillation="none").train()
    if trainer.is_world_process_zero():
        conclude(trainer, output, path, student.data)
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
    choices = {name: given_choice(name, value) for name, value in given.items()}
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
    section = "student" if choice.section == "both" else choice.section
    return choice.name in sections[section] and sections[section][choice.name] == choice.value


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
    """Compares student and teacher by the classes that they predict for the same test images, and says which to use.

    Args:
        student: Predicted classes; (images,).
        teacher: Predicted classes; (images,).
        labels: True classes; (images,).
        groups: Class indices of each group.
        output: Folder of the run, which the advice names.

    Returns:
        Two sentences: the differences in points with their intervals, and the advice.
    """
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
