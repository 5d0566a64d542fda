"""Turns rows of a data set into tensors: image decoding, the torch data set and the collator."""

import contextlib
import hashlib
import mmap
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from ..io import one_line
from .image_rule import FORMATS, is_transparent, open_encoded, orientation_of, upright_rgb

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from .copies import ReducedCopies


def _jpeg_decoder() -> Callable[..., torch.Tensor] | None:
    """torchvision's decoder of JPEGs, a third faster than Pillow's; None if there is none, and Pillow decodes.

    torchvision may be built without it, and version 0.29 announces that a later one will not decode images.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None
    return partial(decode_jpeg, mode=ImageReadMode.RGB) if hasattr(torch.ops.image, "decode_jpeg") else None


decode_jpeg = _jpeg_decoder()
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision", DeprecationWarning)
# Pillow's warnings (palettes, corrupt EXIF, TIFF tags) do not concern pixels, and would repeat per image and worker.
warnings.filterwarnings("ignore", module=r"PIL\.")

# A region of a JPEG is decoded to at least this many times the size of the result, as in Pillow's `thumbnail`.
# A smaller factor is faster, and farther from a reduction of the full image.
REDUCING_GAP = 2.0
CACHED_SIDE = 64  # pixels; images up to this side are cached decoded
CACHE_BYTES = 2**30
ROWS_A_TASK = 256
ADVICE = " Repair or remove it, or pass --skip_bad_images."


class EncodedImage:
    """An encoded image. Decoding is deferred until it is known which region and resolution are needed.

    Args:
        source: Bytes of the image, or the path of its file.
        name: Name of the image in errors.
        background: Background colour behind transparent pixels; None ignores transparency.

    Attributes:
        size: Width and height in pixels of the decoded, upright image.

    Raises:
        ValueError: If it is not an image, or exceeds the size limits of `image_rule`; the message names it.
    """

    def __init__(self, source: bytes | str, name: str, background: str | None = None) -> None:
        self.name, self.background = name, background
        with self._errors():
            # A copy that can be written to: torch warns of read-only memory for every image.
            self.data = bytearray(source if isinstance(source, bytes) else _read_file(source))
            self._opened = open_encoded(self.data)
            orientation = orientation_of(self._opened)
            # torchvision ignores the orientation, so images that must be turned go through Pillow. MPO is what Pillow
            # calls a JPEG with further pictures behind the first.
            self._is_jpeg = self._opened.format in ("JPEG", "MPO") and orientation == 1
            width, height = self._opened.size
            self.size = (height, width) if orientation >= 5 else (width, height)

    def decode(self) -> np.ndarray:
        """Decodes the whole image: upright RGB, uint8 of shape (height, width, 3).

        Raises:
            ValueError: If the image cannot be decoded; the message names it.
        """
        with self._errors():
            if self._is_jpeg and decode_jpeg is not None:
                data = torch.frombuffer(self.data, dtype=torch.uint8)
                pixels = decode_jpeg(data).permute(1, 2, 0).numpy()
            else:
                pixels = np.asarray(upright_rgb(self._opened, self.background))
            height, width, _ = pixels.shape
            if (width, height) != self.size:  # crop regions are chosen from this size
                raise ValueError(
                    f"its header says {self.size[0]} x {self.size[1]} pixels, but it has {width} x {height}"
                )
            return pixels

    def traits(self) -> tuple[bool, bool]:
        """Returns whether any pixel is transparent, and whether the image has several frames."""
        try:
            # The further pictures of an MPO are previews of the first one.
            several = getattr(self._opened, "is_animated", False) and self._opened.format != "MPO"
        except Exception:  # the second frame is damaged; it is never read
            several = True
        opaque = "A" in self._opened.getbands() and np.asarray(self._opened.getchannel("A")).min() == 255
        return is_transparent(self._opened) and not opaque, several

    def decode_region(self, region: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray | None:
        """Decodes a JPEG at a fraction of its size and resizes a region of it, if the result is much smaller.

        The region is given by top, left, height and width, the size of the result by height and width.

        Returns:
            uint8 of shape (height, width, 3); None if the whole image must be decoded instead.

        Raises:
            ValueError: If the image cannot be decoded; the message names it.
        """
        top, left, height, width = region
        available = min(height / (REDUCING_GAP * size[0]), width / (REDUCING_GAP * size[1]))
        reduction = next((step for step in (8, 4, 2) if step <= available), 1)
        if not self._is_jpeg or reduction == 1:
            return None
        with self._errors():
            image, (full_width, full_height) = self._opened, self._opened.size
            # The decoder then computes 4, 2 or 1 instead of 8 values along each side of a block, and skips the rest.
            image.draft("RGB", (full_width // reduction, full_height // reduction))
            # `draft` rounds the reduced size up, so the box is scaled by the actual ratios.
            across, down = image.width / full_width, image.height / full_height
            box = (left * across, top * down, (left + width) * across, (top + height) * down)
            return np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC, box))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns any exception of a decoder into one sentence that names the image."""
        try:
            yield
        except Exception as error:  # Pillow's readers raise NameError, NotImplementedError, TypeError and others, too
            what = (getattr(error, "strerror", None) or str(error)).strip().rstrip(".") or type(error).__name__
            if "decode_jpeg" in what:
                what = what.split(", ")[-1]
            raise ValueError(f"cannot read the image {one_line(self.name)}: {one_line(what)}.{ADVICE}") from error


