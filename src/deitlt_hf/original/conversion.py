"""Converts the authors' checkpoints (students, PaCo and LDAM teachers), and exports students to their format.

timm's distilled DeiTs have the same layout as the authors' students.

The heads of the students (DeiT-LT, `datasets.py`), and of the LDAM teachers for ImageNet-LT and iNaturalist
(Saddle-LongTail, `datasets/imagenet.py` and `ina2018.py`), are ordered by decreasing training count. The heads of the
PaCo teachers are in the data set's order: DeiT-LT maps the teacher's prediction (`losses.py`, `--map-targets`).
"""

import argparse
import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.loading import SORTED_BY_AUTHORS
from ..data.long_tail import decreasing_count_map
from ..data.sources.labels import check_class_names
from ..data.transforms import model_processor
from ..io import check_can_be_folder
from ..models.deitlt.configuration_deitlt import DeiTLTConfig
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..models.safe_loading import read_checkpoint, strip_wrappers
from .layouts import (
    LDAM_LAYOUT,
    LDAM_RESNET50_LAYOUT,
    PACO_LAYOUT,
    StateDict,
    student_sizes,
    student_to_original,
    student_to_ours,
)

logger = logging.get_logger(__name__)

Source = str | PathLike | StateDict
Model = TypeVar("Model", bound=PreTrainedModel)

STUDENT, PACO_TEACHER, LDAM_TEACHER = "a student", "a PaCo teacher", "an LDAM teacher"

# A PaCo teacher predicts with its query encoder (without the projection) and the linear layer. These parts only train.
_PACO_TRAINING_ONLY = ("queue", "encoder_k.", "linear_k.", "encoder_q.fc.")
# Fields of a student's configuration that cannot be read from its tensors.
_NOT_IN_TENSORS = ("num_attention_heads", "layer_norm_eps")


def load_original_student(
    source: Source,
    ema: bool = False,
    class_map: Sequence[int] | None = None,
    class_counts: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    like: DeiTLTConfig | None = None,
    **config: Any,
) -> DeiTLTForImageClassification:
    """Loads a student from a file of the authors, or a distilled DeiT of timm. Sizes are read from the tensors.

    The authors' ImageNet-LT and iNaturalist heads are ordered by decreasing training count. This function restores the
    data set's order: by `class_map`, else by the map in the file, else by `class_counts`. The configuration keeps the
    map, and [`export_original_student`] uses it to restore the authors' order.

    Args:
        source: A `.pth` or `.safetensors` file, or a state dict such as that of timm's
            `deit_base_distilled_patch16_224`.
        ema: Load the moving average of the weights instead of the weights. The paper's results are of the weights.
        class_map: Row of each class in the file's heads.
        class_counts: Training images of each class, in label order.
        class_names: Names of the classes, in label order.
        like: Gives the number of attention heads if the file does not contain it and has the same hidden size.
            Otherwise attention heads are 64 wide.
        **config: Further fields of [`DeiTLTConfig`], such as `num_attention_heads` or `drop_path_rate`. With another
            `num_labels` than the file's, both heads are newly initialised.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read safely, does not hold a student, or does not fit the classes.
    """
    checkpoint = _open(source, ema)
    if checkpoint.kind != STUDENT:
        raise ValueError(f"{checkpoint.name} holds {checkpoint.kind}, not {STUDENT}; use load_original_teacher.")
    return _student(checkpoint, class_map, class_counts, class_names, like, **config)


