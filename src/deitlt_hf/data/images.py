"""From rows of a data set to tensors: decoding, the torch data set and the collator."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, default_collate


def decode_image(image: Mapping[str, Any]) -> Image.Image:
    """Decodes an image of a `datasets.Image(decode=False)` column into upright RGB.

    Args:
        image: `bytes` and `path`; the bytes come first if both are there.

    Raises:
        ValueError: If it cannot be read; the message names the file.
    """
    source = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
    try:
        with Image.open(source) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read the image {image['path'] or '(embedded in the data set)'}: {error}. Repair or remove it, or "
            "pass --skip_bad_images."
        ) from error


class ImageDataset(Dataset):
    """Rows of a `datasets.Dataset` as dictionaries of model inputs.

    Args:
        dataset: Rows with an image and a label.
        image_column: Its image column.
        label_column: Its label column.
        views: Transforms from a PIL image, by the name of the model input they make. Without any, the row has the
            decoded image itself under `image`, for [`ImageCollator`].
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        label_column: str,
        views: Mapping[str, Callable[[Image.Image], torch.Tensor]] | None = None,
    ):
        # Decoding is ours: datasets' own does not say which file is broken.
        columns = dataset.select_columns([image_column, label_column])
        self.dataset = columns.cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.label_column = label_column
        self.views = views or {"image": lambda image: image}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        image = decode_image(row[self.image_column])
        return {"labels": row[self.label_column], **{name: view(image) for name, view in self.views.items()}}


class ImageCollator:
    """Stacks rows into a batch; decoded images go through the image processor, as they will at inference."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "image" not in rows[0]:
            return default_collate(list(rows))
        pixel_values = self.image_processor([row["image"] for row in rows], return_tensors="pt").pixel_values
        return {"pixel_values": pixel_values, "labels": torch.tensor([row["labels"] for row in rows])}
