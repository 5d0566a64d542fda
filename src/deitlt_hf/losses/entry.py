"""Entries of the registry of losses: what training, models and recipes need to know of a loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from ..options import Limit

Counts = Sequence[int] | torch.Tensor | None


class LossOptions:
    """Base of a dataclass with a loss's own training arguments, whose names begin with the name of the loss.

    Attributes:
        limits: Limits of the options that have any.
    """

    limits: ClassVar[Mapping[str, Limit]] = {}


@dataclass(frozen=True)
class TeacherLoss:
    """A loss of the teacher.

    Attributes:
        build: Makes the loss from the training arguments, the training images of each class, and the class weights
            (classes,) of deferred re-weighting or None. The loss maps float32 logits (batch, classes) and labels
            (batch,) to the sum over images of the loss times the weight of the image's class. With `contrast` it is
            called as [`PaCoLoss`].
        about: A few words for the help, next to the name.
        options: Dataclass of the loss's own training arguments.
        classifier: Classifier that the model needs: `linear` or `cosine`.
        logit_scale: Training argument with the factor between the cosines of a cosine classifier and its logits.
        contrast: Whether the loss compares projected features with keys of a momentum encoder: the model needs a
            projection, and each image has two views. `paco_queue` and `paco_momentum` set up the encoder.
        smooths_labels: Whether the loss uses `label_smoothing_factor`.
        drops_last: Whether the authors' training leaves out the images that do not fill the last batch of an epoch.
    """

    build: Callable[[Any, Counts, torch.Tensor | None], torch.nn.Module]
    about: str = ""
    options: type[LossOptions] | None = None
    classifier: str = "linear"
    logit_scale: str | None = None
    contrast: bool = False
    smooths_labels: bool = False
    drops_last: bool = False


@dataclass(frozen=True)
class ClsLoss:
    """A loss of the student's CLS head.

    Attributes:
        build: Makes the loss from the training images of each class and class weights (classes,), or None. The loss
            maps float32 logits (batch, classes) and labels, (batch,) or probabilities (batch, classes), to the sum
            over images of the loss times the weight of the image's class.
        about: A few words for the help, next to the name.
        needs_counts: Whether the training images of each class must be known.
    """

    build: Callable[[Counts, torch.Tensor | None], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
    about: str = ""
    needs_counts: bool = False


@dataclass(frozen=True)
class DistillationTarget:
    """What the student's DIST head learns from, and its loss.

    Attributes:
        targets: Targets from the labels, (batch,) or (batch, classes), and the teacher's logits (batch, classes).
        loss: Maps float32 logits (batch, classes), the targets, class weights (classes,) or None, and the temperature
            to the sum over images.
        about: A few words for the help, next to the name.
        needs_teacher: Whether the targets depend on the teacher. Without it, `targets` gets None for the logits.
        weighted_mean: Whether the weights of the targets' classes weight the images, so that the mean over images
            divides by their sum. The targets are then class indices or probabilities.
    """

    targets: Callable[[torch.Tensor, Any], torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
    about: str = ""
    needs_teacher: bool = True
    weighted_mean: bool = False


Entry = TypeVar("Entry", TeacherLoss, ClsLoss, DistillationTarget)


def find(losses: Mapping[str, Entry], name: str, field: str) -> Entry:
    """The entry of a loss in a registry. Raises `ValueError`, with the name of the `field`, if there is none."""
    if name not in losses:
        raise ValueError(f"{field} must be one of {', '.join(losses)}, got {name!r}.")
    return losses[name]


def listed(losses: Mapping[str, Entry]) -> str:
    """The names of losses with a few words about each, for a help text."""
    return ", ".join(f"{name} ({entry.about})" if entry.about else name for name, entry in losses.items())
