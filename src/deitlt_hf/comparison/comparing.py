"""Compares ways to train on a folder of images, at about the same cost: the steps of `deitlt compare`."""

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers.utils import is_peft_available

from ..analysis.observe import predict
from ..analysis.pictures import require_matplotlib
from ..analysis.probing import probe
from ..analysis.report_page import PAGE
from ..console import duration, quiet_log, show
from ..data.images import ImageCollator
from ..data.long_tail import class_counts
from ..io import atomic_write, read_json, write_json
from ..quickstart.fitted_recipe import SMALL, FittedRecipe, adamw_rate, drw_start
from ..quickstart.fitting import RECIPE_FILE, fit, print_fitted
from ..quickstart.folder_training import IMAGES_FOLDER, check_continues, check_places, recipe_title
from ..recipes import DataArguments, StudentArguments, load_recipe
from ..records import find_record
from ..serving.classifiers import load_model, load_processor
from ..training.output_folder import check_output_dir
from ..training.recipe import Recipe
from ..training.results import Results
from ..training.starting import check_start, image_format_of, starting_student
from ..training.taught import TeacherAtChanceError
from ..training.tuning import LORA
from .verdict import Outcome, Verdict, judge, table, write_page

RECORD_FILE, RECIPES, SHARED_TEACHER, PROBE = "comparison.json", "recipes", "teacher", "probe"


@dataclass(frozen=True)
class Arm:
    """One way to train, as changes of the fitted recipe.

    Args:
        title: Name for readers.
        what: How it is trained, in a sentence.
        section: Section of the recipe that is trained: `teacher` for a CNN, `student` for a ViT; or `probe`.
        changes: Values of that section that differ from the fitted recipe.
        is_taught: Whether it learns from the shared teacher.
        needs_start: Whether it is only for a model to start from (`--init_from`).
    """

    title: str
    what: str
    section: str
    changes: Callable[[FittedRecipe], dict[str, Any]] = lambda fitted: {}
    is_taught: bool = False
    needs_start: bool = False

    def seconds(self, teacher: float, student: float) -> float:
        """Expected seconds without the shared teacher, from those of teacher and student; 0 for a probe."""
        return 0.0 if self.section == PROBE else student if self.is_taught else teacher + student


def _stretched(fitted: FittedRecipe, section: str) -> int:
    """Epochs in which a model that is trained alone takes as long as teacher and student together."""
    teacher, student = fitted.seconds
    epochs, own = (fitted.teacher_epochs, teacher) if section == "teacher" else (fitted.student_epochs, student)
    return max(round(epochs * (teacher + student) / own), 1)


def _cnn(fitted: FittedRecipe) -> dict[str, Any]:
    epochs = _stretched(fitted, "teacher")
    return {"num_train_epochs": epochs, "drw_start_epoch": drw_start(epochs)}


def _labels_only(fitted: FittedRecipe) -> dict[str, Any]:
    return {"distillation": "none", "num_train_epochs": _stretched(fitted, "student")}


def _deit_lt(fitted: FittedRecipe) -> dict[str, Any]:
    """The paper's method."""
    return {
        "optim": "adamw_torch",
        "distillation": "hard",
        "cls_loss": "ce",
        "mixup": 0.8,
        "cutmix": 1.0,
        "drw_start_epoch": drw_start(fitted.student_epochs),
        "mixing_in_drw": fitted.image_size > SMALL,
        "learning_rate": adamw_rate(fitted.image_size),
    }


# The simplest comes first: the others are compared with it.
ARMS = {
    PROBE: Arm(
        "linear probe",
        "A linear classifier on the frozen features of the model to start from.",
        PROBE,
        needs_start=True,
    ),
    "cnn": Arm("CNN alone", "The CNN, trained as long as teacher and student together.", "teacher", _cnn),
    "labels": Arm(
        "labels only",
        "The student without a teacher, trained as long as teacher and student together.",
        "student",
        _labels_only,
    ),
    "lora": Arm(
        "LoRA",
        "The model to start from with LoRA adapters, on labels, trained as long as teacher and student together.",
        "student",
        lambda fitted: _labels_only(fitted) | {"tune": LORA, "optim": "adamw_torch", "learning_rate": 1e-3},
        needs_start=True,
    ),
    "deit_lt": Arm(
        "DeiT-LT",
        "The paper's method: hard labels of the teacher, deferred re-weighting, Mixup and CutMix, AdamW.",
        "student",
        _deit_lt,
        is_taught=True,
    ),
    "ours": Arm(
        "ours",
        "The fitted recipe, as deitlt train uses it: soft labels of the teacher, balanced softmax, Muon.",
        "student",
        is_taught=True,
    ),
}


