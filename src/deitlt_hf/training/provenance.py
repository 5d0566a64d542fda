"""Where a run was done, and whom its student learned from: for `results.json` and the model card."""

import contextlib
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import cached_file

from ..io import read_json, weights_digest
from ..records import RESULTS_FILE, RunRecord, is_of_run, read_record

# What matters of a teacher's training to who reads of its student; "epochs" in records of before 0.1.0.
_TEACHER_SETTINGS = (
    *("teacher_loss", "sam_rho", "sam_rho_epochs", "sam_adaptive"),
    *("num_train_epochs", "epochs", "drw_start_epoch", "seed"),
)


def hardware(args: TrainingArguments) -> dict[str, str | int]:
    """The model of the accelerators or the processor that a run is on, and their number; for a CPU that of threads."""
    if args.device.type == "cuda":
        return {"device": torch.cuda.get_device_name(args.device), "devices": args.world_size * max(args.n_gpu, 1)}
    if args.device.type == "cpu":
        return {"device": processor_name(), "threads": torch.get_num_threads()}
    return {"device": args.device.type, "devices": args.world_size}


def processor_name() -> str:
    """Model of the processor, as far as the system tells it."""
    with contextlib.suppress(OSError):  # not on Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def teacher_record(teacher: PreTrainedModel, accuracies: Mapping[str, float] | None) -> dict:
    """What there is to know of a student's teacher.

    Args:
        teacher: A model; its own `results.json` is read from where it was loaded, if it has one.
        accuracies: What the student's run measured of it.

    Returns:
        Where it is from, what it is, its accuracies, and how it was trained (None without a record of that).
    """
    path = teacher.name_or_path
    own = results_of(path)
    settings = own.get("settings", {})
    training = {
        "recipe": own.get("recipe"),
        "settings": {name: settings[name] for name in _TEACHER_SETTINGS if name in settings},
        "finished": own.get("finished"),
        "subset_sha256": own.get("data", {}).get("subset_sha256"),
    }
    return {
        # Of a folder the last part: the record may be published.
        "source": Path(path).name if path and Path(path).exists() else path or None,
        "model": type(teacher).__name__,
        "backbone": getattr(teacher.config, "backbone", None) or teacher.config.model_type,
        "weights_sha256": weights_digest(path) if path and Path(path).is_dir() else None,
        "accuracies": None if accuracies is None else dict(accuracies),
        "training": training if own else None,
    }


def results_of(path: str) -> RunRecord:
    """The record of a run in a model's folder or Hub repository; empty if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        file = path and cached_file(path, RESULTS_FILE, _raise_exceptions_for_missing_entries=False)
        if file and is_of_run(read_json(file)):  # others call files so too
            try:
                return read_record(file)
            except ValueError as error:
                warnings.warn(f"what is known of {path} is left out: {error}", stacklevel=2)
    return {}
