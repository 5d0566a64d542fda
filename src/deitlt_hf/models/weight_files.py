"""Reading checkpoint files of unknown origin without running code of them."""

import argparse
import contextlib
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import CONFIG_NAME

from ..io import read_json, weight_files

# What the authors' files hold beside tensors and plain values: their command line (with a path) and numpy's numbers. A
# pair gives the name in the file; numpy 1 and 2 keep the same function in different modules.
_ALLOWED: list[Callable | tuple[Callable, str]] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
    (multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("int32", "int64", "float32", "float64")),
]
# Names of the one submodule of what is wrapped around a module.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def read_checkpoint(path: str | PathLike) -> Mapping[str, Any]:
    """Reads a `.pth` / `.pth.tar` file of torch, or a `.safetensors` file.

    Of a pickle only tensors, plain values, and the `argparse.Namespace`, path and numpy numbers of the authors' files
    are let in; nothing in it is run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read so.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint file {str(path)!r}.")
    with _one_sentence(path):
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_ALLOWED):
            content = _load(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the weights of a network.")
    return content


def check_readable(path: str | PathLike) -> None:
    """Checks that transformers can read a file of weights or of a run's state, and that nothing in it would be run.

    Tensors stay on the disk; of a pickle plain values and numpy's states of random generators are let in beside them.

    Raises:
        ValueError: If it is damaged, is not a dictionary, or holds other objects.
    """
    with _one_sentence(path):
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt"):
                return
        with safe_globals():
            content = _load(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary.")


def check_model_files(folder: str | PathLike) -> None:
    """Checks the files of a model folder that a model and an image processor are loaded from.

    Raises:
        FileNotFoundError: If the folder has no configuration, or a part of the weights is missing.
        ValueError: If a file is damaged, or holds something else than it should.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} is no model folder: there is no {CONFIG_NAME} in it.")
    for name in (CONFIG_NAME, "preprocessor_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    for path in weight_files(folder):
        check_readable(path)


@contextlib.contextmanager
def _one_sentence(path: str | PathLike) -> Iterator[None]:
    """Says in one sentence why a file cannot be loaded.

    Raises:
        ValueError: In place of what torch or safetensors raise.
    """
    try:
        yield
    except Exception as error:  # a pickle of garbage can raise anything
        if (
            isinstance(error, OSError) and error.filename is not None
        ):  # of the system; torch's of a cut file has no name
            raise
        raise ValueError(f"{path} cannot be loaded: {_what_is_wrong(Path(path), error)}.") from error


def _load(path: str | PathLike) -> Any:
    # Mapping the file into memory leaves the optimiser's state, two thirds of a student's file, on the disk.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_plain_zip(path))


def strip_wrappers(state_dict: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Weights under the names that the model itself gives them, without those of modules wrapped around it.

    `module.` is of DataParallel, DistributedDataParallel and timm's moving average, `_orig_mod.` of `torch.compile`,
    the others of FSDP and activation checkpointing; they can be nested, and around parts of a model.

    Raises:
        ValueError: If two weights have one name then.
    """
    stripped = {".".join(part for part in key.split(".") if part not in _WRAPPERS): key for key in state_dict}
    if len(stripped) < len(state_dict):
        raise ValueError(f"{name} has weights both of a model and of one that is wrapped; save one of them.")
    return {short: state_dict[key] for short, key in stripped.items()}


def _is_plain_zip(path: str | PathLike) -> bool:
    """Whether a file is a zip archive without compression; mapped into memory, another would be read as noise."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _what_is_wrong(path: Path, error: Exception) -> str:
    """A sentence in place of torch's, which recommends loading without `weights_only`."""
    with path.open("rb") as file:
        start = file.read(16)
    code = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if code is not None:
        return f"it refers to {code[1]}, code that could do anything; nothing of it was run"
    if not start:
        return "it is empty"
    if isinstance(error, SafetensorError):
        return f"it is not a whole safetensors file ({error})"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "it is cut short; copy or download it again"
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if not any(name.endswith("/data.pkl") for name in names):
            return f"it is a zip archive of something else ({', '.join(names[:3])})"
        return "it is damaged, or holds other objects than tensors and plain values"
    return f"it is no file of torch; it begins with {start!r}"
