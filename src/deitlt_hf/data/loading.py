"""Where images come from: every source ends as a `DatasetDict` with `image`, `label` and `source_index` columns."""

import gzip
import logging
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from .images import decode_image
from .long_tail import class_counts, long_tailed_indices

logger = logging.getLogger(__name__)

TEST_SPLITS = ("test", "validation", "valid", "val", "eval")
IDX_STEMS = {"train": "train", "test": "t10k"}


def load_long_tailed(
    dataset: str = "digits",
    data_dir: str | None = None,
    *,
    imbalance_ratio: float | None = None,
    imbalance_type: str = "exp",
    max_per_class: int | None = None,
    subset_seed: int = 0,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    skip_bad_images: bool = False,
) -> datasets.DatasetDict:
    """Loads a data set and, if asked, makes its training split long-tailed. The test split stays whole.

    Args:
        dataset: `digits` (scikit-learn's, embedded: 1,797 images of 8 x 8 pixels), or the id of a data set on the Hub.
            With `data_dir` it is only a name.
        data_dir: Read from this folder instead: MNIST-style IDX files, `train/CLASS/*` and `test/CLASS/*` image
            folders, or what `DatasetDict.save_to_disk` wrote.
        imbalance_ratio: Subsample a balanced training split to this ratio of its largest to its smallest class, see
            [`long_tailed_indices`]. None keeps all images, for data that are long-tailed already.
        imbalance_type: `exp` or `step`.
        max_per_class: Images of the largest class after subsampling.
        subset_seed: Seed of the subset. The authors always use 0.
        test_split: Name of the test split; by default the first of test, validation, valid, val and eval.
        image_column: Column with the images; by default the only one of that type.
        label_column: Column with the labels; by default the only one of type `ClassLabel`.
        class_names: Names of the classes, for sources that have none.
        skip_bad_images: Decode every image once and leave out those that cannot be read, with a warning that counts
            them. Otherwise an unreadable image stops the run that meets it, by name.

    Returns:
        `train` and `test`, each with the columns `image`, `label` (`ClassLabel`) and `source_index` (row in the
        source's split).

    Raises:
        FileNotFoundError: If `data_dir` does not exist or holds nothing of the kinds above.
        ValueError: If a split, column or class is missing, or the imbalance cannot be made.
    """
    splits = _load_source(dataset, data_dir)
    splits = _choose_splits(splits, test_split)
    splits = datasets.DatasetDict(
        {name: _standard_columns(split, image_column, label_column, class_names) for name, split in splits.items()}
    )
    if skip_bad_images:
        splits = _drop_unreadable(splits)
    names = splits["train"].features["label"].names
    if len(names) < 2:
        raise ValueError(f"the data have {len(names)} class ({', '.join(names)}); a classifier needs at least two.")
    if splits["test"].features["label"].names != names:
        raise ValueError(
            "the train and test splits have different classes: only in train "
            f"{sorted(set(names) - set(splits['test'].features['label'].names))[:5]}, only in test "
            f"{sorted(set(splits['test'].features['label'].names) - set(names))[:5]}."
        )
    for name, split in splits.items():
        if min(split["label"][:], default=0) < 0:
            raise ValueError(f"the {name} split has images without a label (-1); name another with test_split.")
    if imbalance_ratio is not None:
        indices = long_tailed_indices(
            splits["train"]["label"][:], len(names), imbalance_ratio, imbalance_type, subset_seed, max_per_class
        )
        splits["train"] = splits["train"].select(indices)
    counts = class_counts(splits["train"]["label"][:], len(names))
    if counts.min() == 0:
        empty = [names[label] for label in np.flatnonzero(counts == 0)]
        raise ValueError(f"classes without a training image: {', '.join(empty[:5])} ({len(empty)} in all).")
    return splits


def find_columns(
    dataset: datasets.Dataset, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """Finds the image and the label column of a data set.

    Raises:
        ValueError: If a named column is missing, or there is not exactly one of the type; it lists what there is.
    """
    wanted = {"image": (image_column, datasets.Image), "label": (label_column, datasets.ClassLabel)}
    found = []
    for kind, (name, feature_type) in wanted.items():
        if name is not None and name not in dataset.column_names:
            raise ValueError(f"no {kind} column {name!r}; the columns are {_describe_columns(dataset)}.")
        if name is None:
            names = [key for key, feature in dataset.features.items() if isinstance(feature, feature_type)]
            if len(names) != 1:
                raise ValueError(
                    f"cannot tell the {kind} column: {len(names)} columns have type {feature_type.__name__}; the "
                    f"columns are {_describe_columns(dataset)}. Name it with {kind}_column."
                )
            name = names[0]
        found.append(name)
    return tuple(found)


def _describe_columns(dataset: datasets.Dataset) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in dataset.features.items())


