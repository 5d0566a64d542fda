"""Reads checkpoint files of unknown origin without running code from them."""

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
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..io import read_json
from ..model_folder import weight_files

# Objects in the authors' files other than tensors and plain values: the command line (with a path) and numpy's numbers.
# A pair also gives the name in the file: numpy 1 and 2 keep the same function in different modules.
_ALLOWED: list[Callable | tuple[Callable, str]] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
    (multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("int32", "int64", "float32", "float64")),
]
# Name under which a wrapper stores the module that it wraps.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def read_checkpoint(path: str | PathLike) -> Mapping[str, Any]:
    """Reads a `.pth` / `.pth.tar` file of torch, or a `.safetensors` file.

    A pickle may contain tensors, plain values, and the `argparse.Namespace`, path and numpy numbers of the authors'
    files. Anything else is refused, and no code in the file is run.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read under these rules.
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
    """Checks that transformers can read a file of weights or of training state without running code from it.

    Tensors stay on the disk. A pickle may contain tensors, plain values and the states of numpy's random generators.

    Raises:
        ValueError: If the file is damaged, does not hold a dictionary, or holds other objects.
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
        FileNotFoundError: If the folder has no configuration, or a file of the weights is missing.
        ValueError: If a file is damaged or holds other content than expected.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        has_adapters = (folder / ADAPTER_CONFIG_NAME).is_file()
        hint = " It holds adapters of PEFT: merge them into their model, and save that." if has_adapters else ""
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {CONFIG_NAME}.{hint}")
    for name in (CONFIG_NAME, "preprocessor_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    for path in weight_files(folder):
        check_readable(path)


@contextlib.contextmanager
def _one_sentence(path: str | PathLike) -> Iterator[None]:
    """Turns any loading error into a `ValueError` of one sentence that says why the file cannot be loaded."""
    try:
        yield
    except Exception as error:  # a pickle of garbage can raise anything
        # An error of the system; torch's OSError for a truncated file has no filename.
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path} cannot be loaded: {_what_is_wrong(Path(path), error)}.") from error


def _load(path: str | PathLike) -> Any:
    # Memory mapping leaves the optimiser's state, two thirds of a student's file, on the disk.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_plain_zip(path))


def strip_wrappers(state_dict: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Removes the name parts that wrappers add, which leaves the parameter names of the model itself.

    `module.` comes from DataParallel, DistributedDataParallel and timm's moving average, `_orig_mod.` from
    `torch.compile`, and the others from FSDP and activation checkpointing. Wrappers can be nested, and can be around
    parts of a model.

    Raises:
        ValueError: If two weights then have the same name.
    """
    stripped = {".".join(part for part in key.split(".") if part not in _WRAPPERS): key for key in state_dict}
    if len(stripped) < len(state_dict):
        raise ValueError(f"{name} has weights both of a model and of a wrapped model; save only one.")
    return {short: state_dict[key] for short, key in stripped.items()}


def _is_plain_zip(path: str | PathLike) -> bool:
    """Whether a file is a zip archive without compression. A compressed one would be mapped as noise."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Describes what is wrong with a file. Torch's message would recommend unsafe loading, without `weights_only`."""
    with path.open("rb") as file:
        start = file.read(16)
    code = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if code is not None:
        return f"it refers to {code[1]}, which could run arbitrary code; it was not executed"
    if not start:
        return "it is empty"
    if isinstance(error, SafetensorError):
        return f"it is not a complete safetensors file ({error})"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "it is cut short; copy or download it again"
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if not any(name.endswith("/data.pkl") for name in names):
            return f"it is a zip archive of something else ({', '.join(names[:3])})"
        return "it is damaged, or holds other objects than tensors and plain values"
    return f"it is not a torch file; it begins with {start!r}"
