"""Learning rates as functions of the (fractional) epoch."""

import bisect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import LongTailTrainingArguments
    from .teacher_arguments import FlatTeacherTrainingArguments

LEAST_PEAK = 1e-4  # smallest peak learning rate for a student that trains from scratch


def warmup_cosine(epoch: float, epochs: float, args: "LongTailTrainingArguments") -> float:
    """Learning rate at `epoch` in the authors' schedule: linear warm-up, then a cosine that is counted from epoch 0."""
    if epoch < args.warmup_epochs:
        return _warmup(epoch, args)
    peak, minimum = args.peak_learning_rate, args.min_learning_rate
    # As in timm without `warmup_prefix`: after the warm-up, the cosine is already below the peak.
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * min(epoch / epochs, 1.0))) / 2


def warmup_drops(epoch: float, args: "FlatTeacherTrainingArguments") -> float:
    """Learning rate at `epoch`: linear warm-up, then the peak times the factor of the most recent drop."""
    if epoch < args.warmup_epochs:
        return _warmup(epoch, args)
    passed = bisect.bisect_right(args.lr_drop_epochs, epoch)
    return args.peak_learning_rate * args.lr_drops[passed - 1] if passed else args.peak_learning_rate


def _warmup(epoch: float, args: "LongTailTrainingArguments") -> float:
    start = args.warmup_learning_rate
    return start + (args.peak_learning_rate - start) * epoch / args.warmup_epochs


def published_epoch(step: int, batches: int, micro_batches: int) -> float:
    """Epoch that the authors' scheduler uses at an optimiser step (DeiT-LT, `engine.py` and `main.py`).

    Their code updates the scheduler at the first micro-batch of a step, and again at the last micro-batch of an epoch.
    Without gradient accumulation it updates the scheduler after each epoch, with the number of that epoch. The step
    counts from 0 over all epochs; an epoch has `batches` micro-batches in one process, and a step `micro_batches`.
    """
    epoch, step = divmod(step, math.ceil(batches / micro_batches))
    if micro_batches == 1:
        return max(epoch - 1, 0)  # set after epoch e to the value of e, which epoch e + 1 trains with
    first = step * micro_batches
    return epoch + (first if first + micro_batches < batches else batches - 1) / batches


def value_in_phase(values: Sequence, starts: Sequence[float], epoch: float) -> Any:
    """The value of the phase of training that an epoch belongs to; the phases start at the epochs `starts`."""
    return values[bisect.bisect_right(starts, epoch) - 1]  # right: a phase begins at its epoch


def low_peak(learning_rate: float, init_from: str | None) -> str | None:
    """Warning text if the peak learning rate is too small for a student to learn from scratch; None otherwise.

    The limit is below the lowest peak of the paper's recipes (2.5e-4). It is above the rate that the paper's rule gives
    for a batch of 16 images (1.6e-5). At that rate, a student trained on 1,972 images stayed at chance.
    """
    if init_from is not None or learning_rate >= LEAST_PEAK:
        return None
    return (
        f"the peak learning rate {learning_rate:.3g} is too small for a student that starts from scratch (below "
        f"{LEAST_PEAK:g}): the paper's rule scales it by images / 512. Set learning_rate (for example 1e-3 for small "
        "images), or start from a trained model with init_from."
    )
