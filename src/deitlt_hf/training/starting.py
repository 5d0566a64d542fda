"""Starts a student from an existing model: a student or another ViT of transformers or timm, or a file of weights."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    AutoModel,
    DeiTConfig,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import ADAPTER_CONFIG_NAME, IMAGE_PROCESSOR_NAME, cached_file, logging

from ..data.transforms import ImageFormat
from ..model_folder import weight_files
from ..models.deitlt.configuration_deitlt import DeiTLTConfig
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.safe_loading import read_checkpoint, strip_wrappers
from ..models.trunks import TIMM_TYPE, Trunk, check_type, student_of, trunk_of, vit_of_file
from ..original import load_original_student
from ..recipes import StudentArguments
from ..serving.classifiers import check_weights, loading, read_model_config
from ..serving.handler import native_config
from .inputs import label_fields

# Configuration fields: sizes that a student takes over from the model that it starts from.
FIXED_SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Configuration fields: sizes that the command line can change, since the weights are interpolated.
FREE_SIZE_FIELDS = ("image_size", "patch_size")


@dataclass(frozen=True)
class Start(Trunk):
    """The trunk that a student starts from, and what its file of weights contains, if the source is one."""

    content: Mapping[str, Any] | None = None


def check_start(model_args: StudentArguments, changed: Mapping[str, Any]) -> Start:
    """Checks that a student can start from `model_args.init_from`, before its weights are loaded.

    The model's sizes override those of the recipe; image size, patch size and normalisation on the command line
    (`changed`) override those of the model.

    Returns:
        The trunk with the final configuration. It is on the meta device, unless the source is a file, which is read.

    Raises:
        FileNotFoundError: If the model does not exist.
        ValueError: If its trunk is not one of a student, or its sizes differ from those on the command line.
    """
    path = model_args.init_from
    assert path is not None
    weights = None
    if Path(path).is_file():
        weights = read_checkpoint(path)
        trunk = trunk_of(_of_file(path, weights, model_args))
    else:
        content = read_model_config(path)
        with _as_student(path):
            check_type(content["model_type"])
            _check_plain_weights(path, content)
        with loading(path):
            config = native_config(path)
            with torch.device("meta"):
                source = AutoModel.from_config(config)
        with _as_student(path):
            trunk = trunk_of(source)
    for name in FIXED_SIZE_FIELDS:
        if changed.get(name, trunk.config[name]) not in (None, trunk.config[name]):
            raise ValueError(
                f"{path} has {name} {trunk.config[name]}, not {changed[name]}; a student that starts from it has "
                f"the same sizes, so leave --{name} out."
            )
    config = trunk.config | _image_fields(path, trunk, model_args, changed)
    DeiTLTConfig(**config)  # refuses sizes that do not fit
    return Start(config, trunk.weights, trunk.antialias, trunk.notes, weights)


def starting_student(start: Start, model_args: StudentArguments, names: Sequence[str]) -> DeiTLTForImageClassification:
    """Loads the weights of `model_args.init_from`, which [`check_start`] has checked, into a student of named classes.

    The heads are new, unless the model is a student, or a distilled DeiT, with as many classes. Missing weights are a
    `ValueError`.
    """
    path = model_args.init_from
    assert path is not None
    fields = start.config | {"drop_path_rate": model_args.drop_path_rate}
    source = _model_of(path, names) if start.content is None else _of_file(path, start.content, model_args, names)
    with _as_student(path):
        trunk = trunk_of(source)
    if isinstance(source, DeiTLTForImageClassification):
        heads = {name: tensor for name, tensor in source.state_dict().items() if "classifier." in name}
        student = student_of(trunk, model_args.attn_implementation, **source.config.to_dict() | fields)
        student.load_state_dict(heads, strict=False)
    else:
        student = student_of(trunk, model_args.attn_implementation, **fields | label_fields(names))
    student.name_or_path = path
    return student


def _model_of(path: str, names: Sequence[str]) -> torch.nn.Module:
    """Loads a student with its heads from a DeiT with two tokens, and a ViT without its head from other models."""
    with loading(path), without_report():
        config = native_config(path)
        # transformers 5.9 does not find the weights of a DeiT without heads in a class with heads.
        has_heads = config.model_type == DeiTConfig.model_type and config.architectures != ["DeiTModel"]
        kind: Any = DeiTLTForImageClassification if has_heads else AutoModel
        own: dict[str, Any] = label_fields(names) if has_heads else {"config": config, "trust_remote_code": False}
        source, info = kind.from_pretrained(
            path, **own, dtype="float32", ignore_mismatched_sizes=True, output_loading_info=True
        )
    check_weights(path, info, "ViT", ("classifier.", "pooler."))
    return source


def _check_plain_weights(path: str, content: Mapping[str, Any]) -> None:
    """Raises `ValueError` with the reason if weights are missing, adapters of PEFT, or quantised."""
    if "quantization_config" in content:
        raise ValueError("its weights are quantised; start from the unquantised model")
    if cached_file(path, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None:
        raise ValueError("it has adapters of PEFT; merge them into the weights first (PEFT's merge_and_unload)")
    if Path(path).is_dir() and not weight_files(path):
        raise ValueError("its folder has no weights (model.safetensors)")


def _of_file(
    path: str, content: Mapping[str, Any], model_args: StudentArguments, names: Sequence[str] | None = None
) -> torch.nn.Module:
    """The authors' student or timm's distilled DeiT from the content of a file; a ViT of timm from that of others."""
    like = model_args.config()
    below = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)), content)
    weights = strip_wrappers(below, path) if all(isinstance(name, str) for name in below) else {}
    if not weights or "dist_token" in weights:
        # Without names, only the trunk is of interest: another number of classes leaves out the file's heads.
        labels: dict[str, Any] = {"class_names": names, "num_labels": len(names)} if names else {"num_labels": 1}
        with _as_student(path):
            return load_original_student(content, like=like, **labels)
    token = weights.get("cls_token")
    heads = like.num_attention_heads if token is not None and token.shape[-1] == like.hidden_size else None
    with _as_student(path):
        return vit_of_file(weights, heads)


def _image_fields(path: str, trunk: Trunk, model_args: StudentArguments, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and normalisation of the student's images: of the command line, else of the source."""
    found = image_format_of(path)
    fields = {name: trunk.config[name] for name in FREE_SIZE_FIELDS}
    if found is not None:
        # A model of timm has a fixed size, but timm before 1.0.31 writes the size of the architecture beside it.
        if not _is_of_timm(path):
            if found.size[0] != found.size[1] and "image_size" not in changed:
                raise ValueError(
                    f"the images of {path} are {' x '.join(map(str, found.size))}; give a square --image_size."
                )
            fields["image_size"] = found.size[0]
        if (found.mean, found.std) != (tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)):
            fields |= {"image_mean": list(found.mean), "image_std": list(found.std)}
    given = {name: changed[name] for name in FREE_SIZE_FIELDS if name in changed}
    normalisation = {name: getattr(model_args, name) for name in ("image_mean", "image_std")}
    return fields | given | {name: values for name, values in normalisation.items() if values is not None}


