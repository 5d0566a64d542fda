"""Faster array versions of timm's RandAugment operations, with the same pixels.

Pillow computes look-up tables in Python loops, shears and translates an image with a general affine transform (16
products per value where 4 are enough), and smooths with a general filter. The functions here replace those operations,
for RGB images as uint8 arrays of shape (height, width, 3). `tests/test_augment.py` compares each with timm's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data.auto_augment import AugmentOp, RandAugment

Operation = Callable[..., np.ndarray]

# Below this number of pixels Pillow's general functions are faster than these (fewer steps), and its tables are slower.
SMALL = 8_192
LEVELS = np.arange(256)
CHANNELS = np.array([0, 256, 512], np.uint16)


def on_arrays(augmentation: Callable) -> Callable[[np.ndarray], np.ndarray]:
    """Converts a timm augmentation of Pillow images to one of arrays.

    The random draws and magnitudes of RandAugment stay those of timm. The functions of its operations are replaced, in
    place.
    """
    if not isinstance(augmentation, RandAugment):
        return partial(_with_pillow, augmentation)
    for operation in augmentation.ops:
        if isinstance(operation, AugmentOp):
            name = operation.name.removesuffix("Increasing")
            operation.aug_fn = FASTER.get(name) or partial(_with_pillow, operation.aug_fn)  # type: ignore[arg-type]
    ops = np.empty(len(augmentation.ops), dtype=object)  # numpy's choice would convert a list in each call
    ops[:] = augmentation.ops
    augmentation.ops = ops
    return augmentation


def _with_pillow(operation: Callable, pixels: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
    return _array(operation(_image(pixels), *args, **kwargs))


def _image(pixels: np.ndarray) -> Image.Image:
    """Like `Image.fromarray`, without its second copy and its checks."""
    return Image.frombuffer("RGB", pixels.shape[1::-1], np.ascontiguousarray(pixels), "raw", "RGB", 0, 1)


def _array(image: Image.Image) -> np.ndarray:
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def invert(pixels: np.ndarray, **_: Any) -> np.ndarray:
    """Inverts the colours: 255 minus each value."""
    return ~pixels


def posterize(pixels: np.ndarray, bits: int, **_: Any) -> np.ndarray:
    """Keeps the highest bits of each value. Values of 0 or less, which timm draws and Pillow 13 refuses, give black."""
    return pixels if bits >= 8 else pixels & np.uint8(256 - 2 ** (8 - max(bits, 0)))


def solarize(pixels: np.ndarray, threshold: int, **_: Any) -> np.ndarray:
    """Inverts values at or above the threshold."""
    if threshold > 255:
        return pixels
    return pixels ^ (np.uint8(255) * (pixels >= np.uint8(threshold)).view(np.uint8))


def solarize_add(pixels: np.ndarray, add: int, threshold: int = 128, **_: Any) -> np.ndarray:
    """Adds a constant to values below the threshold. timm adds at most 128, so no sum exceeds 255."""
    return pixels + np.uint8(add) * (pixels < np.uint8(threshold)).view(np.uint8)


def auto_contrast(pixels: np.ndarray, **_: Any) -> np.ndarray:
    """Stretches each channel to the full range of values."""
    if pixels.size >= 3 * SMALL:
        return _with_pillow(ImageOps.autocontrast, pixels)
    low, high = np.array(_image(pixels).getextrema()).T[:, :, None]
    scale = 255.0 / np.maximum(high - low, 1)
    stretched = (LEVELS * scale + -low * scale).clip(0, 255).astype(np.uint8)
    return _look_up(pixels, np.where(high > low, stretched, LEVELS))  # as in Pillow, a constant channel stays


def equalize(pixels: np.ndarray, **_: Any) -> np.ndarray:
    """Equalizes the histogram of each channel."""
    if pixels.size >= 3 * SMALL:
        return _with_pillow(ImageOps.equalize, pixels)
    # The table of Pillow's `ImageOps.equalize`, for all channels at once.
    image = _image(pixels)
    counts = np.array(image.histogram()).reshape(3, 256)
    last = counts[np.arange(3), np.array(image.getextrema())[:, 1]][:, None]
    step = (pixels.size // 3 - last) // 255
    flat = (step // 2 + counts.cumsum(axis=1) - counts) // np.maximum(step, 1)
    return _look_up(pixels, np.where(step > 0, np.minimum(flat, 255), LEVELS))


def _look_up(pixels: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Looks up each value in the table of its channel; tables have the shape (3, 256)."""
    return tables.astype(np.uint8).take(pixels + CHANNELS)


def sharpness(pixels: np.ndarray, factor: float, **_: Any) -> np.ndarray:
    """Blends the smoothed image (factor 0) with the image (factor 1); larger factors sharpen."""
    image = _image(pixels)
    if image.width * image.height < SMALL:
        return _array(ImageEnhance.Sharpness(image).enhance(factor))
    values = pixels.astype(np.int16)
    rows = values[:-2] + values[1:-1] + values[2:]
    inner = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * values[1:-1, 1:-1]
    smooth = pixels.copy()  # its border stays, as in Pillow
    smooth[1:-1, 1:-1] = (2 * inner + 13) // 26  # thirteenths, rounded
    return _array(Image.blend(_image(smooth), image, factor))


