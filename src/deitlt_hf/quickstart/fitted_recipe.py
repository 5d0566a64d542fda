"""Chooses a recipe for a folder of images: every value with the reason for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..data.copies import SIDE_OF_CROP
from ..data.images import CACHED_SIDE
from ..data.long_tail import class_counts, shot_groups
from ..io import atomic_write

# Sides of training images from which to choose: on a CPU, and on a GPU.
TRAIN_SIDES = {False: (64, 48, 32), True: (224, 160, 128, 96, 64)}
# Changes for other losses of the teacher, which weight the classes themselves.
OTHER_LOSSES: dict[str, Any] = {
    "paco": {"drw_start_epoch": None, "learning_rate": 0.05},
    "logit_adjusted": {"drw_start_epoch": None},
}
SMALL = 40  # pixels; images up to this side are trained at their own size
PATCHES = 8  # patches along a side of small images; 14 along the side of large images, as in ViT/16 at 224 pixels
# Training images that a model sees in a standard run. On Fashion-MNIST, 30 epochs of the teacher and 60 of the student
# are 112,000 and 223,000 (docs/claims.md). The bounds are in epochs.
TEACHER_IMAGES, TEACHER_EPOCHS = 110_000, (20, 90)
STUDENT_IMAGES, STUDENT_EPOCHS = 220_000, (40, 160)
SHORTEST = 0.4  # share of the standard number of epochs below which smaller images are a better use of the time
LONGEST = 3.0  # share above which more epochs are not expected to help
FEWEST_EPOCHS = 5
EVALUATIONS = 4
TEST_FRACTION = 0.2  # of each class, in data without a test split


@dataclass(frozen=True)
class FolderFacts:
    """What is known about a data set before a run.

    Args:
        labels: Class index of each training image.
        num_classes: Number of classes.
        test_counts: Test images of each class, (classes,).
        has_test: Whether the data have a test split.
        shorter_sides: Shorter sides of a sample of training images, in pixels.
        longer_sides: Longer sides of the same images.
        transparent: Share of these images with transparent pixels.
        unreadable: Descriptions of images of the sample that cannot be read.
        notes: What else to know about the data, in sentences.
    """

    labels: Sequence[int]
    num_classes: int
    test_counts: Sequence[int]
    has_test: bool
    shorter_sides: Sequence[int]
    longer_sides: Sequence[int]
    transparent: float = 0.0
    unreadable: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def counts(self) -> np.ndarray:
        """Training images of each class, (classes,)."""
        return class_counts(np.asarray(self.labels), self.num_classes)


@dataclass(frozen=True)
class Machine:
    """What a run can use: whether training runs on a GPU, the number of CPU cores, and whether the GPU has bfloat16."""

    has_gpu: bool
    cores: int
    has_bfloat16: bool = False


@dataclass(frozen=True)
class Choice:
    """A chosen value of a recipe.

    Args:
        section: `data`, `teacher`, `student`, or `both` for teacher and student.
        name: Field of that section.
        value: The value.
        reason: Why; empty for values that belong to the one before.
    """

    section: str
    name: str
    value: Any
    reason: str = ""

    @property
    def sections(self) -> tuple[str, ...]:
        """Sections of the recipe that have the value."""
        return ("teacher", "student") if self.section == "both" else (self.section,)


@dataclass(frozen=True)
class FittedRecipe:
    """The chosen values of a recipe.

    Args:
        choices: All values, in the order of the recipe.
        image_size: Side of the training images, in pixels.
        teacher_epochs: Epochs of the teacher.
        student_epochs: Epochs of the student.
        share: Number of epochs relative to [`standard_epochs`].
        notes: What to know before the run, in sentences.
        seconds: Expected seconds of teacher and student; NaN without a trial.
        data: A sentence about the images for the printed plan.
    """

    choices: list[Choice]
    image_size: int
    teacher_epochs: int
    student_epochs: int
    share: float = 1.0
    notes: list[str] = field(default_factory=list)
    seconds: tuple[float, float] = (math.nan, math.nan)
    data: str = ""

    def value(self, section: str, name: str) -> Any:
        """Value of a field; None if the recipe does not set it."""
        return self.sections()[section].get(name)

    def sections(self) -> dict[str, dict[str, Any]]:
        """Values by section and field, as in a recipe file."""
        found: dict[str, dict[str, Any]] = {"data": {}, "teacher": {}, "teacher_losses": OTHER_LOSSES, "student": {}}
        for choice in self.choices:
            for section in choice.sections:
                found[section][choice.name] = choice.value
        return found

    def text(self, title: str) -> str:
        """The recipe as YAML, with the reasons as comments.

        Args:
            title: The description of the recipe.
        """
        twice = "it weights the classes itself, so DRW would weight them twice"
        reasons = {("teacher_losses", loss): twice for loss in OTHER_LOSSES}
        for choice in self.choices:
            for section in choice.sections:
                reasons[section, choice.name] = choice.reason
        lines = [yaml.safe_dump({"description": title}, width=110).strip()]
        for section, values in self.sections().items():
            lines += ["", f"{section}:"]
            for name, value in values.items():
                reason = reasons.get((section, name))
                lines += [f"  # {' '.join(reason.split())}"] if reason else []
                text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
                lines.append(f"  {name}: {text.strip().removesuffix('...').strip()}")
        return "\n".join(lines) + "\n"

    def write(self, path: Path, title: str) -> None:
        """Writes the recipe to a YAML file; see [`text`]."""
        with atomic_write(path) as file:
            file.write_text(self.text(title), encoding="utf-8")


RUNNING = (
    Choice("both", "eval_strategy", "steps"),
    Choice("both", "eval_steps", 1 / EVALUATIONS),
    Choice("both", "save_steps", 0.1),
    Choice("both", "save_minutes", 10),
)


def sizes_for(folder: FolderFacts, machine: Machine, wanted: int | None = None) -> list[int]:
    """Sides of training images that suit a folder, the best first, or the side that a user wants."""
    if wanted is not None:
        return [wanted]
    side = int(np.median(folder.shorter_sides))
    if side <= SMALL:
        return [max(side // 4 * 4, 8)]
    sizes = [size for size in TRAIN_SIDES[machine.has_gpu] if size <= side * 1.5]
    return sizes or [TRAIN_SIDES[machine.has_gpu][-1]]


def standard_epochs(num_images: int) -> tuple[int, int]:
    """Epochs of teacher and student in a standard run with a number of training images."""
    return tuple(
        int(np.clip(round(seen / num_images), *bounds))
        for seen, bounds in ((TEACHER_IMAGES, TEACHER_EPOCHS), (STUDENT_IMAGES, STUDENT_EPOCHS))
    )  # type: ignore[return-value]


def fit_recipe(
    folder: FolderFacts,
    machine: Machine,
    image_size: int,
    share: float = 1.0,
    cache: str | None = None,
    epochs: tuple[int | None, int | None] = (None, None),
) -> FittedRecipe:
    """Chooses the values of a recipe for a folder.

    The method is that of the recipes `*_fast`: Muon, soft labels, balanced softmax for CLS, no mixing.

    Args:
        folder: The data set.
        machine: What the run can use.
        image_size: Side of the training images, in pixels; see [`sizes_for`].
        share: Number of epochs relative to [`standard_epochs`].
        cache: Folder for reduced copies of the images, for images that are much larger than those of training.
        epochs: Epochs of teacher and student that the user gives; None for each that is chosen.
    """
    teacher_epochs, student_epochs = (
        wanted or max(round(share * standard), FEWEST_EPOCHS)
        for wanted, standard in zip(epochs, standard_epochs(len(folder.labels)), strict=True)
    )
    choices = _data_choices(folder)
    choices += _image_choices(folder, machine, image_size, cache)
    choices += _teacher_choices(folder, machine, image_size, teacher_epochs, share)
    choices += [*_student_choices(folder, machine, image_size, student_epochs, share), *RUNNING]
    return FittedRecipe(choices, image_size, teacher_epochs, student_epochs, share, _notes(folder, share))


def with_given(fitted: FittedRecipe, given: Sequence[Choice]) -> FittedRecipe:
    """The recipe with values instead of the chosen ones; of several values for a field, the last counts."""
    last = {(choice.section, choice.name): choice for choice in given}
    size = last.get(("both", "image_size"))
    image_size = fitted.image_size if size is None else size.value
    optim = last.get(("student", "optim"))
    if optim is not None and optim.value != "muon":  # the fitted learning rate is for Muon
        rate = Choice("student", "learning_rate", adamw_rate(image_size), f"the optimiser is {optim.value}")
        last = {("student", "learning_rate"): rate} | last
    kept = [choice for choice in fitted.choices if (choice.section, choice.name) not in last]
    return replace(fitted, choices=[*kept, *last.values()], image_size=image_size)


def adamw_rate(image_size: int) -> float:
    """Peak learning rate of a student with AdamW: that of this package's recipes of the paper's method for images of
    such a size. The paper's rule is for larger batches."""
    return 1e-3 if image_size <= 64 else 5e-4


