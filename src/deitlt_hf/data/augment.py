"""timm's RandAugment operations on arrays, faster and with the same pixels.

Pillow computes look-up tables in Python loops, shears and moves an image as if it were turned (16 products a value
where 4 do), and smooths with a general filter. Here are functions in the place of those, for RGB images as uint8 arrays
of shape (height, width, 3); `tests/test_augment.py` compares every operation with timm's.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data.auto_augment import AugmentOp, RandAugment

Operation = Callable[..., np.ndarray]

# Below so many pixels Pillow's general functions are faster than ours, which have more steps, and its tables slower.
SMALL = 8_192
LEVELS = np.arange(256)
CHANNELS = np.array([0, 256, 512], np.uint16)


def on_arrays(augmentation: Callable) -> Callable[[np.ndarray], np.ndarray]:
    """Makes an augmentation of timm's take and give arrays in place of Pillow images.

    Draws and magnitudes of RandAugment stay timm's; the functions of its operations are replaced, in place.
    """
    if not isinstance(augmentation, RandAugment):
        return partial(_with_pillow, augmentation)
    for operation in augmentation.ops:
        if isinstance(operation, AugmentOp):
            name = operation.name.removesuffix("Increasing")
            operation.aug_fn = FASTER.get(name) or partial(_with_pillow, operation.aug_fn)  # type: ignore[arg-type]
    ops = np.empty(len(augmentation.ops), dtype=object)  # timm draws from it, and would make it of the list each time
    ops[:] = augmentation.ops
    augmentation.ops = ops
    return augmentation


def _with_pillow(operation: Callable, pixels: np.ndarray, *args, **kwargs) -> np.ndarray:
    return _array(operation(_image(pixels), *args, **kwargs))


def _image(pixels: np.ndarray) -> Image.Image:
    """As `Image.fromarray`, which copies twice and asks more."""
    return Image.frombuffer("RGB", pixels.shape[1::-1], np.ascontiguousarray(pixels), "raw", "RGB", 0, 1)


def _array(image: Image.Image) -> np.ndarray:
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def invert(pixels: np.ndarray, **_) -> np.ndarray:
    """255 minus each value."""
    return ~pixels


def posterize(pixels: np.ndarray, bits: int, **_) -> np.ndarray:
    """Keeps the highest bits of each value. 0 bits and fewer, which timm draws and Pillow 13 refuses, give black."""
    return pixels if bits >= 8 else pixels & np.uint8(256 - 2 ** (8 - max(bits, 0)))


def solarize(pixels: np.ndarray, threshold: int, **_) -> np.ndarray:
    """Inverts values from the threshold on."""
    if threshold > 255:
        return pixels
    return pixels ^ (np.uint8(255) * (pixels >= np.uint8(threshold)).view(np.uint8))


def solarize_add(pixels: np.ndarray, add: int, threshold: int = 128, **_) -> np.ndarray:
    """Adds to values below the threshold. At most 128 in timm's levels, so that no sum is beyond 255."""
    return pixels + np.uint8(add) * (pixels < np.uint8(threshold)).view(np.uint8)


def auto_contrast(pixels: np.ndarray, **_) -> np.ndarray:
    """Stretches each channel to the whole range."""
    if pixels.size >= 3 * SMALL:
        return _with_pillow(ImageOps.autocontrast, pixels)
    low, high = np.array(_image(pixels).getextrema()).T[:, :, None]
    scale = 255.0 / np.maximum(high - low, 1)
    stretched = (LEVELS * scale + -low * scale).clip(0, 255).astype(np.uint8)
    return _look_up(pixels, np.where(high > low, stretched, LEVELS))


