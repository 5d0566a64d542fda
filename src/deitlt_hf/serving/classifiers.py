"""Loads image classifiers and their image processors; an error is reported in one sentence."""

import contextlib
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..io import one_line
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..models.safe_loading import check_model_files
from .handler import is_hub_id, load_native, native_config

# Architecture names of a student: the name that is saved, and the name of the package's class.
STUDENTS = ("DeiTForImageClassificationWithTeacher", "DeiTLTForImageClassification")


def load_model(path: str) -> PreTrainedModel:
    """Loads a student with all its experts, or any other image classifier as [`load_classifier`] does.

    Args:
        path: Folder of the model, or its Hub id.

    Raises:
        FileNotFoundError: If the path is local and has no model.
        OSError: If the model cannot be downloaded.
        ValueError: If a file is corrupt, or holds no image classifier.
    """
    config = read_model_config(path)
    if not any(name in STUDENTS for name in config.get("architectures") or []):
        return load_classifier(path, config)
    with loading(path):
        return DeiTLTForImageClassification.from_pretrained(path)


def load_classifier(path: str, config: dict[str, Any] | None = None) -> PreTrainedModel:
    """Loads a [`FlatTeacherForImageClassification`], or any image classifier of transformers or timm.

    Args:
        path: Folder of the model, or its Hub id.
        config: The content of its `config.json`, if it has been read and checked.

    Raises:
        FileNotFoundError: If the path is local and has no model.
        OSError: If the model cannot be downloaded.
        ValueError: If a file is corrupt, or holds no image classifier.
    """
    is_flat_teacher = (config or read_model_config(path)).get("model_type") == FlatTeacherConfig.model_type
    with loading(path):
        return FlatTeacherForImageClassification.from_pretrained(path) if is_flat_teacher else load_native(path)


