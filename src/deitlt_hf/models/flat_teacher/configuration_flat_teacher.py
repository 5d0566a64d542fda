"""Configuration of the flat CNN teacher.

This file is copied into every saved folder and Hub repository, so it imports transformers only. It supports version
4.41 and newer: no version of transformers contains code for this model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

try:
    from transformers import PreTrainedConfig
except ImportError:  # its name in transformers 4
    from transformers import PretrainedConfig as PreTrainedConfig

logger = logging.get_logger(__name__)

CIFAR_RESNETS = ("resnet20", "resnet32", "resnet44", "resnet56")


class FlatTeacherConfig(PreTrainedConfig):
    """Configuration of a CNN that teaches a DeiT-LT student.

    Args:
        backbone: A CIFAR ResNet (`resnet20`, `resnet32`, `resnet44`, `resnet56`; He et al., 2016, section 4.2) or
            `timm/NAME` for any timm backbone, such as `timm/resnet50`.
        classifier: `linear`, or `cosine`: the cosine between feature and class weight, times `logit_scale`, as in LDAM.
        image_size: Side of the square input images, in pixels.
        num_channels: Channels of the images.
        image_mean: Mean for normalising the images, one value per channel. ImageNet's by default.
        image_std: Standard deviation for normalising the images.
        projection_size: Output size of the two-layer MLP head whose features PaCo compares in training; 0 for no such
            head. It does not change the logits.
        logit_scale: Factor between the classifier's output and the logits. None: 30 for a cosine classifier, as in
            LDAM, else 1.
        class_counts: Training images of each class, in label order, when known.
        class_groups: Class indices of each group, such as head, mid and tail, when known.
        class_map: For an LDAM teacher converted from the authors' checkpoint, the row of each class in the head of that
            checkpoint, if the orders differ.
        prediction_sets: Thresholds of prediction sets, as `deitlt calibrate` fits them for these weights.
        **kwargs: Fields common to all configurations, such as `num_labels` and `id2label`.

    Raises:
        ValueError: If the backbone or classifier is unknown, `logit_scale` is not above 0, mean and std do not have
            one value per channel, or `class_counts`, `class_groups` or `class_map` do not fit the labels.
    """

    model_type = "flat_teacher"
    # Outputs that transformers' Trainer does not collect as predictions.
    keys_to_ignore_at_inference = ["projections"]

    # An explicit constructor: configurations are dataclasses from transformers 5.4 on only.
    def __init__(
        self,
        backbone: str = "resnet32",
        classifier: str = "linear",
        image_size: int = 32,
        num_channels: int = 3,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        projection_size: int = 0,
        logit_scale: float | None = None,
        class_counts: list[int] | None = None,
        class_groups: dict[str, list[int]] | None = None,
        class_map: list[int] | None = None,
        prediction_sets: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if backbone not in CIFAR_RESNETS and not backbone.startswith("timm/"):
            raise ValueError(
                f"unknown backbone {backbone!r}; choose one of {', '.join(CIFAR_RESNETS)}, or timm/NAME for a backbone "
                "of timm."
            )
        if classifier not in ("linear", "cosine"):
            raise ValueError(f"classifier must be 'linear' or 'cosine', got {classifier!r}.")
        if not len(image_mean) == len(image_std) == num_channels:
            raise ValueError(
                f"image_mean {image_mean} and image_std {image_std} need one value for each of the {num_channels} "
                "channels."
            )
        if logit_scale is None:
            logit_scale = 30.0 if classifier == "cosine" else 1.0
        if not logit_scale > 0:
            raise ValueError(f"logit_scale must be above 0, got {logit_scale}.")
        self.backbone = backbone
        self.classifier = classifier
        self.image_size = image_size
        self.num_channels = num_channels
        self.image_mean = image_mean
        self.image_std = image_std
        self.projection_size = projection_size
        self.logit_scale = logit_scale
        self.class_counts = class_counts
        self.class_groups = class_groups
        self.class_map = class_map
        self.prediction_sets = prediction_sets
        _check_classes(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "FlatTeacherConfig":
        """Makes a configuration from a dictionary, without class facts that do not apply to the wanted classes."""
        result = super().from_dict(_of_its_classes(config_dict, kwargs), **kwargs)
        _check_classes(result[0] if isinstance(result, tuple) else result)  # `kwargs` are set after the first check
        return result


# ---- Identical block in configuration_deitlt.py: each file is saved without the other. ----


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


def _check_classes(config: FlatTeacherConfig) -> None:
    num_labels = config.num_labels or 0  # None without classes
    if config.class_counts is not None and len(config.class_counts) != num_labels:
        raise ValueError(f"class_counts has {len(config.class_counts)} entries but the model has {num_labels} labels.")
    if config.class_groups is not None and not _fits(config.class_groups, num_labels):
        raise ValueError(f"class_groups has classes beyond the {num_labels} labels of the model.")
    if config.class_map is not None and sorted(config.class_map) != list(range(num_labels)):
        raise ValueError(
            f"class_map must hold each of 0 to {num_labels - 1} once; it begins with {config.class_map[:5]}."
        )


FlatTeacherConfig.register_for_auto_class()
