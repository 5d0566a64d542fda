"""From rows of a data set to tensors: decoding, the torch data set and the collator."""

import contextlib
import hashlib
import io
import mmap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, default_collate

try:
    # A third faster than Pillow. torchvision 0.29 says that a later version will not have it.
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision", DeprecationWarning)

MAX_PIXELS = 89_478_485  # Pillow's own limit, at which it only warns: 256 MiB of RGB
REDUCING_GAP = 2.0  # a region of a JPEG is decoded no smaller than this many times its result
CACHED_SIDE = 64  # images of at most this side are kept decoded
CACHE_BYTES = 2**30
ROWS_A_TASK = 256
ADVICE = " Repair or remove it, or pass --skip_bad_images."


class EncodedImage:
    """An image that is decoded when it is known how much of it is needed.

    Args:
        source: Its bytes, or the path of its file.
        name: What errors call it.

    Attributes:
        size: Width and height in pixels, upright.

    Raises:
        ValueError: If it is no image, or has more than 89 million pixels; the message names it.
    """

    def __init__(self, source: bytes | str, name: str):
        self.name = name
        with self._errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            self.data = bytearray(source if isinstance(source, bytes) else Path(source).read_bytes())
            if not self.data:
                raise ValueError("it has no bytes")
            self._opened = Image.open(io.BytesIO(self.data))
            width, height = self._opened.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"its {width} x {height} pixels are more than {MAX_PIXELS}")
            orientation = self._opened.getexif().get(0x0112, 1)
            self._orientation = orientation if isinstance(orientation, int) else 1  # some cameras write text
        self._is_jpeg = self._opened.format in ("JPEG", "MPO") and self._orientation == 1
        self.size = (height, width) if 5 <= self._orientation <= 8 else (width, height)

    def decode(self) -> np.ndarray:
        """Decodes the whole image.

        Returns:
            Upright RGB; uint8 of shape (height, width, 3).

        Raises:
            ValueError: If it cannot be decoded; the message names it.
        """
        with self._errors():
            if self._is_jpeg and decode_jpeg is not None:
                data = torch.frombuffer(self.data, dtype=torch.uint8)
                return decode_jpeg(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()
            return np.asarray(_eight_bits(ImageOps.exif_transpose(self._opened)).convert("RGB"))

    def decode_region(self, region: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray | None:
        """Decodes a JPEG at a fraction of its size and resizes a region of it, if that is much smaller.

        Args:
            region: Top, left, height and width.
            size: Height and width of the result.

        Returns:
            uint8 of shape (height, width, 3); None if the region has to be taken from the whole image.

        Raises:
            ValueError: If it cannot be decoded; the message names it.
        """
        top, left, height, width = region
        available = min(height / (REDUCING_GAP * size[0]), width / (REDUCING_GAP * size[1]))
        reduction = next((step for step in (8, 4, 2) if step <= available), 1)
        if not self._is_jpeg or reduction == 1:
            return None
        with self._errors():
            image, (full_width, full_height) = self._opened, self._opened.size
            image.draft("RGB", (full_width // reduction, full_height // reduction))
            across, down = image.width / full_width, image.height / full_height
            box = (left * across, top * down, (left + width) * across, (top + height) * down)
            return np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC, box))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns whatever a decoder raises into one sentence that names the image."""
        try:
            yield
        except Exception as error:
            what = str(error).strip().rstrip(".") or type(error).__name__
            if isinstance(error, Image.UnidentifiedImageError):
                what = "it is of no known format"
            elif isinstance(error, Image.DecompressionBombError):
                what = f"it has more than {2 * MAX_PIXELS} pixels"
            elif "decode_jpeg" in what:
                what = what.split(", ")[-1]
            raise ValueError(f"cannot read the image {self.name}: {what}.{ADVICE}") from error


def open_image(image: Mapping[str, Any]) -> EncodedImage:
    """Opens an image of a `datasets.Image(decode=False)` column: `bytes` and `path`, the bytes first if both are there.

    Raises:
        ValueError: As for [`EncodedImage`].
    """
    source = image["bytes"] if image["bytes"] is not None else image["path"]
    return EncodedImage(source, image["path"] or "(embedded in the data set)")


def decode_image(image: Mapping[str, Any]) -> np.ndarray:
    """Decodes an image of a `datasets.Image(decode=False)` column into upright RGB; uint8 of shape (height, width, 3).

    Of an animation it is the first frame. Transparency is left out and 16 bits a channel are scaled to 8.

    Raises:
        ValueError: If it cannot be read; the message names the file.
    """
    return open_image(image).decode()


def decode_all(rows: datasets.Dataset) -> list[tuple[str | None, bytes | None]]:
    """Decodes every image of a data set, on all cores.

    Args:
        rows: Has the column `image`.

    Returns:
        For each row what is wrong with its image, or None, and a digest of its bytes.
    """
    images = rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
    with ProcessPoolExecutor(initializer=_keep, initargs=(images,)) as pool:
        tasks = pool.map(_decode_some, range(0, len(images), ROWS_A_TASK))
        return [result for task in tasks for result in task]


_images: datasets.Dataset  # of a process of `decode_all`, which gets them once


def _keep(images: datasets.Dataset) -> None:
    global _images
    _images = images


def _decode_some(start: int) -> list[tuple[str | None, bytes | None]]:
    results: list[tuple[str | None, bytes | None]] = []
    for row in range(start, min(start + ROWS_A_TASK, len(_images))):
        try:
            image = open_image(_images[row]["image"])
            image.decode()
            results.append((None, hashlib.blake2b(image.data, digest_size=16).digest()))
        except ValueError as error:
            results.append((str(error).removesuffix(ADVICE), None))
    return results


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16 bits to 8, which Pillow would clip."""
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, whose range is not known; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError(f"its values from {values.min()} to {values.max()} do not fit 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


class ImageDataset(Dataset):
    """Rows of a `datasets.Dataset` as dictionaries of model inputs.

    Small images, such as CIFAR's, are decoded once and then kept in memory, which the workers of a data loader share.

    Args:
        dataset: Rows with an image and a label.
        image_column: Its image column.
        label_column: Its label column.
        views: Transforms from an [`EncodedImage`] or a decoded one (uint8, of shape (height, width, 3)), by the name
            of the model input that they make. Without any, the row has the decoded image itself under `image`, for
            [`ImageCollator`].
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        label_column: str,
        views: Mapping[str, Callable[[EncodedImage | np.ndarray], torch.Tensor]] | None = None,
    ):
        # Decoding is ours: datasets' own does not say which file is broken.
        images = dataset.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        self.images = images.with_format("arrow")  # the fastest way to a row
        self.views = views or {}
        self.labels = np.asarray(dataset[label_column][:])
        self._cache = self._make_cache()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._image(index)
        if len(self.views) != 1 and isinstance(image, EncodedImage):
            image = image.decode()
        views = {name: view(image) for name, view in self.views.items()} or {"image": image}
        return {"labels": int(self.labels[index]), **views}

    def _image(self, index: int) -> EncodedImage | np.ndarray:
        if self._cache is None:
            return self._open(index)
        pixels, known = self._cache
        if not known[index]:
            image = self._open(index).decode()
            if image.shape != pixels.shape[1:]:
                return image
            pixels[index] = image
            known[index] = True  # after the pixels: another worker may be reading
        return pixels[index]

    def _open(self, index: int) -> EncodedImage:
        return open_image(self.images[index].column(0)[0].as_py())

    def _make_cache(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Memory for all images, and which are there; None if the first image is large, or they are too many."""
        if len(self) == 0:
            return None
        try:
            width, height = self._open(0).size
        except ValueError:
            return None
        num_bytes = len(self) * 3 * width * height
        if max(width, height) > CACHED_SIDE or num_bytes > CACHE_BYTES:
            return None
        # Anonymous and shared: forked workers fill it together, and /dev/shm, small in containers, does not limit it.
        pixels = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8).reshape(len(self), height, width, 3)
        return pixels, np.frombuffer(mmap.mmap(-1, len(self)), bool)


class ImageCollator:
    """Stacks rows into a batch; decoded images go through the image processor, as they will at inference."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "image" not in rows[0]:
            return default_collate(list(rows))
        # A tensor's channels come first, an array's shape does not tell.
        images = [torch.from_numpy(row["image"].transpose(2, 0, 1).copy()) for row in rows]
        pixel_values = self.image_processor(images, return_tensors="pt").pixel_values
        return {"pixel_values": pixel_values, "labels": torch.tensor([row["labels"] for row in rows])}
