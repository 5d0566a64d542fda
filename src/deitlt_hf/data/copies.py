"""Copies of training images at a reduced size, in a folder: large images are decoded once instead of in every epoch."""

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BitImageProcessor

from ..io import atomic_write
from .images import EncodedImage, open_image
from .transforms import resized_to

# A random crop of 8 % of the area, the smallest, is 0.28 of a side, and half of the crops are larger than 0.73.
SIDE_OF_CROP = 2


class ReducedCopies:
    """Opens images by their reduced copies, and writes a copy when an image is opened for the first time.

    A copy is a PNG file without loss, so the pixels are the same the first time and later. Images that are not larger
    than a copy are read from their source. Several runs and processes can share the folder.

    Args:
        folder: Folder of the copies.
        side: Shorter side of a copy, in pixels.
        reduce: Reduces an image to that side; gives uint8 of shape (height, width, 3).
        kind: Name of the reduction; copies of one kind and side are the same.
    """

    def __init__(self, folder: str | Path, side: int, reduce: Callable[[EncodedImage], np.ndarray], kind: str) -> None:
        self.folder, self.side, self.kind = Path(folder), side, kind
        self._reduce = reduce
        self._can_write = True

    @classmethod
    def for_training(cls, folder: str | Path, image_size: int) -> "ReducedCopies":
        """Copies with `SIDE_OF_CROP` times the image size on the shorter side, from which random crops are taken."""
        side = SIDE_OF_CROP * image_size
        return cls(folder, side, partial(resized_to, side=side), "train")

    @classmethod
    def for_evaluation(cls, folder: str | Path, processor: BaseImageProcessor) -> "ReducedCopies | None":
        """Copies at the size to which the processor resizes: it then makes the same model inputs as from the images.

        None if the processor does not resize the shorter side.
        """
        side = (getattr(processor, "size", None) or {}).get("shortest_edge")
        if not isinstance(processor, BitImageProcessor) or not isinstance(side, int):
            return None
        only_resize: dict[str, Any] = {"do_center_crop": False, "do_rescale": False, "do_normalize": False}

        def reduce(image: EncodedImage) -> np.ndarray:
            pixels = torch.from_numpy(image.decode().transpose(2, 0, 1).copy())
            resized = processor([pixels], **only_resize, return_tensors="pt").pixel_values[0]
            return resized.permute(1, 2, 0).numpy()

        return cls(folder, side, reduce, "test")

    def open(
        self, cell: Mapping[str, Any] | None, place: str = "", background: str | None = None
    ) -> EncodedImage | np.ndarray:
        """Opens an image; parameters and errors as in [`open_image`].

        Returns:
            The encoded image or copy, or the pixels of a copy that was just written; uint8 of shape (height, width, 3).
        """
        path = self._path(cell or {}, background)
        if path is not None and path.is_file():
            return EncodedImage(str(path), str((cell or {}).get("path") or place))  # the copy has the background
        image = open_image(cell, place, background)
        if min(image.size) <= self.side or path is None:
            return image
        pixels = np.ascontiguousarray(self._reduce(image))
        if self._can_write:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as file:
                    # The fastest level, since training waits while a copy is written.
                    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
            except OSError as error:  # the run does not need the copies
                self._can_write = False
                warnings.warn(f"image_cache {self.folder} cannot be written: {error.strerror or error}.", stacklevel=2)
        return pixels

    def _path(self, cell: Mapping[str, Any], background: str | None) -> Path | None:
        """Path of the copy of an image, by its content or by its path, size and time; None if it cannot be read."""
        data, path = cell.get("bytes"), cell.get("path")
        if data is None:
            try:
                status = os.stat(path or "")
            except (OSError, ValueError):
                return None
            # Not the content, which would have to be read again in every epoch.
            data = f"{os.path.realpath(str(path))} {status.st_size} {status.st_mtime_ns}".encode()
        # Copies of another kind, size or background have other names, so runs with other settings can share the folder.
        digest = hashlib.blake2b(
            data, digest_size=16, person=f"{self.kind[:2]}{self.side}{background or ''}".encode()[:16]
        )
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.png"
