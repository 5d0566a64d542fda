"""What the C library does with memory that a training step no longer needs."""

import ctypes
import platform

# Parameters of glibc's mallopt (malloc.h), and the largest threshold that every version of it takes.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> bool:
    """Lets this process, all of it, keep the memory that it frees, for its next allocation.

    By default glibc gives memory at the end of its heap back to the system whenever a few tens of MiB of it are free,
    as they are after every backward pass, and the next step asks for it anew: the system clears page after page. Kept,
    the process stays as large as it was at its largest. Tensors of more than 32 MiB are given back as before: in the
    heap they would leave gaps that nothing fits. Children that are forked later do the same.

    Returns:
        Whether the C library has such a setting; others than glibc are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # -1 is the largest size: never trim. To set one of the two fixes the other at its small first value.
    return bool(mallopt(_TRIM_THRESHOLD, -1) and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD))