def load_backbone(path: str) -> PreTrainedModel:
    """Loads an image model for its features, in float32 and evaluation mode.

    A student is loaded as the DeiT of transformers, a teacher with its classifier, and any other model of transformers
    or timm as `AutoModel` loads it.

    Raises:
        FileNotFoundError: If the path is local and has no model.
        ValueError: If the model cannot be loaded, or weights of it are missing. A pooler may be missing.
    """
    if read_model_config(path).get("model_type") == FlatTeacherConfig.model_type:
        return load_classifier(path).eval()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a missing pooler does not matter
    try:
        with loading(path, "an image model"):
            config = native_config(path)
            if getattr(config, "mask_ratio", 0):  # an MAE would hide most patches
                config.mask_ratio = 0.0
            model, info = AutoModel.from_pretrained(
                path,
                config=config,
                trust_remote_code=False,
                dtype="float32",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    finally:
        logging.set_verbosity(verbosity)
    check_weights(path, info, type(model).__name__, ("pooler",))
    return model.eval()


def check_weights(path: str, info: Mapping[str, Any], kind: str, new: tuple[str, ...]) -> None:
    """Checks that a model was loaded with all of its weights; the others would be random.

    Args:
        path: Folder or Hub id of the model.
        info: What transformers reports with `output_loading_info`.
        kind: Name of the model's class, for the message.
        new: Parts of the names of weights that may be new.
    """
    mismatched = (entry[0] for entry in info["mismatched_keys"])
    for names, what in (
        (info["missing_keys"], "lacks {} weights"),
        (mismatched, "has {} weights of other shapes than those"),
    ):
        found = sorted(name for name in names if not any(part in name for part in new))
        if found:
            raise ValueError(
                f"{path} {what.format(len(found))} of a {kind} with its config.json ({', '.join(found[:3])}); they "
                "would be initialised at random. Download or save the model again."
            )


def load_processor(path: str) -> BaseImageProcessor:
    """Loads the image processor of a model folder or Hub repository.

    Raises:
        FileNotFoundError: If the folder has no configuration, or a file of its weights is missing.
        OSError: If there is no image processor, or it cannot be downloaded.
        ValueError: If a file of the folder is corrupt.
    """
    if Path(path).is_dir():
        check_model_files(path)
    with loading(path):
        return AutoImageProcessor.from_pretrained(path)


@contextlib.contextmanager
def loading(path: str, kind: str = "an image classifier") -> Iterator[None]:
    """Reports in one sentence why a model, its configuration or its image processor cannot be loaded.

    Raises:
        OSError: If a file is missing, or cannot be downloaded.
        ValueError: If the model cannot be loaded.
        torch.OutOfMemoryError: If it does not fit into the memory of the device.
    """
    try:
        yield
    except OSError as error:
        raise _readable(path, error) from error
    except torch.OutOfMemoryError:  # of a GPU that other programs use, for example: the model is not damaged
        raise
    except Exception as error:  # configuration fields of a wrong type can raise any exception
        unknown = "its config.json has the unknown value " * isinstance(error, KeyError)
        raise ValueError(f"{path} cannot be loaded as {kind}: {unknown}{one_line(error).rstrip('.')}.") from error


def _readable(path: str, error: OSError) -> OSError:
    """An error of transformers about a file of a model, whose messages have several lines, as one sentence."""
    cause = error.__cause__
    if isinstance(cause, GatedRepoError):  # a RepositoryNotFoundError, too
        return PermissionError(
            f"access to {path} on the Hub is restricted: ask for it on the page of the model, and log in with "
            "'hf auth login' or set HF_TOKEN."
        )
    if isinstance(cause, RepositoryNotFoundError):
        return FileNotFoundError(
            f"there is no model {path!r} on the Hub, or it is private; check the id, and for a private model log in "
            "with 'hf auth login' or set HF_TOKEN."
        )
    if isinstance(cause, LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        return FileNotFoundError(f"{path} is not in the Hub's cache on this machine, and {why}.")
    return error if error.errno is not None else OSError(one_line(error))


def read_model_config(path: str | PathLike) -> dict[str, Any]:
    """Reads the configuration of a model folder or Hub repository. For a local path, the Hub is not queried.

    The files of a folder are checked first, without running code from them. An error names the corrupt file.

    Raises:
        FileNotFoundError: If the path is local and no folder, or the folder has no model.
        OSError: If the configuration is missing, or cannot be downloaded.
        ValueError: If the path is a file, a file of the folder is corrupt, or [`check_config`] refuses the
            configuration.
    """
    path = str(path)
    if Path(path).is_file():
        raise ValueError(f"{path} is a file; convert it to a model folder first, with 'deitlt convert'.")
    if Path(path).is_dir():
        check_model_files(path)
    elif not is_hub_id(path):
        name, _, revision = path.partition("@")
        hint = f"; give the folder of 'hf download {name} --revision {revision} --local-dir DIR'" if revision else ""
        raise FileNotFoundError(f"there is no model folder {path!r}{hint}.")
    with loading(path):
        config = PreTrainedConfig.get_config_dict(path)[0]
    check_config(config, f"the config.json of {path!r}")
    return config


def check_config(config: dict[str, Any], place: str) -> None:
    """Checks the types of the fields of a `config.json` that this package reads: model type, classes, groups, sets.

    Raises:
        ValueError: If a field has a type that no saved model has; the message names its `place`.
    """
    names, groups, counts = (config.get(name) or {} for name in ("id2label", "class_groups", "class_counts"))
    is_right = {
        "model_type": isinstance(config.get("model_type"), str),
        "id2label": isinstance(names, dict) and {*names} == {str(label) for label in range(len(names))},
        "class_counts": not counts or _are_whole(counts),
        "class_groups": isinstance(groups, dict) and all(map(_are_whole, groups.values())),
        "architectures": isinstance(config.get("architectures") or [], list),
        "prediction_sets": _are_sets(config.get("prediction_sets")),
    }
    for name, right in is_right.items():
        if not right:
            shown = " ".join(str(config.get(name))[:60].split())
            raise ValueError(f"{place} has a {name} that is not valid ({shown}); save the model again.")


def _are_sets(value: Any) -> bool:
    """Whether this is the content of [`PredictionSets`], or None."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(isinstance(value.get(name), dict) for name in ("thresholds", "images")):
        return False
    shares = [value.get("coverage"), *value["thresholds"].values()]
    are_shares = all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares)
    return are_shares and _are_whole([value.get("num_labels"), *value["images"].values()])


def _are_whole(values: Any) -> bool:
    """Whether this is a list of whole numbers from 0: class indices, or numbers of images."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
