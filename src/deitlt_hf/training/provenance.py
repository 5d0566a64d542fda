"""Collects hardware, settings and the teacher of a run, for `results.json` and the model card."""

import contextlib
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from huggingface_hub import metadata_load
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import cached_file

from ..data.images import decoder_versions
from ..hub.card_facts import HUB_ID, LICENSE_FIELDS
from ..hub.cards import CARD_FILE
from ..io import one_line, read_json
from ..model_folder import weights_digest
from ..records import RESULTS_FILE, RunRecord, is_of_run, read_record
from .sam import SAM

if TYPE_CHECKING:
    from .trainer import LongTailTrainer

# Settings of a teacher that are recorded with its student.
_TEACHER_SETTINGS = (
    *("teacher_loss", "sam_rho", "sam_rho_epochs", "sam_adaptive"),
    *("num_train_epochs", "drw_start_epoch", "seed"),
)


def hardware(args: TrainingArguments) -> dict[str, str | int]:
    """Model and number of the accelerators of a run; on a CPU, model of the processor and number of threads."""
    if args.device.type == "cuda":
        return {"device": torch.cuda.get_device_name(args.device), "devices": args.world_size * max(args.n_gpu, 1)}
    if args.device.type == "cpu":
        return {"device": processor_name(), "threads": torch.get_num_threads()}
    return {"device": args.device.type, "devices": args.world_size}


def processor_name() -> str:
    """Model name of the processor, as far as the system reports it."""
    with contextlib.suppress(OSError):  # the file exists on Linux only
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def float32_precisions() -> dict[str, str]:
    """What torch may calculate with in place of float32: `tf32`, `bf16`, `ieee`, or `none` if nothing was chosen.

    torch 2.9 has new settings, which transformers changes for `--tf32` and `--torch_compile`. After that, to read the
    old ones, such as `allow_tf32`, raises an error.
    """
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):
        parts = {"matmul": backends.cuda.matmul, "convolution": backends.cudnn.conv, "cpu": backends.mkldnn.matmul}
        return {name: part.fp32_precision for name, part in parts.items()}
    allowed = {"matmul": backends.cuda.matmul.allow_tf32, "convolution": backends.cudnn.allow_tf32}
    on_cpu = {"highest": "ieee", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]
    return {name: "tf32" if value else "ieee" for name, value in allowed.items()} | {"cpu": on_cpu}


def what_ran(trainer: "LongTailTrainer") -> dict[str, Any]:
    """The objects that a trainer trains with (dtypes, optimiser, scheduler), which can differ from the arguments."""
    assert trainer.optimizer is not None  # created before the run is recorded
    args, optimizer = trainer.args, optimizer_record(trainer.optimizer)
    if optimizer["sam"] is not None and not trainer.rho_is_given:  # later phases have other radii
        optimizer["sam"] |= {"rho": args.sam_rho, "epochs": args.sam_rho_epochs}
    teacher = getattr(trainer, "teacher", None)
    evaluated = "bfloat16" if args.bf16_full_eval else "float16" if args.fp16_full_eval else None
    return {
        "dtype": dtype_of(trainer.model),
        "teacher_dtype": None if teacher is None else dtype_of(teacher),
        "evaluation_dtype": evaluated or dtype_of(trainer.model),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "tf32": float32_precisions()["matmul"] == "tf32",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "compiled": bool(args.torch_compile),
        "optimizer": optimizer,
        "scheduler": {
            "class": class_name(without_wrapper(trainer.lr_scheduler)),
            "of_the_method": "scheduler" not in trainer.given,
        },
        "given": list(trainer.given),
        "image_decoders": decoder_versions(),
    }


def without_wrapper(optimizer: Any) -> Any:
    """Returns the optimiser or scheduler inside a wrapper of Accelerate."""
    for name in ("optimizer", "scheduler"):
        if type(optimizer).__module__.startswith("accelerate.") and hasattr(optimizer, name):
            return getattr(optimizer, name)
    return optimizer


