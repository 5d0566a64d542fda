"""Refused arguments and parameters of transformers, each with its reason, and the checks of them.

A refused name must keep its default: it would have no effect, or break the method. `--help` hides it. All others work.
A test fails if transformers has a name that is neither refused here nor known to work.
"""

import copy
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.debug_utils import DebugOption

from .optimizers import MUON, Muon, muon_settings

_BATCHES = "the method defines batches and their order"
_SCHEDULE = "the method defines the schedule, with warmup_epochs"
_METRICS = "metrics are always computed, over all test images together"

ARGUMENTS: Mapping[str, str] = {
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"), _SCHEDULE),
    **dict.fromkeys(("train_sampling_strategy", "dataloader_drop_last", "auto_find_batch_size"), _BATCHES),
    **dict.fromkeys(("prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches"), _METRICS),
    "remove_unused_columns": "the data set makes the model's inputs itself",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "label_names": "the labels are in the data's ClassLabel column",
    "length_column_name": "images have one size",
    "include_num_input_tokens_seen": "images have no tokens to count",
    "average_tokens_across_devices": "the loss is normalised over the whole batch of an optimiser step",
    "eval_use_gather_object": "predictions are tensors",
    "optim_target_modules": "it is for optimisers that are refused",
    "use_cache": "a classifier generates nothing",
    "use_liger_kernel": "it does not have kernels for images",
    "liger_kernel_config": "Liger does not have kernels for images",
    "neftune_noise_alpha": "its noise is for word embeddings",
    "save_on_each_node": "all processes read the checkpoints of the main process, in one output_dir",
    "enable_jit_checkpoint": "SIGTERM ends every run with a checkpoint",
    "hub_always_push": "only the finished model is pushed",
    "ignore_data_skip": "a resumed run continues with the same images as an uninterrupted one",
    "parallelism_config": "the batch is divided among all processes",
    "ddp_static_graph": "accumulation and the two passes of SAM change the graph",
}

# Further ones for teachers.
TEACHER_ARGUMENTS: Mapping[str, str] = dict.fromkeys(
    ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    "teachers are trained with SGD",
)

# Parameters of the trainers.
PARAMETERS: Mapping[str, str] = {
    "data_collator": "the trainer makes the batches itself; image transforms are set in the arguments",
    "compute_loss_func": "the loss is the method's; override compute_training_loss for another",
}

_ACCELERATOR = {
    "split_batches": _BATCHES,
    "dispatch_batches": _BATCHES,
    "even_batches": "the last batches of an evaluation are padded, and the padding is not counted",
    "use_seedable_sampler": _BATCHES,
    "gradient_accumulation_kwargs": "gradient_accumulation_steps defines the micro-batches",
}
_OPTIMIZERS = {
    "galore": "its parameter groups apply weight decay to norms and tokens",
    "apollo": "its parameter groups apply weight decay to norms and tokens",
    "lomo": "it updates weights in the backward pass, before the batch is complete and checked",
    "adalomo": "it updates weights in the backward pass, before the batch is complete and checked",
    "schedule_free": "it does not use a learning-rate schedule, which the method needs",
}


def check_left(values: Any, reasons: Mapping[str, str], prefix: str = "") -> None:
    """Raises `ValueError` if a field named in `reasons` does not have its default in a dataclass."""
    for field in fields(values):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(values, field.name)
        is_off = all(off is None or off is False or off in ("no", "") for off in (value, default))
        if field.name in reasons and value != default and not is_off:
            why = reasons[field.name]
            raise ValueError(f"{prefix}{field.name} must keep its default ({why}), got {value!r}.")


def check_needs(args: TrainingArguments) -> None:
    """Raises `ValueError` if an argument is given without the one that it needs to have an effect."""
    for name, needed in (
        ("activation_checkpointing_kwargs", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "gradient_checkpointing"),
        ("fsdp_config", "fsdp"),
        ("greater_is_better", "metric_for_best_model"),
        ("dataloader_prefetch_factor", "dataloader_num_workers"),
        ("dataloader_multiprocessing_context", "dataloader_num_workers"),
        ("dataloader_persistent_workers", "dataloader_num_workers"),
    ):
        given = getattr(args, name, None)  # some exist in newer versions only
        if given not in (None, False, {}) and not getattr(args, needed):
            raise ValueError(f"{name} {given!r} has no effect without {needed}; give both or neither.")


def check_values(args: TrainingArguments) -> None:
    """Raises `ValueError` if a value has no effect on the device, or would break the method."""
    check_left(args.accelerator_config, _ACCELERATOR, "accelerator_config: ")
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError("fp16 has no effect on a CPU; leave it out, or use bf16.")
    if DebugOption.TPU_METRICS_DEBUG in args.debug:
        raise ValueError("debug 'tpu_metrics_debug' has no effect without a TPU; leave it out.")


def check_optimizer(args: TrainingArguments) -> None:
    """Raises `ValueError` if the chosen optimiser cannot be created, breaks the method, or ignores an argument."""
    name = str(getattr(args.optim, "value", args.optim))
    for prefix, why in _OPTIMIZERS.items():
        if name.startswith(prefix):
            raise ValueError(f"optim {name!r} cannot be used: {why}.")
    made = _optimizer_of(args)
    given = [part for part in (args.optim_args or "").replace(" ", "").split(",") if part]
    for part in given:
        # transformers ignores options that an optimiser does not read: such a one changes nothing in what it creates.
        others = ",".join(other for other in given if other != part)
        if _optimizer_of(args, optim_args=others or None) == made:
            raise ValueError(f"optim_args {part!r} has no effect on optim {name!r}; leave it out.")
    for field in fields(args):
        if field.name not in ("adam_beta1", "adam_beta2", "adam_epsilon") or getattr(args, field.name) == field.default:
            continue
        if _optimizer_of(args, **{field.name: field.default}) == made:
            raise ValueError(f"{field.name} has no effect on optim {name!r}; leave it out.")


def _optimizer_of(args: TrainingArguments, **changed: Any) -> tuple:
    """Class and settings of the optimiser that transformers creates from the arguments."""
    args = copy.copy(args)
    for name, value in changed.items():
        setattr(args, name, value)
    if args.optim == MUON:
        return Muon, muon_settings(args)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        what = " ".join(str(error).split()).rstrip(".")
        name = str(getattr(args.optim, "value", args.optim))
        raise ValueError(f"optim {name!r} with optim_args {args.optim_args!r} cannot be made: {what}.") from error


def check_parameters(given: dict[str, Any]) -> None:
    """Removes the parameters of `Trainer` that these trainers refuse. Raises `ValueError` if one is not None."""
    for name, why in PARAMETERS.items():
        if given.pop(name, None) is not None:
            raise ValueError(f"{name} cannot be given: {why}.")
