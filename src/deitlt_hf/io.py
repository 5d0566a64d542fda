"""Files: atomic writes that reach the disk, digests, and one sentence for a file that cannot be read."""

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

MAX_QUOTED = 300  # characters of a foreign value or message in one of ours
_BLOCK = 2**20


def one_line(value: object, limit: int = MAX_QUOTED) -> str:
    """A foreign value or message on one line of at most `limit` characters, for a message of ours."""
    text = " ".join(str(value)[: 4 * limit].split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_can_be_folder(folder: str | PathLike) -> None:
    """Refuses a folder to write to that cannot be made.

    Raises:
        FileExistsError: If it is a file, or below one.
    """
    for path in (Path(folder), *Path(folder).parents):
        if path.is_file():
            raise FileExistsError(f"{path} is a file; choose another folder to write to than {folder}.")


@contextlib.contextmanager
def file_errors(source: str | PathLike) -> Iterator[None]:
    """Turns what a library raises about the content of a file into one sentence that names the file.

    It covers the errors of json, csv, yaml, zip, tar, pickle, torch, safetensors, pyarrow, datasets and Pillow, in
    which a damaged file shows. Errors of the system (a missing file, no permission) and of the program pass unchanged.

    Args:
        source: The file or folder that is read.

    Raises:
        ValueError: If the content cannot be read.
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
    """What libraries raise about the content of a file; imported late, since most programs never need them."""
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
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a pipe or the like, which may have no end, or is not text in UTF-8.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is not a file.")
    with file_errors(path):
        text = Path(path).read_bytes().decode("utf-8-sig")
    if "\0" in text:
        raise ValueError(f"{path} is not text in UTF-8; save it as UTF-8 (it has NUL bytes).")
    return text


def read_json(path: str | PathLike, kind: type = dict) -> Any:
    """The content of a JSON file.

    Args:
        path: The file, in UTF-8.
        kind: The type that its content must have.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, or of another type.
    """
    with file_errors(path):
        content = json.loads(read_text(path))
    if not isinstance(content, kind):
        raise ValueError(f"{path} cannot be read: it holds a {type(content).__name__}, not a {kind.__name__}.")
    return content


def write_json(path: str | PathLike, content: Any, indent: int | None = 2) -> None:
    """Writes a JSON file atomically; NaN becomes null."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(nan_to_null(content), indent=indent) + "\n", encoding="utf-8")


def nan_to_null(value: Any) -> Any:
    """A value as JSON represents it, with null for NaN, in mappings and sequences too."""
    if isinstance(value, Mapping):
        return {key: nan_to_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@contextlib.contextmanager
def atomic_write(path: str | PathLike) -> Iterator[Path]:
    """Gives a temporary path; what is written there replaces the file if all goes well, and is removed otherwise.

    The content is on the disk before the file gets its name, so that a power loss leaves the old file or the new one.
    A link of that name is replaced, not followed: the files of a snapshot in the Hub's cache are links to others.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        sync_to_disk(part)
        os.replace(part, path)
        sync_to_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_to_disk(path: str | PathLike) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and Path(path).is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | PathLike) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(folder: str | PathLike) -> list[Path]:
    """The files that transformers loads the weights of a model folder from, by name; none if it has no weights.

    Others beside them, such as shards that no index names, are of an earlier model.

    Raises:
        FileNotFoundError: If a file that an index names is missing.
        ValueError: If an index cannot be read, or names something else than files of weights in the folder.
    """
    folder = Path(folder)
    # In the order in which transformers looks for them.
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index} does not name the files of the weights; save the model again.")
        for shard in shards.values():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(Path(name).suffix):
                raise ValueError(
                    f"{index} names {one_line(shard, 100)!r}, which is no file of weights in its folder; save the "
                    "model again."
                )
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder} is no whole model folder: {shard} is missing; save the model again.")
        return [folder / shard for shard in sorted(set(shards.values()))]
    return []


def check_link(path: str | PathLike, folder: str | PathLike) -> None:
    """Refuses a path in a model folder that leads out of it by a link, or to a file of another kind.

    Such a link publishes a file that nobody meant to: of a folder from a stranger, any file of the user's. The folder
    itself may be a link. In a snapshot of the Hub's cache all files are links to its blobs.

    Args:
        path: A file below the folder.
        folder: The model's.

    Raises:
        ValueError: If it does.
    """
    target, top = Path(path).resolve(), Path(folder).resolve()
    is_same_kind = target.is_relative_to(top) and target.suffix == Path(path).suffix
    if is_same_kind and not any(part.startswith(".") for part in target.relative_to(top).parts):
        return
    if top.parent.name == "snapshots" and target.parent == top.parents[1] / "blobs":
        return
    raise ValueError(f"{path} is a link to {target}; put a copy of what it is meant to be there, or remove it.")


def weights_digest(folder: str | PathLike) -> str | None:
    """The sha256 of a model folder's weights, in all their files; None if there are none.

    It identifies the weights that a record, a card, an ONNX file or a report is about.

    Args:
        folder: Has the files that [`weight_files`] finds.
    """
    files = weight_files(folder)
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest() if files else None
