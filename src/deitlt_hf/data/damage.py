"""Tar files that are cut short."""

from collections.abc import Mapping, Sequence
from pathlib import Path

TAR_BLOCK = 512  # bytes; a tar file is whole blocks, and ends with empty ones


def check_shards(shards: Mapping[str, Sequence[str]]) -> None:
    """Checks that no tar file is cut short, where readers may stop without an error.

    Raises:
        ValueError: If one is; the message names it.
    """
    for path in (Path(path) for paths in shards.values() for path in paths):
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAR_BLOCK, 0))
            if size % TAR_BLOCK or file.read() != bytes(TAR_BLOCK):
                raise ValueError(
                    f"{path} is not a whole tar file: it does not end as one does (cut short, or compressed?); copy it "
                    "again."
                )
