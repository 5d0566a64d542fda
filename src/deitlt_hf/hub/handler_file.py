"""Adds the endpoint handler to model folders, and recognises copies of the package's files there."""

import shutil
from os import PathLike
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ..io import atomic_write
from ..serving import handler
from .cards import read_config


def add_handler(folder: str | PathLike) -> Path:
    """Copies `serving/handler.py` into a model folder as handler.py. A push of the folder then includes it.

    The handler needs no requirements.txt: every image of Inference Endpoints with transformers has its imports.

    Returns:
        Path of the copy.

    Raises:
        FileNotFoundError: If the folder holds no model.
        FileExistsError: If the folder has a handler.py that is not a version of this file.
        ValueError: If transformers does not know the type of the model: an endpoint could not load it.
    """
    target = check_handler(folder)
    with atomic_write(target) as part:
        shutil.copyfile(handler.__file__, part)
    return target


def check_handler(folder: str | PathLike) -> Path:
    """Returns the path of the handler in a folder; raises the errors of [`add_handler`]."""
    model_type = read_config(Path(folder))["model_type"]
    if model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(
            f"{str(folder)!r} has a model of type {model_type!r}, which transformers does not know: no endpoint can "
            "load it; leave the handler out."
        )
    target = Path(folder) / "handler.py"
    if target.exists() and not is_version_of(target, handler.__file__):
        raise FileExistsError(f"{str(target)!r} is another handler; move it away to use the handler of deitlt_hf.")
    return target


def is_version_of(path: str | PathLike, own: str | PathLike) -> bool:
    """Whether a file is a version, possibly an earlier one, of a file of this package.

    All versions of a file begin with the same line.
    """
    return _first_line(path) == _first_line(own)


def _first_line(path: str | PathLike) -> bytes:
    with open(path, "rb") as file:
        return file.readline().rstrip().removesuffix(b'"""')