def compare(
    data: str | Path,
    output: str | Path | None = None,
    minutes: float | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    **given: Any,
) -> Verdict | None:
    """Trains a folder's images in several ways that cost about the same, and says which is worth its cost.

    The ways are the CNN alone, a ViT on labels only, DeiT-LT as in the paper, and this package's own recipe; with
    `init_from` also a linear probe and LoRA of that model. All see the same training and test images. The output folder
    then holds `index.html`, `comparison.json`, the recipes, and the models. The same call continues after an
    interruption.

    ```python
    verdict = deitlt_hf.compare("photos", minutes=60)
    print(verdict.advice)
    ```

    Args:
        data: Folder with the images, in any layout of `deitlt data check`.
        output: Output folder; by default `outputs/NAME_compared` with the name of the folder.
        minutes: Time for all ways together. By default each model sees a standard number of images.
        dry_run: Print the recipe, the ways and the expected time, and end. Nothing is written.
        overwrite: Replace an earlier comparison in the output folder.
        **given: Fields of the data, the student or the teacher, as for [`train`].

    Returns:
        Accuracies, differences and the advice; None for a dry run.

    Raises:
        FileNotFoundError: If the folder does not exist or has no images.
        ValueError: As [`train`]; or matplotlib is not installed.
    """
    quiet_log()
    require_matplotlib()
    name = Path(data).expanduser().resolve().name
    source, output = check_places(data, Path("outputs") / f"{name}_compared" if output is None else output)
    path, record_file = output / RECIPE_FILE, output / RECORD_FILE
    if record_file.is_file() and path.is_file() and not overwrite and not dry_run:
        check_continues(path, source, minutes, given)
    else:
        earlier = [] if dry_run else _replaced(output)
        start = given.get("init_from")
        arms = {name: arm for name, arm in ARMS.items() if start is not None or not arm.needs_start}
        if start is not None and Path(start).is_file():
            del arms[PROBE]  # a file of weights has no configuration
        if "lora" in arms and not is_peft_available():
            print("PEFT is not installed, so LoRA is left out; install it with pip install peft.")
            del arms["lora"]
        fitted = fit(source, minutes, given, str(output / IMAGES_FOLDER), lambda *both: _cost(arms, *both))
        print_fitted(fitted)
        if PROBE in arms and image_format_of(str(start)) is None:
            print(f"{start} has no image processor, so the linear probe is left out.")
            del arms[PROBE]
            from_start = StudentArguments(init_from=start)  # wrong weights must not be found after the CNN is trained
            starting_student(check_start(from_start, {}), from_start, ("a", "b"))
        _print_arms(fitted, arms)
        if dry_run:
            return None
        path.unlink(missing_ok=True)  # first: without it, nothing continues with a half-removed comparison
        for folder in earlier:
            shutil.rmtree(folder, ignore_errors=True)
        write_json(record_file, {"name": source.resolve().name, "notes": fitted.notes, "arms": {}})
        _write_recipes(fitted, arms, output, recipe_title(source, minutes))
    return _run(output)


def _replaced(output: Path) -> list[Path]:
    """Folders of an earlier comparison that a new one replaces. No other file or folder is ever replaced.

    It raises `FileExistsError` if the output folder holds a recipe, a page or a run of something else.
    """
    record_file = output / RECORD_FILE
    known = ComparisonRecord(record_file).content["arms"] if record_file.is_file() else {}
    runs = [*ARMS, SHARED_TEACHER]
    for name in runs:
        check_output_dir(output / name, overwrite=name in known, resuming=False)
    for name in (RECIPE_FILE, PAGE):
        if (output / name).exists() and not record_file.is_file():
            raise FileExistsError(f"{output / name} does not belong to a comparison; choose another --output_dir.")
    return [output / name for name in runs if name in known] + [output / RECIPES] * record_file.is_file()


