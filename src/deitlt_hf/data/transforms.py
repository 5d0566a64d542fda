"""Image transforms: timm's for training, transformers' image processor for evaluation and inference."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, RandAugment
from torch.nn import functional as F
from torchvision import transforms
from transformers import DeiTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

TRAIN_CROPS = ("random_resized", "padded")


def image_processor(
    image_size: int,
    resize_size: int | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> DeiTImageProcessor:
    """Makes the processor used in evaluation, and saved for inference.

    Args:
        image_size: Side of the square images that the model takes, in pixels.
        resize_size: What the shorter side is resized to (bicubic) before the centre crop; by default 256 / 224 of the
            image size for 224 pixels and more, as in the paper, and the image size itself below.
        mean: Mean for normalisation, one value a channel. ImageNet's, for every data set, as in the paper.
        std: Standard deviation for normalisation.

    Raises:
        ValueError: If the resized image would be smaller than the crop.
    """
    if resize_size is None:
        resize_size = image_size * 256 // 224 if image_size >= 224 else image_size
    if resize_size < image_size:
        raise ValueError(f"resize_size {resize_size} is smaller than image_size {image_size}.")
    return DeiTImageProcessor(
        size={"shortest_edge": resize_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )


def train_transform(
    processor: DeiTImageProcessor,
    crop: str = "random_resized",
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    hflip: float = 0.5,
    random_erasing: float = 0.25,
) -> Callable[[Image.Image], torch.Tensor]:
    """Makes the training transform: timm's, with the paper's defaults.

    Args:
        processor: Gives the image size, mean and standard deviation.
        crop: `random_resized`, or `padded`: shorter side resized to the image size, then a random crop with an eighth
            of it as padding (4 pixels for 32, as the authors do).
        auto_augment: Policy in timm's notation; None for none.
        hflip: Probability of a horizontal flip.
        random_erasing: Probability of random erasing (pixel noise, one area).

    Raises:
        ValueError: If the crop or the policy is unknown.
    """
    if crop not in TRAIN_CROPS:
        raise ValueError(f"train_crop must be one of {', '.join(TRAIN_CROPS)}, got {crop!r}.")
    size = processor.crop_size["height"]
    try:
        transform = create_transform(
            size,
            is_training=True,
            hflip=hflip,
            color_jitter=None,
            auto_augment=auto_augment,
            interpolation="bicubic",
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            re_prob=random_erasing,
            re_mode="pixel",
            re_count=1,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm does not know the augmentation policy {auto_augment!r}: {error}.") from error
    if crop == "padded":
        transform.transforms[0] = transforms.Compose(
            [
                transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
                transforms.RandomCrop(size, padding=size // 8),
            ]
        )
    _allow_zero_bits(transform)
    return transform


def weak_transform(processor: DeiTImageProcessor, hflip: float = 0.5) -> Callable[[Image.Image], torch.Tensor]:
    """Makes the in-distribution view of the ablation: a padded random crop and a flip, no strong augmentation."""
    return train_transform(processor, crop="padded", auto_augment=None, hflip=hflip, random_erasing=0.0)


def resize_and_renormalize(
    pixel_values: torch.Tensor,
    size: int,
    from_mean_std: tuple[list[float], list[float]],
    to_mean_std: tuple[list[float], list[float]],
) -> torch.Tensor:
    """Makes one model's normalised batch another's: bicubic resizing, then the other mean and standard deviation.

    Args:
        pixel_values: Normalised images; (batch, channels, height, width).
        size: Side of the result, in pixels.
        from_mean_std: Mean and standard deviation of the batch.
        to_mean_std: Those of the result.
    """
    if pixel_values.shape[-1] != size or pixel_values.shape[-2] != size:
        pixel_values = F.interpolate(pixel_values, (size, size), mode="bicubic", antialias=True)
    if from_mean_std != to_mean_std:
        old_mean, old_std, new_mean, new_std = (
            pixel_values.new_tensor(values).view(-1, 1, 1) for pair in (from_mean_std, to_mean_std) for values in pair
        )
        pixel_values = (pixel_values * old_std + old_mean - new_mean) / new_std
    return pixel_values


def _allow_zero_bits(transform: transforms.Compose) -> None:
    """Lets RandAugment's posterize keep 0 bits, which Pillow 13 refuses (seen with timm 1.0.31): a black image."""
    for step in transform.transforms:
        for operation in step.ops if isinstance(step, RandAugment) else ():
            if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
                operation.aug_fn = _ZeroBitsPosterize(operation.aug_fn)


class _ZeroBitsPosterize:
    def __init__(self, posterize):
        self.posterize = posterize

    def __call__(self, image, bits_to_keep, **kwargs):
        if bits_to_keep == 0:
            return Image.new(image.mode, image.size)
        return self.posterize(image, bits_to_keep, **kwargs)
