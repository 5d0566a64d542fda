"""Tables that list whether each argument and parameter inherited from transformers is supported, and checks of them.

Each name in the versions of transformers that setup.py allows is in one table, with one of four verdicts. A test fails
if transformers has a name that is missing here. Names with the verdict [`Refused`] must keep their defaults, and
`--help` hides them.
"""

import copy
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.debug_utils import DebugOption

from .optimizers import MUON, Muon, muon_settings

WORKS = "as in transformers"
SET = "with another default or meaning, in arguments.py or trainer.py"
FOR_SCRIPTS = "for scripts that read it themselves; without effect on a command line"


class Refused(str):
    """Reason why values other than the default have no effect, or would break the method."""


_BATCHES = Refused("the method defines batches and their order")
_SCHEDULE = Refused("the method defines the schedule, with warmup_epochs")
_METRICS = Refused("metrics are always computed, over all test images together")

ARGUMENTS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "optim_args"),
            *("adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32"),
            *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_accumulation_steps"),
            *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
            *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
            *("logging_strategy", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica"),
            *("logging_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
            *("eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start", "eval_accumulation_steps"),
            *("include_for_metrics", "save_only_model", "save_strategy", "save_steps"),
            *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_revision"),
            *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
            *("full_determinism", "use_cpu", "accelerator_config", "resume_from_checkpoint", "local_rank"),
            *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
            *(
                "dataloader_in_order",
                "restore_callback_states_from_checkpoint",
                "debug",
                "skip_memory_metrics",
                "fsdp",
                "fsdp_config",
                "deepspeed",
            ),
            *("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend", "ddp_timeout"),
        ),
        WORKS,
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "label_smoothing_factor", "max_grad_norm", "optim", "seed", "data_seed"),
            *("logging_steps", "report_to", "disable_tqdm", "eval_strategy", "save_total_limit", "hub_strategy"),
            *("dataloader_pin_memory", "dataloader_persistent_workers", "ddp_find_unused_parameters"),
        ),
        SET,
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), FOR_SCRIPTS),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"), _SCHEDULE),
    **dict.fromkeys(("train_sampling_strategy", "dataloader_drop_last", "auto_find_batch_size"), _BATCHES),
    **dict.fromkeys(("prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches"), _METRICS),
    "remove_unused_columns": Refused("the data set makes the model's inputs itself"),
    "logging_nan_inf_filter": Refused("a loss that is not finite stops the run"),
    "label_names": Refused("the labels are in the data's ClassLabel column"),
    "length_column_name": Refused("images have one size"),
    "include_num_input_tokens_seen": Refused("images have no tokens to count"),
    "average_tokens_across_devices": Refused("the loss is normalised over the whole batch of an optimiser step"),
    "eval_use_gather_object": Refused("predictions are tensors"),
    "optim_target_modules": Refused("it is for optimisers that are refused"),
    "use_cache": Refused("a classifier generates nothing"),
    "use_liger_kernel": Refused("it does not have kernels for images"),
    "liger_kernel_config": Refused("Liger does not have kernels for images"),
    "neftune_noise_alpha": Refused("its noise is for word embeddings"),
    "save_on_each_node": Refused("all processes read the checkpoints of the main process, in one output_dir"),
    "enable_jit_checkpoint": Refused("SIGTERM ends every run with a checkpoint"),
    "hub_always_push": Refused("only the finished model is pushed"),
    "ignore_data_skip": Refused("a resumed run continues with the same images as an uninterrupted one"),
    "parallelism_config": Refused("the batch is divided among all processes"),
    "ddp_static_graph": Refused("accumulation and the two passes of SAM change the graph"),
}

# Additional verdicts for the arguments of teachers.
TEACHER_ARGUMENTS: Mapping[str, str] = dict.fromkeys(
    ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    Refused("teachers are trained with SGD"),
)

PARAMETERS: Mapping[str, str] = {
    **dict.fromkeys(("callbacks", "preprocess_logits_for_metrics"), WORKS),
    **dict.fromkeys(
        ("model", "args", "train_dataset", "eval_dataset", "processing_class", "model_init", "compute_metrics"), SET
    ),
    **dict.fromkeys(("optimizers", "optimizer_cls_and_kwargs"), SET),
    "data_collator": Refused("the trainer makes the batches itself; image transforms are set in the arguments"),
    "compute_loss_func": Refused("the loss is the method's; override compute_training_loss for another"),
}