def decoder_versions() -> dict[str, str]:
    """Versions of the packages that decode images: other decoders or versions can differ by a few grey levels."""
    packages = ["pillow", *["torchvision"] * (decode_jpeg is not None), *["pillow-heif"] * ("HEIF" in FORMATS)]
    return {package: version(package) for package in packages}


def open_image(image: Mapping[str, Any] | None, place: str = "", background: str | None = None) -> EncodedImage:
    """Opens an image of a `datasets.Image(decode=False)` column, from `bytes` if the cell has them, else from `path`.

    `place` is that of the cell for errors, such as "row 17 of the column image".

    Raises:
        ValueError: See [`EncodedImage`]; also if the cell is empty.
    """
    image = image or {}
    data: bytes | None = image.get("bytes")
    path: str | None = image.get("path")
    if data is None and path:
        return EncodedImage(path, path, background)
    if data is None:
        raise ValueError(f"{place or 'an image of the data set'} is empty, without bytes and path.{ADVICE}")
    name = f"{path} ({place})" if path and place else path or (f"in {place}" if place else "(embedded in the data set)")
    return EncodedImage(data, name, background)


class Decoded(NamedTuple):
    """Result of decoding an image."""

    error: str | None  # a sentence; None without an error
    digest: bytes | None = None  # of the bytes; None after an error
    is_transparent: bool = False  # whether any pixel is transparent
    is_flat: bool = False  # whether the decoded image, as training uses it, has a single colour
    has_frames: bool = False  # whether it has several frames, of which only the first is read


