"""Where files are written, and that they are whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def check_can_be_folder(folder: str | Path) -> None:
    """Refuses a folder to write to that cannot be made.

    Raises:
        FileExistsError: If it is a file, or below one.
    """
    for path in (Path(folder), *Path(folder).parents):
        if path.is_file():
            raise FileExistsError(f"{path} is a file; choose another folder to write to than {folder}.")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name to write to; the file gets its own name if all goes well, and is removed otherwise.

    What had that name stays what it is elsewhere: the files of a snapshot in the Hub's cache are links to others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