_ACCELERATOR = {
    "split_batches": _BATCHES,
    "dispatch_batches": _BATCHES,
    "even_batches": Refused("the last batches of an evaluation are padded, and the padding is not counted"),
    "use_seedable_sampler": _BATCHES,
    "gradient_accumulation_kwargs": Refused("gradient_accumulation_steps defines the micro-batches"),
}
_OPTIMIZERS = {
    "galore": "its parameter groups apply weight decay to norms and tokens",
    "apollo": "its parameter groups apply weight decay to norms and tokens",
    "lomo": "it updates weights in the backward pass, before the batch is complete and checked",
    "adalomo": "it updates weights in the backward pass, before the batch is complete and checked",
    "schedule_free": "it does not use a learning-rate schedule, which the method needs",
}


def refused(table: Mapping[str, str]) -> dict[str, str]:
    """Names in a table with the verdict [`Refused`], with the reasons."""
    return {name: verdict for name, verdict in table.items() if isinstance(verdict, Refused)}


def check_left(values: Any, reasons: Mapping[str, str], prefix: str = "") -> None:
    """Checks that the fields named in `reasons` have their defaults in a dataclass.

    Raises:
        ValueError: If a field does not.
    """
    for field in fields(values):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(values, field.name)
        is_off = all(off is None or off is False or off in ("no", "") for off in (value, default))
        if field.name in reasons and value != default and not is_off:
            why = reasons[field.name]
            raise ValueError(f"{prefix}{field.name} must keep its default ({why}), got {value!r}.")


def check_needs(args: TrainingArguments) -> None:
    """Checks that each given argument comes with the argument that it needs to have an effect.

    Raises:
        ValueError: If one does not.
    """
    for name, needed in (
        ("activation_checkpointing_kwargs", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "gradient_checkpointing"),
        ("fsdp_config", "fsdp"),
        ("greater_is_better", "metric_for_best_model"),
        ("dataloader_prefetch_factor", "dataloader_num_workers"),
        ("dataloader_multiprocessing_context", "dataloader_num_workers"),
        ("dataloader_persistent_workers", "dataloader_num_workers"),
    ):
        if getattr(args, name, None) not in (None, False, {}) and not getattr(
            args, needed
        ):  # some exist in newer versions only
            raise ValueError(f"{name} {getattr(args, name)!r} has no effect without {needed}; give both or neither.")


def check_values(args: TrainingArguments) -> None:
    """Checks arguments of which only some values are supported, after the device is known.

    Raises:
        ValueError: If one has no effect, or would break the method.
    """
    check_left(args.accelerator_config, _ACCELERATOR, "accelerator_config: ")
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError("fp16 has no effect on a CPU; leave it out, or use bf16.")
    if DebugOption.TPU_METRICS_DEBUG in args.debug:
        raise ValueError("debug 'tpu_metrics_debug' has no effect without a TPU; leave it out.")
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug and args.n_gpu > 1:
        raise ValueError("debug 'underflow_overflow' needs one process for each GPU; start them with accelerate.")


def check_optimizer(args: TrainingArguments) -> None:
    """Checks that the chosen optimiser can be created, fits the method, and uses all of its arguments.

    Raises:
        ValueError: If it does not.
    """
    name = str(getattr(args.optim, "value", args.optim))
    for prefix, why in _OPTIMIZERS.items():
        if name.startswith(prefix):
            raise ValueError(f"optim {name!r} cannot be used: {why}.")
    made = _made_of(args)
    given = [part for part in (args.optim_args or "").replace(" ", "").split(",") if part]
    for part in given:
        others = ",".join(other for other in given if other != part)
        if _made_of(args, optim_args=others or None) == made:
            raise ValueError(f"optim_args {part!r} has no effect on optim {name!r}; leave it out.")
    for field in fields(args):
        if field.name not in ("adam_beta1", "adam_beta2", "adam_epsilon") or getattr(args, field.name) == field.default:
            continue
        if _made_of(args, **{field.name: field.default}) == made:
            raise ValueError(f"{field.name} has no effect on optim {name!r}; leave it out.")


def _made_of(args: TrainingArguments, **changed) -> tuple:
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


def check_parameters(given: Mapping[str, Any]) -> None:
    """Checks that no given parameter of `Trainer` is refused by these trainers.

    Raises:
        ValueError: If one was.
    """
    for name, why in refused(PARAMETERS).items():
        if given.get(name) is not None:
            raise ValueError(f"{name} cannot be given: {why}.")
