"""Helpers for files: atomic and durable writes, digests, and one-sentence errors for files that cannot be read."""

import contextlib
import csv
import hashlib
import json
import lzma
import math
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

MAX_QUOTED = 300  # characters of a third-party value or message that a message of this package quotes


def one_line(value: object, limit: int = MAX_QUOTED) -> str:
    """Shortens a third-party value or message to one line of at most `limit` characters, to quote it in a message."""
    text = " ".join(str(value)[: 4 * limit].split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_can_be_folder(folder: str | PathLike) -> None:
    """Raises `FileExistsError` if a folder to write to, or one of its parents, is a file."""
    for path in (Path(folder), *Path(folder).parents):
        if path.is_file():
            raise FileExistsError(f"{path} is a file; choose another folder to write to than {folder}.")


@contextlib.contextmanager
def file_errors(source: str | PathLike) -> Iterator[None]:
    """Turns a library's error about the content of a file into one sentence that names the file, a `ValueError`.

    It covers the errors that json, csv, yaml, zip, tar, pickle, torch, safetensors, pyarrow, datasets and Pillow raise
    for a corrupt file. Errors of the system (a missing file, no permission) and programming errors pass unchanged.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not text in UTF-8; save it as UTF-8 ({error}).") from error
    except RecursionError as error:
        raise ValueError(f"{source} cannot be read: its content is nested too deeply.") from error
    except Exception as error:
        if not isinstance(error, _content_errors()):
            raise
        cause = one_line(error.__cause__ or error).rstrip(".")
        raise ValueError(f"{source} cannot be read: {cause}.") from error


def _content_errors() -> tuple[type[Exception], ...]:
    """Exceptions of libraries about the content of a file; imported late, since most programs never need them."""
    import pyarrow
    import yaml
    from datasets.exceptions import DatasetGenerationError
    from PIL import Image, UnidentifiedImageError
    from safetensors import SafetensorError

    return (
        csv.Error,
        json.JSONDecodeError,
        yaml.YAMLError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        tarfile.TarError,
        pickle.UnpicklingError,
        SafetensorError,
        pyarrow.ArrowException,
        DatasetGenerationError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    )


def read_text(path: str | PathLike) -> str:
    """Reads a UTF-8 text file, without its byte order mark.

    It raises `ValueError` if it is not a regular file (reading a pipe may never end), or is not text in UTF-8.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is not a file.")
    with file_errors(path):
        text = Path(path).read_bytes().decode("utf-8-sig")
    if "\0" in text:
        raise ValueError(f"{path} is not text in UTF-8; save it as UTF-8 (it has NUL bytes).")
    return text


def read_json(path: str | PathLike, kind: type = dict) -> Any:
    """Reads a JSON file in UTF-8; `ValueError` if it is not JSON, or its content is not a `kind`."""
    with file_errors(path):
        content = json.loads(read_text(path))
    if not isinstance(content, kind):
        raise ValueError(f"{path} cannot be read: it holds a {type(content).__name__}, not a {kind.__name__}.")
    return content


def write_json(path: str | PathLike, content: Any) -> None:
    """Writes a JSON file atomically; NaN becomes null."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(nan_to_null(content), indent=2) + "\n", encoding="utf-8")


def nan_to_null(value: Any) -> Any:
    """Replaces NaN by None, also inside mappings and sequences, since JSON does not have NaN."""
    if isinstance(value, Mapping):
        return {key: nan_to_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@contextlib.contextmanager
def atomic_write(path: str | PathLike) -> Iterator[Path]:
    """Writes a file atomically: the caller writes to a temporary path, which replaces the file on success.

    After an error the temporary file is removed and the old file stays. The content reaches the disk before the file
    gets its name: a power loss leaves either the old file or the new one. A link of that name is replaced, not
    followed: the files of a snapshot in the Hub's cache are links to shared files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        sync_to_disk(part)
        os.replace(part, path)
        sync_to_disk(path.parent)  # makes the new name durable, too
    finally:
        part.unlink(missing_ok=True)


def sync_to_disk(path: str | PathLike) -> None:
    """Flushes a file, or the directory entries of a folder, to the disk."""
    if os.name == "nt" and Path(path).is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | PathLike) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
