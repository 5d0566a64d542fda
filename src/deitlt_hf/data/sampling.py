"""Which images a process sees, in which order, and the random numbers that change them.

All of it follows from seed, epoch and the position in the epoch. So a run that is interrupted goes on as if it had not
been, with any number of workers, and an optimiser step has the same images, augmented in the same way, however many
processes and accumulation slices share them. Not so what is done to a whole slice on the device: random erasing and
mixing, which follow from the step, the slice and the process.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler

ROUND = 256  # of repeated augmentation, in images


def seed_streams(*key: int, device: torch.device | None = None) -> None:
    """Seeds the random streams of Python, numpy and torch.

    Args:
        *key: One number, or several that are hashed; none negative.
        device: Seed this device's own stream too.
    """
    seed = key[0] if len(key) == 1 else int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if device is None or device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # a hundredth of the time of the other, which reaches all devices
    else:
        torch.manual_seed(seed)


def shuffled_order(num_images: int, epoch: int, seed: int = 0) -> np.ndarray:
    """A permutation of the images; int64 of shape (num_images,)."""
    return np.random.default_rng([seed, epoch]).permutation(num_images)


def repeated_augmentation_order(num_images: int, num_repeats: int, epoch: int, seed: int = 0) -> np.ndarray:
    """A permutation in which every image appears several times in a row (Hoffer et al., 2020; DeiT): timm's.

    An epoch has as many draws as the data set has images, rounded down to a multiple of 256, so it sees about one in
    `num_repeats` of them.

    Args:
        num_images: Images of the data set.
        num_repeats: Copies of each image.
        epoch: Counted from 0.
        seed: 0 gives the authors' order.

    Returns:
        Image indices; int64 of shape (draws,).

    Raises:
        ValueError: If the data set has fewer images than one round of 256.
    """
    check_repeats(num_images)
    sampler = RepeatAugSampler(range(num_images), 1, 0, num_repeats=num_repeats, selected_round=ROUND)
    # timm seeds with the epoch alone; seeds are kept apart for runs of up to 100,000 epochs.
    sampler.set_epoch(epoch + 100_000 * seed)
    return np.fromiter(sampler, np.int64)


def check_repeats(num_images: int) -> None:
    """Raises `ValueError` if there are fewer images than one round of repeated augmentation."""
    if num_images < ROUND:
        raise ValueError(
            f"repeated augmentation draws rounds of {ROUND} images, but the training set has only {num_images}; pass "
            "--repeated_augmentation 1."
        )


def whole_steps(num_images: int, batch_size: int, num_processes: int = 1, slices: int = 1) -> int:
    """Batches of a process in an epoch: whole ones, and of whole optimiser steps if there are images for one.

    A step of what is left would be of another size with each arrangement of processes and slices.
    """
    batches = num_images // (batch_size * num_processes)
    return batches - batches % slices if batches >= slices else batches


def batches_of_epoch(num_images: int, batch_size: int, num_processes: int, slices: int, partial: bool) -> list[int]:
    """Images in each batch of a process: of [`whole_steps`], or with `partial` of all that a process has.

    An incomplete batch has an even number of images, since mixing pairs them.
    """
    if not partial:
        return [batch_size] * whole_steps(num_images, batch_size, num_processes, slices)
    whole, rest = divmod(num_images // num_processes, batch_size)
    rest -= rest % 2
    return [batch_size] * whole + [rest] * (rest > 0)


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one process: images, each with the seed of its augmentation.

    Images are dealt out to the processes one by one, as timm and the authors do, so that copies of one are spread.

    Args:
        num_images: Images of the data set.
        batch_size: Images a process takes in one forward pass.
        rank: Index of this process.
        num_processes: Number of processes.
        slices: Batches of an optimiser step.
        num_repeats: Copies of each image; see [`repeated_augmentation_order`].
        seed: Of order and augmentation, which differ by epoch.
        partial: Take what is left after whole optimiser steps too; see [`batches_of_epoch`].

    Raises:
        ValueError: If images are to be repeated and there are fewer than one round of 256.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
        slices: int = 1,
        num_repeats: int = 1,
        seed: int = 0,
        partial: bool = False,
    ):
        self.num_images, self.rank, self.num_processes = num_images, rank, num_processes
        self.num_repeats, self.seed, self.epoch = num_repeats, seed, 0
        if num_repeats > 1:
            check_repeats(num_images)
            num_images = num_images // ROUND * ROUND
        self.sizes = batches_of_epoch(num_images, batch_size, num_processes, slices, partial)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.num_repeats > 1:
            order = repeated_augmentation_order(self.num_images, self.num_repeats, self.epoch, self.seed)
        else:
            order = shuffled_order(self.num_images, self.epoch, self.seed)
        seeds = image_seeds(len(order), self.seed, self.epoch)
        mine = slice(self.rank, sum(self.sizes) * self.num_processes, self.num_processes)
        draws = zip(order[mine].tolist(), seeds[mine].tolist(), strict=True)
        for size in self.sizes:
            yield list(itertools.islice(draws, size))


def image_seeds(number: int, *key: int) -> np.ndarray:
    """Seeds of the augmentation of images, by their position; int64 of shape (number,)."""
    # Another stream than that of the order, which has the same key.
    return np.random.default_rng([*key, 1]).integers(2**63, size=number)


class Rows(Protocol):
    """Rows that can be counted and looked up."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class SeededImages(Dataset):
    """A data set whose images are drawn with a seed: what [`TrainBatches`] asks for.

    Args:
        dataset: Any with an index; its transforms draw from the global streams of Python, numpy or torch.
    """

    def __init__(self, dataset: Rows):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        index, seed = draw
        seed_streams(seed)
        return self.dataset[index]
