"""Training arguments of all trainers, in addition to those of transformers. Defaults come from the paper."""

import importlib.util
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..data.sampling import SAMPLINGS
from ..data.transforms import TRAIN_CROPS, image_processor, train_transform
from ..losses import LossOptions
from ..losses.class_weights import read_class_weights
from ..options import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, SHARE, Limit, option
from . import inherited
from .optimizers import MUON

if torch.distributed.is_available():
    # Imported before a process group exists: otherwise DDP imports it later, and its default arguments then keep a
    # reference to the group.
    importlib.import_module("torch.distributed.nn")

PRECISIONS = ("bf16", "fp16")
# Fields that affect how a run is carried out, but not its result.
_RUNNING = {
    *("recipe", "overwrite", "report_to", "hub_strategy", "remove_unused_columns", "image_resize"),
    *("image_cache", "teacher_cache", "fold_teacher", "save_adapter", "keep_freed_memory", "eval_strategy"),
    *("save_minutes", "save_total_limit", "logging_steps", "logging_nan_inf_filter", "on_nonfinite", "nonfinite_limit"),
    "ddp_find_unused_parameters",
}
# Unchanged fields of transformers that affect the result of a run, if only its last digits.
_OF_TRANSFORMERS = {
    *("num_train_epochs", "max_steps", "data_seed", "label_smoothing_factor", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", *PRECISIONS),
}


def increases(values: Sequence[float]) -> bool:
    """Whether each value is larger than the one before it."""
    return all(first < second for first, second in itertools.pairwise(values))


def require(args: TrainingArguments, name: str, fits: bool, wanted: str) -> None:
    """Raises `ValueError` with the name and value of a field and the wanted values, if `fits` is not set."""
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {getattr(args, name)!r}.")


def one_of(*choices: str) -> Limit:
    """Limit of a field to some values."""
    return choices.__contains__, f"one of {', '.join(choices)}"


@dataclass
class LongTailTrainingArguments(TrainingArguments):
    """Training arguments of both trainers: batch size, schedule, augmentation, deferred re-weighting and evaluation.

    This class defines only fields that [`~transformers.TrainingArguments`] lacks, or whose default differs.
    `inherited.py` lists the fields that are refused.

    Attributes:
        recipe: Name of the recipe that the values come from, and the values that the command line overrides
            (`overrides`).
        refused: Fields that must keep their defaults, with the reasons.
        phases: Fields with a value for each phase of training, and the fields with the epochs at which phases start.
        phase_starts: All fields with epochs at which phases of training start.
        limits: Limits of the fields that have any, in addition to those of the parent classes.

    Raises:
        ValueError: If a value is outside its range, or `global_batch_size` cannot be divided into whole micro-batches.
    """

    refused: ClassVar[Mapping[str, str]] = inherited.ARGUMENTS
    phases: ClassVar[Mapping[str, str]] = {"sam_rho": "sam_rho_epochs"}
    phase_starts: ClassVar[Sequence[str]] = ("sam_rho_epochs",)
    limits: ClassVar[Mapping[str, Limit]] = {
        **dict.fromkeys(("hflip", "random_erasing", "label_smoothing_factor"), SHARE),
        **dict.fromkeys(("color_jitter", "min_learning_rate", "warmup_learning_rate", "warmup_epochs"), AT_LEAST_0),
        **dict.fromkeys(("seed", "data_seed", "drw_start_epoch", "nonfinite_limit"), AT_LEAST_0),
        **dict.fromkeys(("learning_rate", "learning_rate_per_512", "save_minutes"), ABOVE_0),
        **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "global_batch_size"), AT_LEAST_1),
        **dict.fromkeys(("gradient_accumulation_steps", "learning_rate_micro_batches"), AT_LEAST_1),
        "drw_beta": BELOW_1,
        "ema_decay": (lambda value: value is None or 0 < value < 1, "between 0 and 1"),
        "sam_rho": (lambda values: len(values) > 0 and min(values) >= 0, "one or more values, none negative"),
        "sampling": one_of(*SAMPLINGS),
        "loss_normalization": (lambda value: value in (None, "global", "per_process"), "one of global, per_process"),
        "on_nonfinite": one_of("stop", "skip"),
        "hub_strategy": one_of("end"),
    }
    if TYPE_CHECKING:  # None by default in transformers, which then fills it
        output_dir: str = "trainer_output"
    recipe: Mapping | None = field(default=None, init=False, repr=False)
    global_batch_size: int | None = option(
        None,
        "Images per optimiser step, over all processes. Sets gradient_accumulation_steps and turns "
        "per_device_train_batch_size into an upper limit, so the number of processes does not change the run. None: "
        "processes x per_device_train_batch_size x gradient_accumulation_steps.",
    )
    learning_rate: float | None = option(  # type: ignore[assignment]
        None,
        "Peak learning rate. None: learning_rate_per_512 x images per micro-batch (over all processes) / 512, as in "
        "the paper.",
    )
    learning_rate_per_512: float = option(
        5e-4, "Peak learning rate for a batch of 512 images; it scales linearly with the batch. The paper uses 5e-4."
    )
    learning_rate_micro_batches: int | None = option(
        None,
        "Gradient-accumulation steps that the scaling of learning_rate_per_512 assumes. The authors scale by one "
        "micro-batch (processes x per-device batch), not by the whole batch. The paper uses 4. None: the accumulation "
        "steps of this run.",
    )
    min_learning_rate: float = option(1e-5, "Final learning rate of the cosine schedule. The paper uses 1e-5.")
    warmup_epochs: float = option(5, "Length of the linear warm-up, in epochs. The paper uses 5.")
    warmup_learning_rate: float = option(1e-6, "Learning rate at the start of the warm-up. The paper uses 1e-6.")
    drw_start_epoch: float | None = option(
        None,
        "Epoch (counted from 0) at which deferred re-weighting (DRW) of the classes starts. None or inf: never.",
    )
    drw_beta: float = option(0.9999, "Beta of the effective-number class weights of DRW, in [0, 1).")
    class_weights: dict | str | None = option(
        None,
        "Weights of classes in the loss, such as melanoma=5,nevus=1; other classes have weight 1. They apply in all "
        "phases, multiply the weights of DRW, and are scaled to mean 1 over the classes. For a student, they apply to "
        "both heads.",
    )
    sam_rho: list[float] = option(
        [0.0],
        "Radius of the perturbation of SAM, over all weights: one value, or one per phase of training. 0: no SAM.",
    )
    sam_rho_epochs: list[float] = option(
        [0.0],
        "Epoch (counted from 0) at which each value of sam_rho starts, such as 0 5 60. The first must be 0. A single "
        "value of sam_rho holds for the whole run.",
    )
    sam_adaptive: bool = option(False, "Scale the perturbation of each weight by its magnitude (ASAM).")
    sam_per_process: bool = option(
        False,
        "Each process perturbs the weights along the gradient of its part of the batch, as Foret et al. do, instead of "
        "the gradient of the whole batch. Saves one reduction per step, but the result depends on the number of "
        "processes.",
    )
    sampling: str = option(
        "uniform",
        "Choice of training images: uniform (each image once in an epoch), or class_balanced (each class equally "
        "often, so images of rare classes appear several times). DRW also gives rare classes more weight, unless "
        "drw_start_epoch is inf.",
    )
    image_resize: int | None = option(
        None,
        "Length in pixels to which the shorter side is resized before the centre crop in evaluation. None: 256 / 224 "
        "of an image size of 224 pixels or more, or the image size itself if it is smaller.",
    )
    train_crop: str = option(
        "random_resized", f"Random crop of training images: {' or '.join(TRAIN_CROPS)} (by an eighth of the size)."
    )
    auto_augment: str | None = option(
        "rand-m9-mstd0.5-inc1",
        "Augmentation policy of training images in timm's notation, by default the paper's; 'none' disables it.",
    )
    color_jitter: float = option(
        0.0,
        "Largest random change of brightness, contrast and saturation, as a fraction. Must be 0 with auto_augment.",
    )
    hflip: float = option(0.5, "Probability that a training image is flipped horizontally.")
    random_erasing: float = option(
        0.25, "Probability that a random rectangle of a training image is erased. 0.25 in the paper."
    )
    image_cache: str | None = option(
        None,
        "Folder for reduced copies of the images, for training at twice the image size. Each image is decoded at its "
        "full size only once; later epochs and runs read the copies. None: no copies.",
    )
    ema_decay: float | None = option(
        None,
        "Decay of an exponential moving average of the weights. The average is evaluated with the model and saved in "
        "the subfolder 'ema'. None: no average. The authors' code uses 0.99996, but their reported numbers are those "
        "of the weights without averaging.",
    )
    save_adapter: bool = option(
        False,
        "Also save the adapters of a PEFT model separately, in the subfolder 'adapter'. The full model, with the "
        "adapters merged into its weights, is always saved.",
    )
    as_published: bool = option(
        False,
        "Reproduce the authors' training loop where this package differs from it: loss_normalization per_process, "
        "partial_steps true, ema_every_micro_batch true; for students also teacher_antialias false, fp16 on a GPU, and "
        "learning-rate updates at the same times as theirs.",
    )
    loss_normalization: str | None = option(
        None,
        "Denominator of the mean loss. 'global' (the default): images or class weights of the whole batch of an "
        "optimiser step; processes and accumulation then do not change the loss. 'per_process', as in the authors' "
        "code: those of each micro-batch, then the number of micro-batches of a full step.",
    )
    partial_steps: bool | None = option(
        None,
        "Also train on the images that remain at the end of an epoch, in an optimiser step with fewer micro-batches, "
        "of which the last may have fewer images. By default they are left out, because they would depend on the "
        "number of processes.",
    )
    ema_every_micro_batch: bool | None = option(
        None,
        "Update the moving average after every micro-batch, as in the authors' code. By default it is updated after "
        "every optimiser step.",
    )
    on_nonfinite: str = option(
        "stop",
        "'stop' the run if the loss or the weights are not finite, or 'skip' an update if its gradient is not finite. "
        "'skip' synchronises the device in every step, which is slower.",
    )
    nonfinite_limit: int = option(20, "Number of consecutive updates that may be skipped with on_nonfinite skip.")
    overwrite: bool = option(False, "Replace an existing run in output_dir.")
    keep_freed_memory: bool | None = option(
        None,
        "On a CPU, keep freed memory between steps instead of returning it to the system, which is faster. Applies to "
        "the whole process and cannot be undone. By default commands do so, and trainers in Python do not.",
    )

    remove_unused_columns: bool = option(False, "Must stay off: the data set creates the inputs of the model itself.")
    max_grad_norm: float = option(0.0, "Maximum norm of the gradient for clipping. 0: no clipping, as in the paper.")
    logging_nan_inf_filter: bool = option(False, "Must stay off: a loss that is not finite stops the run.")
    logging_steps: float = option(
        0.02,
        "Optimiser steps between two log lines; a value below 1 is a fraction of the run. The default gives 50 lines.",
    )
    report_to: None | str | list[str] = option(
        None,
        "Experiment trackers to report to: trackio, tensorboard, wandb, none, ... By default trackio if it is "
        "installed, otherwise none.",
    )
    eval_strategy: str = option("epoch", "When to evaluate: no, steps or epoch.")
    save_minutes: float | None = option(
        None,
        "Also save a checkpoint when this many minutes have passed since the last one. None: as save_strategy says.",
    )
    save_total_limit: int | None = option(2, "Number of checkpoints to keep. The best checkpoint is always kept.")
    ddp_find_unused_parameters: bool | None = option(
        False,
        "Search for parameters without a gradient in distributed training. Not needed: every parameter has one.",
    )
    hub_strategy: str = option(
        "end",
        "What push_to_hub pushes. Only 'end' is supported: the finished model, without checkpoints.",
    )
    seed: int = option(0, "Random seed of initialisation, augmentation and order of the images.")

    def __post_init__(self) -> None:
        self.check()
        inherited.check_needs(self)
        if self.report_to is None:
            self.report_to = "trackio" if importlib.util.find_spec("trackio") else "none"
        self._computed_learning_rate: float | None = None  # last computed value, to detect changes
        self._computed_data_seed: int | None = None
        # Global batch, micro-batch and accumulation steps after the last `settle`.
        self._batch: tuple[int | None, int, int] | None = None
        # transformers compares the learning rate with 0, so it must not be None there.
        given_learning_rate, self.learning_rate = self.learning_rate, self.learning_rate or 0.0
        given_optim = self.optim
        if given_optim == MUON:  # transformers does not know this name
            self.optim = type(self).optim
        super().__post_init__()
        self.learning_rate = given_learning_rate
        if given_optim == MUON:
            self.optim = MUON
        # Without a terminal the output goes to a log file, where progress bars are noise.
        self.disable_tqdm = self.disable_tqdm or not sys.stderr.isatty()
        self.settle()

    def check(self) -> None:
        """Raises `ValueError` if a value is outside its range, or a field that must keep its default was changed."""
        inherited.check_left(self, self.refused)
        for cls in type(self).__mro__:
            for name, (fits, wanted) in vars(cls).get("limits", {}).items():
                require(self, name, fits(getattr(self, name)), wanted)
        self._set_published_values()
        if self.auto_augment in ("none", ""):
            self.auto_augment = None
        if self.drw_start_epoch == math.inf:
            self.drw_start_epoch = None
        self.class_weights = read_class_weights(self.class_weights)
        train_transform(image_processor(32), self.train_crop, self.auto_augment)  # refuses an unknown crop or policy
        require(self, "color_jitter", self.color_jitter == 0 or not self.auto_augment, "0 with auto_augment")
        for name, starts in self.phases.items():
            self._check_phases(name, starts)

    def _check_phases(self, name: str, starts: str) -> None:
        """Raises `ValueError` if a field does not have a value for each phase, or the phases are not in order."""
        values = getattr(self, name)
        if len(values) <= 1:
            setattr(self, starts, [0.0])
        epochs = getattr(self, starts)
        if values and len(values) != len(epochs):
            raise ValueError(
                f"{name} {values} and {starts} {epochs} must have as many values: each value of {name} holds from its "
                "epoch on (a single one for the whole run)."
            )
        require(self, starts, epochs[0] == 0 and increases(epochs), "increasing from 0")

    def settle(self) -> "LongTailTrainingArguments":
        """Recomputes batch size and learning rate from the current values, and checks all values again.

        The trainers call it, because values can change after construction: by assignment, by `set_training`, or by a
        hyperparameter search. It raises `ValueError` for a value without effect, too.
        """
        self.check()
        inherited.check_values(self)
        if "optim" not in self.refused:
            inherited.check_optimizer(self)
        # Starting workers in every epoch costs more than a small epoch itself.
        self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
        batch = (self.global_batch_size, self.per_device_train_batch_size, self.gradient_accumulation_steps)
        if batch != self._batch:
            if self._batch is not None and self.global_batch_size == self._batch[0]:
                self.global_batch_size = None  # one of its factors was set since
            if self.global_batch_size is None:
                self.global_batch_size = self.train_batch_size * self.world_size * self.gradient_accumulation_steps
            else:
                self.per_device_train_batch_size, self.gradient_accumulation_steps = divide_batch(
                    self.global_batch_size, self.world_size * max(self.n_gpu, 1), self.per_device_train_batch_size
                )
            self._batch = (self.global_batch_size, self.per_device_train_batch_size, self.gradient_accumulation_steps)
        # A learning rate that was not set by the user follows the batch size.
        if self.learning_rate in (None, self._computed_learning_rate):
            micro_batches = self.learning_rate_micro_batches or self.gradient_accumulation_steps
            assert self.global_batch_size is not None  # set above
            self.learning_rate = self.learning_rate_per_512 * self.global_batch_size / micro_batches / 512
            self._computed_learning_rate = self.learning_rate
        if self.data_seed in (None, self._computed_data_seed):
            self.data_seed = self._computed_data_seed = self.seed
        return self

    def set_training(self, *args: Any, **kwargs: Any) -> "LongTailTrainingArguments":
        """As in transformers. The global batch size is then computed from batch size and accumulation steps."""
        return super().set_training(*args, **kwargs).settle()

    def set_dataloader(self, *args: Any, **kwargs: Any) -> "LongTailTrainingArguments":
        """As in transformers. The global batch size is then computed from batch size and accumulation steps."""
        return super().set_dataloader(*args, **kwargs).settle()

    def set_push_to_hub(
        self, model_id: str, strategy: str | HubStrategy = "end", *args: Any, **kwargs: Any
    ) -> "LongTailTrainingArguments":
        """As in transformers. Only the strategy `end` is supported, which pushes the finished model."""
        super().set_push_to_hub(model_id, strategy, *args, **kwargs)
        self.check()
        return self

    def set_lr_scheduler(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `ValueError`: the learning-rate schedule of the method cannot be exchanged here."""
        raise ValueError(
            "set_lr_scheduler has no effect: the method defines its schedule; set num_train_epochs, warmup_epochs and "
            "min_learning_rate, or pass the trainer a scheduler together with its optimizer."
        )

    def published_values(self) -> dict[str, tuple[Any, Any]]:
        """Fields that `as_published` sets, each with its value in this package and its value in the authors' code."""
        return {
            "loss_normalization": ("global", "per_process"),
            "partial_steps": (False, True),
            "ema_every_micro_batch": (False, True),
        }

    def _set_published_values(self) -> None:
        """Sets the fields of [`published_values`] that were not given. Only this method applies `as_published` to them.

        It raises `ValueError` if `as_published` is set and a given value differs from the published one.
        """
        for name, ways in self.published_values().items():
            value = getattr(self, name)
            if value is None:
                setattr(self, name, ways[self.as_published])
            elif self.as_published and value != ways[True]:
                raise ValueError(
                    f"{name} {value!r} is not as published, which is {ways[True]!r}; leave out {name} or as_published."
                )

    @property
    def peak_learning_rate(self) -> float:
        """The peak learning rate. [`settle`] computes it if none was given."""
        assert self.learning_rate is not None
        return self.learning_rate

    @property
    def repeats(self) -> int:
        """Copies of an image in a batch."""
        return 1

    @property
    def gradients_per_step(self) -> float:
        """Mean number of gradients in an optimiser step: SAM takes two."""
        shares = zip(self.sam_rho, self.phase_shares(self.sam_rho_epochs), strict=True)
        return 1 + sum(share for rho, share in shares if rho > 0)

    def phase_shares(self, starts: Sequence[float]) -> list[float]:
        """Shares of training of the phases that start at these epochs."""
        total = self.num_train_epochs
        if total <= 0:
            return [0.0] * len(starts)
        # With max_steps, phases may start after the last epoch.
        ends = [min(start, total) for start in [*starts[1:], total]]
        return [(end - min(start, total)) / total for start, end in zip(starts, ends, strict=True)]

    def method_settings(self) -> dict[str, Any]:
        """Values of all fields that affect the result of a run, without those that affect only its execution."""
        classes = [
            c for c in type(self).__mro__ if issubclass(c, LongTailTrainingArguments) or LossOptions in c.__bases__
        ]
        own = {name for cls in classes for name in cls.__annotations__}
        names = own.intersection(field.name for field in fields(self)) | _OF_TRANSFORMERS
        settings = {name: getattr(self, name) for name in sorted(names - _RUNNING)}
        settings = {name: getattr(value, "value", value) for name, value in settings.items()}  # enumerations to values
        settings["image_cache"] = bool(self.image_cache)  # training sees other pixels; the folder does not matter
        # The precision may come from `accelerate launch`.
        return settings | {name: self.mixed_precision == name for name in PRECISIONS}

    def check_data(self, num_images: int) -> None:
        """Raises `ValueError` if an epoch has less than one batch, or a phase would start after the end of training."""
        batch = self.train_batch_size * self.world_size
        if num_images < batch:
            raise ValueError(
                f"an epoch has {num_images} images, fewer than one batch of {batch} ({self.world_size} "
                f"process(es) x {self.train_batch_size}); lower per_device_train_batch_size."
            )
        if self.max_steps > 0:
            return
        for name, off in (("drw_start_epoch", "inf"), ("warmup_epochs", "0")):
            epoch = getattr(self, name)
            if epoch is not None and self.num_train_epochs <= epoch:
                raise ValueError(
                    f"{name} {epoch:g} is not before the end of training at epoch {self.num_train_epochs:g}; change "
                    f"one of them ({name} {off} for none)."
                )
        for name in self.phase_starts:
            epochs = getattr(self, name)
            if epochs and epochs[-1] >= self.num_train_epochs:
                raise ValueError(
                    f"{name} {epochs} are not all before the end of training at epoch {self.num_train_epochs:g}; "
                    "change one of them."
                )


def divide_batch(global_batch_size: int, processes: int, batch_size: int) -> tuple[int, int]:
    """Divides the batch of an optimiser step into micro-batches of equal size, of at most `batch_size` images.

    Returns:
        Images per micro-batch, and micro-batches per process in an optimiser step (gradient-accumulation steps).

    Raises:
        ValueError: If the global batch size is not a multiple of the processes and the micro-batch size.
    """
    batch_size = min(batch_size, max(global_batch_size // processes, 1))
    if global_batch_size % (batch_size * processes):
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of {processes} process(es) x "
            f"per_device_train_batch_size {batch_size}; change one of them."
        )
    return batch_size, global_batch_size // (batch_size * processes)
