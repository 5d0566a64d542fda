"""Training images without their labels, for pre-training, with images of folders that have no labels."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import datasets

from .columns import find_columns
from .loading import readable
from .sources.files import images_below, not_read

ONLY_CLASS = "image"


def unlabelled_images(
    train: datasets.Dataset, folders: Iterable[str | Path] = (), skip_bad_images: bool = False
) -> datasets.Dataset:
    """Joins the images of a training split with all images in and below folders, as a data set with a single class.

    With `skip_bad_images`, images of the folders that cannot be read are left out, with a warning that counts them.

    Raises:
        FileNotFoundError: If a folder does not exist or has no images.
    """
    image, _ = find_columns(train)
    parts = [train.select_columns(image).rename_columns({image: "image"})]
    parts += [_images_in(Path(folder).expanduser(), skip_bad_images) for folder in folders]
    joined = datasets.concatenate_datasets([part.cast_column("image", datasets.Image()) for part in parts])
    labels = joined.add_column("label", [0] * len(joined))
    return labels.cast_column("label", datasets.ClassLabel(names=[ONLY_CLASS]))


def _images_in(folder: Path, skip_bad_images: bool) -> datasets.Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a folder with images, without labels.")
    others: Counter[str] = Counter()
    paths = images_below(folder, others=others)
    if not paths:
        found = f" ({not_read(others)})" if others else ""
        raise FileNotFoundError(f"{folder} has no images{found}.")
    images = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    return readable(folder.name, images) if skip_bad_images else images
