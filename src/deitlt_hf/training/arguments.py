"""Training arguments: what transformers' have not. Defaults are the paper's."""

import importlib.util
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames

from ..data.sampling import ROUND, check_repeats
from ..data.transforms import TRAIN_CROPS, image_processor, train_transform
from ..losses import TEACHER_LOSSES
from ..losses.distillation import CLS_LOSSES, DISTILLATION_TYPES, DistillationLoss
from . import inherited
from .optimizers import MUON

TEACHER_VIEWS = ("student", "weak")
PRECISIONS = ("bf16", "fp16")
# Fields that decide how a run goes, but not what it ends with.
_RUNNING = {
    "recipe",
    "overwrite",
    "image_resize",
    "save_adapter",
    "remove_unused_columns",
    "logging_nan_inf_filter",
    "report_to",
    "eval_strategy",
    "on_nonfinite",
    "nonfinite_limit",
    "save_total_limit",
    "ddp_find_unused_parameters",
    "hub_strategy",
    "keep_freed_memory",
    "fold_teacher",
    "logging_steps",
}
# Fields of transformers, as they are there, that change what a run ends with, if only in its digits.
_OF_TRANSFORMERS = {
    "num_train_epochs",
    "max_steps",
    "data_seed",
    "label_smoothing_factor",
    *PRECISIONS,
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
}


