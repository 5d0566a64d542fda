"""What all processes of a run must have in common: the images, and the results and errors of the main process."""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..data.loading import images_hash, subset_hash


def check_same_images(splits: Sequence) -> None:
    """Checks that all processes read the same images, in the same order.

    Each process computes its part of a batch from its own copy of the data. With different copies, images would be
    trained on too often or never, and no error would show it. Every process raises `ValueError` if those of one differ
    from those of the first.
    """
    if PartialState().num_processes == 1:
        return
    own = [(images_hash(split, contents=16) or subset_hash(split), len(split)) for split in splits]
    first, *others = gather_object([own])
    for process, found in enumerate(others, 1):
        if found != first:
            sizes = [" + ".join(str(size) for _, size in of_process) for of_process in (found, first)]
            raise ValueError(
                f"process {process} of {len(others) + 1} reads other images ({sizes[0]}) than process 0 ({sizes[1]}); "
                "give all processes the same data."
            )


def of_first_process(find: Callable[[], Any]) -> Any:
    """Calls a function in the main process, and returns its result, or raises its error, in all processes.

    Raises:
        ValueError, OSError: If the function raises one.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [find(), None]
        except (ValueError, OSError) as error:  # raised below: the other processes wait in the broadcast
            outcome = [None, error]
    found, raised = broadcast_object_list(outcome)
    if raised is not None:
        raise raised
    return found