def image_format_of(path: str) -> ImageFormat | None:
    """Image size and normalisation of a model's processor; None if the model has none."""
    if Path(path).is_file():
        return None
    has_file = cached_file(path, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False) is not None
    if not has_file and not _is_of_timm(path):  # timm's are in its config
        return None
    with loading(path):
        return ImageFormat.of(AutoImageProcessor.from_pretrained(path))


def _is_of_timm(path: str) -> bool:
    return native_config(path).model_type == TIMM_TYPE


@contextlib.contextmanager
def _as_student(path: str) -> Iterator[None]:
    """Makes a sentence of the reason (a `ValueError`) why a model cannot become a student."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} cannot become a student: {str(error).rstrip('.')}.{_as_teacher(path)}") from error


def _as_teacher(path: str) -> str:
    """How a model that cannot become a student can be a teacher, as a sentence; empty if it cannot."""
    if Path(path).is_file():
        return ""
    kind = read_model_config(path)["model_type"]
    if kind == "dinov3_vit":
        return " timm's version of it can be a teacher (deitlt train-teacher --backbone timm/... --tune heads)."
    is_known = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if not is_known and kind != FlatTeacherConfig.model_type:
        return ""
    return " It can be a teacher of the same classes (--teacher)."


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Hides transformers' table of weights that are new or not used, such as heads and poolers."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
