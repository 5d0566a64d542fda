"""Learning rates as functions of the (fractional) epoch."""

import bisect
import math
from collections.abc import Sequence

LEAST_PEAK = 1e-4  # of a student that starts from scratch


def warmup_cosine(
    epoch: float,
    *,
    epochs: float,
    peak: float,
    minimum: float = 1e-5,
    warmup_epochs: float = 5,
    warmup_start: float = 1e-6,
) -> float:
    """Linear warm-up, then the cosine that started at epoch 0: the authors' schedule, learning rate at `epoch`."""
    if epoch < warmup_epochs:
        return warmup_start + (peak - warmup_start) * epoch / warmup_epochs
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * min(epoch / epochs, 1.0))) / 2


def published_epoch(step: int, batches: int, slices: int) -> float:
    """The epoch that the authors' scheduler is at in an optimiser step (DeiT-LT, `engine.py` and `main.py`).

    They move it with the first slice of a step, and with the last batch of an epoch once more. Without accumulation it
    moves after an epoch, to the number of that epoch.

    Args:
        step: Counted from 0, over all epochs.
        batches: Of a process in an epoch.
        slices: Of a whole step.
    """
    epoch, step = divmod(step, math.ceil(batches / slices))
    if slices == 1:
        return max(epoch - 1, 0)
    first = step * slices
    return epoch + (first if first + slices < batches else batches - 1) / batches


def warmup_drops(
    epoch: float,
    *,
    peak: float,
    drop_epochs: Sequence[float],
    factors: Sequence[float],
    warmup_epochs: float = 5,
    warmup_start: float = 0.0,
) -> float:
    """Linear warm-up, then the peak times the factor of the last drop that has passed."""
    if epoch < warmup_epochs:
        return warmup_start + (peak - warmup_start) * epoch / warmup_epochs
    passed = bisect.bisect_right(drop_epochs, epoch)
    return peak * factors[passed - 1] if passed else peak


def low_peak(learning_rate: float, init_from: str | None) -> str | None:
    """Says that a student's peak learning rate is too small to learn anything from scratch; None if it is not.

    The limit is below the lowest of the paper's recipes (2.5e-4), and above what the paper's rule makes of a batch of
    16 images (1.6e-5), with which a student of 1,972 images stayed at chance.
    """
    if init_from is not None or learning_rate >= LEAST_PEAK:
        return None
    return (
        f"the peak learning rate {learning_rate:.3g} is too small for a student that starts from scratch (below "
        f"{LEAST_PEAK:g}): the paper's rule divides by 512 images. Set learning_rate, to 1e-3 for small images, or "
        "start from a trained model with init_from."
    )
