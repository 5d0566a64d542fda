"""Loading of any image classifier and of its image processor, with one sentence where that fails."""

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

# A student as it is saved, and as the package's own class is.
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
    """Says in one sentence why a model, its configuration or its image processor cannot be loaded.

    The files of a folder are looked at first: nothing in them is run, and the sentence names the one that is damaged.

    Raises:
        FileNotFoundError: If the folder has no model.
        ValueError: If it cannot be loaded.
    """
    if Path(path).is_dir():
        check_model_files(path)
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # fields of a configuration that are of another type can raise anything
        raise ValueError(f"{path} cannot be loaded as an image classifier: {one_line(error).rstrip('.')}.") from error


def read_model_config(path: str) -> dict:
    """What the configuration of a folder or Hub repository says."""
    if Path(path).is_file():
        raise ValueError(f"{path} is a file; convert it to a model folder first, with 'deitlt convert'.")
    if Path(path).is_dir():
        check_model_files(path)
    return model_config(path)
