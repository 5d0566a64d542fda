"""Long-tailed subsets, class counts and shot groups, as pure functions of labels."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

GROUPS = ("head", "mid", "tail")
IMBALANCE_TYPES = ("exp", "step")
GROUP_RULES = ("auto", "shots", "thirds")
MANY_SHOTS, FEW_SHOTS = 100, 20
# Share by which a class may be below the mean in data that count as balanced: digits classes have 116 to 122 images.
NEARLY_BALANCED = 0.05

Integers = Sequence[int] | np.ndarray  # such as labels, counts and indices
Groups = Mapping[str, Integers]  # class indices of each group, such as head, mid and tail


def long_tailed_indices(
    labels: Integers,
    num_classes: int,
    imbalance_ratio: float,
    imbalance_type: str = "exp",
    seed: int = 0,
    max_per_class: int | None = None,
) -> np.ndarray:
    """Chooses a long-tailed subset of a balanced data set. The same seed gives the same images as the authors' code.

    Class `c` of `C` keeps `n_max * imbalance_ratio ** (-c / (C - 1))` images (`exp`), or all of them in the first half
    of the classes and `n_max / imbalance_ratio` in the second (`step`), rounded down.

    Args:
        labels: Class index of each image.
        num_classes: Number of classes.
        imbalance_ratio: Images of the largest class over images of the smallest, at least 1: the paper's rho. The
            authors' flag `imb_factor` is its inverse.
        imbalance_type: `exp` or `step`.
        seed: Seed of the choice within each class.
        max_per_class: Images of the largest class; by default the mean number of images per class. A class may
            then have up to 5 % fewer images than wanted.

    Returns:
        Int64 indices into `labels`, ordered by class.

    Raises:
        ValueError: If the ratio is below 1, the type unknown, or a class would get no image or has too few.
    """
    if not imbalance_ratio >= 1:
        raise ValueError(
            f"imbalance_ratio is n_max / n_min and must be at least 1, got {imbalance_ratio}; for the inverse flag "
            "imb_factor of the original code give 1 / imb_factor."
        )
    if imbalance_type not in IMBALANCE_TYPES:
        raise ValueError(f"imbalance_type must be one of {', '.join(IMBALANCE_TYPES)}, got {imbalance_type!r}.")
    labels = np.asarray(labels, dtype=np.int64)
    # The mean may be a fraction. As in the authors' formula, only the product with the decay is rounded.
    n_max = len(labels) / num_classes if max_per_class is None else max_per_class
    classes = np.arange(num_classes)
    exponents = classes / max(num_classes - 1, 1)
    if imbalance_type == "step":
        exponents = (classes >= num_classes // 2).astype(float)
    counts = class_counts(labels, num_classes)[:num_classes]
    tolerance = NEARLY_BALANCED if max_per_class is None else 0.0
    wanted = _kept_counts(counts, n_max, imbalance_ratio, exponents, tolerance)
    # The authors' calls in their order: one generator, whose stream numpy has frozen, shuffles class after class.
    random = np.random.RandomState(seed)
    chosen = []
    for label in classes:
        candidates = np.flatnonzero(labels == label)
        random.shuffle(candidates)
        chosen.append(candidates[: wanted[label]])
    return np.concatenate(chosen)


def _kept_counts(
    counts: np.ndarray, n_max: float, imbalance_ratio: float, exponents: np.ndarray, tolerance: float
) -> list[int]:
    """Number of images that each class keeps; a class may have fewer by the share `tolerance`.

    Raises:
        ValueError: If a class would get no image or has too few.
    """
    # The authors' flag and their order of operations: another order can round to an image less.
    factor = 1.0 / imbalance_ratio
    wanted = [int(n_max * factor**exponent) for exponent in exponents]
    for label in range(len(counts)):
        if min(wanted[label], counts[label]) < 1:
            raise ValueError(
                f"class {label} would get no image (it has {counts[label]}, and imbalance_ratio {imbalance_ratio:g} "
                f"leaves {wanted[label]} of {n_max:g}); lower the imbalance ratio."
            )
    # In a second loop: for data with both problems, a lower ratio is the advice that helps.
    for label in range(len(counts)):
        if counts[label] < (1 - tolerance) * wanted[label]:
            most = int(min(counts / factor**exponents))
            raise ValueError(
                f"class {label} has {counts[label]} images, but imbalance_ratio {imbalance_ratio:g} with {n_max:g} "
                f"images in the largest class takes {wanted[label]} of it; set max_per_class to {most}, or "
                "imbalance_ratio to none if the data are long-tailed already."
            )
    return wanted


def stratified_split(labels: Integers, test_fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Splits labels into training and test indices: a share of each class, at least one image, is for testing.

    Args:
        labels: Class index of each image.
        test_fraction: Share of a class that is for testing, in (0, 1).
        seed: Seed of the choice within each class.

    Returns:
        Sorted int64 indices for training and for testing.

    Raises:
        ValueError: If the fraction is outside its range, or a class has a single image.
    """
    labels, counts = _checked(labels, test_fraction, "test_fraction")
    single = np.flatnonzero(counts == 1).tolist()
    if single:
        raise ValueError(
            f"{len(single)} classes have a single image, which cannot be both for training and for testing: labels "
            f"{', '.join(map(str, single[:5]))}; add images, or remove them."
        )
    return _set_apart(labels, counts, test_fraction, seed)


