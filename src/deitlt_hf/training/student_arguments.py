"""Training arguments of students. Defaults come from the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..data.sampling import images_of_epoch
from ..io import check_can_be_folder
from ..losses import CLS_LOSSES, DISTILLATION_TARGETS, DistillationLoss
from ..losses.entry import listed
from ..options import AT_LEAST_0, AT_LEAST_1, SHARE, Limit, option
from .arguments import LongTailTrainingArguments, increases, one_of, require
from .optimizers import MUON
from .tuning import FULL, HEADS, LORA, TUNE_CHOICES, check_tune

TEACHER_VIEWS = ("student", "weak")


@dataclass
class DeiTLTTrainingArguments(LongTailTrainingArguments):
    """Arguments of [`DeiTLTTrainer`]: distillation, mixing and sampling of DeiT-LT (section 4 of the paper)."""

    phases: ClassVar[Mapping[str, str]] = {**LongTailTrainingArguments.phases, "train_sizes": "train_size_epochs"}
    phase_starts: ClassVar[Sequence[str]] = tuple(phases.values())
    limits: ClassVar[Mapping[str, Limit]] = {
        **dict.fromkeys(("mixup", "cutmix"), AT_LEAST_0),
        **dict.fromkeys(("mixup_switch", "mixup_probability"), SHARE),
        **dict.fromkeys(("tail_below", "lora_rank", "repeated_augmentation"), AT_LEAST_1),
        "layer_decay": (lambda value: 0 < value <= 1, "in (0, 1]"),
        "optim": one_of(MUON, *OptimizerNames),
        "teacher_view": one_of(*TEACHER_VIEWS),
        "train_sizes": (lambda values: increases([0, *values]), "positive and increasing"),
    }
    alpha: float = option(
        0.5, "Weight of the DIST head's loss, in [0, 1]; the CLS head's loss has weight 1 - alpha. The paper uses 0.5."
    )
    distillation: str = option(
        next(iter(DISTILLATION_TARGETS)), f"Targets of the DIST head: {listed(DISTILLATION_TARGETS)}."
    )
    temperature: float = option(1.0, "Temperature of the softmax in soft distillation.")
    cls_loss: str = option(next(iter(CLS_LOSSES)), f"Loss of the CLS head: {listed(CLS_LOSSES)}.")
    reweight_cls: bool = option(
        False, "Also re-weight the loss of the CLS head in the DRW phase. By default only the DIST head is re-weighted."
    )
    teacher_view: str = option(
        "student",
        "Images that the teacher sees. 'student': the augmented and mixed images of the student, which are out of "
        "distribution (as in the paper). 'weak': weakly augmented images (the in-distribution ablation).",
    )
    fold_teacher: bool = option(
        True,
        "On a CPU, fold the batch norms of a flat teacher into its convolutions. This is faster and gives the same "
        "labels up to rounding. Has no effect in mixed precision.",
    )
    teacher_cache: str | None = option(
        None,
        "Folder for what the teacher predicts for the augmented and mixed images. Further runs with the same teacher, "
        "images, augmentation, mixing, seed and batches read it, and need no forward pass of the teacher. None: store "
        "nothing.",
    )
    tail_below: int | None = option(
        None,
        "With --tail_teacher: classes with fewer training images than this learn from it. None: the classes of the "
        "group tail.",
    )
    mixup: float = option(0.8, "Alpha of Mixup; 0 disables Mixup. The paper uses 0.8.")
    cutmix: float = option(1.0, "Alpha of CutMix; 0 disables CutMix. The paper uses 1.")
    mixup_switch: float = option(0.5, "Probability per batch of CutMix instead of Mixup, if both are enabled.")
    mixup_probability: float = option(1.0, "Probability that a batch is mixed.")
    mixing_in_drw: bool = option(
        False,
        "Continue mixing and label smoothing in the DRW phase, as for ImageNet-LT and iNaturalist in the paper. By "
        "default both stop there, as for CIFAR.",
    )
    teacher_antialias: bool | None = option(
        None,
        "Smooth the student's images (antialiasing) before they are downscaled for the teacher, as Pillow does. On by "
        "default; the authors' version of torchvision did not smooth tensors.",
    )
    # Not `bool | None`: HfArgumentParser would then reject --fp16 without a value.
    fp16: bool = option(  # type: ignore[assignment]
        None, "Train in fp16 mixed precision with loss scaling, on a GPU, as the authors do. Off by default."
    )
    label_smoothing_factor: float = option(
        0.1, "Label smoothing of the CLS head's targets, in [0, 1]. The paper uses 0.1."
    )
    repeated_augmentation: int = option(
        3, "Number of differently augmented copies of each image in a batch; 1: plain shuffling without copies."
    )
    train_sizes: list[int] = option(
        [],
        "Sides in pixels of the images that the student trains on, one per phase of training, such as 112 160 224. "
        "The last must be the image size. Smaller images make cheaper steps; the teacher sees the full size. By "
        "default all phases have the image size.",
    )
    train_size_epochs: list[float] = option(
        [0.0], "Epoch (counted from 0) at which each value of train_sizes starts, such as 0 40 70. The first must be 0."
    )
    tune: str = option(
        FULL,
        f"Part of the student that is trained: {TUNE_CHOICES}. heads: both heads on frozen features. last_N: the last "
        "N blocks, final norm, tokens and heads. lora: low-rank adapters in all blocks, tokens and heads (needs "
        "peft); the saved model contains them merged.",
    )
    lora_rank: int = option(16, "Rank of the adapters of tune lora.")
    layer_decay: float = option(
        1.0,
        "Factor of the learning rate from each layer to the layer below it, in (0, 1], as in timm. 1: the same rate "
        "everywhere.",
    )
    heads_from_means: bool | None = option(
        None,
        "Initialise both heads with the mean features of the classes, which requires pretrained weights. By default "
        "only with tune heads.",
    )
    weight_decay: float = option(0.05, "Weight decay. Does not apply to biases, norms, tokens and position embeddings.")
    optim: str = option(
        TrainingArguments.optim,
        "Optimiser: one of those of transformers, or muon. muon is timm's Muon for the matrices of the blocks, with "
        "AdamW for all other parameters at the same learning rate.",
    )

    def check(self) -> None:
        super().check()
        # Checks these values now, before hours of teacher training.
        values = (self.alpha, self.distillation, self.temperature, self.cls_loss, None, self.reweight_cls)
        DistillationLoss(*values, class_counts=[1])  # a placeholder: only the trainer knows the counts
        if self.teacher_cache is not None:
            check_can_be_folder(self.teacher_cache)
            if not self.needs_teacher:
                raise ValueError(
                    f"teacher_cache has no effect with distillation {self.distillation!r}, which needs no teacher; "
                    "leave it out."
                )
        check_tune(self.tune)
        has_effect = self.tune == LORA or self.lora_rank == type(self).lora_rank
        require(self, "lora_rank", has_effect, "left out without tune lora")
        alone = self.repeated_augmentation == 1 or self.sampling == "uniform"
        require(self, "repeated_augmentation", alone, f"1 with sampling {self.sampling}")

    def settle(self) -> "DeiTLTTrainingArguments":
        super().settle()
        precision = "fp16" if self.fp16 else "no"
        if self.as_published and self.mixed_precision != precision:
            raise ValueError(
                f"as_published trains in {'half' if self.fp16 else 'full'} precision on this device, not in "
                f"{self.mixed_precision}; leave out bf16 (and the launcher's mixed_precision), or as_published."
            )
        if self.mixes and self.train_batch_size % 2:
            raise ValueError(
                "Mixup and CutMix pair the images of a batch, so per_device_train_batch_size must be even, got "
                f"{self.train_batch_size}."
            )
        return self

    def check_data(self, num_images: int) -> None:
        """As in the parent class. Repeated augmentation uses whole rounds of images."""
        super().check_data(images_of_epoch(num_images, self.repeated_augmentation))

    def published_values(self) -> dict[str, tuple[Any, Any]]:
        on_gpu = torch.cuda.is_available() and not self.use_cpu  # a CPU does not train in half precision
        return super().published_values() | {"teacher_antialias": (True, False), "fp16": (False, on_gpu)}

    @property
    def repeats(self) -> int:
        """Copies of an image in a batch."""
        return self.repeated_augmentation

    @property
    def mixes(self) -> bool:
        """Whether any batch is mixed by Mixup or CutMix."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mixup_probability > 0

    def check_sizes(self, image_size: int, patch_size: int) -> None:
        """Raises `ValueError` if a student with these sizes, in pixels, cannot train on images of `train_sizes`."""
        fits = self.train_sizes[-1:] in ([], [image_size]) and all(size % patch_size == 0 for size in self.train_sizes)
        require(
            self, "train_sizes", fits, f"multiples of the patch size {patch_size} up to the image size {image_size}"
        )

    def size_shares(self, image_size: int) -> dict[int, float]:
        """Sides of the training images in pixels, with the share of training in which they are used."""
        shares = zip(self.train_sizes, self.phase_shares(self.train_size_epochs), strict=False)
        return dict(shares) or {image_size: 1.0}

    @property
    def starts_heads_at_means(self) -> bool:
        """Whether the heads begin at class means."""
        return self.tune == HEADS if self.heads_from_means is None else self.heads_from_means

    @property
    def needs_teacher(self) -> bool:
        """Whether the DIST head learns from a teacher."""
        return DISTILLATION_TARGETS[self.distillation].needs_teacher
