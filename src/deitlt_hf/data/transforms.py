"""Image transforms: timm's transforms for training, an image processor of transformers for evaluation and inference."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch.nn import functional as F
from torchvision.transforms import Normalize, RandomHorizontalFlip
from transformers import BaseImageProcessor, BitImageProcessor, PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .augment import on_arrays
from .image_rule import colour
from .images import EncodedImage

TRAIN_CROPS = ("random_resized", "padded")
CACHED_VALUES = 2**18  # number of floats that fit into the cache of a core


def image_processor(
    image_size: int,
    resize_size: int | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    background: str | None = None,
) -> BitImageProcessor:
    """Makes the image processor that evaluation uses and that is saved for inference.

    It is BiT's processor, which resizes the shorter side in every version of transformers from 4.41 on. DeiT's
    processor does so only from 5.0 on, and raises a `ValueError` in the 4.x versions of production servers.

    Args:
        image_size: Side of the square input images of the model, in pixels.
        resize_size: Length to which the shorter side is resized (bicubic) before the centre crop. By default 256 / 224
            of the image size for 224 pixels and more, as in the paper, and the image size itself below.
        mean: Mean for normalisation, one value per channel. ImageNet's for every data set, as in the paper.
        std: Standard deviation for normalisation.
        background: Background colour behind transparent pixels in training and inference: a CSS name or `#rrggbb`,
            saved with the processor. None ignores transparency, as transformers' pipeline does.

    Raises:
        ValueError: If the resized image would be smaller than the crop, or the colour is unknown.
    """
    if resize_size is None:
        resize_size = image_size * 256 // 224 if image_size >= 224 else image_size
    if resize_size < image_size:
        raise ValueError(
            f"images cannot be resized to {resize_size} and cropped to image_size {image_size}; resize to {image_size} "
            "or more."
        )
    processor = BitImageProcessor(
        size={"shortest_edge": resize_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )
    if background is not None:
        vars(processor)["background"] = colour(background)  # transformers saves and loads unknown attributes unchanged
    return processor


def model_processor(
    config: PreTrainedConfig, resize_size: int | None = None, background: str | None = None
) -> BitImageProcessor:
    """Makes the image processor for a model whose configuration has an image size and optionally mean and std.

    Args:
        config: The model's configuration.
        resize_size: See [`image_processor`].
        background: See [`image_processor`].

    Raises:
        ValueError: If the resized image would be smaller than the model's, or `image_size` is not an integer.
    """
    if not isinstance(getattr(config, "image_size", None), int):
        raise ValueError(
            f"{type(config).__name__} has no integer image_size; give an image processor "
            "(processing_class=image_processor(SIZE))."
        )
    mean = getattr(config, "image_mean", None) or IMAGENET_DEFAULT_MEAN
    std = getattr(config, "image_std", None) or IMAGENET_DEFAULT_STD
    return image_processor(config.image_size, resize_size, mean, std, background)


@dataclass(frozen=True)
class ImageFormat:
    """Size and normalisation of a model's input images.

    Args:
        size: Height and width in pixels.
        mean: Mean for normalising images in [0, 1], one value per channel.
        std: Standard deviation for normalising images in [0, 1], one value per channel.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: BaseImageProcessor) -> "ImageFormat":
        """Reads the format from an image processor of transformers, including its wrapper for timm models.

        Raises:
            ValueError: If the processor has no size, or changes pixels by more than normalisation.
        """
        if hasattr(processor, "data_config"):  # transformers' wrapper for timm models
            config = processor.data_config
            return cls(tuple(config["input_size"][1:]), tuple(config["mean"]), tuple(config["std"]))
        crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
        size = dict(crop or getattr(processor, "size", None) or {})
        shortest = size.get("shortest_edge")
        height, width = size.get("height") or shortest, size.get("width") or shortest
        if not height or not width:
            raise ValueError(f"{type(processor).__name__} has no height and width for its images: {size}.")
        mean: Sequence[float] = getattr(processor, "image_mean", None) or (0.0, 0.0, 0.0)
        std: Sequence[float] = getattr(processor, "image_std", None) or (1.0, 1.0, 1.0)
        if not getattr(processor, "do_normalize", False):
            mean, std = (0.0,) * len(mean), (1.0,) * len(mean)
        # Mean and std refer to the rescaled values, by default in [0, 1]; convert them if the range is another.
        scale = 255 * getattr(processor, "rescale_factor", 1.0) if getattr(processor, "do_rescale", False) else 255
        found = cls((height, width), tuple(value / scale for value in mean), tuple(value / scale for value in std))
        found._check(processor)
        return found

    def _check(self, processor: BaseImageProcessor) -> None:
        """Compares the format with the output of the processor, since some also reorder channels or rescale twice."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (len(self.mean), *self.size), generator=generator, dtype=torch.uint8)
        made = processor(pixels, do_resize=False, return_tensors="pt").pixel_values[0]
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        expected = (pixels / 255 - mean) / std
        # The tolerance is far below a grey level (0.004 / std) and far above rounding.
        if made.shape != expected.shape or not torch.allclose(made, expected, atol=1e-3):
            raise ValueError(
                f"{type(processor).__name__} changes images in other ways than by size, mean and standard deviation; "
                "give a processor that changes only these."
            )

    def visible(self, pixel_values: torch.Tensor) -> np.ndarray:
        """Images in [0, 1] of a normalised batch; float32 of shape (batch, height, width, channels)."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixel_values.cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def __str__(self) -> str:
        height, width = self.size
        return f"{width} px" if height == width else f"{width} x {height} px"