def usable_cores() -> int:
    """Number of cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_all(rows: datasets.Dataset, background: str | None = None) -> list[Decoded]:
    """Decodes every image of a data set with the column `image`, on all cores; `background` as in [`EncodedImage`]."""
    images = rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
    with ProcessPoolExecutor(
        usable_cores(), initializer=_set_job, initargs=(images, source_rows(rows), background)
    ) as pool:
        tasks = pool.map(_decode_some, range(0, len(images), ROWS_A_TASK))
        return [result for task in tasks for result in task]


def under_several_labels(images: Sequence[Decoded], labels: Sequence[int]) -> list[int]:
    """Positions of the images whose bytes also occur with another label."""
    known: dict[bytes | None, set[int]] = {}
    for image, label in zip(images, labels, strict=True):
        known.setdefault(image.digest, set()).add(label)
    return [row for row, image in enumerate(images) if image.error is None and len(known[image.digest]) > 1]


def source_rows(dataset: datasets.Dataset) -> np.ndarray:
    """Index of each row in the source of a data set if known, else in the data set; counted from 0."""
    if "source_index" not in dataset.column_names:
        return np.arange(len(dataset))
    return np.asarray(dataset.with_format("numpy")["source_index"][:])


_job: tuple  # arguments of `_decode_some`, sent once to each worker process of `decode_all`


def _set_job(*job: Any) -> None:
    global _job
    _job = job


def _decode_some(start: int) -> list[Decoded]:
    images, places, background = _job
    results = []
    for row in range(start, min(start + ROWS_A_TASK, len(images))):
        try:
            image = open_image(images[row]["image"], f"row {places[row]} of the column image", background)
            pixels = image.decode().reshape(-1, 3)
        except ValueError as error:
            results.append(Decoded(str(error).removesuffix(ADVICE)))
            continue
        digest = hashlib.blake2b(image.data, digest_size=16).digest()
        transparent, frames = image.traits()
        results.append(Decoded(None, digest, transparent, bool((pixels == pixels[0]).all()), frames))
    return results


def _read_file(path: str) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or a device may never end
        raise ValueError("it is not a file")
    return Path(path).read_bytes()


class ImageDataset(Dataset):
    """Torch data set whose items are the rows of a `datasets.Dataset` as dictionaries of model inputs.

    Small images, such as CIFAR's, are decoded once and cached in memory that the workers of a data loader share.

    Args:
        dataset: Rows with an image and a label, in the named columns.
        views: Transforms of an [`EncodedImage`] or a decoded image (uint8, of shape (height, width, 3)), by the name of
            the model input that they make. Without views, a row contains the decoded image under `image`, for
            [`ImageCollator`].
        background: See [`EncodedImage`].
        copies: Opens images by their reduced copies; None reads the images themselves.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        label_column: str,
        views: Mapping[str, Callable[[EncodedImage | np.ndarray], torch.Tensor]] | None = None,
        background: str | None = None,
        copies: "ReducedCopies | None" = None,
    ) -> None:
        # `datasets` would decode without naming the corrupt file in its error.
        images = dataset.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        self.images = images.with_format("arrow")  # the fastest format for single rows
        self.views = views or {}
        self.background = background
        self._open_cell = open_image if copies is None else copies.open
        self.column, self._rows = image_column, source_rows(dataset)
        self.labels = np.asarray(dataset[label_column][:])
        self._cache = self._make_cache()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._image(index)
        # Several views share one decoded image; a single view may need only a region of it.
        if len(self.views) != 1 and isinstance(image, EncodedImage):
            image = image.decode()
        row: dict[str, Any] = {"labels": int(self.labels[index])}
        if not self.views:
            return row | {"image": image}
        return row | {name: view(image) for name, view in self.views.items()}

    def _image(self, index: int) -> EncodedImage | np.ndarray:
        if self._cache is not None:
            pixels, known = self._cache
            if not known[index]:
                image = open_image(*self._cell(index), self.background)
                if image.size == (pixels.shape[2], pixels.shape[1]):
                    pixels[index] = image.decode()
                    known[index] = True  # set after the pixels, since another worker may read at the same time
            if known[index]:
                return pixels[index]
        return self._open_cell(*self._cell(index), self.background)

    def _cell(self, index: int) -> tuple[Mapping[str, Any] | None, str]:
        """Cell of an image, and its place for errors."""
        return self.images[index].column(0)[0].as_py(), f"row {self._rows[index]} of the column {self.column}"

    def _make_cache(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Allocates memory for all images and their flags; None if the first image or the total is too large."""
        if len(self) == 0:
            return None
        try:
            width, height = open_image(*self._cell(0), self.background).size
        except ValueError:
            return None
        num_bytes = len(self) * 3 * width * height
        if max(width, height) > CACHED_SIDE or num_bytes > CACHE_BYTES:
            return None
        # Anonymous shared memory: forked workers fill it together, and it is not limited by /dev/shm, which is small in
        # containers.
        pixels = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8).reshape(len(self), height, width, 3)
        return pixels, np.frombuffer(mmap.mmap(-1, len(self)), bool)


class ImageCollator:
    """Stacks rows into a batch. Decoded images pass through the image processor, as at inference.

    Attributes:
        background: Background colour of the processor, for decoding; see [`EncodedImage`].
    """

    def __init__(self, image_processor: "BaseImageProcessor") -> None:
        self.image_processor = image_processor
        self.background = getattr(image_processor, "background", None)

    def images(self, split: datasets.Dataset) -> ImageDataset:
        """The images of a split with the columns `image` and `label`, decoded over the background of the processor."""
        return ImageDataset(split, "image", "label", background=self.background)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "image" not in rows[0]:
            return default_collate(list(rows))
        # Channels first: the processor cannot always infer the channel axis of an array from its shape.
        images = [torch.from_numpy(row["image"].transpose(2, 0, 1).copy()) for row in rows]
        pixel_values = self.image_processor(images, return_tensors="pt").pixel_values
        return {"pixel_values": pixel_values, "labels": torch.tensor([row["labels"] for row in rows])}