def _cost(arms: Mapping[str, Arm], teacher: float, student: float) -> float:
    """Seconds of all ways, from those of teacher and student; the teacher is trained once."""
    return teacher + sum(arm.seconds(teacher, student) for arm in arms.values())


def _print_arms(fitted: FittedRecipe, arms: Mapping[str, Arm]) -> None:
    teacher, student = fitted.seconds
    print("Ways to train:")
    for arm in arms.values():
        seconds = arm.seconds(teacher, student)
        print(f"  {arm.title:12} {duration(seconds) if seconds else 'short':>7}  {arm.what}")
    print(
        f"  {'teacher':12} {duration(teacher):>7}  It is trained once, for the ways that need it.\n"
        f"The whole comparison is expected to take {duration(_cost(arms, teacher, student))}.\n",
        flush=True,
    )


def _write_recipes(fitted: FittedRecipe, arms: Mapping[str, Arm], output: Path, title: str) -> None:
    """Writes the fitted recipe, and for each way a recipe that extends it with the values that differ."""
    for run, arm in arms.items():
        changes = arm.changes(fitted)
        content: dict[str, Any] = {"description": f"{arm.title}. {arm.what} {title}"}
        content |= {"extends": f"../{RECIPE_FILE}"} | ({arm.section: changes} if changes else {})
        with atomic_write(output / RECIPES / f"{run}.yaml") as file:
            file.write_text(yaml.safe_dump(content, sort_keys=False, width=110), encoding="utf-8")
    fitted.write(output / RECIPE_FILE, title)
    print(f"The recipes are in {output / RECIPE_FILE} and {output / RECIPES}.\n", flush=True)


def _run(output: Path) -> Verdict:
    """Trains what is not finished, and judges."""
    recipe, record = str(output / RECIPE_FILE), ComparisonRecord(output / RECORD_FILE)
    arms = {name: arm for name, arm in ARMS.items() if (output / RECIPES / f"{name}.yaml").is_file()}
    data_args = Recipe.load(recipe).data()
    data = data_args.load()
    if len(arms) < 2:
        raise ValueError(f"{output / RECIPES} has fewer than two recipes; pass --overwrite.")
    outcomes = []
    for name, arm in arms.items():
        folder, own = output / name, str(output / RECIPES / f"{name}.yaml")
        if arm.section == PROBE:
            predictions = _probed(load_recipe(own)["student"]["init_from"], folder / "probe.json", data, record)
        else:
            if arm.is_taught:
                _train(recipe, "teacher", output / SHARED_TEACHER, record)
            try:
                _train(own, arm.section, folder, record)
            except TeacherAtChanceError as error:
                print(f"Note: {error} {arm.title} is left out.", flush=True)
                continue
            predictions = _predictions(folder, data)
        outcomes.append(record.outcome(name, arm, predictions, _epochs(folder)))
        gc.collect()
    return _conclude(output, record, outcomes, data, data_args)


def _train(recipe: str, section: str, folder: Path, record: "ComparisonRecord") -> None:
    """Trains a way, or continues its training; a finished one is not trained again."""
    if Results(folder).finished_steps() is not None:
        return
    print(f"\nTraining {folder.name}.", flush=True)
    make = Recipe.load(recipe).teacher if section == "teacher" else Recipe.load(recipe).student
    with record.measured(folder.name):
        make(output_dir=str(folder), resume_from_checkpoint="auto").train()


def _predictions(folder: Path, data: Mapping) -> list[int]:
    """Classes that a trained way predicts for the test images."""
    model = load_model(str(folder)).to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    collate = ImageCollator(load_processor(str(folder)))
    images = collate.images(data["test"])
    return predict(model, images, collate)[1]["mean"].argmax(axis=1).tolist()


def _epochs(folder: Path) -> float | None:
    """Epochs of a trained way; None for a probe."""
    record = find_record(folder)
    return None if record is None else record["settings"]["num_train_epochs"]