class TrainTransform:
    """timm's training transform in two steps: per image in the workers, and per batch on the device.

    Workers crop, flip and augment uint8 images, which need a quarter of the transfer of normalised images. The batch is
    normalised and randomly erased on the device. The random draws and their distribution are those of timm's
    `create_transform`. For the same draw, two things differ from timm: resizing uses torch, with at most two grey
    levels of difference from Pillow (0.01 on average); and a JPEG is decoded at a fraction of its size if the cropped
    region is at least four times as high and wide as the result (0.1 to 0.3 grey levels on average).

    Args:
        size: Side of the result, in pixels.
        crop: One of `TRAIN_CROPS`.
        hflip: Probability of a horizontal flip.
        augmentations: Operations on uint8 arrays of shape (size, size, 3), applied after the flip.
        mean: Mean for normalisation, one value per channel.
        std: Standard deviation for normalisation.
        erasing: Random erasing of normalised images; None for none.
    """

    def __init__(
        self,
        size: int,
        crop: str,
        hflip: float,
        augmentations: Sequence[Callable[[np.ndarray], np.ndarray]],
        mean: Sequence[float],
        std: Sequence[float],
        erasing: RandomErasing | None,
    ) -> None:
        self.size = size
        self.crop = _random_resized_crop if crop == "random_resized" else _padded_crop
        self.hflip = hflip
        self.augmentations = list(augmentations)
        self.mean, self.std = tuple(mean), tuple(std)
        self.erasing = erasing
        self._memory = np.empty(0, np.float32)

    def __call__(self, image: EncodedImage | Image.Image | np.ndarray) -> torch.Tensor:
        """Crops, flips and augments an image.

        Args:
            image: Encoded image, or a decoded one: a Pillow image in RGB, or uint8 of shape (height, width, 3).

        Returns:
            uint8 of shape (size, size, 3).
        """
        pixels = self.crop(np.asarray(image) if isinstance(image, Image.Image) else image, self.size)
        # Drawn from torch as RandomHorizontalFlip does, and not at all for 0, where timm leaves the flip out.
        if self.hflip > 0 and torch.rand(1).item() < self.hflip:
            pixels = _tensor(pixels).flip(1).numpy()
        if self.augmentations:
            pixels = np.ascontiguousarray(pixels)
            for augmentation in self.augmentations:
                pixels = augmentation(pixels)
        return _tensor(pixels).contiguous()

    def finish(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalises and randomly erases a batch on its device.

        Args:
            pixels: uint8 of shape (batch, size, size, 3).

        Returns:
            float32 of shape (batch, 3, size, size), in channels-last memory format.
        """
        rows = pixels.flatten(2)
        mean, std = _channels(self.mean, pixels.device), _channels(self.std, pixels.device)
        # (x / 255 - mean) / std as x * scale + shift: one pass over the values instead of three.
        scale, shift = (1 / (255 * std)).repeat(self.size), (-mean / std).repeat(self.size)
        # On a CPU, chunks that fit the cache take half the time of a whole batch.
        chunk = max(CACHED_VALUES // rows[0].numel(), 1) if pixels.device.type == "cpu" else len(pixels)
        batch = self._empty(rows) if pixels.device.type == "cpu" else torch.empty_like(rows, dtype=torch.float32)
        for image, row in zip(batch.split(chunk), rows.split(chunk), strict=True):
            torch.addcmul(shift, row.to(torch.float32), scale, out=image)
        batch = batch.view(-1, self.size, self.size, 3).permute(0, 3, 1, 2)
        if self.erasing is not None:
            self.erasing.device = batch.device  # timm's default is CUDA, also without a GPU
            self.erasing(batch)
        return batch

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        """Allocates a batch on a CPU. Memory of the previous batch is reused if nothing refers to it any more.

        The first write to new memory pages takes longer than the arithmetic.
        """
        # Two references are the attribute and the argument of `getrefcount`; a tensor in use holds another.
        if self._memory.shape != like.shape or sys.getrefcount(self._memory) > 2:
            self._memory = np.empty(like.shape, np.float32)
        return torch.from_numpy(self._memory)


def train_transform(
    processor: BaseImageProcessor,
    crop: str = "random_resized",
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    hflip: float = 0.5,
    random_erasing: float = 0.25,
    color_jitter: float = 0.0,
) -> TrainTransform:
    """Makes timm's training transform with the paper's defaults.

    Args:
        processor: Image processor that defines the image size, mean and standard deviation.
        crop: `random_resized`, or `padded`: resize the shorter side to the image size, then take a random crop with an
            eighth of the size as padding (4 pixels for 32, as in the authors' code).
        auto_augment: Augmentation policy in timm's notation; None for no policy.
        hflip: Probability of a horizontal flip.
        random_erasing: Probability of random erasing (pixel noise, one area).
        color_jitter: Random change of brightness, contrast and saturation by up to this share; timm applies it only
            without a policy.

    Raises:
        ValueError: If the crop or the policy is unknown, or the processor's images are not square.
    """
    if crop not in TRAIN_CROPS:
        raise ValueError(f"train_crop must be one of {', '.join(TRAIN_CROPS)}, got {crop!r}.")
    images = ImageFormat.of(processor)
    size = images.size[0]
    if images.size != (size, size):
        raise ValueError(f"training images are square, but the image processor makes {images}.")
    try:
        stages = create_transform(
            size,
            is_training=True,
            hflip=hflip,
            # None, because timm would add a jitter of 0 as an operation.
            color_jitter=color_jitter or None,  # type: ignore[arg-type]
            auto_augment=auto_augment,
            interpolation="bicubic",
            mean=images.mean,
            std=images.std,
            re_prob=random_erasing,
            re_mode="pixel",
            re_count=1,
        ).transforms
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm does not know the augmentation policy {auto_augment!r}: {error}.") from error
    # These stages have their own implementation in `TrainTransform`; what remains are the policy and the colour jitter.
    ours = (RandomResizedCropAndInterpolation, RandomHorizontalFlip, MaybeToTensor, Normalize, RandomErasing)
    augmentations = [on_arrays(stage) for stage in stages if not isinstance(stage, ours)]
    erasing = next((stage for stage in stages if isinstance(stage, RandomErasing)), None)
    return TrainTransform(size, crop, hflip, augmentations, images.mean, images.std, erasing)


def weak_transform(processor: BaseImageProcessor, hflip: float = 0.5) -> TrainTransform:
    """Makes the weak transform for the in-distribution ablation: a padded random crop and a flip only."""
    return train_transform(processor, crop="padded", auto_augment=None, hflip=hflip, random_erasing=0.0)


def resize_and_renormalize(
    pixel_values: torch.Tensor, source: ImageFormat, target: ImageFormat, antialias: bool = True
) -> torch.Tensor:
    """Converts a normalised batch from one model's format to another's: bicubic resizing, then renormalisation.

    Args:
        pixel_values: Normalised images; (batch, channels, height, width), of any height and width.
        source: Format of the given images.
        target: Format of the result.
        antialias: Smooth before downscaling, as Pillow does. The authors' environment did not: their torchvision 0.15
            resized tensors without.
    """
    pixel_values = resize(pixel_values, target.size, antialias)
    if (source.mean, source.std) != (target.mean, target.std):
        old_mean, old_std, new_mean, new_std = (
            _channels(values, pixel_values.device).to(pixel_values.dtype).view(-1, 1, 1)
            for values in (source.mean, source.std, target.mean, target.std)
        )
        pixel_values = (pixel_values * old_std + old_mean - new_mean) / new_std
    return pixel_values


def _channels(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """One value per channel, created on the device: a copy from the host would synchronise in every step."""
    return torch.cat([torch.full((1,), float(value), device=device) for value in values])


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    """A tensor that shares the memory of an array. Read-only arrays are copied, since torch would warn."""
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())


def resize(images: torch.Tensor, size: tuple[int, int], antialias: bool = True) -> torch.Tensor:
    """Resizes a batch of images (batch, channels, height, width) to a height and width; bicubic."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=antialias)


def _random_resized_crop(image: EncodedImage | np.ndarray, size: int) -> np.ndarray:
    """Takes a random crop of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, and resizes it to a square."""
    height, width = _height_width(image)
    shape = torch.empty((1, height, width), device="meta")  # timm reads only the size
    region = RandomResizedCropAndInterpolation.get_params(shape, (0.08, 1.0), (3 / 4, 4 / 3))
    return resized_region(image, region, (size, size))


def _padded_crop(image: EncodedImage | np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to `size`, then takes a random crop with an eighth of `size` as padding."""
    resized = resized_to(image, size)
    padding = size // 8
    height, width, _ = resized.shape
    top, left = (
        torch.randint(0, side + 2 * padding - size + 1, (1,)).item() - padding for side in (height, width)
    )  # the same draws as torchvision's RandomCrop
    crop = np.zeros((size, size, 3), np.uint8)
    rows, columns = slice(max(top, 0), min(top + size, height)), slice(max(left, 0), min(left + size, width))
    crop[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = resized[rows, columns]
    return crop


def _height_width(image: EncodedImage | np.ndarray) -> tuple[int, int]:
    return image.size[::-1] if isinstance(image, EncodedImage) else image.shape[:2]


def resized_to(image: EncodedImage | np.ndarray, side: int) -> np.ndarray:
    """Resizes an image so that its shorter side has this length, and rounds the other down, as torchvision does."""
    height, width = _height_width(image)
    shorter = min(height, width)
    return resized_region(image, (0, 0, height, width), (side * height // shorter, side * width // shorter))


def resized_region(
    image: EncodedImage | np.ndarray, region: tuple[int, int, int, int], size: tuple[int, int]
) -> np.ndarray:
    """Resizes a region (top, left, height, width) of an image, decoded at no higher resolution than needed."""
    if isinstance(image, EncodedImage):
        reduced = image.decode_region(region, size)
        if reduced is not None:
            return reduced
        image = image.decode()
    top, left, height, width = region
    pixels = image[top : top + height, left : left + width]
    if pixels.shape[:2] == size:
        return pixels
    # Permuted after the batch dimension is added: torch then sees channels-last memory and keeps this layout.
    batch = _tensor(pixels).unsqueeze(0).permute(0, 3, 1, 2)
    return resize(batch, size)[0].permute(1, 2, 0).numpy()
