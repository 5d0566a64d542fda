"""Figures of a command as JSON, for other programs."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..training.report import nan_to_null


@contextlib.contextmanager
def json_output(target: str | None) -> Iterator[Callable]:
    """Gives a function that writes to a file, with `-` to the terminal, and with None nowhere.

    With `-` all else that is printed goes to stderr, so that stdout is the JSON alone.

    Raises:
        FileNotFoundError: If the file's folder is missing.
    """
    if target not in (None, "-") and not Path(target).absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder for the file --json {target}; make it first.")
    stdout = sys.stdout

    def write(content) -> None:
        text = json.dumps(nan_to_null(content), indent=2) + "\n"
        if target == "-":
            stdout.write(text)
        elif target is not None:
            Path(target).write_text(text, encoding="utf-8")

    with contextlib.redirect_stdout(sys.stderr) if target == "-" else contextlib.nullcontext():
        yield write
