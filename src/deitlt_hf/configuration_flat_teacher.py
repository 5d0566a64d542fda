"""Configuration of the flat CNN teacher."""

from transformers import PreTrainedConfig

CIFAR_RESNETS = ("resnet20", "resnet32", "resnet44", "resnet56")


class FlatTeacherConfig(PreTrainedConfig):
    """Configuration of a CNN that teaches a DeiT-LT student.

    Args:
        backbone: A CIFAR ResNet (`resnet20`, `resnet32`, `resnet44`, `resnet56`; He et al., 2016, section 4.2) or
            `timm/NAME` for any backbone of timm, such as `timm/resnet50`.
        classifier: `linear`, or `cosine`: the cosine between feature and class weight, as LDAM trains it.
        image_size: Side of the square images it takes, in pixels.
        num_channels: Channels of the images.
        image_mean: Mean that its images are normalised with, one value a channel. ImageNet's by default.
        image_std: Standard deviation that its images are normalised with.
        class_counts: Training images of each class, in label order, when known.
        class_map: For a teacher converted from the authors' checkpoint, the row of its head there for each class, if
            they differ.

    Raises:
        ValueError: If the backbone or classifier is unknown, or mean and std do not have one value a channel.
    """

    model_type = "flat_teacher"

    backbone: str = "resnet32"
    classifier: str = "linear"
    image_size: int = 32
    num_channels: int = 3
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    class_counts: list[int] | None = None
    class_map: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.backbone not in CIFAR_RESNETS and not self.backbone.startswith("timm/"):
            raise ValueError(
                f"unknown backbone {self.backbone!r}; choose one of {', '.join(CIFAR_RESNETS)}, or timm/NAME for a "
                "backbone of timm."
            )
        if self.classifier not in ("linear", "cosine"):
            raise ValueError(f"classifier must be 'linear' or 'cosine', got {self.classifier!r}.")
        if not len(self.image_mean) == len(self.image_std) == self.num_channels:
            raise ValueError(
                f"image_mean {self.image_mean} and image_std {self.image_std} need one value for each of the "
                f"{self.num_channels} channels."
            )


FlatTeacherConfig.register_for_auto_class()
