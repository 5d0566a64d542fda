"""Output to a terminal or a log file: tables and progress bars."""

import sys

import datasets
import huggingface_hub.utils
import transformers
from rich.console import Console, RenderableType


def quiet_log(quiet: bool | None = None) -> None:
    """Disables the progress bars of loading, saving and pushing; by default only if stderr is not a terminal."""
    if quiet or (quiet is None and not sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


def show(renderable: RenderableType) -> None:
    """Prints a rich renderable to the terminal, or as plain text of a fixed width if the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    console.print(renderable)


def duration(seconds: float) -> str:
    """A time in words, such as `25 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
