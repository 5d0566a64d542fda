"""Configuration of the DeiT-LT student.

This file is copied into every saved folder and Hub repository, so it imports transformers only.
"""

from collections.abc import Mapping
from typing import Any

from transformers import DeiTConfig, __version__
from transformers.utils import logging

# First version with the DeiT modules that the student uses. Older ones leave weights newly initialised or fail.
OLDEST = (5, 9)
if tuple(map(int, __version__.split(".")[:2])) < OLDEST:
    raise ImportError(
        f"the code of DeiT-LT needs transformers {'.'.join(map(str, OLDEST))} or newer, and this is {__version__}; "
        "update transformers, or leave trust_remote_code out: the model loads without its own code from 4.41 on."
    )

logger = logging.get_logger(__name__)

_COUNTED = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")


class DeiTLTConfig(DeiTConfig):
    """Configuration of a DeiT-LT student: a DeiT with two tokens (CLS and DIST) trained on long-tailed images.

    It keeps every field of [`~transformers.DeiTConfig`], including `model_type`. Plain transformers therefore loads a
    saved folder as its own `DeiTForImageClassificationWithTeacher`. Differences from `DeiTConfig`:

    Args:
        layer_norm_eps: Epsilon of the layer norms, 1e-6 as in the authors' code (transformers' DeiT has 1e-12).
        drop_path_rate: Stochastic depth of the last block, in [0, 1); it rises linearly from 0 over the blocks.
            0.1 in the paper.
        image_mean: Mean for normalising images in [0, 1], one value per channel. None: ImageNet's, as in the paper.
        image_std: Standard deviation for normalising images, likewise.
        class_counts: Training images of each class, in label order, when known. It does not change the model. It
            records for users of a saved model which classes are head and which are tail.
        class_groups: Class indices of each group, such as head, mid and tail, when known.
        class_map: For a model converted from the authors' checkpoint, the row of each class in the heads of that
            checkpoint, if the orders differ. The authors' ImageNet-LT and iNaturalist heads are ordered by decreasing
            training count.
        prediction_sets: Thresholds of prediction sets, as `deitlt calibrate` fits them for these weights.

    Raises:
        ValueError: If a size or number is below 1, the patch size does not divide the image size, the number of heads
            does not divide the hidden size, `image_mean` or `image_std` do not fit the channels, `drop_path_rate` is
            outside [0, 1), or `class_counts`, `class_groups` or `class_map` do not fit the labels.
    """

    # Outputs that transformers' Trainer does not collect as predictions.
    keys_to_ignore_at_inference = ["cls_logits", "distillation_logits", "token_features"]

    layer_norm_eps: float = 1e-6
    drop_path_rate: float | int = 0.1
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    class_counts: list[int] | None = None
    class_groups: dict[str, list[int]] | None = None
    class_map: list[int] | None = None
    prediction_sets: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for field in _COUNTED:
            value = getattr(self, field)
            if min(_pair(value)) < 1:
                raise ValueError(f"{field} must be 1 or more, got {value}.")
        for side, patch in zip(_pair(self.image_size), _pair(self.patch_size), strict=True):
            if side % patch:
                raise ValueError(
                    f"patch_size {self.patch_size} does not divide image_size {self.image_size}; "
                    "choose an image size that is a multiple of the patch size."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}."
            )
        for field in ("image_mean", "image_std"):
            values = getattr(self, field)
            if values is not None and len(values) != self.num_channels:
                raise ValueError(
                    f"{field} must have a value for each of the {self.num_channels} channels, got {values}."
                )
        if self.image_std is not None and min(self.image_std) <= 0:
            raise ValueError(f"image_std must be above 0, got {self.image_std}.")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}.")
        _check_classes(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DeiTLTConfig":
        """Makes a configuration from a dictionary, without class facts that do not apply to the wanted classes."""
        result = super().from_dict(_of_its_classes(config_dict, kwargs), **kwargs)
        _check_classes(result[0] if isinstance(result, tuple) else result)  # `kwargs` are set after the first check
        return result

    def to_dict(self) -> dict[str, Any]:
        """Serializes with the native architecture name, by which plain transformers picks the two-headed DeiT."""
        output = super().to_dict()
        if output.get("architectures") == ["DeiTLTForImageClassification"]:
            output["architectures"] = ["DeiTForImageClassificationWithTeacher"]
        # transformers writes an entry for the saved class only, but `AutoModel` needs an entry for the bare model.
        auto_map = output.get("auto_map") or {}
        if "AutoModelForImageClassification" in auto_map:
            reference = auto_map["AutoModelForImageClassification"]
            model = reference.replace("DeiTLTForImageClassification", "DeiTLTModel")
            output["auto_map"] = {**auto_map, "AutoModel": model}
        return output


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


# ---- Identical block in configuration_flat_teacher.py: each file is saved without the other. ----


def _of_its_classes(config_dict: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Drops facts about classes that do not fit the stored classes, or if `kwargs` ask for other classes."""
    stored = {int(label): name for label, name in (config_dict.get("id2label") or {}).items()}
    num_labels = len(stored) or 2  # two unnamed labels are transformers' default, which it does not store
    names = kwargs.get("id2label")
    wanted = kwargs.get("num_labels", num_labels) if names is None else len(names)
    stale = wanted != num_labels or (names is not None and {int(key): name for key, name in names.items()} != stored)
    dropped = []
    for field in ("class_counts", "class_groups", "class_map"):
        values = config_dict.get(field)
        if values is not None and (stale or not _fits(values, num_labels)):
            dropped.append(field)
    if stale and config_dict.get("prediction_sets") is not None:
        dropped.append("prediction_sets")
    if dropped and not stale:
        logger.warning("%s left out: they do not fit the %d classes of the model.", " and ".join(dropped), num_labels)
    return {key: value for key, value in config_dict.items() if key not in dropped}


def _fits(values: dict[str, list[int]] | list[int], num_labels: int) -> bool:
    if isinstance(values, dict):
        return all(0 <= label < num_labels for group in values.values() for label in group)
    return len(values) == num_labels


def _check_classes(config: DeiTLTConfig) -> None:
    num_labels = config.num_labels or 0  # None without classes
    if config.class_counts is not None and len(config.class_counts) != num_labels:
        raise ValueError(f"class_counts has {len(config.class_counts)} entries but the model has {num_labels} labels.")
    if config.class_groups is not None and not _fits(config.class_groups, num_labels):
        raise ValueError(f"class_groups has classes beyond the {num_labels} labels of the model.")
    if config.class_map is not None and sorted(config.class_map) != list(range(num_labels)):
        raise ValueError(
            f"class_map must hold each of 0 to {num_labels - 1} once; it begins with {config.class_map[:5]}."
        )


DeiTLTConfig.register_for_auto_class()
