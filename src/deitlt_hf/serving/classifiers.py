"""Loads image classifiers and their image processors; an error is reported in one sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from ..io import one_line
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..models.weight_files import check_model_files
from .handler import load_native, model_config

# Architecture names of a student: the name that is saved, and the name of the package's class.
STUDENTS = ("DeiTForImageClassificationWithTeacher", "DeiTLTForImageClassification")


def load_model(path: str) -> PreTrainedModel:
    """Loads a student with all its experts, or any other image classifier as [`load_classifier`] does."""
    if any(name in STUDENTS for name in read_model_config(path).get("architectures") or []):
        with loading(path):
            return DeiTLTForImageClassification.from_pretrained(path)
    return load_classifier(path)


def load_classifier(path: str) -> PreTrainedModel:
    """Loads a [`FlatTeacherForImageClassification`], or any image classifier of transformers or timm."""
    is_flat_teacher = read_model_config(path).get("model_type") == FlatTeacherConfig.model_type
    with loading(path):
        return FlatTeacherForImageClassification.from_pretrained(path) if is_flat_teacher else load_native(path)


def load_processor(path: str) -> BaseImageProcessor:
    """Loads the image processor of a model folder or Hub repository."""
    with loading(path):
        return AutoImageProcessor.from_pretrained(path)


@contextlib.contextmanager
def loading(path: str) -> Iterator[None]:
    """Reports in one sentence why a model, its configuration or its image processor cannot be loaded.

    The files of a folder are checked first, without running code from them. The sentence names the corrupt file.

    Raises:
        FileNotFoundError: If the folder has no model.
        ValueError: If the model cannot be loaded.
    """
    if Path(path).is_dir():
        check_model_files(path)
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # configuration fields of a wrong type can raise any exception
        raise ValueError(f"{path} cannot be loaded as an image classifier: {one_line(error).rstrip('.')}.") from error


def read_model_config(path: str) -> dict:
    """Reads the configuration of a model folder or Hub repository.

    Raises:
        ValueError: If the path is a file, or a file of the folder is corrupt.
    """
    if Path(path).is_file():
        raise ValueError(f"{path} is a file; convert it to a model folder first, with 'deitlt convert'.")
    if Path(path).is_dir():
        check_model_files(path)
    return model_config(path)