def equalize(pixels: np.ndarray, **_) -> np.ndarray:
    """Makes each channel's histogram flat."""
    if pixels.size >= 3 * SMALL:
        return _with_pillow(ImageOps.equalize, pixels)
    image = _image(pixels)
    counts = np.array(image.histogram()).reshape(3, 256)
    last = counts[np.arange(3), np.array(image.getextrema())[:, 1]][:, None]
    step = (pixels.size // 3 - last) // 255
    flat = (step // 2 + counts.cumsum(axis=1) - counts) // np.maximum(step, 1)
    return _look_up(pixels, np.where(step > 0, np.minimum(flat, 255), LEVELS))


def _look_up(pixels: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Each value's entry in its channel's table; tables are of shape (3, 256)."""
    return tables.astype(np.uint8).take(pixels + CHANNELS)


def sharpness(pixels: np.ndarray, factor: float, **_) -> np.ndarray:
    """Between the smoothed image (0), the image (1) and beyond."""
    image = _image(pixels)
    if image.width * image.height < SMALL:
        return _array(ImageEnhance.Sharpness(image).enhance(factor))
    values = pixels.astype(np.int16)
    rows = values[:-2] + values[1:-1] + values[2:]
    inner = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * values[1:-1, 1:-1]
    smooth = pixels.copy()  # its border stays, as in Pillow
    smooth[1:-1, 1:-1] = (2 * inner + 13) // 26  # thirteenths, rounded
    return _array(Image.blend(_image(smooth), image, factor))


def shear_x(pixels: np.ndarray, factor: float, **kwargs) -> np.ndarray:
    """Moves each row by its distance from the top."""
    return _move(pixels, 1, factor * (np.arange(pixels.shape[0]) + 0.5), (1, factor, 0, 0, 1, 0), **kwargs)


def shear_y(pixels: np.ndarray, factor: float, **kwargs) -> np.ndarray:
    """Moves each column by its distance from the left."""
    return _move(pixels, 0, factor * (np.arange(pixels.shape[1]) + 0.5), (1, 0, 0, factor, 1, 0), **kwargs)


def translate_x(pixels: np.ndarray, share: float, **kwargs) -> np.ndarray:
    """Moves the image by a share of its width."""
    distance = share * pixels.shape[1]
    return _move(pixels, 1, np.full(pixels.shape[0], distance), (1, 0, distance, 0, 1, 0), **kwargs)


def translate_y(pixels: np.ndarray, share: float, **kwargs) -> np.ndarray:
    """Moves the image by a share of its height."""
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
    """Moves rows to the left (axis 1) or columns up (axis 0) by their distances; `matrix` says the same to Pillow."""
    height, width, _ = pixels.shape
    if resample == Image.Resampling.BICUBIC and height * width >= SMALL:
        return _cubic_shift(pixels, axis, distances, fillcolor)
    image = _image(pixels)
    transform = Image.Transform.AFFINE
    return _array(image.transform(image.size, transform, matrix, fillcolor=fillcolor, resample=resample))


def _cubic_shift(pixels: np.ndarray, axis: int, distances: np.ndarray, fillcolor: Sequence[int]) -> np.ndarray:
    """Moves lines with the cubic interpolation of Pillow's transform (a = -1)."""
    length, lines = pixels.shape[axis], pixels.shape[1 - axis]

    def by_line(array: np.ndarray) -> np.ndarray:
        return array if axis == 1 else array.swapaxes(0, 1)

    def empty(length: int) -> np.ndarray:
        return np.empty((lines, length, 3) if axis == 1 else (length, lines, 3), np.uint8)

    # Lines with the same whole distance, and on the same side of half a pixel, are taken together.
    halves = np.floor(2 * distances)
    starts = [0, *(np.flatnonzero(halves[1:] != halves[:-1]) + 1).tolist()]
    groups = [slice(*ends) for ends in zip(starts, [*starts[1:], lines], strict=True)]
    # Each line as the four taps need it: one pixel before, two after, the ends repeated.
    floors = np.floor(distances)
    whole = floors[starts].astype(np.int64).tolist()
    before, after = 1 + max(0, -min(whole)), 2 + max(0, max(whole))
    padded = by_line(empty(before + length + after))
    padded[:, before : before + length] = by_line(pixels)
    padded[:, :before] = by_line(pixels)[:, :1]
    padded[:, before + length :] = by_line(pixels)[:, -1:]
    taps = empty(length + 3)
    for group, distance in zip(groups, whole, strict=True):
        first = before - 1 + distance
        by_line(taps)[group] = padded[group, first : first + length + 3]

    values = torch.from_numpy(taps).flatten(1).float()
    d = (distances - floors).astype(np.float32)
    d = d[:, None] if axis == 1 else d.repeat(3)[None]
    weights = (d * (d * (2 - d) - 1), d * d * (d - 2) + 1, d * (d * (1 - d) + 1), d * d * (d - 1))
    step = 3 if axis == 1 else 1  # values from one tap to the next
    moved = values.narrow(axis, 0, step * length) * torch.from_numpy(weights[0])
    for tap in (1, 2, 3):
        moved.addcmul_(values.narrow(axis, step * tap, step * length), torch.from_numpy(weights[tap]))
    # Pillow rounds down. What float32 leaves of a whole number must not fall below it.
    result = moved.add_(1e-3).clamp_(0, 255).numpy().astype(np.uint8).reshape(pixels.shape)

    # A pixel whose centre comes from outside the image has the fill colour.
    fill = np.array(fillcolor, np.uint8)
    firsts = np.ceil(-distances[starts] - 0.5).astype(np.int64)
    for group, first, end in zip(groups, firsts.tolist(), (firsts + length).tolist(), strict=True):
        if first > 0:
            by_line(result)[group, :first] = fill
        if end < length:
            by_line(result)[group, max(end, 0) :] = fill
    return result