def validation_split(labels: Integers, validation_fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Splits labels into training and validation indices: a share of each class, at least one image, is for validation.

    A class with a single image keeps it for training.

    Args:
        labels: Class index of each image.
        validation_fraction: Share of a class that is for validation, in (0, 1).
        seed: Seed of the choice within each class.

    Returns:
        Sorted int64 indices for training and for validation.

    Raises:
        ValueError: If the fraction is outside its range, or every class has a single image.
    """
    labels, counts = _checked(labels, validation_fraction, "validation_fraction")
    if counts.max(initial=0) < 2:
        raise ValueError("every class has a single image, so none can be set apart; leave out validation_fraction.")
    return _set_apart(labels, counts, validation_fraction, seed)


def _checked(labels: Integers, fraction: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    if not 0 < fraction < 1:
        raise ValueError(f"{name} must be in (0, 1), got {fraction}.")
    labels = np.asarray(labels, dtype=np.int64)
    return labels, class_counts(labels)


def _set_apart(labels: np.ndarray, counts: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images that stay, and of those that are set apart: a share of each class, if one stays."""
    # Rounding alone would give rare classes no image to be measured on, or leave them none to learn from.
    most = np.maximum(counts - 1, 0)
    wanted = np.clip(np.round(fraction * counts).astype(np.int64), np.minimum(1, most), most)
    is_apart = random_ranks(labels, seed) < wanted[labels]
    return np.flatnonzero(~is_apart), np.flatnonzero(is_apart)


def random_ranks(labels: np.ndarray, seed: int) -> np.ndarray:
    """Rank of each image in a random order of its class, from 0; int64 of shape (images,)."""
    # RandomState, whose stream numpy has frozen: a seed gives the same split with every version.
    order = np.random.RandomState(seed).permutation(len(labels))
    # A stable sort by class keeps the random order within each class.
    order = order[np.argsort(labels[order], kind="stable")]
    counts = class_counts(labels)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def class_counts(labels: Integers, num_classes: int | None = None) -> np.ndarray:
    """Counts the images of each class; int64 of shape (num_classes,), by default up to the largest label."""
    return np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes or 0)


def decreasing_count_map(counts: Integers) -> np.ndarray:
    """The authors' class map: position of each class when classes are sorted by decreasing training count.

    Their ImageNet-LT and iNaturalist heads are in that order, with ties as numpy 1.24's unstable sort left them.

    Args:
        counts: Training images of each class, in label order.

    Returns:
        Int64 positions of shape (num_classes,): `class_map[label]` is the row of the authors' head.
    """
    # Newer numpy sorts integers with vector instructions, whose order of ties depends on the processor. It still sorts
    # time differences by the algorithm that numpy 1.24 used for all types (verified with 1.26, 2.1 and 2.4).
    order = np.argsort((-np.asarray(counts, dtype=np.int64)).astype("timedelta64[s]"))
    class_map = np.empty(len(order), dtype=np.int64)
    class_map[order] = np.arange(len(order))
    return class_map


class ShotGroups(dict[str, np.ndarray]):
    """Class indices of `head`, `mid` and `tail`, each sorted by decreasing count. A group may be empty.

    Args:
        groups: Class indices by group.
        rule: Description of the rule that defines the groups.
    """

    def __init__(self, groups: Mapping[str, np.ndarray], rule: str) -> None:
        super().__init__(groups)
        self.rule = rule


def shot_groups(counts: Integers, boundaries: Sequence[int] | None = None, rule: str = "auto") -> ShotGroups:
    """Groups classes into head, mid and tail by their number of training images.

    Args:
        counts: Training images of each class, in label order.
        boundaries: Ends of the head and of the mid group among the classes sorted by decreasing count (ties in label
            order), such as (3, 7) for CIFAR-10-LT. They override the rule.
        rule: `shots`: many, medium and few shot, which is more than 100 images, 20 to 100, fewer than 20 (Liu et al.,
            CVPR 2019). `thirds`: thirds of the sorted classes. `auto`: shots if no group is empty then, else thirds.

    Raises:
        ValueError: If the boundaries are not two increasing positions among the classes, or the rule is unknown.
    """
    if rule not in GROUP_RULES:
        raise ValueError(f"group_rule must be one of {', '.join(GROUP_RULES)}, got {rule!r}.")
    counts = np.asarray(counts)
    # Ties in label order: unlike that of the authors' class map, the order of groups must be the same everywhere.
    order = np.argsort(-counts, kind="stable")
    by_shots = int(np.count_nonzero(counts > MANY_SHOTS)), int(np.count_nonzero(counts >= FEW_SHOTS))
    if boundaries is not None:
        ends, words = tuple(boundaries), f"classes sorted by count, cut at {list(boundaries)}"
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= len(counts):
            raise ValueError(
                f"group boundaries must be two increasing positions among {len(counts)} classes, got {list(ends)}."
            )
    elif rule == "shots" or (rule == "auto" and 0 < by_shots[0] < by_shots[1] < len(counts)):
        ends, words = by_shots, f"more than {MANY_SHOTS} training images, {FEW_SHOTS} to {MANY_SHOTS}, fewer"
    else:
        first = max(len(counts) // 3, min(len(counts) // 2, 1))  # of two classes, one is head and one is tail
        ends, words = (first, 2 * len(counts) // 3), "thirds of the classes sorted by count"
    return ShotGroups(dict(zip(GROUPS, np.split(order, ends), strict=True)), words)


def indices_hash(indices: Integers) -> str:
    """SHA-256 of the int64 indices of a subset, for checking that two runs used the same images."""
    # Little-endian on every machine, so that hashes can be compared between machines.
    return hashlib.sha256(np.asarray(indices, dtype="<i8").tobytes()).hexdigest()