def shear_x(pixels: np.ndarray, factor: float, **kwargs: Any) -> np.ndarray:
    """Shears horizontally: shifts each row in proportion to its distance from the top."""
    return _move(pixels, 1, factor * (np.arange(pixels.shape[0]) + 0.5), (1, factor, 0, 0, 1, 0), **kwargs)


def shear_y(pixels: np.ndarray, factor: float, **kwargs: Any) -> np.ndarray:
    """Shears vertically: shifts each column in proportion to its distance from the left."""
    return _move(pixels, 0, factor * (np.arange(pixels.shape[1]) + 0.5), (1, 0, 0, factor, 1, 0), **kwargs)


def translate_x(pixels: np.ndarray, share: float, **kwargs: Any) -> np.ndarray:
    """Translates the image horizontally by a share of its width."""
    distance = share * pixels.shape[1]
    return _move(pixels, 1, np.full(pixels.shape[0], distance), (1, 0, distance, 0, 1, 0), **kwargs)


def translate_y(pixels: np.ndarray, share: float, **kwargs: Any) -> np.ndarray:
    """Translates the image vertically by a share of its height."""
    distance = share * pixels.shape[0]
    return _move(pixels, 0, np.full(pixels.shape[1], distance), (1, 0, 0, 0, 1, distance), **kwargs)


FASTER: dict[str, Operation] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateXRel": translate_x,
    "TranslateYRel": translate_y,
}


def _move(
    pixels: np.ndarray,
    axis: int,
    distances: np.ndarray,
    matrix: Sequence[float],
    fillcolor: tuple[int, ...],
    resample: int,
) -> np.ndarray:
    """Shifts rows left (axis 1) or columns up (axis 0) by their distances; `matrix` is the same shift for Pillow."""
    height, width, _ = pixels.shape
    if resample == Image.Resampling.BICUBIC and height * width >= SMALL:
        return _cubic_shift(pixels, axis, distances, fillcolor)
    image = _image(pixels)
    transform = Image.Transform.AFFINE
    return _array(image.transform(image.size, transform, matrix, fillcolor=fillcolor, resample=resample))


def _cubic_shift(pixels: np.ndarray, axis: int, distances: np.ndarray, fillcolor: Sequence[int]) -> np.ndarray:
    """Shifts lines with the cubic interpolation of Pillow's transform (a = -1)."""
    length, lines = pixels.shape[axis], pixels.shape[1 - axis]
    # Group consecutive lines with the same whole distance on the same side of half a pixel: one slice serves a group.
    halves = np.floor(2 * distances)
    starts = [0, *(np.flatnonzero(halves[1:] != halves[:-1]) + 1).tolist()]
    groups = [slice(*ends) for ends in zip(starts, [*starts[1:], lines], strict=True)]
    floors = np.floor(distances)
    values = torch.from_numpy(_taps(pixels, axis, groups, floors[starts].astype(np.int64).tolist())).flatten(1).float()
    d = (distances - floors).astype(np.float32)
    d = d[:, None] if axis == 1 else d.repeat(3)[None]
    # Weights of the four taps of cubic convolution with a = -1.
    weights = (d * (d * (2 - d) - 1), d * d * (d - 2) + 1, d * (d * (1 - d) + 1), d * d * (d - 1))
    step = 3 if axis == 1 else 1  # values from one tap to the next
    moved = values.narrow(axis, 0, step * length) * torch.from_numpy(weights[0])
    for tap in (1, 2, 3):
        moved.addcmul_(values.narrow(axis, step * tap, step * length), torch.from_numpy(weights[tap]))
    # Pillow rounds down, so a float32 error must not push a whole number below itself.
    result = moved.add_(1e-3).clamp_(0, 255).numpy().astype(np.uint8).reshape(pixels.shape)

    # As in Pillow, a pixel whose source centre is outside the image gets the fill colour.
    fill = np.array(fillcolor, np.uint8)
    firsts = np.ceil(-distances[starts] - 0.5).astype(np.int64)
    for group, first, end in zip(groups, firsts.tolist(), (firsts + length).tolist(), strict=True):
        if first > 0:
            _by_line(result, axis)[group, :first] = fill
        if end < length:
            _by_line(result, axis)[group, max(end, 0) :] = fill
    return result


def _taps(pixels: np.ndarray, axis: int, groups: Sequence[slice], distances: Sequence[int]) -> np.ndarray:
    """Groups of lines, shifted by whole distances; three pixels longer than the lines, for four taps at each pixel."""
    length, lines = pixels.shape[axis], pixels.shape[1 - axis]

    def empty(length: int) -> np.ndarray:
        return np.empty((lines, length, 3) if axis == 1 else (length, lines, 3), np.uint8)

    # The four taps need one pixel before and two after each line; the ends are repeated.
    before, after = 1 + max(0, -min(distances)), 2 + max(0, max(distances))
    padded, own = _by_line(empty(before + length + after), axis), _by_line(pixels, axis)
    padded[:, before : before + length] = own
    padded[:, :before] = own[:, :1]
    padded[:, before + length :] = own[:, -1:]
    taps = empty(length + 3)
    for group, distance in zip(groups, distances, strict=True):
        first = before - 1 + distance
        _by_line(taps, axis)[group] = padded[group, first : first + length + 3]
    return taps


def _by_line(array: np.ndarray, axis: int) -> np.ndarray:
    """A view whose first axis counts the lines that lie along `axis`."""
    return array if axis == 1 else array.swapaxes(0, 1)
