"""One sentence for any error of a command, and its exit status. No heavy library is imported here."""

import contextlib
import gc
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..out_of_memory import is_out_of_memory, out_of_memory_sentence


@contextlib.contextmanager
def command_line_errors() -> Iterator[None]:
    """Context manager of commands: prints an error that the user can correct as one sentence, and exits with status 1.

    On success it leaves the process group. Set the environment variable DEITLT_TRACEBACK=1 to get the traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):  # the terminal's encoding may lack characters of file and class names
        sys.stdout.reconfigure(errors="backslashreplace")
    formatwarning = warnings.formatwarning
    warnings.formatwarning = _format_warning
    # Pillow's warnings (corrupt EXIF, TIFF tags) do not concern pixels, and would repeat per image and worker.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
        _leave_group()
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        sentence = _sentence(error)
        if sentence is None or os.environ.get("DEITLT_TRACEBACK"):
            raise
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(5)  # if all processes fail, rank 0 reports the error and the launcher ends the others
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:  # with arguments, the run has already printed how it ended
            print("interrupted.", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    finally:
        warnings.formatwarning = formatwarning


def _sentence(error: Exception) -> str | None:
    """The sentence about an error for a user; None if the user cannot correct it."""
    said = str(error)
    if is_out_of_memory(error):
        return out_of_memory_sentence(error)
    if isinstance(error, RuntimeError) and "invalid device ordinal" in said:
        return (
            f"{os.environ.get('LOCAL_WORLD_SIZE', 'several')} processes were started on a machine with "
            f"{sys.modules['torch'].cuda.device_count()} GPU(s), and each needs one; start fewer (--num_processes)."
        )
    if isinstance(error, RuntimeError | MemoryError):
        return None
    if "Original Traceback" in said:  # from a data loader worker: the last line is the error
        return said.strip().splitlines()[-1].partition(": ")[2]
    return said


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Formats a warning on one line. Warnings of this package omit the code location, which does not help users."""
    place = "" if Path(filename).is_relative_to(Path(__file__).parents[1]) else f"{filename}:{lineno}: "
    return f"{place}warning: {message}\n"


def _leave_group() -> None:
    """Destroys the process group, if one was initialised.

    Without this, NCCL prints a warning, and a Gloo thread that holds a tensor when Python exits aborts the process.
    Gloo threads end when nothing refers to the group any more, such as a model that was wrapped for it. Such objects
    are collected here.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()
