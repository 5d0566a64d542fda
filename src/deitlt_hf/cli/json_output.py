"""Implements the option `--json`: writes the figures of a command as JSON, for other programs."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..io import nan_to_null


def check_file(option: str, target: str) -> Path:
    """Returns the path of an option's output file, and checks that it can be written.

    Raises:
        FileNotFoundError: If the folder of the file does not exist.
        IsADirectoryError: If the path is a folder.
    """
    path = Path(target).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{option} {target} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder for the file {option} {target}; create it first.")
    return path


@contextlib.contextmanager
def json_output(target: str | None) -> Iterator[Callable]:
    """Yields a function that writes content as JSON to a file; `-` is stdout, None writes nothing.

    With `-`, all other output is redirected to stderr: stdout has only the JSON.

    Raises:
        FileNotFoundError, IsADirectoryError: See [`check_file`].
    """
    file = None if target in (None, "-") else check_file("--json", target)
    stdout = sys.stdout

    def write(content: Any) -> None:
        text = json.dumps(nan_to_null(content), indent=2) + "\n"
        if target == "-":
            stdout.write(text)
        elif file is not None:
            file.write_text(text, encoding="utf-8")

    with contextlib.redirect_stdout(sys.stderr) if target == "-" else contextlib.nullcontext():
        yield write
