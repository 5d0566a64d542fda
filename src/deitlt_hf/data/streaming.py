"""Streams training images from shards: sequential reads, shuffling in a window, and sharding over processes."""

import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from datasets.features.features import FeatureType
from torch.utils.data import IterableDataset, get_worker_info

from ..io import file_errors, read_json
from .columns import find_columns, standard_columns, with_classes
from .images import EncodedImage, open_image
from .sampling import image_seeds, images_of_epoch, seed_streams, whole_steps
from .sources.files import TEST_NAMES, find_split
from .sources.labels import check_class_names, check_training_counts, class_of, encode_labels, refuse_missing
from .sources.tables import embeds_images, find_shards, find_tables, sibling_tables

logger = logging.getLogger(__name__)


class StreamedSplit:
    """A training split that is streamed from shards, with its classes and class counts.

    Args:
        stream: Rows with an image and a label.
        image_column: Name of the image column.
        label_column: Name of the label column.
        counts: Images of each class by label. A label is a class index (also as text, if no class has that name) or a
            value of the column.
        shuffle_buffer: Size of the shuffle window, in images. The order of the shards is shuffled, too.
        skip_bad_images: Leave out images that cannot be read, with a warning each.

    Raises:
        ValueError: If a class has no image, or `counts` has an entry that is not a class.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        image_column: str,
        label_column: str,
        counts: Mapping,
        shuffle_buffer: int = 2048,
        skip_bad_images: bool = False,
    ) -> None:
        feature = (stream.features or {}).get(label_column)
        self.label_of: dict[Any, int]
        self._indices: dict[str, int] = {}
        if isinstance(feature, datasets.ClassLabel):
            names = feature.names
            self.label_of = {label: label for label in range(len(names))}
            self.class_counts = _counts_of_indices(names, counts)
        else:
            names, self.label_of, self.class_counts = _counts_of_values(feature, counts)
            self._indices = {name: label for label, name in enumerate(names)}  # a counts file has class names
        check_training_counts(names, self.class_counts)
        # Not decoded by `datasets`, whose error would not name the image.
        self.stream = stream.select_columns([image_column, label_column]).cast_column(
            image_column, datasets.Image(decode=False)
        )
        self.image_column, self.label_column = image_column, label_column
        self.features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        self.column_names = ["image", "label"]
        self.shuffle_buffer = shuffle_buffer
        self.skip_bad_images = skip_bad_images

    def __len__(self) -> int:
        return int(self.class_counts.sum())

    def label(self, value: Any) -> int | None:
        """The class index of a label value in the stream; None if it was not counted."""
        found = self.label_of.get(value)
        return class_of(value, self._indices) if found is None and self._indices else found


def _counts_of_indices(names: list[str], counts: Mapping) -> np.ndarray:
    """Images of each class of a `ClassLabel` column, (classes,), from counts by class index or by name."""
    check_class_names(names, "the stream")
    missing = {str(key): count for key, count in counts.items() if key is None or key == -1}
    if missing:
        refuse_missing("the stream", missing, sum(counts.values()))
    # Class names can be numbers in another order than the labels: text keys are names if they match the names.
    by_name = any(isinstance(key, str) for key in counts)
    if set(counts) == set(map(str, range(len(names)))) and not set(counts) & set(names):
        counts, by_name = {int(key): count for key, count in counts.items()}, False
    keys = names if by_name else range(len(names))
    known = set(keys)
    _refuse_others([key for key in counts if key not in known], f"classes go from {keys[0]!r} to {keys[-1]!r}")
    return np.array([counts.get(key, 0) for key in keys])


def _counts_of_values(feature: FeatureType, counts: Mapping) -> tuple[list[str], dict[Any, int], np.ndarray]:
    """Class names, class index by label, and images of each class of a column of any labels."""
    if str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        others = [key for key in counts if not re.fullmatch(r"-?\d+", str(key))]
        _refuse_others(others, "labels are whole numbers")
        counts = {int(key): count for key, count in counts.items()}
    names, labels = encode_labels({"train": counts}, {"train": "the stream"})
    label_of = dict(zip(counts, labels["train"].tolist(), strict=True))
    class_counts = np.zeros(len(names), np.int64)
    # `add.at` accumulates: different spellings of a label can be the same class.
    np.add.at(class_counts, labels["train"], list(counts.values()))
    return names, label_of, class_counts


class StreamedImages(IterableDataset):
    """Iterates over one process's share of a [`StreamedSplit`] as rows of model inputs, in full batches.

    An epoch has as many images as the split, rounded down to whole optimiser steps. If the number of shards is a
    multiple of the number of processes, each process reads only its own shards. Otherwise each process reads all shards
    and skips the images of the other processes. Parameters are those of [`TrainBatches`], except:

    Args:
        split: Split to read.
        views: Transforms by the name of the model input that they make.
        num_repeats: All copies of an image are consecutive in one process, whereas [`TrainBatches`] spreads them.
        seed: Order and augmentation also depend on the number of workers, since workers share the shards.
        background: See [`EncodedImage`].

    Raises:
        ValueError: If there are fewer images than one batch over all processes.
    """

    def __init__(
        self,
        split: StreamedSplit,
        views: Mapping[str, Callable[[EncodedImage | np.ndarray], torch.Tensor]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_repeats: int = 1,
        seed: int = 0,
        micro_batches: int = 1,
        background: str | None = None,
    ) -> None:
        self.split, self.views, self.batch_size, self.num_repeats = split, views, batch_size, num_repeats
        self.background = background
        images = images_of_epoch(len(split), num_repeats)
        self.num_batches = whole_steps(images, batch_size, world_size, micro_batches)
        if self.num_batches == 0:
            raise ValueError(f"{images} images are fewer than one batch of {world_size} x {batch_size}.")
        self.rank, self.world_size, self.seed = rank, world_size, seed
        # In shared memory: persistent workers then see the epoch change.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch[0] = epoch

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The loader takes whole batches from its workers in turn, so the first ones deliver those that remain.
        wanted = (self.num_batches // workers + (index < self.num_batches % workers)) * self.batch_size
        seeds = image_seeds(wanted, self.seed, int(self.epoch), self.rank, index)
        for seed, (image, label) in zip(seeds.tolist(), self._rows(), strict=False):  # the rows are infinite
            seed_streams(seed)
            yield {"labels": label, **{name: view(image) for name, view in self.views.items()}}

    def _rows(self) -> Iterator[tuple[np.ndarray | EncodedImage, int]]:
        """Infinite iterator over images and labels: shards differ in size, so an exhausted worker restarts."""
        for turn in itertools.count():
            # Not the stream's `set_epoch`: workers share its state and would write it at the same time.
            seed = np.random.SeedSequence([self.seed, int(self.epoch), turn]).generate_state(1)[0]
            # Before the division among processes, and by the same seed: all must agree on the order of the shards.
            stream = self.split.stream.shuffle(seed=int(seed), buffer_size=self.split.shuffle_buffer)
            seen = found = False
            for row in split_dataset_by_node(stream, rank=self.rank, world_size=self.world_size):
                seen = True
                image = self._open(row[self.split.image_column], row[self.split.label_column])
                label = self.split.label(row[self.split.label_column])
                if label is None:
                    raise ValueError(f"the stream has a label that was not counted: {row[self.split.label_column]!r}.")
                if image is None:
                    continue
                found = True
                yield from itertools.repeat((image, label), self.num_repeats)
            # Without these errors, the loop over turns would never end.
            if seen and not found:
                raise ValueError("none of the images that a worker has read can be decoded.")
            if not found:
                raise ValueError(
                    f"a worker has no shard: there are only {self.split.stream.num_shards} shards; lower "
                    "--dataloader_num_workers, or make more shards."
                )

    def _open(self, image: Mapping | None, label: object) -> np.ndarray | EncodedImage | None:
        try:
            opened = open_image(image, f"an image of the stream with the label {label!r}", self.background)
            # Decode once here if several transforms or copies use the image, or if errors must be caught.
            return (
                opened
                if self.num_repeats * len(self.views) == 1 and not self.split.skip_bad_images
                else opened.decode()
            )
        except ValueError as error:
            if not self.split.skip_bad_images:
                raise
            logger.warning("left out: %s", error)
            return None


def load_streamed(
    dataset: str,
    data_dir: str | None,
    *,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_counts: str | None = None,
    shuffle_buffer: int = 2048,
    skip_bad_images: bool = False,
) -> tuple[str, dict]:
    """Opens the training split of a data set as a stream, and loads its test split.

    Args:
        dataset: Id of a data set on the Hub; with `data_dir` it is only a name.
        data_dir: Folder with webdataset shards, or parquet files that contain images.
        test_split: Name of the test split; by default the first split with a usual name, such as test or validation.
        image_column: See [`load_source`].
        label_column: See [`load_source`].
        class_counts: JSON file with the training images of each class, as [`count_classes`] returns them. Without it,
            the labels of all shards are read first.
        shuffle_buffer: See [`StreamedSplit`].
        skip_bad_images: See [`StreamedSplit`].

    Returns:
        A description of the source, and a dictionary of `train`, a [`StreamedSplit`], and `test`, a `datasets.Dataset`.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it has no shards or no test split, a column is missing, or the test split has other classes.
    """
    kind, arguments = _shards(dataset, data_dir)
    with file_errors(data_dir or dataset):
        streams = datasets.load_dataset(**arguments, streaming=True)
    test = find_split(streams, [test_split] if test_split is not None else TEST_NAMES)
    if "train" not in streams or test is None:
        raise ValueError(f"streaming needs a train and a test split; the splits are {', '.join(streams)}.")
    stream = streams["train"]
    if stream.features is None:  # shards without a schema, such as webdataset: the first rows show the columns
        stream = stream._resolve_features()
    columns = find_columns(stream, image_column, label_column)
    counts = _read_counts(class_counts) if class_counts is not None else count_classes(stream, columns[1])
    train = StreamedSplit(stream, *columns, counts, shuffle_buffer, skip_bad_images)
    with file_errors(data_dir or dataset):
        tested = datasets.load_dataset(**arguments, split=test)
    tested = standard_columns(datasets.DatasetDict(test=tested), *columns)["test"]
    return kind, {"train": train, "test": with_classes(tested, train.features["label"])}


def count_classes(stream: datasets.IterableDataset, label_column: str) -> Counter:
    """Counts the images of each class by reading all labels of a stream; keys are the labels."""
    return Counter(row[label_column] for row in stream.select_columns([label_column]))


def _refuse_others(keys: Sequence, known: str) -> None:
    if keys:
        raise ValueError(f"there are counts of {', '.join(map(repr, keys[:5]))} ({len(keys)} in all), but {known}.")


def _read_counts(path: str) -> dict:
    content = read_json(Path(path).expanduser(), object)
    counts = dict(enumerate(content)) if isinstance(content, list) else content
    if not isinstance(counts, dict) or not all(type(count) is int and count >= 0 for count in counts.values()):
        raise ValueError(f"{path} must hold a list of counts, or an object from class to count.")
    return counts


def _shards(dataset: str, data_dir: str | None) -> tuple[str, dict]:
    if data_dir is None:
        if dataset == "digits":
            raise ValueError("the embedded digits need no streaming; give data_dir, or the id of a Hub data set.")
        return f"{dataset} from the Hub, streamed", {"path": dataset}
    folder = Path(data_dir).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir {data_dir!r} is not a folder.")
    if shards := find_shards(folder):
        return "webdataset shards, streamed", {"path": "webdataset", "data_files": shards}
    tables = find_tables(folder)
    if tables and embeds_images(tables["train"]):
        files = {split: sibling_tables(path) for split, path in tables.items()}
        return "parquet files, streamed", {"path": "parquet", "data_files": files}
    raise ValueError(
        f"{data_dir} has no webdataset shards or parquet files to stream; images that are separate files need no "
        "--streaming: only their names are read before training."
    )