def load_original_teacher(
    source: Source,
    class_map: Sequence[int] | None = None,
    class_counts: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> FlatTeacherForImageClassification:
    """Loads a PaCo or LDAM teacher (ResNet-32 or ResNet-50) from a file of the authors.

    The kind of teacher and its sizes are read from the tensors. The head of an LDAM teacher for ImageNet-LT or
    iNaturalist has the order of the students' heads, and the same class map applies. The head of a PaCo teacher is
    already in the data set's order, without `class_map`. See [`load_original_student`] for parameters and errors.
    """
    checkpoint = _open(source)
    if checkpoint.kind == STUDENT:
        raise ValueError(f"{checkpoint.name} holds {STUDENT}, not a teacher; use load_original_student.")
    return _teacher(checkpoint, class_map, class_counts, class_names)


def convert_original(
    source: Source,
    folder: str | PathLike,
    ema: bool = False,
    class_map: Sequence[int] | None = None,
    class_counts: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    **config: Any,
) -> PreTrainedModel:
    """Converts a file of the authors to a folder with a model and its image processor, for `from_pretrained`.

    Parameters and errors are those of [`load_original_student`] and [`load_original_teacher`]. The folder must not
    hold a model.

    Raises:
        FileExistsError: If the folder holds a model, or is a file.
    """
    folder = Path(folder).expanduser()
    check_can_be_folder(folder)
    if any(folder.glob("*.safetensors*")) or (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} holds a model; choose another folder.")
    checkpoint = _open(source, ema)
    model: PreTrainedModel
    if checkpoint.kind == STUDENT:
        model = _student(checkpoint, class_map, class_counts, class_names, **config)
    elif config:
        raise ValueError(f"{checkpoint.name} holds {checkpoint.kind}, which has no {', '.join(config)} to set.")
    else:
        model = _teacher(checkpoint, class_map, class_counts, class_names)
    model.save_pretrained(folder)
    model_processor(model.config).save_pretrained(folder)
    return model


def export_original_student(model: PreTrainedModel, path: str | PathLike) -> None:
    """Writes a student as a file that the authors' code (`--resume`) and timm's distilled DeiTs load strictly.

    The key `model` holds the weights. For [`load_original_student`] the file also contains `class_map` and
    `cls_num_list` if known, and `config` with the values that cannot be read from tensors: the number of heads and the
    epsilon of the layer norms. In the authors' code heads are 64 wide and the epsilon is 1e-6.

    Args:
        model: A [`DeiTLTForImageClassification`], or transformers' `DeiTForImageClassificationWithTeacher`.
        path: The file to write. Missing folders are created.

    Raises:
        ValueError: If the model is not such a student, or has options that the authors' code does not support.
    """
    path, config = Path(path).expanduser(), model.config
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} would not be a safetensors file; give a name ending in .pth.")
    try:
        state_dict = student_to_original(model.state_dict())
    except KeyError as error:
        raise ValueError(
            f"a {type(model).__name__} is not a student with two heads: parameter {error} is missing or unknown."
        ) from error
    for field, value in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if getattr(config, field) != value:
            raise ValueError(f"the authors' students have {field} {value!r}, this one {getattr(config, field)!r}.")
    class_map, counts = (getattr(config, field, None) for field in ("class_map", "class_counts"))
    for name, values in (("class_map", class_map), ("class_counts", counts)):
        if values is not None and len(values) != config.num_labels:
            raise ValueError(
                f"{name} of the model has {len(values)} entries for {config.num_labels} classes; correct its config."
            )
    # The inverse of the map: the class in each row of the authors' heads.
    rows = list(range(len(config.id2label or ()))) if class_map is None else np.argsort(class_map).tolist()
    weights = {
        name: (tensor[rows] if name.startswith("head") else tensor).detach().cpu().contiguous()
        for name, tensor in state_dict.items()
    }
    content: dict[str, Any] = {"model": weights, "config": {field: getattr(config, field) for field in _NOT_IN_TENSORS}}
    if class_map is not None:
        content["class_map"] = list(class_map)
    if counts is not None:
        content["cls_num_list"] = [counts[label] for label in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


# ---- What a file holds ----


@dataclasses.dataclass
class _Checkpoint:
    """The weights of one network, and what the file says about its classes."""

    name: str
    kind: str
    state_dict: StateDict
    class_map: Sequence[int] | None = None
    class_counts: Sequence[int] | None = None  # in the order of the file's head
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields that cannot be read from tensors
    is_sorted: bool = False  # whether the head is ordered by decreasing training count


def _open(source: Source, ema: bool = False) -> _Checkpoint:
    """Reads a file and identifies its content by the names of its tensors."""
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    content: Mapping[str, Any] = source if isinstance(source, Mapping) else read_checkpoint(source)
    keys = ("model_ema",) if ema else ("model", "state_dict")
    below = [content[key] for key in keys if isinstance(content.get(key), Mapping)]
    if ema and not below:
        raise ValueError(f"{name} has no moving average of the weights ('model_ema'); leave out ema.")
    weights: Mapping[str, Any] = below[0] if below else content
    wrong = [str(key) for key, value in weights.items() if not isinstance(key, str) or not _is_whole(value)]
    if wrong or not weights:
        raise ValueError(
            f"{name} has no weights below {' or '.join(map(repr, keys))}; it contains {_listed(wrong) or 'nothing'}."
        )
    state_dict = strip_wrappers(weights, name)
    kind = _kind(name, state_dict)
    # The authors store class facts in their command line, `export_original_student` stores them next to the weights.
    args = content.get("args")
    about = {**(vars(args) if isinstance(args, argparse.Namespace) else {}), **content}
    if kind == PACO_TEACHER:
        state_dict = {k: tensor for k, tensor in state_dict.items() if not k.startswith(_PACO_TRAINING_ONLY)}
    wrong = [key for key, tensor in state_dict.items() if not tensor.is_floating_point() and tensor.dim() > 0]
    if wrong:
        dtype = state_dict[wrong[0]].dtype
        raise ValueError(f"{name} has weights that are not floating-point numbers: {_listed(wrong)} ({dtype}).")
    return _Checkpoint(
        name=name,
        kind=kind,
        state_dict=state_dict,
        class_map=_integers(about.get("class_map"), f"class_map of {name}"),
        class_counts=_integers(about.get("cls_num_list"), f"cls_num_list of {name}"),
        config=content["config"] if isinstance(content.get("config"), dict) else {},
        is_sorted=about.get("data_set") in SORTED_BY_AUTHORS.values()
        if kind == STUDENT
        else kind == LDAM_TEACHER and any(key.startswith("layer4.") for key in state_dict),
    )


def _is_whole(value: Any) -> bool:
    """Whether this is a dense tensor with all elements in memory. An expanded tensor could claim any size."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.is_meta or value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _integers(values: Any, name: str) -> list[int] | None:
    """Checks whole numbers from a file or a caller, and returns them as a list."""
    if values is None:
        return None
    try:
        if not isinstance(values, Mapping):
            return [operator.index(value) for value in values]  # takes numpy's integers, and refuses floats
    except TypeError:
        pass
    raise ValueError(f"{name} must be a list of whole numbers, got {str(values)[:60]}.")


def _kind(name: str, state_dict: StateDict) -> str:
    modules = {key.split(".")[0] for key in state_dict}
    for kind, typical in (
        (STUDENT, {"cls_token", "blocks"}),
        (PACO_TEACHER, {"encoder_q", "linear"}),
        (LDAM_TEACHER, {"layer1", "linear"}),
    ):
        if typical <= modules:
            return kind
    # LDAM's cosine classifier has no bias; the `fc` of a plain ResNet has one.
    if {"layer1", "fc"} <= modules and "fc.bias" not in state_dict:
        return LDAM_TEACHER
    raise ValueError(
        f"{name} is neither a DeiT-LT student nor a PaCo or LDAM teacher; its tensors begin with {_listed(state_dict)}."
    )


# ---- From a file to a model ----


def _student(
    checkpoint: _Checkpoint,
    class_map: Sequence[int] | None,
    class_counts: Sequence[int] | None,
    class_names: Sequence[str] | None,
    like: DeiTLTConfig | None = None,
    **config: Any,
) -> DeiTLTForImageClassification:
    sizes, num_labels = _sizes(checkpoint, student_sizes)
    if like is not None and like.hidden_size == sizes["hidden_size"]:
        sizes["num_attention_heads"] = like.num_attention_heads
    config.pop("label2id", None)
    if class_names is None and "id2label" in config:
        id2label = config.pop("id2label")
        class_names = [id2label[label] for label in range(len(id2label))]
        config["num_labels"] = len(class_names)
    new: tuple[str, ...] = ()
    if config.get("num_labels", num_labels) != num_labels:
        num_labels, new = config["num_labels"], ("head.", "head_dist.")
        kept = {name: tensor for name, tensor in checkpoint.state_dict.items() if not name.startswith(new)}
        # Without its class map and counts, which are of the classes of the file.
        checkpoint = _Checkpoint(checkpoint.name, checkpoint.kind, kept, config=checkpoint.config)
    classes = _classes(checkpoint, num_labels, class_map, class_counts, class_names)
    model = DeiTLTForImageClassification(DeiTLTConfig(**sizes | checkpoint.config | classes | config))
    return _fill(model, checkpoint, student_to_ours, student_to_original, new)


def _teacher(
    checkpoint: _Checkpoint,
    class_map: Sequence[int] | None,
    class_counts: Sequence[int] | None,
    class_names: Sequence[str] | None,
) -> FlatTeacherForImageClassification:
    layout = PACO_LAYOUT if checkpoint.kind == PACO_TEACHER else LDAM_LAYOUT
    if checkpoint.kind == LDAM_TEACHER and "linear.weight" not in checkpoint.state_dict:
        layout = LDAM_RESNET50_LAYOUT
    sizes, num_labels = _sizes(checkpoint, layout.sizes)
    classes = _classes(checkpoint, num_labels, class_map, class_counts, class_names)
    if checkpoint.kind == PACO_TEACHER and classes["class_map"] not in (None, list(range(num_labels))):
        raise ValueError(
            f"{checkpoint.name} holds {PACO_TEACHER}, whose head is already in the data set's order; leave class_map "
            "out. The map of a student's file is of the heads of students and of LDAM teachers."
        )
    model = FlatTeacherForImageClassification(FlatTeacherConfig(**sizes | classes))
    return _fill(model, checkpoint, layout.to_ours, layout.to_original)


def _sizes(checkpoint: _Checkpoint, sizes: Callable[[StateDict], dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """Reads fields of the configuration and the number of classes from the tensors."""
    try:
        found = sizes(checkpoint.state_dict)
    except KeyError as error:
        raise ValueError(f"{checkpoint.name} is only part of {checkpoint.kind}: it lacks {error}.") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"{checkpoint.name} is not {checkpoint.kind} as the authors save it: {error}.") from error
    return found, found.pop("num_labels")


def _classes(
    checkpoint: _Checkpoint,
    num_labels: int,
    class_map: Sequence[int] | None,
    class_counts: Sequence[int] | None,
    class_names: Sequence[str] | None,
) -> dict[str, Any]:
    """Makes the class fields of the configuration, in the data set's order."""
    class_map = checkpoint.class_map if class_map is None else _integers(class_map, "class_map")
    class_counts = _integers(class_counts, "class_counts")
    if class_names is not None:
        class_names = list(class_names)
        check_class_names(class_names, "class_names")
    for name, values in (
        ("class_map", class_map),
        ("class_counts", class_counts),
        ("class_names", class_names),
        ("cls_num_list of the file", checkpoint.class_counts),
    ):
        if values is not None and len(values) != num_labels:
            raise ValueError(f"{name} has {len(values)} entries but {checkpoint.name} has {num_labels} classes.")
    if class_map is None and checkpoint.is_sorted:
        class_map = _map_of_sorted(checkpoint.name, class_counts, class_names)
    if class_map is not None and sorted(class_map) != list(range(num_labels)):
        raise ValueError(f"class_map must hold each of 0 to {num_labels - 1} once; it begins with {class_map[:5]}.")
    if checkpoint.class_counts is not None:
        of_file = [checkpoint.class_counts[row] for row in class_map or range(num_labels)]
        class_counts = of_file if class_counts is None else class_counts
        for label, (count, given) in enumerate(zip(of_file, class_counts, strict=True)):
            if count != given:
                raise ValueError(
                    f"class {label} had {count} training images for {checkpoint.name} but has {given} in class_counts; "
                    "these are other data, or other classes."
                )
    classes: dict[str, Any] = {"num_labels": num_labels, "class_map": class_map}
    if class_counts is not None:
        classes["class_counts"] = class_counts
    if class_names is not None:
        classes["id2label"] = dict(enumerate(class_names))
        classes["label2id"] = {name: label for label, name in enumerate(class_names)}
    return classes


def _map_of_sorted(
    name: str, class_counts: Sequence[int] | None, class_names: Sequence[str] | None
) -> list[int] | None:
    """The class map of a file with classes by decreasing training count; None, with a warning, if it is not known."""
    if class_counts is not None:
        return decreasing_count_map(class_counts).tolist()
    if class_names is not None:
        raise ValueError(
            f"{name} orders its classes by decreasing training count, so these names would name other classes; give "
            "class_counts, or the class_map of the student."
        )
    logger.warning(
        "%s orders its classes by decreasing training count, and they stay in that order; give class_counts or "
        "class_map to have them in the data set's.",
        name,
    )
    return None


def _fill(
    model: Model,
    checkpoint: _Checkpoint,
    to_ours: Callable[[StateDict], dict[str, torch.Tensor]],
    to_original: Callable[[StateDict], StateDict],
    new: tuple[str, ...] = (),
) -> Model:
    """Loads a file's weights after a strict check of names and shapes. Weights with a prefix in `new` stay."""
    expected = to_original(model.state_dict())
    found = {name: tensor for name, tensor in expected.items() if name.startswith(new)}
    found.update(checkpoint.state_dict)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    differing = [
        f"{name} is {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = [f"it lacks {_listed(missing)}"] if missing else []
    problems += [f"it has {_listed(extra)} too"] if extra else []
    problems += differing[:1]
    if problems:
        raise ValueError(f"{checkpoint.name} is not {checkpoint.kind} as the authors save it: {'; '.join(problems)}.")
    weights = to_ours(found)
    class_map = model.config.class_map
    if class_map is not None:  # the rows of the heads, from the authors' order to the data set's
        weights |= {name: tensor[class_map] for name, tensor in weights.items() if "classifier." in name}
    model.load_state_dict(weights)
    return model.eval()


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (f" and others ({len(names)} in all)" if len(names) > 3 else "")