def drw_start(epochs: int) -> int | None:
    """Epoch at which deferred re-weighting starts; None for a run that is too short for it.

    The share is that of `fashion_mnist_lt_tiny`. The paper's much longer runs start at 6/7 to 11/12.
    """
    return epochs * 4 // 5 if epochs >= 5 else None


def _data_choices(folder: FolderFacts) -> list[Choice]:
    choices = [Choice("data", "dataset", "imagefolder")]
    if not folder.has_test:
        choices.append(
            Choice(
                "data",
                "test_fraction",
                TEST_FRACTION,
                "the data have no test split: a fifth of each class is set apart",
            )
        )
    if folder.transparent > 0:
        reason = f"{100 * folder.transparent:.1f} % of the images have transparent pixels, which are shown on white"
        choices.append(Choice("data", "background", "white", reason))
    if folder.unreadable:
        reason = f"{len(folder.unreadable)} images of a sample cannot be read, see above; such images are left out"
        choices.append(Choice("data", "skip_bad_images", True, reason))
    return choices


def _image_choices(folder: FolderFacts, machine: Machine, image_size: int, cache: str | None) -> list[Choice]:
    side = int(np.median(folder.shorter_sides))
    where = "a GPU" if machine.has_gpu else f"{machine.cores} CPU core{'s' * (machine.cores != 1)}"
    reason = f"the images have a median shorter side of {side} pixels; training runs on {where}"
    choices = [Choice("both", "image_size", image_size, reason)]
    crop, why = "padded", "small images are shifted, not zoomed"
    if image_size > SMALL:
        crop, why = "random_resized", "large images are cropped at random positions and scales"
    choices.append(Choice("both", "train_crop", crop, why))
    pixels = float(np.mean(np.multiply(folder.shorter_sides, folder.longer_sides, dtype=float)))
    # Images up to CACHED_SIDE are decoded once in any case, and kept in memory.
    if cache is not None and pixels > max(2 * (SIDE_OF_CROP * image_size) ** 2, CACHED_SIDE**2):
        reason = f"the images have {pixels / 1e6:.2g} megapixels on average; reduced copies are read faster"
        choices.append(Choice("both", "image_cache", cache, reason))
    # With 3,720 images, batches of 64 are better than those of 128: 2.7 points for a teacher of 20 epochs, 1.4 for a
    # student of 30, at 4 and 8 % more time (docs/beyond.md, "What was tried"). An epoch has at least 4 steps.
    batch_size = 64 if len(folder.labels) < 6000 else 128 if len(folder.labels) < 20_000 else 256
    batch_size = min(batch_size, max(len(folder.labels) // 4 // 2 * 2, 2))
    choices += [
        Choice("both", "global_batch_size", batch_size, f"{len(folder.labels):,} training images"),
        Choice("both", "per_device_train_batch_size", min(batch_size, 128)),
        Choice("both", "per_device_eval_batch_size", 128),
    ]
    workers = min(8, machine.cores - 1) if machine.has_gpu else min(2, machine.cores // 2)
    choices.append(Choice("both", "dataloader_num_workers", max(workers, 0)))
    return choices


def _epochs_reason(share: float, epochs: int) -> str:
    if share == 1:
        return "a standard number"
    if share == LONGEST:
        return f"{share:g} times the standard number; more are not expected to help, so the run ends earlier"
    if epochs == FEWEST_EPOCHS:
        return "the least number; the given time may be too short for it"
    return f"{100 * share:.0f} % of the standard number, for the given time"


def _warmup(epochs: int) -> int | float:
    return min(5, epochs // 10) if epochs >= 10 else 0


def _teacher_choices(folder: FolderFacts, machine: Machine, image_size: int, epochs: int, share: float) -> list[Choice]:
    if image_size <= SMALL:
        backbone, reason = "resnet20", "a CNN for small images"
    elif machine.has_gpu and image_size >= 160:
        backbone, reason = "timm/resnet50", "as for ImageNet-LT in the paper"
    else:
        backbone, reason = "timm/resnet18", "a CNN that a few cores can train"
    # Of fashion_mnist_lt_tiny, where it is the largest rho without a visible loss of accuracy (docs/claims.md), and of
    # image_folder, which follows the paper's ImageNet-LT.
    rho = 0.1 if image_size <= SMALL else 0.05
    return [
        Choice("teacher", "backbone", backbone, reason),
        Choice("teacher", "teacher_loss", "ce"),
        Choice("teacher", "num_train_epochs", epochs, _epochs_reason(share, epochs)),
        Choice("teacher", "drw_start_epoch", drw_start(epochs)),
        Choice("teacher", "warmup_epochs", _warmup(epochs)),
        Choice("teacher", "learning_rate", 0.1),
        Choice("teacher", "weight_decay", 5e-4),
        Choice("teacher", "sam_rho", [rho], "a flat teacher (SAM)"),
    ]


def _student_choices(folder: FolderFacts, machine: Machine, image_size: int, epochs: int, share: float) -> list[Choice]:
    patch = 16 if image_size >= 160 else max(image_size // PATCHES, 2) if image_size > SMALL else 4
    # Widths: of ViT-S, of fashion_mnist_lt_tiny (not tuned, docs/claims.md), and between.
    if machine.has_gpu:
        width, blocks, heads, reason = 384, 12, 6, "ViT-S"
    elif image_size <= SMALL or len(folder.labels) < 20_000:
        width, blocks, heads, reason = 128, 6, 4, "a small ViT, for a CPU"
    else:
        width, blocks, heads, reason = 192, 9, 3, "a small ViT, for a CPU"
    method = "this package's own recipe, see docs/beyond.md"
    return [
        Choice("student", "patch_size", patch),
        Choice("student", "hidden_size", width, reason),
        Choice("student", "num_hidden_layers", blocks),
        Choice("student", "num_attention_heads", heads),
        Choice("student", "num_train_epochs", epochs, _epochs_reason(share, epochs)),
        Choice("student", "optim", "muon", method),
        Choice("student", "distillation", "soft_sum"),
        Choice("student", "cls_loss", "logit_adjusted"),
        Choice("student", "drw_start_epoch", None),
        Choice("student", "mixup", 0),
        Choice("student", "cutmix", 0),
        Choice("student", "repeated_augmentation", 1),
        Choice("student", "learning_rate", 3e-3),
        Choice("student", "warmup_epochs", _warmup(epochs)),
    ]


def _notes(folder: FolderFacts, share: float) -> list[str]:
    notes = list(folder.notes)
    tested = int(np.asarray(folder.test_counts)[shot_groups(folder.counts)["tail"]].sum())
    if tested < 200:
        notes.append(
            f"The tail classes have {tested} test image{'s' * (tested != 1)}, so their accuracy is uncertain by up to "
            f"{100 / max(tested, 1) ** 0.5:.0f} points."
        )
    if share < SHORTEST:
        notes.append(
            f"The time allows {100 * share:.0f} % of the standard number of epochs, with which a ViT learns little "
            "from scratch; give more --minutes, or use the CNN."
        )
    return notes
