"""Errors of a full memory: one sentence for a command's user, with advice from the place where it was raised."""

import contextlib
import re
from collections.abc import Callable, Iterator

# In the messages of torch's allocators: of GPUs, whatever their maker, and of the CPU.
_FULL = ("out of memory", "DefaultCPUAllocator: can't allocate memory")
# Facts in the messages of torch's allocators, the second only in that of CUDA.
_WANTED = re.compile(r"tried to allocate \d+(?:\.\d+)? \w+", re.IGNORECASE)
_DEVICE = re.compile(r"GPU \d+ has a total capacity of .*? is free")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of the machine is full."""
    is_of_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)
    return is_of_torch or isinstance(error, MemoryError)


@contextlib.contextmanager
def advice_if_out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Adds a note to an error of a full memory: what to change. The first note, of the innermost place, stays alone."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error) and not getattr(error, "__notes__", None):
            error.add_note(advice())
        raise


def out_of_memory_sentence(error: BaseException) -> str:
    """One sentence for a command's user: which memory is full, and the note of [`advice_if_out_of_memory`]."""
    said = str(error)
    facts = ", ".join(match[0] for pattern in (_WANTED, _DEVICE) if (match := pattern.search(said)))
    memory = "this machine" if isinstance(error, MemoryError) or "DefaultCPUAllocator" in said else "the GPU"
    advice = getattr(error, "__notes__", None) or ["use smaller batches, or a machine with more memory"]
    return f"the memory of {memory} is full{f' ({facts})' if facts else ''}; {advice[0]}."
