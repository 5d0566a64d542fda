"""Detects tar files that are truncated or empty."""

from collections.abc import Mapping, Sequence
from pathlib import Path

TAR_BLOCK = 512  # bytes; a tar file consists of whole blocks, and the last are zero


def check_shards(shards: Mapping[str, Sequence[str]]) -> None:
    """Checks that no tar file is truncated or empty. Readers may end silently at the end of a truncated file.

    Raises:
        ValueError: If a file is truncated, empty, or not a regular file; the message names it.
    """
    for path in (Path(path) for paths in shards.values() for path in paths):
        if not path.is_file():
            raise ValueError(f"{path} is not a file (a pipe or device?); remove it.")
        with path.open("rb") as file:
            is_empty = not any(file.read(TAR_BLOCK))
            size = file.seek(0, 2)
            file.seek(max(size - TAR_BLOCK, 0))
            if size % TAR_BLOCK or file.read() != bytes(TAR_BLOCK):
                raise ValueError(
                    f"{path} is not a whole tar file: it does not end as one does (cut short, or compressed?); copy it "
                    "again."
                )
            if is_empty:
                raise ValueError(f"{path} is an empty tar file: it begins with zeros; remove it, or copy it again.")
