"""Damaged files of users: one sentence with the file's name, in place of what the libraries say."""

import contextlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow
from datasets.exceptions import DatasetGenerationError

TAR_BLOCK = 512  # bytes; a tar file is whole blocks, and ends with empty ones


@contextlib.contextmanager
def named_errors(source: Path | str) -> Iterator[None]:
    """Names the source in what is raised while it is read.

    Raises:
        ValueError: If it is text but not in UTF-8, or `datasets` cannot read it.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not text in UTF-8; save it as UTF-8 ({error}).") from error
    except (pyarrow.ArrowInvalid, tarfile.TarError, DatasetGenerationError) as error:
        cause = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise ValueError(f"{source} cannot be read: {cause}.") from error


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
