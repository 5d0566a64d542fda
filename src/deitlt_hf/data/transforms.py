"""Image transforms: timm's for training, transformers' image processor for evaluation and inference."""

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
CACHED_VALUES = 2**18  # floats that fit a core's cache


def image_processor(
    image_size: int,
    resize_size: int | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    background: str | None = None,
) -> BitImageProcessor:
    """Makes the processor used in evaluation, and saved for inference.

    It is BiT's, whose class has resized the shorter side in every version of transformers from 4.41 on. DeiT's own does
    so from 5.0 on only, and raises a `ValueError` in the 4.x of production servers.

    Args:
        image_size: Side of the square images that the model takes, in pixels.
        resize_size: What the shorter side is resized to (bicubic) before the centre crop; by default 256 / 224 of the
            image size for 224 pixels and more, as in the paper, and the image size itself below.
        mean: Mean for normalisation, one value a channel. ImageNet's, for every data set, as in the paper.
        std: Standard deviation for normalisation.
        background: Colour that shows through transparent pixels of training images, and later of the model's: a name
            of CSS or `#rrggbb`, kept in the processor. None leaves transparency out, as transformers' pipeline does.

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
        vars(processor)["background"] = colour(background)  # which transformers saves and loads as it is
    return processor


def model_processor(
    config: PreTrainedConfig, resize_size: int | None = None, background: str | None = None
) -> BitImageProcessor:
    """Makes the processor for a model of this package, which tells its image size and perhaps mean and std.

    Args:
        config: The model's configuration.
        resize_size: As for [`image_processor`].
        background: As for [`image_processor`].

    Raises:
        ValueError: If the resized image would be smaller than the model's, or the configuration tells no size.
    """
    if not isinstance(getattr(config, "image_size", None), int):
        raise ValueError(
            f"{type(config).__name__} does not tell the side of the model's images; give an image processor "
            "(processing_class=image_processor(SIZE))."
        )
    mean, std = getattr(config, "image_mean", IMAGENET_DEFAULT_MEAN), getattr(config, "image_std", IMAGENET_DEFAULT_STD)
    return image_processor(config.image_size, resize_size, mean, std, background)


@dataclass(frozen=True)
class ImageFormat:
    """What a model's images look like.

    Args:
        size: Height and width in pixels.
        mean: Mean that images in [0, 1] are normalised with, one value a channel.
        std: Standard deviation, likewise.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: BaseImageProcessor) -> "ImageFormat":
        """The format that an image processor makes: one of transformers', or of its wrapper of timm.

        Raises:
            ValueError: If the processor does not tell a size, or does more than to normalise.
        """
        if hasattr(processor, "data_config"):  # of transformers' wrapper of timm
            config = processor.data_config
            return cls(tuple(config["input_size"][1:]), tuple(config["mean"]), tuple(config["std"]))
        crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
        size = dict(crop or getattr(processor, "size", None) or {})
        shortest = size.get("shortest_edge")
        height, width = size.get("height") or shortest, size.get("width") or shortest
        if not height or not width:
            raise ValueError(f"{type(processor).__name__} tells no height and width of its images: {size}.")
        mean: Sequence[float] = getattr(processor, "image_mean", None) or (0.0, 0.0, 0.0)
        std: Sequence[float] = getattr(processor, "image_std", None) or (1.0, 1.0, 1.0)
        if not getattr(processor, "do_normalize", False):
            mean, std = (0.0,) * len(mean), (1.0,) * len(mean)
        # Rescaling is to [0, 1] by default; a processor that does otherwise normalises other values.
        scale = 255 * getattr(processor, "rescale_factor", 1.0) if getattr(processor, "do_rescale", False) else 255
        found = cls((height, width), tuple(value / scale for value in mean), tuple(value / scale for value in std))
        found._check(processor)
        return found

    def _check(self, processor: BaseImageProcessor) -> None:
        """Compares with what a processor makes, as some also reorder channels or rescale twice."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (len(self.mean), *self.size), generator=generator, dtype=torch.uint8)
        made = processor(pixels, do_resize=False, return_tensors="pt").pixel_values[0]
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        expected = (pixels / 255 - mean) / std
        if made.shape != expected.shape or not torch.allclose(made, expected, atol=1e-3):
            raise ValueError(
                f"{type(processor).__name__} changes images in other ways than by size, mean and standard deviation; "
                "give one that does not."
            )

    def __str__(self) -> str:
        height, width = self.size
        return f"{width} px" if height == width else f"{width} x {height} px"


class TrainTransform:
    """timm's training transform, in two steps: one an image, in the workers, and one a batch, on the device.

    Workers crop, flip and augment in bytes, which is a quarter of what normalised images take on their way to the
    device; there the batch is normalised and randomly erased. The draws and their distribution are those of timm's
    `create_transform`. Two things differ from its result on the same draw: resizing is torch's, at most two grey levels
    from Pillow's (0.01 in the mean), and a JPEG of which a region is at least four times as high and wide as the result
    is decoded at a fraction of its size (0.1 to 0.3 grey levels in the mean).

    Args:
        size: Side of the result, in pixels.
        crop: One of `TRAIN_CROPS`.
        hflip: Probability of a horizontal flip.
        augmentations: Operations on uint8 arrays of shape (size, size, 3) that come after the flip.
        mean: Mean for normalisation, one value a channel.
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
    ):
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
            image: Encoded, or decoded: a Pillow image in RGB, or uint8 of shape (height, width, 3).

        Returns:
            uint8 of shape (size, size, 3).
        """
        pixels = self.crop(np.asarray(image) if isinstance(image, Image.Image) else image, self.size)
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
            float32 of shape (batch, 3, size, size), in memory as channels last.
        """
        rows = pixels.flatten(2)
        mean, std = _channels(self.mean, pixels.device), _channels(self.std, pixels.device)
        scale, shift = (1 / (255 * std)).repeat(self.size), (-mean / std).repeat(self.size)
        # A few images at a time on a CPU: a batch does not fit the cache, and took twice as long.
        chunk = max(CACHED_VALUES // rows[0].numel(), 1) if pixels.device.type == "cpu" else len(pixels)
        batch = self._empty(rows) if pixels.device.type == "cpu" else torch.empty_like(rows, dtype=torch.float32)
        for image, row in zip(batch.split(chunk), rows.split(chunk), strict=True):
            torch.addcmul(shift, row.to(torch.float32), scale, out=image)
        batch = batch.view(-1, self.size, self.size, 3).permute(0, 3, 1, 2)
        if self.erasing is not None:
            self.erasing.device = batch.device
            self.erasing(batch)
        return batch

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        """Memory for a batch on a CPU: that of the batch before, if nobody has that any more.

        The first touch of fresh pages takes longer than the arithmetic.
        """
        if self._memory.shape != like.shape or sys.getrefcount(self._memory) > 2:
            self._memory = np.empty(like.shape, np.float32)
        return torch.from_numpy(self._memory)


def train_transform(
    processor: BitImageProcessor,
    crop: str = "random_resized",
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    hflip: float = 0.5,
    random_erasing: float = 0.25,
    color_jitter: float = 0.0,
) -> TrainTransform:
    """Makes the training transform: timm's, with the paper's defaults.

    Args:
        processor: Gives the image size, mean and standard deviation.
        crop: `random_resized`, or `padded`: shorter side resized to the image size, then a random crop with an eighth
            of it as padding (4 pixels for 32, as the authors do).
        auto_augment: Policy in timm's notation; None for none.
        hflip: Probability of a horizontal flip.
        random_erasing: Probability of random erasing (pixel noise, one area).
        color_jitter: Random change of brightness, contrast and saturation by up to this share; timm has it without a
            policy only.

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
    ours = (RandomResizedCropAndInterpolation, RandomHorizontalFlip, MaybeToTensor, Normalize, RandomErasing)
    augmentations = [on_arrays(stage) for stage in stages if not isinstance(stage, ours)]
    erasing = next((stage for stage in stages if isinstance(stage, RandomErasing)), None)
    return TrainTransform(size, crop, hflip, augmentations, images.mean, images.std, erasing)


def weak_transform(processor: BitImageProcessor, hflip: float = 0.5) -> TrainTransform:
    """Makes the in-distribution view of the ablation: a padded random crop and a flip, no strong augmentation."""
    return train_transform(processor, crop="padded", auto_augment=None, hflip=hflip, random_erasing=0.0)


def resize_and_renormalize(
    pixel_values: torch.Tensor, source: ImageFormat, target: ImageFormat, antialias: bool = True
) -> torch.Tensor:
    """Makes one model's normalised batch another's: bicubic resizing, then the other mean and standard deviation.

    Args:
        pixel_values: Normalised images; (batch, channels, height, width), of any height and width.
        source: The model that they were made for.
        target: The model that they are made for now.
        antialias: Smooth before making smaller, as Pillow does.
    """
    if pixel_values.shape[-2:] != target.size:
        pixel_values = _resize(pixel_values, target.size, antialias)
    if (source.mean, source.std) != (target.mean, target.std):
        old_mean, old_std, new_mean, new_std = (
            _channels(values, pixel_values.device).to(pixel_values.dtype).view(-1, 1, 1)
            for values in (source.mean, source.std, target.mean, target.std)
        )
        pixel_values = (pixel_values * old_std + old_mean - new_mean) / new_std
    return pixel_values


def _channels(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """A value a channel, made on the device: copying them there would make every step wait for it."""
    return torch.cat([torch.full((1,), float(value), device=device) for value in values])


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    """A tensor in the memory of an array, or of its copy if it may not be written to, about which torch would warn."""
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())


def _resize(images: torch.Tensor, size: tuple[int, int], antialias: bool = True) -> torch.Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=antialias)


def _random_resized_crop(image: EncodedImage | np.ndarray, size: int) -> np.ndarray:
    """A crop of 8 to 100 % of the area, with an aspect ratio of 3/4 to 4/3, resized to a square."""
    height, width = _height_width(image)
    shape = torch.empty((1, height, width), device="meta")  # timm asks for the size only
    region = RandomResizedCropAndInterpolation.get_params(shape, (0.08, 1.0), (3 / 4, 4 / 3))
    return _resized_region(image, region, (size, size))


def _padded_crop(image: EncodedImage | np.ndarray, size: int) -> np.ndarray:
    """The shorter side resized to the size, then a random crop with an eighth of it as padding."""
    height, width = _height_width(image)
    shorter = min(height, width)
    # Rounded down, as torchvision does.
    resized = _resized_region(image, (0, 0, height, width), (size * height // shorter, size * width // shorter))
    padding = size // 8
    height, width, _ = resized.shape
    top, left = (
        torch.randint(0, side + 2 * padding - size + 1, (1,)).item() - padding for side in (height, width)
    )  # torchvision's draws
    crop = np.zeros((size, size, 3), np.uint8)
    rows, columns = slice(max(top, 0), min(top + size, height)), slice(max(left, 0), min(left + size, width))
    crop[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = resized[rows, columns]
    return crop


def _height_width(image: EncodedImage | np.ndarray) -> tuple[int, int]:
    return image.size[::-1] if isinstance(image, EncodedImage) else image.shape[:2]


def _resized_region(
    image: EncodedImage | np.ndarray, region: tuple[int, int, int, int], size: tuple[int, int]
) -> np.ndarray:
    """A region (top, left, height, width) resized to a size, decoded no larger than it needs to be."""
    if isinstance(image, EncodedImage):
        reduced = image.decode_region(region, size)
        if reduced is not None:
            return reduced
        image = image.decode()
    top, left, height, width = region
    pixels = image[top : top + height, left : left + width]
    if pixels.shape[:2] == size:
        return pixels
    # Permuted last, so that torch sees channels-last memory, works in it and gives it back.
    batch = _tensor(pixels).unsqueeze(0).permute(0, 3, 1, 2)
    return _resize(batch, size)[0].permute(1, 2, 0).numpy()
