"""Figures of a command as JSON, for other programs."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..io import nan_to_null


def check_file(option: str, target: str) -> Path:
    """The path of a file that an option names, if it can be written.

    Raises:
        FileNotFoundError: If the file's folder is missing.
        IsADirectoryError: If it is a folder itself.
    """
    path = Path(target).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{option} {target} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder for the file {option} {target}; make it first.")
    return path


@contextlib.contextmanager
def json_output(target: str | None) -> Iterator[Callable]:
    """Gives a function that writes to a file, with `-` to the terminal, and with None nowhere.

    With `-` all else that is printed goes to stderr, so that stdout is the JSON alone.

    Raises:
        FileNotFoundError, IsADirectoryError: As [`check_file`].
    """
    file = None if target in (None, "-") else check_file("--json", target)
    stdout = sys.stdout

    def write(content) -> None:
        text = json.dumps(nan_to_null(content), indent=2) + "\n"
        if target == "-":
            stdout.write(text)
        elif file is not None:
            file.write_text(text, encoding="utf-8")

    with contextlib.redirect_stdout(sys.stderr) if target == "-" else contextlib.nullcontext():
        yield write