def _option(default, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class LongTailTrainingArguments(TrainingArguments):
    """What the two trainers share: batch arithmetic, schedule, augmentation, deferred re-weighting, evaluation.

    Only fields that [`~transformers.TrainingArguments`] lacks, or whose default differs, are here; what becomes of each
    of the others, `inherited.py` says.

    Attributes:
        recipe: Name of the recipe that the values come from, and what the command line changed of it (`overrides`).
        refused: Fields that must be left as they are, with the reasons.

    Raises:
        ValueError: If a value is outside its range, or `global_batch_size` cannot be made of whole batches.
    """

    refused: ClassVar[Mapping[str, str]] = inherited.refused(inherited.ARGUMENTS)
    if TYPE_CHECKING:  # transformers fills it
        output_dir: str = "trainer_output"
    recipe: Mapping | None = field(default=None, init=False, repr=False)
    global_batch_size: int | None = _option(
        None,
        "Images an optimiser step, over all processes. Sets gradient_accumulation_steps, and makes "
        "per_device_train_batch_size an upper limit, so that a run is the same however many processes share it. None: "
        "whatever processes x batch x accumulation give.",
    )
    learning_rate: float | None = _option(  # type: ignore[assignment]
        None, "Peak learning rate. None: learning_rate_per_512 times the images of one accumulation slice / 512."
    )
    learning_rate_per_512: float = _option(5e-4, "Learning rate for 512 images, scaled linearly. 5e-4 in the paper.")
    learning_rate_slices: int | None = _option(
        None,
        "Accumulation slices of the run that learning_rate_per_512 was chosen for: the authors scale by a slice of the "
        "batch (processes x per-device batch), not by the whole. 4 in the paper. None: this run's own accumulation.",
    )
    min_learning_rate: float = _option(1e-5, "Where the cosine ends.")
    warmup_epochs: float = _option(5, "Epochs of linear warm-up.")
    warmup_learning_rate: float = _option(1e-6, "Where the warm-up starts.")
    drw_start_epoch: float | None = _option(
        None, "Deferred re-weighting: epoch (from 0) from which on classes are weighted. None or inf: never."
    )
    drw_beta: float = _option(0.9999, "Beta of the effective-number class weights, in [0, 1).")
    image_resize: int | None = _option(
        None,
        "Shorter side before the centre crop in evaluation. None: 256 / 224 of the image size from 224 pixels on.",
    )
    train_crop: str = _option("random_resized", f"Random crop in training: {' or '.join(TRAIN_CROPS)} (by an eighth).")
    auto_augment: str | None = _option("rand-m9-mstd0.5-inc1", "Augmentation policy in timm's notation, or 'none'.")
    color_jitter: float = _option(
        0.0, "Random change of brightness, contrast and saturation by up to this share; only without auto_augment."
    )
    hflip: float = _option(0.5, "Probability of a horizontal flip.")
    random_erasing: float = _option(0.25, "Probability of random erasing.")
    ema_decay: float | None = _option(
        None,
        "Keep an exponential moving average of the weights with this decay, evaluate it too and save it in the folder "
        "'ema'. 0.99996 in the authors' code, whose reported numbers are those of the weights themselves.",
    )
    save_adapter: bool = _option(
        False,
        "Save the adapters of a PEFT model too, in the folder 'adapter'. The model itself is saved whole in any case, "
        "with the adapters merged into its weights.",
    )
    as_published: bool = _option(
        False,
        "Train as the authors' loop does where this package does otherwise: loss_normalization per_process, "
        "partial_steps true, ema_every_slice true; for students teacher_antialias false, fp16 on a GPU, and a learning "
        "rate that moves when theirs does.",
    )
    loss_normalization: str | None = _option(
        None,
        "What a mean divides by: 'global' (the default), images or weights of the whole batch of an optimiser step, so "
        "that processes and accumulation do not change it; 'per_process', those of each slice, and then the number of "
        "slices of a whole step, as in the authors' code.",
    )
    partial_steps: bool | None = _option(
        None,
        "Take what is left of an epoch after whole optimiser steps too: a step of fewer slices, the last of which may "
        "have fewer images. By default it is left out, as it would differ with each number of processes.",
    )
    ema_every_slice: bool | None = _option(
        None, "Update the moving average with every accumulation slice; by default with every optimiser step."
    )
    on_nonfinite: str = _option(
        "stop",
        "If the gradient is not finite: 'stop', or 'skip' the update (each step then waits for the device).",
    )
    nonfinite_limit: int = _option(20, "Updates in a row that may be skipped.")
    overwrite: bool = _option(False, "Replace the run that is in output_dir.")
    keep_freed_memory: bool = _option(
        True,
        "On a CPU, keep memory between steps instead of giving it back to the system each time: faster. Holds for the "
        "whole process, and cannot be undone in it.",
    )

    remove_unused_columns: bool = _option(False, "Left off: the data set makes the model's inputs itself.")
    max_grad_norm: float = _option(0.0, "Gradient clipping; 0 for none, as in the paper.")
    logging_nan_inf_filter: bool = _option(False, "Left off: a loss that is not finite stops the run.")
    logging_steps: float = _option(
        0.02, "Steps between two lines of the log; below 1 a share of the run. By default there are 50 lines."
    )
    report_to: None | str | list[str] = _option(
        None, "Where to report to: trackio, tensorboard, wandb, none, ... By default trackio, if that is installed."
    )
    eval_strategy: str = _option("epoch", "When to evaluate: no, steps or epoch.")
    save_total_limit: int | None = _option(2, "Checkpoints to keep.")
    ddp_find_unused_parameters: bool | None = _option(False, "All parameters get a gradient in every step.")
    hub_strategy: str = _option("end", "What push_to_hub pushes: 'end', the finished model; checkpoints stay here.")
    seed: int = _option(0, "Seed of initialisation, augmentation and order.")

    def __post_init__(self):
        self.check()
        inherited.check_needs(self)
        if self.report_to is None:
            self.report_to = "trackio" if importlib.util.find_spec("trackio") else "none"
        self._made_learning_rate: float | None = None  # what the last one was made to be, if it was not given
        self._made_data_seed: int | None = None
        self._batch: tuple[int | None, int, int] | None = None  # global, of a process, and slices, as they fitted last
        given_learning_rate, self.learning_rate = self.learning_rate, self.learning_rate or 0.0  # is compared with 0
        given_optim = self.optim
        if given_optim == MUON:  # which transformers does not know
            self.optim = type(self).optim
        super().__post_init__()
        self.learning_rate = given_learning_rate
        if given_optim == MUON:
            self.optim = MUON
        # New workers every epoch cost more than a small epoch itself.
        self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
        # Without a terminal there is a log, where progress bars are noise.
        self.disable_tqdm = self.disable_tqdm or not sys.stderr.isatty()
        self.settle()

    def check(self) -> None:
        """Checks each value.

        Raises:
            ValueError: If one is outside its range, or is to be left as it is.
        """
        inherited.check_left(self, self.refused)
        self._decide_arrangement()
        if self.auto_augment in ("none", ""):
            self.auto_augment = None
        if self.drw_start_epoch == math.inf:
            self.drw_start_epoch = None
        train_transform(image_processor(32), self.train_crop, self.auto_augment)  # refuses an unknown crop or policy
        _check(self, "color_jitter", self.color_jitter >= 0, "0 or more")
        _check(self, "color_jitter", self.color_jitter == 0 or not self.auto_augment, "0 with auto_augment")
        for name in ("hflip", "random_erasing", "label_smoothing_factor"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        _check(self, "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1")
        for name in ("seed", "data_seed", "warmup_epochs", "drw_start_epoch", "nonfinite_limit"):
            _check(self, name, (getattr(self, name) or 0) >= 0, "0 or more")
        for name in ("min_learning_rate", "warmup_learning_rate"):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
        _check_choice(self, "loss_normalization", ("global", "per_process"))
        _check_choice(self, "on_nonfinite", ("stop", "skip"))
        _check_choice(self, "hub_strategy", ("end",))
        _check(self, "drw_beta", 0 <= self.drw_beta < 1, "in [0, 1)")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _check(self, name, getattr(self, name) >= 1, "1 or more")
        for name in ("global_batch_size", "learning_rate_slices"):
            _check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        _check(self, "learning_rate", self.learning_rate is None or self.learning_rate > 0, "above 0")
        _check(self, "learning_rate_per_512", self.learning_rate_per_512 > 0, "above 0")

    def settle(self) -> "LongTailTrainingArguments":
        """Makes batch and learning rate fit what was set since they last did, and checks all values again.

        The trainers call it: values can be set one by one, by `set_training`, or by a search for hyperparameters.

        Raises:
            ValueError: If a value is outside its range or has no effect, or `global_batch_size` cannot be made of whole
                batches.
        """
        self.check()
        inherited.check_values(self)
        if "optim" not in self.refused:
            inherited.check_optimizer(self)
        batch = (self.global_batch_size, self.per_device_train_batch_size, self.gradient_accumulation_steps)
        if batch != self._batch:
            if self._batch is not None and self.global_batch_size == self._batch[0]:
                self.global_batch_size = None  # what it is made of was set
            self._divide_global_batch()
            self._batch = (self.global_batch_size, self.per_device_train_batch_size, self.gradient_accumulation_steps)
        if self.learning_rate in (None, self._made_learning_rate):
            slices = self.learning_rate_slices or self.gradient_accumulation_steps
            assert self.global_batch_size is not None  # made above
            self.learning_rate = self.learning_rate_per_512 * self.global_batch_size / slices / 512
            self._made_learning_rate = self.learning_rate
        if self.data_seed in (None, self._made_data_seed):
            self.data_seed = self._made_data_seed = self.seed
        return self

    def set_training(self, *args, **kwargs):
        """As in transformers; the global batch is then what the batch and the accumulation make."""
        return super().set_training(*args, **kwargs).settle()

    def set_dataloader(self, *args, **kwargs):
        """As in transformers; the global batch is then what the batch and the accumulation make."""
        super().set_dataloader(*args, **kwargs)
        self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        return self.settle()

    def set_push_to_hub(self, model_id: str, strategy: str | HubStrategy = "end", *args, **kwargs):
        """As in transformers; what is pushed is the finished model."""
        super().set_push_to_hub(model_id, strategy, *args, **kwargs)
        self.check()
        return self

    def set_lr_scheduler(self, *args, **kwargs):
        """Refuses: there is no other schedule than the method's.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "set_lr_scheduler has no effect: the schedule is the method's own; set num_train_epochs, warmup_epochs and "
            "min_learning_rate, or give the trainer a scheduler with its optimizer."
        )

    def arrangements(self) -> dict[str, tuple[Any, Any]]:
        """What `as_published` decides, by field: this package's way and the authors'."""
        return {
            "loss_normalization": ("global", "per_process"),
            "partial_steps": (False, True),
            "ema_every_slice": (False, True),
        }

    def _decide_arrangement(self) -> None:
        """Fills the fields of [`arrangements`] that were not given; the one place where `as_published` decides them.

        Raises:
            ValueError: If one was given that is not as published.
        """
        for name, ways in self.arrangements().items():
            value = getattr(self, name)
            if value is None:
                setattr(self, name, ways[self.as_published])
            elif self.as_published and value != ways[True]:
                raise ValueError(
                    f"{name} {value!r} is not as published, which is {ways[True]!r}; leave {name} or as_published out."
                )

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, which [`settle`] makes if none was given."""
        assert self.learning_rate is not None
        return self.learning_rate

    @property
    def repeats(self) -> int:
        """Copies of an image in a batch."""
        return 1

    def method_settings(self) -> dict[str, Any]:
        """What decides the result of a run, by field; what only decides how it goes is left out."""
        classes = [cls for cls in type(self).__mro__ if cls.__module__ == __name__]
        own = {name for cls in classes for name in cls.__annotations__}
        names = own.intersection(field.name for field in fields(self)) | _OF_TRANSFORMERS
        settings = {name: getattr(self, name) for name in sorted(names - _RUNNING)}
        settings = {name: getattr(value, "value", value) for name, value in settings.items()}  # of an enumeration
        return settings | {name: self.mixed_precision == name for name in PRECISIONS}  # `accelerate launch` sets it too

    def check_data(self, num_images: int) -> None:
        """Checks that training images and epochs suffice.

        Raises:
            ValueError: If an epoch has fewer images than one batch, or a phase would begin after the end of training.
        """
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

    def _divide_global_batch(self) -> None:
        """Makes the global batch of processes, images a process, and accumulation steps."""
        if self.global_batch_size is None:
            self.global_batch_size = self.train_batch_size * self.world_size * self.gradient_accumulation_steps
            return
        self.per_device_train_batch_size, self.gradient_accumulation_steps = divide_batch(
            self.global_batch_size, self.world_size * max(self.n_gpu, 1), self.per_device_train_batch_size
        )


@dataclass
class DeiTLTTrainingArguments(LongTailTrainingArguments):
    """Arguments of [`DeiTLTTrainer`]: the distillation, mixing and sampling of DeiT-LT (section 4 of the paper)."""

    alpha: float = _option(0.5, "Share of the DIST head's loss.")
    distillation: str = _option(
        "hard",
        f"What the DIST head learns from: {', '.join(DISTILLATION_TYPES)} (the labels). soft is averaged over classes, "
        "as in the authors' code; soft_sum is summed, as strong as hard.",
    )
    temperature: float = _option(1.0, "Temperature of soft distillation.")
    cls_loss: str = _option(
        "ce",
        f"Loss of the CLS head: {', '.join(CLS_LOSSES)} (balanced softmax: logits adjusted by the classes' shares).",
    )
    reweight_cls: bool = _option(False, "Re-weight the CLS head's loss too in the DRW phase.")
    teacher_view: str = _option(
        "student",
        "What the teacher sees: 'student', the student's own augmented and mixed image (out of distribution, the "
        "paper); 'weak', a weakly augmented one (the in-distribution ablation).",
    )
    fold_teacher: bool = _option(
        True,
        "On a CPU, fold the batch norms of a flat teacher into its convolutions: the same labels up to rounding, "
        "faster. Left out in mixed precision.",
    )
    mixup: float = _option(0.8, "Mixup alpha; 0 for none.")
    cutmix: float = _option(1.0, "CutMix alpha; 0 for none.")
    mixup_switch: float = _option(0.5, "Probability of CutMix instead of Mixup, a batch.")
    mixup_probability: float = _option(1.0, "Probability of mixing, a batch.")
    mixing_in_drw: bool = _option(
        False, "Go on with mixing and label smoothing in the DRW phase (ImageNet-LT, iNaturalist) or stop (CIFAR)."
    )
    teacher_antialias: bool | None = _option(
        None,
        "Smooth the student's image before it is made smaller for the teacher, as Pillow does; the authors' version of "
        "torchvision did not, for tensors.",
    )
    # Not bool | None, with which the command line would not take a bare --fp16.
    fp16: bool = _option(None, "Train in half precision, on a GPU, with a scaled loss; the authors do.")
    label_smoothing_factor: float = _option(0.1, "Label smoothing of the CLS head's targets.")
    repeated_augmentation: int = _option(3, "Copies of an image in a batch; 1 for plain shuffling.")
    weight_decay: float = _option(0.05, "Weight decay; none on biases, norms, tokens and positions.")
    optim: str = _option(
        TrainingArguments.optim,
        "Optimiser: one of transformers', or muon (timm's, for the matrices of the blocks; AdamW for the rest, at the "
        "same learning rate).",
    )

    def check(self) -> None:
        super().check()
        # Refuses values outside their range here, before a teacher is trained for them.
        values = (self.alpha, self.distillation, self.temperature, self.cls_loss, None, self.reweight_cls)
        DistillationLoss(*values, class_counts=[1])  # the trainer knows them
        _check_choice(self, "teacher_view", TEACHER_VIEWS)
        _check_choice(self, "optim", (MUON, *OptimizerNames))
        _check(self, "repeated_augmentation", self.repeated_augmentation >= 1, "1 or more")
        for name in ("mixup", "cutmix"):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("mixup_switch", "mixup_probability"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")

    def settle(self) -> "DeiTLTTrainingArguments":
        super().settle()
        precision = "fp16" if self.fp16 else "no"
        if self.as_published and self.mixed_precision != precision:
            raise ValueError(
                f"as_published trains in {'half' if self.fp16 else 'full'} precision on this device, not in "
                f"{self.mixed_precision}; leave bf16 (and the launcher's mixed_precision) or as_published out."
            )
        if self.mixes and self.train_batch_size % 2:
            raise ValueError(
                "Mixup and CutMix pair the images of a batch, so per_device_train_batch_size must be even, got "
                f"{self.train_batch_size}."
            )
        return self

    def check_data(self, num_images: int) -> None:
        """Checks that training images and epochs suffice; repeated augmentation takes whole rounds of images.

        Raises:
            ValueError: If they do not.
        """
        if self.repeated_augmentation > 1:
            check_repeats(num_images)
            num_images -= num_images % ROUND
        super().check_data(num_images)

    def arrangements(self) -> dict[str, tuple[Any, Any]]:
        on_gpu = torch.cuda.is_available() and not self.use_cpu  # a CPU has no half precision
        return super().arrangements() | {"teacher_antialias": (True, False), "fp16": (False, on_gpu)}

    @property
    def repeats(self) -> int:
        """Copies of an image in a batch."""
        return self.repeated_augmentation

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed at all."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mixup_probability > 0


@dataclass
class FlatTeacherTrainingArguments(LongTailTrainingArguments):
    """Arguments of [`FlatTeacherTrainer`]: SGD with momentum under SAM, as in the CIFAR teachers of the paper.

    The learning rate falls by `lr_drops` at `lr_drop_epochs`, or follows a cosine without them.
    """

    refused: ClassVar[Mapping[str, str]] = {
        **LongTailTrainingArguments.refused,
        **inherited.refused(inherited.TEACHER_ARGUMENTS),
    }
    teacher_loss: str = _option(
        "ce",
        "Loss: ce, ldam (with a cosine classifier), logit_adjusted (balanced softmax), or paco (with projection_size).",
    )
    ldam_margin: float = _option(0.5, "Margin of the rarest class.")
    ldam_scale: float = _option(30.0, "What the cosine classifier of LDAM multiplies the cosines by.")
    paco_alpha: float = _option(0.01, "Weight of an image of the same class as a positive of PaCo.")
    paco_temperature: float = _option(0.05, "What PaCo's similarities are divided by. 0.05 for CIFAR, else 0.2.")
    paco_queue: int = _option(1024, "Keys of earlier batches that PaCo compares with. 1024 for CIFAR, else 8192.")
    paco_momentum: float = _option(0.999, "Share of the old weights in PaCo's momentum encoder.")
    sam_rho: list[float] = _option(
        [0.05], "Radius of SAM's perturbation of all weights: one value, or one a phase of training; 0 for plain SGD."
    )
    sam_rho_epochs: list[float] = _option(
        [0.0],
        "Epoch (from 0) from which on each value of sam_rho holds, such as 0 5 60; the first is 0. One value holds for "
        "the whole run.",
    )
    sam_adaptive: bool = _option(False, "Scale the perturbation by the weights (ASAM).")
    sam_per_process: bool = _option(
        False,
        "Each process perturbs along the gradient of its own share of the batch, as Foret et al. do, instead of all "
        "along the whole batch's. Saves a reduction a step, but the run then depends on the number of processes.",
    )
    momentum: float = _option(0.9, "Momentum of SGD.")
    lr_drop_epochs: list[float] = _option([], "Epochs (from 0) at which the learning rate drops.")
    lr_drops: list[float] = _option([], "Factors of the peak learning rate from those epochs on.")

    learning_rate: float | None = _option(0.1, "Peak learning rate.")
    min_learning_rate: float = _option(0.0, "Where the cosine ends.")
    warmup_learning_rate: float = _option(0.0, "Where the warm-up starts.")
    weight_decay: float = _option(2e-4, "Weight decay, on all parameters.")
    train_crop: str = _option("padded", f"Random crop in training: {' or '.join(TRAIN_CROPS)} (by an eighth).")
    auto_augment: str | None = _option(None, "Augmentation policy in timm's notation, or 'none'.")
    random_erasing: float = _option(0.0, "Probability of random erasing.")

    def check(self) -> None:
        super().check()
        _check_choice(self, "teacher_loss", TEACHER_LOSSES)
        _check(self, "paco_alpha", self.paco_alpha >= 0, "0 or more")
        _check(self, "paco_temperature", self.paco_temperature > 0, "above 0")
        _check(self, "paco_queue", self.paco_queue >= 1, "1 or more")
        _check(self, "paco_momentum", 0 <= self.paco_momentum <= 1, "in [0, 1]")
        for name in ("ldam_margin", "ldam_scale"):
            _check(self, name, getattr(self, name) > 0, "above 0")
        _check(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        smooths = self.teacher_loss == "ce" or self.label_smoothing_factor == 0
        _check(self, "label_smoothing_factor", smooths, f"0 with teacher_loss {self.teacher_loss!r}")
        _check(self, "sam_rho", len(self.sam_rho) > 0 and min(self.sam_rho) >= 0, "one or more values, none negative")
        if len(self.sam_rho) == 1:
            self.sam_rho_epochs = [0.0]
        if len(self.sam_rho) != len(self.sam_rho_epochs):
            raise ValueError(
                f"sam_rho {self.sam_rho} and sam_rho_epochs {self.sam_rho_epochs} must have as many values: each value "
                "of sam_rho holds from its epoch on (a single one for the whole run)."
            )
        phases = self.sam_rho_epochs[0] == 0 and _increases(self.sam_rho_epochs)
        _check(self, "sam_rho_epochs", phases, "increasing from 0")
        if len(self.lr_drop_epochs) != len(self.lr_drops):
            raise ValueError(
                f"lr_drop_epochs {self.lr_drop_epochs} and lr_drops {self.lr_drops} must have as many values."
            )
        _check(self, "lr_drop_epochs", _increases(self.lr_drop_epochs), "increasing")

    def arrangements(self) -> dict[str, tuple[Any, Any]]:
        # PaCo's loader drops an incomplete batch, that of Saddle-LongTail takes it.
        return super().arrangements() | {"partial_steps": (False, self.teacher_loss != "paco")}

    def check_data(self, num_images: int) -> None:
        """Checks that training images and epochs suffice, and that learning rate and rho change within them.

        Raises:
            ValueError: If they do not.
        """
        super().check_data(num_images)
        if self.max_steps > 0:
            return
        for name in ("lr_drop_epochs", "sam_rho_epochs"):
            epochs = getattr(self, name)
            if epochs and epochs[-1] >= self.num_train_epochs:
                raise ValueError(
                    f"{name} {epochs} are not all before the end of training at epoch {self.num_train_epochs:g}; "
                    "change one of them."
                )


def divide_batch(global_batch_size: int, processes: int, batch_size: int) -> tuple[int, int]:
    """Makes the batch of an optimiser step of processes, images a process takes at once, and accumulation steps.

    Args:
        global_batch_size: Images of an optimiser step.
        processes: Their number.
        batch_size: Images a process takes at once, at most.

    Returns:
        Images that a process takes at once, and how often in a step.

    Raises:
        ValueError: If they do not make it.
    """
    batch_size = min(batch_size, max(global_batch_size // processes, 1))
    if global_batch_size % (batch_size * processes):
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of {processes} process(es) x "
            f"per_device_train_batch_size {batch_size}; change one of them."
        )
    return batch_size, global_batch_size // (batch_size * processes)


def _increases(values: Sequence[float]) -> bool:
    return all(first < second for first, second in itertools.pairwise(values))


def _check(args: TrainingArguments, name: str, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {getattr(args, name)!r}.")


def _check_choice(args: TrainingArguments, name: str, choices: Sequence[str]) -> None:
    _check(args, name, getattr(args, name) in choices, f"one of {', '.join(choices)}")