def class_name(thing: Any) -> str:
    """Module and name of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def dtype_of(model: nn.Module) -> str:
    """Names of the dtypes of a model's parameters, sorted and separated by commas."""
    return ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}))


def optimizer_record(optimizer: Optimizer) -> dict[str, Any]:
    """Class and settings of an optimiser. For SAM, those of the wrapped optimiser and the settings of SAM.

    Settings that differ between parameter groups are lists. `lr` is the peak learning rate.
    """
    optimizer, sam = without_wrapper(optimizer), None
    if isinstance(optimizer, SAM):
        rhos = [group["rho"] for group in optimizer.param_groups]
        sam = {"rho": rhos[:1] if len(set(rhos)) == 1 else rhos, "adaptive": optimizer.adaptive}
        optimizer = optimizer.base_optimizer
    names = dict.fromkeys(name for group in optimizer.param_groups for name in group)
    settings = {}
    for name in names:
        if name in ("params", "param_names", "initial_lr", "rho"):
            continue
        # `lr` is the rate of the current step; the schedule keeps the peak in `initial_lr`.
        key = "initial_lr" if name == "lr" and "initial_lr" in optimizer.param_groups[0] else name
        values = [_plain(group.get(key)) for group in optimizer.param_groups]
        settings[name] = values[0] if all(value == values[0] for value in values) else values
    return {"class": class_name(optimizer), "settings": settings, "sam": sam}


def _plain(value: Any) -> Any:
    """Converts a setting to a JSON type."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | bool | int | float | None) else str(value)


def started_from(model: nn.Module) -> str | None:
    """Hub id of the model whose weights training starts from; None for a folder, a file or new weights."""
    name = str(getattr(model, "name_or_path", None) or "")
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def license_of_start(model: nn.Module) -> dict[str, Any] | None:
    """Licence of the model whose weights training starts from, from the metadata of its card; None if it names none.

    The card is in the model's folder, or on the Hub if that can be reached. The fields are `license`, `license_name`
    and `license_link`, as far as they are given.
    """
    path, card = str(getattr(model, "name_or_path", None) or ""), None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        if path and not Path(path).is_file():
            file = cached_file(path, CARD_FILE, _raise_exceptions_for_missing_entries=False)
            card = file and metadata_load(file)
    found = {name: (card or {}).get(name) for name in LICENSE_FIELDS}
    known = {name: one_line(value) for name, value in found.items() if isinstance(value, str) and value.strip()}
    return known if "license" in known else None


def teacher_record(teacher: PreTrainedModel, accuracies: Mapping[str, float] | None) -> dict:
    """Describes the teacher of a student for the student's record: source, model, accuracies and training.

    Its training is None if there is no `results.json` in the place that it was loaded from.
    """
    path = teacher.name_or_path
    own = results_of(path)
    settings: Mapping[str, Any] = own.get("settings", {})
    training = {
        "recipe": own.get("recipe"),
        "settings": {name: settings[name] for name in _TEACHER_SETTINGS if name in settings},
        "optimizer": (own.get("ran") or {}).get("optimizer"),
        "finished": own.get("finished"),
        "subset_sha256": own.get("data", {}).get("subset_sha256"),
    }
    return {
        # Only the last part of a local path, because the record may be published.
        "source": Path(path).name if path and Path(path).exists() else path or None,
        "model": type(teacher).__name__,
        "backbone": getattr(teacher.config, "backbone", None) or teacher.config.model_type,
        "weights_sha256": weights_digest(path) if path and Path(path).is_dir() else None,
        "accuracies": None if accuracies is None else dict(accuracies),
        "training": training if own else None,
    }


def results_of(path: str | None) -> RunRecord:
    """Record of a run from a model folder or Hub repository; empty if no readable record exists."""
    with contextlib.suppress(OSError, ValueError):
        file = path and cached_file(path, RESULTS_FILE, _raise_exceptions_for_missing_entries=False)
        if file and is_of_run(read_json(file)):  # other software also writes files of this name
            try:
                return read_record(file)
            except ValueError as error:
                warnings.warn(f"the record of {path} is ignored: {error}", stacklevel=2)
    return {}
