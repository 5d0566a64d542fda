"""Setting of the C library that keeps freed memory in the process between training steps."""

import ctypes
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arguments import LongTailTrainingArguments

# Parameters of glibc's mallopt (malloc.h), and the largest threshold that every version of glibc accepts.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory_of_command(args: "LongTailTrainingArguments") -> None:
    """Keeps freed memory in a command, whose process is its own, on a CPU and unless the arguments say otherwise."""
    if args.keep_freed_memory is not False and args.device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Makes the whole process keep freed memory for its next allocation; returns whether the C library (glibc) can.

    By default glibc returns memory at the end of its heap to the system whenever a few tens of MiB of it are free. This
    happens after every backward pass. The next step requests the memory again, and the system has to clear every page.
    With this setting the process keeps its peak size. Tensors of more than 32 MiB are still returned: in the heap they
    would fragment it. Child processes that are forked later inherit the setting.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # -1 means never trim. Both are set, because setting one alone fixes the other at its small initial value.
    return bool(mallopt(_TRIM_THRESHOLD, -1) and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD))