def _probed(path: str, file: Path, data: Mapping, record: "ComparisonRecord") -> list[int]:
    """Classes that a linear probe of a model predicts for the test images."""
    if not file.is_file():
        print(f"Probing {path}.", flush=True)
        with record.measured(PROBE):
            found = probe(path, data)
        write_json(file, {"strength": found.strength, "predictions": found.predictions})
    return read_json(file)["predictions"]


class ComparisonRecord:
    """The record of a comparison, `comparison.json`, which counts the seconds of each way over all of its parts.

    They are seconds of the processor, over all its cores and the workers; with a GPU, seconds of the clock. The file
    exists; it raises `ValueError` if it is not the record of a comparison.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, read_json(path)
        arms, kinds = self.content.get("arms"), {"seconds": float, "is_least": bool, "is_running": bool}
        is_valid = isinstance(self.content.get("name"), str) and isinstance(arms, dict)
        if not is_valid or not all(
            isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in kinds.items())
            for entry in arms.values()
        ):
            raise ValueError(f"{path} is not the record of a comparison; choose another --output_dir.")

    @contextlib.contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Context that adds its seconds to those of a way, also if it is interrupted."""
        entry = self.content["arms"].setdefault(name, {"seconds": 0.0, "is_least": False})
        # A part that was killed did not write its seconds.
        entry |= {"is_least": entry["is_least"] or entry.get("is_running", False), "is_running": True}
        write_json(self.path, self.content)
        started = _clock()
        try:
            yield
        finally:
            entry |= {"seconds": round(entry["seconds"] + _clock() - started, 1), "is_running": False}
            write_json(self.path, self.content)

    def outcome(self, name: str, arm: Arm, predictions: Sequence[int], epochs: float | None = None) -> Outcome:
        """A way with its price, to which the shared teacher belongs if it is taught."""
        unknown = {"seconds": 0.0, "is_least": True}
        parts = [self.content["arms"].get(part, unknown) for part in (name, *[SHARED_TEACHER] * arm.is_taught)]
        seconds = sum(part["seconds"] for part in parts)
        what = arm.what if epochs is None else f"{arm.what} {epochs:g} epochs."
        return Outcome(name, arm.title, what, predictions, seconds, any(part["is_least"] for part in parts))


def _clock() -> float:
    if torch.cuda.is_available():
        return time.perf_counter()
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _conclude(
    output: Path, record: ComparisonRecord, outcomes: Sequence[Outcome], data: Mapping, data_args: DataArguments
) -> Verdict:
    """Judges the ways on the test images, writes page and record, and prints table and advice."""
    labels, groups = np.asarray(data["test"]["label"][:]), data_args.groups(data)
    verdict = judge(outcomes, labels, groups)
    counts = class_counts(labels, data["test"].features["label"].num_classes)
    tested = {"overall": len(labels)} | {name: int(counts[group].sum()) for name, group in groups.items()}
    facts = {
        "name": record.content["name"],
        "images": f"{len(data['train']):,} training and {len(labels):,} test images of {len(counts):,} classes",
        "unit": "seconds" if torch.cuda.is_available() else "CPU seconds",
        "notes": [*record.content.get("notes", []), f"Groups of classes: {groups.rule}."],
    }
    if "validation" in data:
        facts["notes"].append(
            f"The best evaluation of each way was chosen on {len(data['validation']):,} other images."
        )
    page = write_page(verdict, outcomes, groups, tested, facts, output)
    record.content |= {
        "unit": facts["unit"],
        "advice": verdict.advice,
        "reference": outcomes[0].title,
        "level": verdict.level,
        "ways": {
            outcome.name: {
                "title": outcome.title,
                "seconds": round(outcome.seconds, 1),
                **dict(zip(("accuracies", "intervals"), verdict.accuracies[outcome.title], strict=True)),
                **dict(zip(("leads", "lead_intervals"), verdict.leads.get(outcome.title, ()), strict=False)),
            }
            for outcome in outcomes
        },
    }
    write_json(record.path, record.content)
    show(table(verdict, outcomes, labels, groups))
    print(f"{verdict.advice}\n\nThe page is in {page}; each way's model is in its folder beside it.", flush=True)
    return verdict
