"""Class weights: those of deferred re-weighting, and those that a user gives."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence

import torch

from ..io import one_line

# `NAME=WEIGHT`, with commas between several. A name may hold commas and equals signs, a weight none.
_NAMED = re.compile(r"\s*(.+?)\s*=\s*([^=,]+?)\s*(?:,|$)")


def positive_counts(class_counts: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Training images of each class as float64, (classes,). Raises `ValueError` if a class has no image."""
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
    # In float64: 1 - beta ** n cancels. With beta 0.9999 and n 1, float32 would keep three digits.
    weights = (1.0 - beta) / (1.0 - beta**counts)
    return (weights / weights.mean()).float()


def read_class_weights(given: Mapping | str | None) -> dict[str, float] | None:
    """Reads class weights of a user, from a mapping or from a text such as `melanoma=5,nevus=1`; None without any.

    The text `none` overrides the weights of a recipe.

    Raises:
        ValueError: If the text has another form, or a weight is not a finite number above 0.
    """
    if isinstance(given, str) and given.lower() == "none":
        return None
    if isinstance(given, str):
        found = list(_NAMED.finditer(given))
        if not found or "".join(match[0] for match in found) != given:
            raise ValueError(f"class_weights must be NAME=WEIGHT,NAME=WEIGHT, got {one_line(given, 100)!r}.")
        names = [match[1] for match in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"class_weights has {one_line(twice, 60)!r} twice; give each class one weight.")
        given = {match[1]: match[2] for match in found}
    weights = {}
    for name, value in (given or {}).items():
        try:
            weights[str(name)] = float(value)
        except (TypeError, ValueError):
            weights[str(name)] = math.nan
        if not 0 < weights[str(name)] < math.inf:
            raise ValueError(
                f"class_weights of {one_line(name, 60)!r} must be a number above 0, got {one_line(value, 60)}."
            )
    return weights or None


def named_weights(given: Mapping | str | None, class_names: Sequence[str]) -> torch.Tensor | None:
    """Weights of all classes from those that a user names, see [`read_class_weights`]; the others weigh 1.

    Returns:
        Float32 weights of shape (classes,), scaled to mean 1 like [`effective_number_weights`]; None for none.

    Raises:
        ValueError: If no class has one of the names; the message has the most similar one. Or if a weight is not a
            finite number above 0.
    """
    weights = read_class_weights(given)
    if weights is None:
        return None
    for name in weights:
        if name not in class_names:
            nearest = difflib.get_close_matches(name, class_names, n=1, cutoff=0.0)
            raise ValueError(
                f"class_weights names the class {one_line(name, 60)!r}, which the data do not have; the most similar "
                f"one is {one_line(nearest[0], 60)!r}."
            )
    values = torch.tensor([weights.get(name, 1.0) for name in class_names], dtype=torch.float64)
    scaled = (values / values.mean()).float()
    if not (scaled > 0).all():  # also of infinity
        raise ValueError("class_weights differ by too much for single precision; choose weights closer to 1.")
    return scaled


def product_of_weights(first: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """Product of class weights, (classes,), scaled to mean 1; the first alone if there is no second."""
    if second is None:
        return first
    product = first.double() * second.double()
    return (product / product.mean()).float()
