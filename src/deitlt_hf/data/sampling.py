"""Repeated augmentation."""

from collections.abc import Iterator, Sized

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler


class RepeatedAugmentationSampler(Sampler[int]):
    """Every image appears `num_repeats` times in a row, spread over the processes (Hoffer et al., 2020; DeiT).

    An epoch has as many draws as the data set has images, rounded down to a multiple of 256, so it sees about one in
    `num_repeats` of them. Each process draws in timm's order, which is the authors'. This one sampler yields the draws
    of all processes, in the blocks that Accelerate hands out one process after the other.

    Args:
        dataset: What to draw from.
        batch_size: Images a process takes in one forward pass.
        num_processes: Number of processes.
        num_repeats: Copies of each image.
        seed: 0 gives the authors' order.

    Raises:
        ValueError: If the data set has fewer images than one round of 256.
    """

    ROUND = 256

    def __init__(self, dataset: Sized, batch_size: int, num_processes: int = 1, num_repeats: int = 3, seed: int = 0):
        self.check_size(len(dataset))
        self.batch_size = batch_size
        self.seed = seed
        self.ranks = [
            RepeatAugSampler(dataset, num_processes, rank, num_repeats=num_repeats, selected_round=self.ROUND)
            for rank in range(num_processes)
        ]
        self.set_epoch(0)

    @classmethod
    def check_size(cls, num_images: int) -> None:
        """Raises `ValueError` if there are fewer images than one round."""
        if num_images < cls.ROUND:
            raise ValueError(
                f"repeated augmentation draws rounds of {cls.ROUND} images, but the training set has only "
                f"{num_images}; pass --repeated_augmentation 1."
            )

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that of `epoch`."""
        for rank in self.ranks:
            # timm seeds with the epoch alone; seeds are kept apart for runs of up to 100,000 epochs.
            rank.set_epoch(epoch + 100_000 * self.seed)

    def __len__(self) -> int:
        return sum(len(rank) for rank in self.ranks)

    def __iter__(self) -> Iterator[int]:
        draws = [list(rank) for rank in self.ranks]
        for start in range(0, len(draws[0]), self.batch_size):
            for rank in draws:
                yield from rank[start : start + self.batch_size]
