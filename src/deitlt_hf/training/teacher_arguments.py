"""Training arguments of teachers. Defaults are those of the CIFAR teachers in the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..data.transforms import TRAIN_CROPS
from ..losses import TEACHER_LOSSES, TeacherLoss
from ..losses.entry import find, listed
from ..options import BELOW_1, Limit, option
from . import inherited
from .arguments import LongTailTrainingArguments, increases, require

# Reversed, because a dataclass has the fields of its last base first.
_LOSS_OPTIONS = [loss.options for loss in reversed(TEACHER_LOSSES.values()) if loss.options is not None]


@dataclass
class FlatTeacherTrainingArguments(*_LOSS_OPTIONS, LongTailTrainingArguments):  # type: ignore[misc]
    """Arguments of [`FlatTeacherTrainer`]: SGD with momentum under SAM, as in the CIFAR teachers of the paper.

    The arguments of single losses are the options of their entries in [`TEACHER_LOSSES`].

    The learning rate drops by `lr_drops` at `lr_drop_epochs`. Without them it follows a cosine.
    """

    refused: ClassVar[Mapping[str, str]] = {**inherited.ARGUMENTS, **inherited.TEACHER_ARGUMENTS}
    phase_starts: ClassVar[Sequence[str]] = ("sam_rho_epochs", "lr_drop_epochs")
    limits: ClassVar[Mapping[str, Limit]] = {"momentum": BELOW_1}
    teacher_loss: str = option(next(iter(TEACHER_LOSSES)), f"Loss of the teacher: {listed(TEACHER_LOSSES)}.")
    sam_rho: list[float] = option(
        [0.05],
        "Radius of the perturbation of SAM, over all weights: one value, or one per phase of training. 0: plain SGD.",
    )
    momentum: float = option(0.9, "Momentum of SGD.")
    lr_drop_epochs: list[float] = option(
        [], "Epochs (counted from 0) at which the learning rate drops. Without any, it follows a cosine."
    )
    lr_drops: list[float] = option([], "Factor of the peak learning rate from each epoch in lr_drop_epochs on.")

    learning_rate: float | None = option(0.1, "Peak learning rate.")
    min_learning_rate: float = option(0.0, "Final learning rate of the cosine schedule.")
    warmup_learning_rate: float = option(0.0, "Learning rate at the start of the warm-up.")
    weight_decay: float = option(2e-4, "Weight decay. Applies to all parameters.")
    train_crop: str = option(
        "padded", f"Random crop of training images: {' or '.join(TRAIN_CROPS)} (by an eighth of the size)."
    )
    auto_augment: str | None = option(
        None, "Augmentation policy of training images in timm's notation; 'none' disables it."
    )
    random_erasing: float = option(0.0, "Probability that a random rectangle of a training image is erased.")

    def check(self) -> None:
        super().check()
        smooths = self.loss.smooths_labels or self.label_smoothing_factor == 0
        require(self, "label_smoothing_factor", smooths, f"0 with teacher_loss {self.teacher_loss!r}")
        if len(self.lr_drop_epochs) != len(self.lr_drops):
            raise ValueError(
                f"lr_drop_epochs {self.lr_drop_epochs} and lr_drops {self.lr_drops} must have as many values."
            )
        require(self, "lr_drop_epochs", increases(self.lr_drop_epochs), "increasing")

    def published_values(self) -> dict[str, tuple[Any, Any]]:
        # PaCo's loader drops an incomplete batch; the loader of Saddle-LongTail uses it.
        return super().published_values() | {"partial_steps": (False, not self.loss.drops_last)}

    @property
    def loss(self) -> TeacherLoss:
        """The registry's entry of `teacher_loss`. Raises `ValueError` if there is none."""
        return find(TEACHER_LOSSES, self.teacher_loss, "teacher_loss")
