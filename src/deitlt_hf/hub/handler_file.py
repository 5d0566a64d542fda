"""Adds the endpoint handler to model folders."""

import inspect
import re
from os import PathLike
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ..data import image_rule
from ..io import atomic_write
from ..serving import handler
from .cards import read_config


def add_handler(folder: str | PathLike) -> Path:
    """Writes [`handler_source`] into a model folder as handler.py, which a push of it includes; returns its path.

    The handler needs no requirements.txt: every image of Inference Endpoints with transformers has its imports.

    Raises:
        FileNotFoundError: If the folder holds no model.
        FileExistsError: If the folder has a handler.py that is not a version of this file.
        ValueError: If transformers does not know the type of the model: an endpoint could not load it.
    """
    target = check_handler(folder)
    with atomic_write(target) as part:
        part.write_bytes(handler_source().encode())
    return target


def handler_source() -> str:
    """The content of handler.py: `serving/handler.py` with the code of `data/image_rule.py` in place of its import."""
    rule = inspect.getsource(image_rule).partition('"""\n')[2].strip()  # without its docstring
    return re.sub(r"from \.\.data\.image_rule import .*", lambda _: rule, inspect.getsource(handler))


def check_handler(folder: str | PathLike) -> Path:
    """Returns the path of the handler in a folder; raises the errors of [`add_handler`]."""
    model_type = read_config(Path(folder))["model_type"]
    if model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(
            f"{str(folder)!r} has a model of type {model_type!r}, which transformers does not know: no endpoint can "
            "load it; leave the handler out."
        )
    target = Path(folder) / "handler.py"
    # All versions of the file, also earlier ones, begin with the same line.
    if target.exists() and target.read_bytes().splitlines()[:1] != handler_source().encode().splitlines()[:1]:
        raise FileExistsError(f"{str(target)!r} is another handler; move it away to use the handler of deitlt_hf.")
    return target
