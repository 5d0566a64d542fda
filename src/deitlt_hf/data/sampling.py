"""Sampling of training images: which images a process sees, in which order, and with which augmentation seeds.

Order and seeds depend only on the seed, the epoch and the position in the epoch. An interrupted run therefore resumes
as if it had not stopped, with any number of workers. An optimiser step has the same images with the same augmentation
for every number of processes and accumulation steps. This does not hold for operations on a whole micro-batch on the
device: random erasing and mixing depend on the step, the micro-batch and the process.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler

from .long_tail import Integers

ROUND = 256  # images per round of repeated augmentation
SAMPLINGS = ("uniform", "class_balanced")


def seed_streams(*key: int, device: torch.device | None = None) -> None:
    """Seeds the random streams of Python, numpy and torch.

    Args:
        *key: One number, or several numbers that are hashed together; none may be negative.
        device: Device whose random stream is seeded, too.
    """
    # Hashed, because sums would give neighbouring seeds and steps the same stream. A single key is random already.
    seed = key[0] if len(key) == 1 else int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # numpy takes 32 bits
    if device is None or device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # 100 times faster than `torch.manual_seed`, which seeds all devices
    else:
        torch.manual_seed(seed)  # the CPU, too, where dropped paths are drawn


def class_balanced_order(labels: Integers, epoch: int, seed: int = 0) -> np.ndarray:
    """A random order in which all classes appear equally often (Kang et al., ICLR 2020); int64 of shape (images,).

    An epoch has as many draws as there are images. The draws of a class go through its images in turn: images of a rare
    class are drawn several times, each with another augmentation, and some images of a frequent class are left out. The
    remainder that not every class can have, and the images, change with the epoch, which is counted from 0.
    """
    # A generator of each epoch's own: a resumed run draws its order without the orders before.
    random = np.random.default_rng([seed, epoch])
    by_class = [random.permutation(np.flatnonzero(np.asarray(labels) == label)) for label in np.unique(labels)]
    share, more = divmod(len(labels), len(by_class))
    # Other classes get the remainder in each epoch, so that none is drawn more often over a run.
    draws = share + (random.permutation(len(by_class)) < more)
    # `np.resize` repeats a short array from its start: the images of a rare class come in turn.
    return random.permutation(np.concatenate([np.resize(images, n) for images, n in zip(by_class, draws, strict=True)]))


def repeated_augmentation_order(num_images: int, num_repeats: int, epoch: int, seed: int = 0) -> np.ndarray:
    """timm's order of repeated augmentation: every image appears several times in a row (Hoffer et al., 2020; DeiT).

    An epoch has as many draws as the data set has images, rounded down to a multiple of 256. It therefore contains
    about one in `num_repeats` images.

    Args:
        num_images: Number of images in the data set.
        num_repeats: Copies of each image.
        epoch: Counted from 0.
        seed: 0 gives the authors' order.

    Returns:
        Image indices; int64 of shape (draws,).

    Raises:
        ValueError: If the data set has fewer images than one round of 256.
    """
    check_repeats(num_images)
    # The order of a single process: timm rounds the share of each of several down, so an epoch would depend on them.
    sampler = RepeatAugSampler(range(num_images), 1, 0, num_repeats=num_repeats, selected_round=ROUND)
    # timm seeds with the epoch alone; the offset keeps seeds distinct for runs of up to 100,000 epochs.
    sampler.set_epoch(epoch + 100_000 * seed)
    return np.fromiter(sampler, np.int64)


def check_repeats(num_images: int) -> None:
    """Raises `ValueError` if there are fewer images than one round of repeated augmentation."""
    if num_images < ROUND:
        raise ValueError(
            f"repeated augmentation draws rounds of {ROUND} images, but the training set has only {num_images}; pass "
            "--repeated_augmentation 1."
        )


def images_of_epoch(num_images: int, num_repeats: int) -> int:
    """Number of images that an epoch draws: with repeated augmentation rounded down to whole rounds.

    Raises:
        ValueError: If images are repeated and there are fewer than one round.
    """
    if num_repeats > 1:
        check_repeats(num_images)
        num_images -= num_images % ROUND
    return num_images


def whole_steps(num_images: int, batch_size: int, num_processes: int = 1, micro_batches: int = 1) -> int:
    """Number of full batches of a process in an epoch, rounded down to whole optimiser steps if one step fits.

    `micro_batches` is the number of micro-batches per optimiser step. The size of a step with the remaining images
    would depend on the number of processes and micro-batches.
    """
    batches = num_images // (batch_size * num_processes)
    # Data with less than one step still train, in one smaller step per epoch, instead of not at all.
    return batches - batches % micro_batches if batches >= micro_batches else batches


def batches_of_epoch(
    num_images: int, batch_size: int, num_processes: int, micro_batches: int, partial: bool
) -> list[int]:
    """Number of images in each batch of a process: full batches of [`whole_steps`]; with `partial`, also the remainder.

    The incomplete batch has an even number of images, since mixing pairs images.
    """
    if not partial:
        return [batch_size] * whole_steps(num_images, batch_size, num_processes, micro_batches)
    whole, rest = divmod(num_images // num_processes, batch_size)
    rest -= rest % 2
    return [batch_size] * whole + [rest] * (rest > 0)


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler of one process: batches of image indices, each index with the seed of its augmentation.

    Images are distributed to the processes in turn, as timm and the authors do. This spreads the copies of an image.

    Args:
        num_images: Number of images in the data set.
        batch_size: Images of a process in one forward pass.
        rank: Index of this process.
        num_processes: Number of processes.
        micro_batches: Micro-batches per optimiser step.
        num_repeats: Copies of each image; see [`repeated_augmentation_order`].
        seed: Seed of order and augmentation, which differ by epoch.
        partial: See [`batches_of_epoch`].
        balanced_labels: Class of each image, for [`class_balanced_order`]; None for the plain order.

    Raises:
        ValueError: If images are repeated and the data set has fewer than one round of 256, or classes are balanced.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
        micro_batches: int = 1,
        num_repeats: int = 1,
        seed: int = 0,
        partial: bool = False,
        balanced_labels: Integers | None = None,
    ) -> None:
        if balanced_labels is not None and num_repeats > 1:
            raise ValueError("sampling class_balanced needs --repeated_augmentation 1.")
        self.balanced_labels = balanced_labels
        self.num_images, self.rank, self.num_processes = num_images, rank, num_processes
        self.num_repeats, self.seed, self.epoch = num_repeats, seed, 0
        drawn = images_of_epoch(num_images, num_repeats)
        self.sizes = batches_of_epoch(drawn, batch_size, num_processes, micro_batches, partial)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.num_repeats > 1:
            order = repeated_augmentation_order(self.num_images, self.num_repeats, self.epoch, self.seed)
        elif self.balanced_labels is not None:
            order = class_balanced_order(self.balanced_labels, self.epoch, self.seed)
        else:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        # Seeds belong to positions in the epoch. The seeds of a data loader's workers would depend on their number, and
        # the copies of repeated augmentation would get the same augmentation from a seed of the image.
        seeds = image_seeds(len(order), self.seed, self.epoch)
        mine = slice(self.rank, sum(self.sizes) * self.num_processes, self.num_processes)
        draws = zip(order[mine].tolist(), seeds[mine].tolist(), strict=True)
        for size in self.sizes:
            yield list(itertools.islice(draws, size))


def image_seeds(number: int, *key: int) -> np.ndarray:
    """Augmentation seeds by position in the epoch; int64 of shape (number,)."""
    # The extra 1 makes the stream independent of that of the order, which has the same key.
    return np.random.default_rng([*key, 1]).integers(2**63, size=number)


class Rows(Protocol):
    """Protocol of a data set with a length and an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class SeededImages(Dataset):
    """Wraps a data set for [`TrainBatches`]: an item is an image, augmented with the seed that comes with its index.

    Args:
        dataset: Data set with an index. Its transforms draw from the global random streams of Python, numpy or torch.
    """

    def __init__(self, dataset: Rows) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        index, seed = draw
        seed_streams(seed)
        return self.dataset[index]
