"""The images of a data set for prediction, from any source that training reads."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ..data.columns import as_image_column, find_image_column
from ..data.loading import load_source
from ..data.sources.files import find_split
from ..io import one_line
from .handler import read_image
from .prediction import read_file

HASHED = 64  # rows whose content identifies a data set


class DatasetImages:
    """The images of a split, by name.

    Attributes:
        names: Name of each image, in the order of the rows: its path if it is a file, else `SPLIT/ROW`.
        sha256: Digest of the content of rows that are spread over the split. Names alone do not identify a data set.

    Raises:
        ValueError: If there is no column with images, or several and none is given.
    """

    def __init__(self, rows: datasets.Dataset, split: str, image_column: str | None = None) -> None:
        column = find_image_column(rows, image_column)
        rows = as_image_column(rows.with_format(None).select_columns(column), column)
        self.rows = rows.rename_columns({column: "image"} if column != "image" else {}).cast_column(
            "image", datasets.Image(decode=False)
        )
        # The paths alone: this does not read the bytes of the images.
        paths: Sequence[str | None] = self.rows.flatten().with_format(None)["image.path"][:]
        has_files = len(paths) > 0 and self.rows[0]["image"]["bytes"] is None
        self.names = [
            path if has_files and path and os.path.isabs(path) else f"{split}/{row}" for row, path in enumerate(paths)
        ]
        digest = hashlib.sha256()
        for row in np.linspace(0, len(paths) - 1, min(HASHED, len(paths))).astype(int).tolist():
            digest.update(hashlib.sha256(self._content(row)).digest())
        self.sha256 = digest.hexdigest()

    def read(self, name: str, background: str | None) -> Image.Image:
        """Reads the image of a name as the handler does.

        Raises:
            ValueError: If it cannot be read, with a sentence.
        """
        if os.path.isabs(name):
            return read_file(name, background)
        content = self._content(int(name.rpartition("/")[2]))
        if not content:
            raise ValueError(f"{name!r} is empty, or its file is missing.")
        return read_image(content, repr(name), background)

    def _content(self, row: int) -> bytes:
        """Bytes of the file of an image; empty if there are none."""
        cell = self.rows[row]["image"] or {}
        if cell.get("bytes") is not None or not cell.get("path"):
            return cell.get("bytes") or b""
        return Path(cell["path"]).read_bytes() if os.path.isfile(cell["path"]) else b""


def dataset_images(
    dataset: str, data_dir: str | None = None, split: str = "test", image_column: str | None = None
) -> DatasetImages:
    """Loads the images of a split of a data set, see [`load_source`]. Labels are not needed.

    Raises:
        FileNotFoundError: If the folder does not exist or has no supported layout.
        ValueError: If the data cannot be read, or there is no such split or column.
    """
    _, splits = load_source(dataset, data_dir, image_column=image_column)
    found = find_split(splits, [split])
    if found is None:
        raise ValueError(f"the data have no split {split!r}; the splits are {one_line(', '.join(splits))}.")
    return DatasetImages(splits[found], found, image_column)