def _load_source(dataset: str, data_dir: str | None) -> datasets.DatasetDict:
    if data_dir is None:
        if dataset == "imagefolder":
            raise ValueError("this data set has no public copy to load; give data_dir, the folder with its images.")
        return _digits() if dataset == "digits" else datasets.load_dataset(dataset)
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir {data_dir!r} is not a folder.")
    if any(folder.glob("*-images-idx3-ubyte*")):
        return datasets.DatasetDict({split: _idx(folder, stem) for split, stem in IDX_STEMS.items()})
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    if not any(path.is_file() for path in folder.rglob("*")):
        raise FileNotFoundError(f"data_dir {data_dir!r} has no files.")
    return _image_folder(folder)


def _digits() -> datasets.DatasetDict:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    indices = train_test_split(np.arange(len(images)), test_size=600, stratify=bunch.target, random_state=0)
    names = [str(name) for name in bunch.target_names]
    return datasets.DatasetDict(
        {
            split: _from_arrays(images[chosen], bunch.target[chosen], names)
            for split, chosen in zip(("train", "test"), indices, strict=True)
        }
    )


def _idx(folder: Path, stem: str) -> datasets.Dataset:
    images = _read_idx(folder, f"{stem}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} {stem} images but {len(labels)} labels.")
    return _from_arrays(images, labels, [str(label) for label in range(int(labels.max()) + 1)])


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Reads unsigned bytes in the IDX format: magic 0, 0, 8, dimensions; big-endian uint32 sizes; the values."""
    for path, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if not path.is_file():
            continue
        try:
            with opener(path, "rb") as file:
                raw = file.read()
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
        header = 4 + 4 * dimensions
        if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) < header:
            raise ValueError(f"{path} is not an IDX file of unsigned bytes with {dimensions} dimension(s).")
        shape = tuple(np.frombuffer(raw, ">u4", dimensions, offset=4))
        if len(raw) - header != np.prod(shape, dtype=np.int64):
            raise ValueError(f"{path} should hold {shape} bytes after its header but holds {len(raw) - header}.")
        return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz; all four IDX files are needed.")


def _from_arrays(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> datasets.Dataset:
    from PIL import Image

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    rows = {"image": [Image.fromarray(image) for image in images], "label": labels.astype(np.int64).tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def _image_folder(folder: Path) -> datasets.DatasetDict:
    return datasets.load_dataset("imagefolder", data_dir=str(folder.resolve()), drop_labels=False)


def _choose_splits(splits: datasets.DatasetDict, test_split: str | None) -> datasets.DatasetDict:
    names = [test_split] if test_split is not None else TEST_SPLITS
    test = next((name for name in names if name in splits), None)
    if "train" not in splits or test is None:
        missing = "train" if "train" not in splits else f"test ({' or '.join(names)})"
        raise ValueError(
            f"the data have no {missing} split; the splits are {', '.join(splits)}. In an image folder put the images "
            "below train/CLASS/ and test/CLASS/."
        )
    return datasets.DatasetDict({"train": splits["train"], "test": splits[test]})


def _standard_columns(
    split: datasets.Dataset, image_column: str | None, label_column: str | None, class_names: Sequence[str] | None
) -> datasets.Dataset:
    image, label = find_columns(split, image_column, label_column)
    split = split.select_columns([image, label]).rename_columns(
        {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    )
    if not isinstance(split.features["label"], datasets.ClassLabel):
        split = split.class_encode_column("label")
    if class_names is not None:
        if len(class_names) != split.features["label"].num_classes:
            raise ValueError(
                f"class_names has {len(class_names)} names but the data have "
                f"{split.features['label'].num_classes} classes."
            )
        split = split.cast_column("label", datasets.ClassLabel(names=list(class_names)))
    return split.add_column("source_index", np.arange(len(split)))


def _drop_unreadable(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    def readable(image: dict) -> bool:
        try:
            decode_image(image)
        except ValueError as error:
            logger.warning("left out: %s", error)
            return False
        return True

    kept = {}
    for name, split in splits.items():
        encoded = split.cast_column("image", datasets.Image(decode=False))
        indices = [row for row, image in enumerate(encoded["image"]) if readable(image)]
        if len(indices) < len(split):
            logger.warning("%s split: left out %d unreadable images of %d", name, len(split) - len(indices), len(split))
        kept[name] = split.select(indices)
    return datasets.DatasetDict(kept)
