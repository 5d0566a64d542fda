"""The record of a run, `results.json`: the fields, their types, and the function that reads and checks it."""

import types
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Required, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from .io import one_line, read_json

RESULTS_FILE = "results.json"
SCHEMA = 1
_LARGEST = 1e13  # bound of displayed numbers: `timedelta` cannot hold more seconds, and no model has more parameters


class Evaluation(TypedDict):
    """An evaluation after a step. Accuracies are fractions by expert and group, null without test images."""

    epoch: float
    step: int
    accuracies: dict[str, dict[str, float | None]]


class RecipeOfRun(TypedDict, total=False):
    """The recipe of a run, and the fields that the command line overrides."""

    name: str
    overrides: dict[str, Any]


class Data(TypedDict, total=False):
    """The data set: its source, numbers of images, classes and groups."""

    dataset: str
    imbalance_ratio: float | None
    local_files: bool
    background: str | None
    train_images: int
    test_images: int
    validation_images: int
    validation_fraction: float | None
    classes: list[str]
    class_counts: list[int]
    subset_sha256: str | None
    images_sha256: str | None
    groups: dict[str, list[str]]
    group_rule: str


class Settings(TypedDict, total=False):
    """Settings that determine the result of a run. Only fields that this package reads are declared here."""

    num_train_epochs: float
    max_steps: int
    drw_start_epoch: float | None
    class_weights: dict[str, float] | None
    global_batch_size: int
    learning_rate: float
    teacher_loss: str
    sam_rho: list[float]
    distillation: str
    teacher_view: str
    train_crop: str
    auto_augment: str | None
    hflip: float
    random_erasing: float
    mixup: float
    cutmix: float
    mixup_switch: float
    mixup_probability: float


class Training(TypedDict, total=False):
    """How a student's teacher was trained."""

    recipe: RecipeOfRun | None
    settings: Required[Settings]
    finished: bool | None
    subset_sha256: str | None


class Teacher(TypedDict, total=False):
    """The teacher of a student: its source, model, accuracies and training."""

    source: str | None
    model: str
    backbone: Required[str]
    weights_sha256: str | None
    accuracies: dict[str, float | None] | None
    training: Training | None
    classes: list[str]  # of a tail teacher


class Hardware(TypedDict, total=False):
    """The hardware of a run."""

    device: Required[str]
    devices: int
    threads: int


class Emissions(TypedDict):
    """Energy and emissions of a run, estimated by codecarbon. Emissions per kWh depend on the country."""

    energy_kwh: float
    grams_co2eq: float
    country: str


class RunRecord(TypedDict, total=False):
    """The content of a `results.json` file. It may contain further fields, such as those of a benchmark."""

    schema: int
    model: str
    parameters: int
    started_from: str | None
    started_from_license: dict[str, str] | None  # fields of the card of that model
    finished: bool
    resumed: bool | None
    steps: int
    saved_step: int
    train_seconds: float
    emissions: Emissions | None
    weights_sha256: str
    recipe: RecipeOfRun | None
    data: Data
    teacher: Teacher | None
    tail_teacher: Teacher | None
    settings: Settings
    architecture: dict[str, Any]
    processes: dict[str, int]
    hardware: Hardware
    versions: dict[str, str]
    ran: dict[str, Any] | None
    last: Evaluation
    best: Evaluation
    test: Evaluation  # on test images that chose nothing; `last` and `best` are then on validation images


def read_record(path: str | PathLike) -> RunRecord:
    """Reads the record of a run from a file, or the folder that contains it.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not JSON, a field has a wrong type, or a newer version of this package wrote it.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    record = read_json(path)
    wrong = _mismatch(record, RunRecord, "")
    if wrong is None:
        for name in ("last", "best", "test"):
            rows = record.get(name, {"accuracies": {"": {"overall": None}}})["accuracies"].values()
            if not rows or not all("overall" in row for row in rows):
                wrong = f"{name}.accuracies has no overall accuracy"
    if wrong is None and record.get("schema", SCHEMA) > SCHEMA:
        wrong = f"a newer version of deitlt-hf wrote it (schema {record['schema']}; this one knows {SCHEMA})"
    if wrong is not None:
        raise ValueError(f"{path} is not a valid record of a run: {wrong}; repair it or move it away.")
    return record


def find_record(folder: str | PathLike) -> RunRecord | None:
    """Reads the record of a run in a folder; None if the file does not exist or belongs to another program."""
    path = Path(folder) / RESULTS_FILE
    if not path.is_file() or not is_of_run(read_json(path, object)):
        return None
    return read_record(path)


def is_of_run(record: Any) -> bool:
    """Whether the content of a JSON file is a record of this package; other programs also use the name results.json."""
    return isinstance(record, dict) and all(isinstance(record.get(name), dict) for name in ("settings", "data"))


def _mismatch(value: Any, wanted: Any, place: str) -> str | None:
    """Describes the first value that does not have its declared type; None if all values do."""
    origin, of = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return None
    if origin in (Union, types.UnionType):
        found = [_mismatch(value, option, place) for option in of if option is not type(None)]
        return None if value is None or None in found else found[0]
    if is_typeddict(wanted) or origin is dict:
        if not isinstance(value, Mapping):
            return _of_type(value, "an object", place)
        hints = get_type_hints(wanted) if is_typeddict(wanted) else dict.fromkeys(value, of[1])
        missing = sorted(getattr(wanted, "__required_keys__", set()) - value.keys())
        if missing:
            return f"{_inside(place, missing[0])} is missing"
        parts = [(value[key], hint, _inside(place, one_line(key, 40))) for key, hint in hints.items() if key in value]
    elif origin is list:
        if not isinstance(value, list):
            return _of_type(value, "a list", place)
        parts = [(item, of[0], f"{place}[{index}]") for index, item in enumerate(value)]
    else:
        is_number = wanted in (int, float)
        fits = isinstance(value, int | wanted if is_number else wanted) and isinstance(value, bool) == (wanted is bool)
        if fits and is_number:
            fits = abs(value) < _LARGEST  # false for NaN, too
        what = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[wanted]
        return None if fits else _of_type(value, what, place)
    return next((wrong for part in parts if (wrong := _mismatch(*part)) is not None), None)


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _of_type(value: Any, wanted: str, place: str) -> str:
    return f"{place or 'it'} is {one_line(repr(value), 60)}, not {wanted}"
