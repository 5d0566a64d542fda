"""Loads image data from any source as a `DatasetDict` with the columns `image`, `label` and `source_index`."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..io import file_errors, one_line
from .columns import find_columns, standard_columns
from .images import decode_all
from .long_tail import class_counts, indices_hash, long_tailed_indices, stratified_split, validation_split
from .sources.arrays import IDX_STEMS, cifar_folder, load_cifar, load_digits, load_idx
from .sources.files import TEST_NAMES, TRAIN_NAMES, find_split, named, split_of
from .sources.folders import load_class_folders, split_folders
from .sources.labels import check_training_counts
from .sources.lists import find_annotations, find_lists, load_annotations, load_lists
from .sources.tables import find_metadata, find_shards, find_tables, load_tables
from .streaming import StreamedSplit

logger = logging.getLogger(__name__)

# Data sets that must be given as a folder, since no public copy can be loaded.
FOLDER_ONLY = ("imagefolder", "imagenet_lt", "inat18", "places_lt")
# Data sets whose classes the authors' student code sorts by decreasing training count, and its names for them.
SORTED_BY_AUTHORS = {"imagenet_lt": "IMAGENETLT", "inat18": "INAT18"}


def load_long_tailed(dataset: str = "digits", data_dir: str | None = None, **options: Any) -> datasets.DatasetDict:
    """Loads a data set and, on request, makes its training split long-tailed. The test split stays complete.

    Args:
        dataset: See [`load_source`].
        data_dir: See [`load_source`].
        **options: `train_list`, `test_list`, `image_column` and `label_column` of [`load_source`], and all options of
            [`long_tailed_splits`].

    Returns:
        `train` and `test`, see [`long_tailed_splits`].

    Raises:
        FileNotFoundError: If `data_dir` does not exist or has no supported layout, or listed images are missing.
        ValueError: If a split, column or class is missing, or the imbalance cannot be made.
    """
    lists = {name: options.pop(name, None) for name in ("train_list", "test_list")}
    columns = {name: options.get(name) for name in ("image_column", "label_column")}
    return long_tailed_splits(load_source(dataset, data_dir, **lists, **columns)[1], **options)


def load_source(
    dataset: str = "digits",
    data_dir: str | None = None,
    train_list: str | None = None,
    test_list: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[str, datasets.DatasetDict]:
    """Loads the splits of a data set unchanged.

    Args:
        dataset: `digits` (scikit-learn's, embedded: 1,797 images of 8 x 8 pixels), or the id of a data set on the Hub.
            With `data_dir` it is only a name.
        data_dir: Read from this folder instead. The layout is detected in this order: list files (see [`load_lists`]);
            MNIST-style IDX files; CIFAR's python version; output of `save_to_disk`; Hugging Face's `metadata.csv` (or
            `.jsonl`, `.parquet`) next to images; class folders below `train` and `test`; an iNaturalist competition;
            tables (CSV, TSV, JSON lines, parquet) with paths or images; webdataset shards; class folders.
        train_list: List file of the training images, relative to the working directory or `data_dir`; by default found
            by its name.
        test_list: List file of the test images.
        image_column: Column with the images; by default a column with a usual name. Layouts without columns (folders,
            lists, arrays) accept any name, since a recipe may name a column of the Hub's copy. But if `data_dir` has
            tables, a named column must be in a table.
        label_column: Column with the labels; the same rules apply.

    Returns:
        A description of the source, and the splits.

    Raises:
        FileNotFoundError: If the folder does not exist or has no supported layout.
        ValueError: If its files do not have the expected content.
    """
    if data_dir is None:
        return _load_public(dataset)
    folder = Path(data_dir).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir {data_dir!r} is not a folder.")
    # A named column can only be meant for a table, so tables come first. The order of the other layouts goes from those
    # with files that no other layout has to class folders, which any folder with subfolders could be.
    if (image_column or label_column) and (tables := find_tables(folder, image_column, label_column)):
        return _load_tables(folder, tables, image_column, label_column)

    def named_columns(kind: str, splits: datasets.DatasetDict) -> tuple[str, datasets.DatasetDict]:
        return kind, splits.rename_columns({"image": image_column or "image", "label": label_column or "label"})

    if lists := find_lists(folder, train_list, test_list):
        return named_columns(f"list files ({_names(folder, lists)})", load_lists(folder, lists))
    if any(folder.glob(f"{IDX_STEMS['train']}-images-idx3-ubyte*")):
        return named_columns("IDX files", load_idx(folder))
    if cifar := cifar_folder(folder):
        return named_columns("CIFAR's python version", load_cifar(cifar))
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return "a saved data set", _load_saved(folder)
    if metadata := find_metadata(folder):
        return _load_tables(folder, metadata)
    if {"train"} < set(split_folders(folder)):
        return named_columns("class folders", load_class_folders(folder))
    if annotations := find_annotations(folder):
        kind = f"iNaturalist annotations ({_names(folder, annotations)})"
        return named_columns(kind, load_annotations(folder, annotations))
    if tables := find_tables(folder):
        return _load_tables(folder, tables)
    if shards := find_shards(folder):
        with file_errors(folder):
            return "webdataset shards", datasets.load_dataset("webdataset", data_files=shards)
    if not any(path.is_file() for path in folder.rglob("*")):
        raise FileNotFoundError(f"data_dir {data_dir!r} has no files.")
    return named_columns("class folders", load_class_folders(folder))


def _load_public(dataset: str) -> tuple[str, datasets.DatasetDict]:
    """Loads the embedded digits, or a data set of the Hub."""
    if dataset in FOLDER_ONLY:
        raise ValueError(f"{dataset} has no public copy to load; give data_dir, the folder with its images.")
    if dataset == "digits":
        return "scikit-learn's digits", load_digits()
    with file_errors(dataset):
        return f"{dataset} from the Hub", _by_split_column(datasets.load_dataset(dataset))


def _load_saved(folder: Path) -> datasets.DatasetDict:
    """Loads the output of `save_to_disk`, of a data set with or without splits."""
    with file_errors(folder):
        loaded = datasets.load_from_disk(str(folder))
    return _by_split_column(loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict(train=loaded))


def _load_tables(folder: Path, tables: dict[str, Path], *columns: str | None) -> tuple[str, datasets.DatasetDict]:
    return f"tables ({_names(folder, tables)})", _by_split_column(load_tables(folder, tables, *columns))


def _names(folder: Path, files: dict[str, Path]) -> str:
    return named(path.relative_to(folder) if path.is_relative_to(folder) else path for path in files.values())


def _by_split_column(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """Divides a single split by its column `split`, if the column names both a training and a test split."""
    if len(splits) != 1:
        return splits
    rows = next(iter(splits.values()))
    column = find_split(rows.column_names, ["split"])
    if column is None or getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
        return splits
    values = rows.with_format(None)[column][:]
    parts = [value and (split_of(value) or value) for value in values]
    if "train" not in parts or not set(parts) & set(TEST_NAMES):
        return splits
    if None in parts or "" in parts:
        raise ValueError(f"{sum(not part for part in parts):,} rows have no {column}; give each one.")
    indices = {part: [row for row, value in enumerate(parts) if value == part] for part in dict.fromkeys(parts)}
    return datasets.DatasetDict({part: rows.select(chosen) for part, chosen in indices.items()})


def long_tailed_splits(
    splits: datasets.DatasetDict,
    *,
    imbalance_ratio: float | None = None,
    imbalance_type: str = "exp",
    max_per_class: int | None = None,
    subset_seed: int = 0,
    test_split: str | None = None,
    test_fraction: float | None = None,
    validation_fraction: float | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | str | None = None,
    skip_bad_images: bool = False,
) -> datasets.DatasetDict:
    """Prepares splits for the trainers, with a long-tailed training split on request. The test split stays complete.

    Args:
        splits: Splits as [`load_source`] returns them.
        imbalance_ratio: Subsample a balanced training split to this ratio of its largest to its smallest class, see
            [`long_tailed_indices`]. None keeps all images, for data that are already long-tailed.
        imbalance_type: `exp` or `step`.
        max_per_class: Images of the largest class after subsampling.
        subset_seed: Seed of the subset, of `test_fraction` and of `validation_fraction`. The authors always use 0.
        test_split: Name of the test split; by default the first of test, validation, valid, val and eval.
        test_fraction: Share of each class to set apart for testing, in data without a test split.
        validation_fraction: Share of each class of the training split, after the subsampling, to set apart for choices
            that the test images must not make; see [`validation_split`].
        image_column: Column with the images; by default the only one of that type.
        label_column: Column with the labels; by default the only one of type `ClassLabel`, or one with a usual name.
        class_names: Names of the classes, or a file with them (see [`read_class_names`]), in label order.
        skip_bad_images: Decode every image once and leave out those that cannot be read, with a warning that counts
            them. Otherwise an unreadable image stops the run with an error that names it.

    Returns:
        `train`, `test` and, on request, `validation`, each with the columns `image`, `label` (`ClassLabel`) and
        `source_index` (row in the split of the source).

    Raises:
        ValueError: If a split, column or class is missing, or the imbalance cannot be made.
    """
    splits = _choose_splits(splits, test_split, test_fraction)
    splits = standard_columns(splits, image_column, label_column, class_names)
    if test_fraction is not None:
        train, test = stratified_split(splits["train"]["label"][:], test_fraction, subset_seed)
        splits = datasets.DatasetDict(train=splits["train"].select(train), test=splits["train"].select(test))
    if skip_bad_images:
        splits = datasets.DatasetDict({name: readable(name, split) for name, split in splits.items()})
    names = splits["train"].features["label"].names
    if max_per_class is not None and imbalance_ratio is None:
        raise ValueError("max_per_class needs an imbalance_ratio (1 for classes of the same size).")
    if imbalance_ratio is not None:
        chosen = long_tailed_indices(
            splits["train"]["label"][:], len(names), imbalance_ratio, imbalance_type, subset_seed, max_per_class
        )
        splits["train"] = splits["train"].select(chosen)
    check_training_counts(names, training_counts(splits["train"]))
    if validation_fraction is not None:
        train, validation = validation_split(splits["train"]["label"][:], validation_fraction, subset_seed)
        splits["validation"] = splits["train"].select(validation)
        splits["train"] = splits["train"].select(train)
    return splits


def training_counts(split: datasets.Dataset | StreamedSplit) -> np.ndarray:
    """Training images of each class, in label order; int64 of shape (num_classes,).

    A split is a `datasets.Dataset` with one `ClassLabel` column, or a [`StreamedSplit`], which stores its counts.
    """
    if not isinstance(split, datasets.Dataset):
        return split.class_counts
    column = find_columns(split)[1]
    return class_counts(split.with_format(None)[column][:], split.features[column].num_classes)


def subset_hash(split: datasets.Dataset | StreamedSplit) -> str | None:
    """SHA-256 of the source rows that a split contains, or of a stream's class counts; None if the rows are unknown.

    Equal hashes mean that two runs chose the same rows of the same source, or of a copy on another machine.
    [`images_hash`] also compares the images.
    """
    if not isinstance(split, datasets.Dataset):
        return indices_hash(split.class_counts)
    return indices_hash(split["source_index"][:]) if "source_index" in split.column_names else None


def images_hash(split: datasets.Dataset | StreamedSplit, contents: int = 4096) -> str | None:
    """SHA-256 of the content of a training split: checks that a resumed run sees the same images. None for a stream.

    The hash covers, in order, the label and the file name (with the name of its folder) of every image, the size of
    every image file, and the full content of `contents` images that are spread evenly over the split.
    """
    if not isinstance(split, datasets.Dataset):
        return None
    image, label = find_columns(split)
    split = split.with_format(None)
    digest = hashlib.sha256(np.asarray(split[label][:], "<i8").tobytes())
    images = split.select_columns(image).cast_column(image, datasets.Image(decode=False))
    # Select the path column alone: this does not read the bytes of the images.
    paths = images.flatten().with_format(None)[f"{image}.path"][:]
    for path in paths:
        # Folder and name only: the same data may lie elsewhere.
        digest.update(repr(path and os.path.normpath(path).split(os.sep)[-2:]).encode())
        with contextlib.suppress(OSError, TypeError):  # images inside a table or an archive have no file
            digest.update(os.stat(path).st_size.to_bytes(8, "little"))
    # Full contents of a sample: to read all of ImageNet would take longer than the start of a run should.
    for row in np.linspace(0, len(paths) - 1, min(contents, len(paths))).astype(int).tolist():
        content = images[row][image]["bytes"]
        with contextlib.suppress(OSError, TypeError):
            content = Path(paths[row]).read_bytes() if content is None else content
        digest.update(hashlib.sha256(content or b"").digest())
    return digest.hexdigest()


def _choose_splits(
    splits: datasets.DatasetDict, test_split: str | None, test_fraction: float | None
) -> datasets.DatasetDict:
    """Chooses the splits `train` and `test`; only `train` if `test_fraction` is to be taken from it."""
    test = find_split(splits, [test_split] if test_split is not None else TEST_NAMES)
    train = find_split(splits, TRAIN_NAMES)
    if test_fraction is not None:
        if test is not None or train is None:
            raise ValueError(f"the data have the splits {', '.join(splits)}; leave out test_fraction.")
        return datasets.DatasetDict(train=splits[train])
    if train is None or test is None:
        missing = "train" if train is None else f"test ({test_split or ' or '.join(TEST_NAMES)})"
        raise ValueError(
            f"the data have no {missing} split; the splits are {one_line(', '.join(splits))}. In an image folder put "
            "the images below train/CLASS/ and test/CLASS/, or give test_fraction to set a share of each class apart."
        )
    return datasets.DatasetDict({"train": splits[train], "test": splits[test]})


# Readable rows of the files that this process has decoded, by a digest of their paths, sizes and times. A run loads its
# data several times: for the plan, the teacher, the student and the report.
_readable_rows: dict[str, list[int]] = {}


def readable(name: str, split: datasets.Dataset) -> datasets.Dataset:
    """The rows of a split whose images (column `image`) can be decoded. Warns of the others once per process."""
    key = _files_digest(split)
    if key is None or key not in _readable_rows:
        errors = [found.error for found in decode_all(split)]
        rows = [row for row, error in enumerate(errors) if error is None]
        for error in filter(None, errors):
            logger.warning("left out: %s", error)
        if len(rows) < len(split):
            logger.warning("%s split: left out %d unreadable images of %d", name, len(split) - len(rows), len(split))
        if key is None:
            return split.select(rows)
        _readable_rows[key] = rows
    return split.select(_readable_rows[key])


def _files_digest(split: datasets.Dataset) -> str | None:
    """Digest of the paths, sizes and times of the image files of a split; None if an image is not a file."""
    images = split.select_columns("image").cast_column("image", datasets.Image(decode=False)).flatten()
    digest = hashlib.sha256()
    for path in images.with_format(None)["image.path"][:]:
        try:
            status = os.stat(path)
        except (OSError, TypeError, ValueError):
            return None
        digest.update(f"{path}\0{status.st_size} {status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
