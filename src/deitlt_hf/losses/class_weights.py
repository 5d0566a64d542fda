"""Class weights for deferred re-weighting."""

from collections.abc import Sequence

import torch


def positive_counts(class_counts: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Checks the training images of each class and returns them as float64, (classes,).

    Raises:
        ValueError: If a class has no image.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.numel() == 0 or counts.min() < 1:
        empty = torch.nonzero(counts < 1).flatten().tolist()
        raise ValueError(f"every class needs at least one training image; classes without one: {empty}.")
    return counts


def effective_number_weights(class_counts: Sequence[int] | torch.Tensor, beta: float = 0.9999) -> torch.Tensor:
    """Class weights: the inverse of the effective number of images (Cui et al., CVPR 2019, equation 2).

    `w_c = (1 - beta) / (1 - beta ** n_c)`, scaled to mean 1.

    Args:
        class_counts: Training images of each class, at least 1.
        beta: In [0, 1): 0 weights all classes equally, values near 1 approach inverse frequency. 0.9999 as in DeiT-LT.

    Returns:
        Float32 weights of shape (classes,), with mean 1.

    Raises:
        ValueError: If a class has no image or beta is outside [0, 1).
    """
    counts = positive_counts(class_counts)
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must be in [0, 1), got {beta}.")
    weights = (1.0 - beta) / (1.0 - beta**counts)
    return (weights / weights.mean()).float()
