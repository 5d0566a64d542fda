"""What a terminal shows, and what a log is spared."""

import sys

import datasets
import huggingface_hub.utils
import transformers
from rich.console import Console


def quiet_log(quiet: bool | None = None) -> None:
    """Keeps progress bars of loading, saving and pushing out of a log; by default if there is no terminal."""
    if quiet or (quiet is None and not sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


def show(renderable) -> None:
    """Prints to the terminal, or as plain text of a fixed width into a log."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    console.print(renderable)
