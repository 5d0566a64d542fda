"""Loads sources that store images as arrays: the embedded digits, IDX files, and CIFAR's pickles."""

import gzip
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from numpy._core import multiarray
from PIL.Image import fromarray

DIGITS = Path(__file__).with_name("digits.npz")
IDX_STEMS = {"train": "train", "test": "t10k"}


class CifarLayout(NamedTuple):
    """Names of files and keys inside an archive of CIFAR's python version."""

    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str


CIFAR_LAYOUTS = {
    "cifar-10-batches-py": CifarLayout(
        tuple(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch", "batches.meta", "labels", "label_names"
    ),
    "cifar-100-python": CifarLayout(("train",), "test", "meta", "fine_labels", "fine_label_names"),
}


def load_digits() -> DatasetDict:
    """Loads scikit-learn's digits: 1,797 images of 8 x 8 pixels, of which 600 are for testing.

    `digits.npz` holds them divided, because scikit-learn would delay the start of every run; a test compares the file
    with scikit-learn's `train_test_split` of `load_digits`.
    """
    names = [str(digit) for digit in range(10)]
    with np.load(DIGITS) as arrays:
        return DatasetDict(
            {
                split: _from_arrays(arrays[f"{split}_images"], arrays[f"{split}_labels"], names)
                for split in ("train", "test")
            }
        )


def load_idx(folder: Path) -> DatasetDict:
    """Loads MNIST-style IDX files, gzipped or not.

    Raises:
        FileNotFoundError: If one of the four files is missing.
        ValueError: If a file cannot be read.
    """
    return DatasetDict({split: _idx_split(folder, stem) for split, stem in IDX_STEMS.items()})


def _idx_split(folder: Path, stem: str) -> Dataset:
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


def cifar_folder(folder: Path) -> Path | None:
    """Finds the folder of CIFAR's python version: the given folder, or one directly below it."""
    candidates = [folder, *(folder / name for name in CIFAR_LAYOUTS)]
    return next(
        (path for path in candidates if any((path / lay.meta).is_file() for lay in CIFAR_LAYOUTS.values())), None
    )


def load_cifar(folder: Path) -> DatasetDict:
    """Loads CIFAR-10 or CIFAR-100 from its python version, in the image order that the authors' subsets refer to.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file does not have the expected content; no code in it is run.
    """
    layout = next(layout for layout in CIFAR_LAYOUTS.values() if (folder / layout.meta).is_file())
    names = _get(folder / layout.meta, _read_pickle(folder / layout.meta), layout.names)
    names = [name.decode() if isinstance(name, bytes) else name for name in names]
    return DatasetDict(
        {
            "train": _from_arrays(*_cifar_split(folder, layout.train, layout.labels), names),
            "test": _from_arrays(*_cifar_split(folder, (layout.test,), layout.labels), names),
        }
    )


def _cifar_split(folder: Path, files: Sequence[str], labels_key: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for path in (folder / name for name in files):
        batch = _read_pickle(path)
        # Rows of 3,072 bytes: 32 x 32 of red, then of green and of blue.
        pixels = np.asarray(_get(path, batch, "data"), dtype=np.uint8)
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(np.asarray(_get(path, batch, labels_key), dtype=np.int64))
    return np.concatenate(images), np.concatenate(labels)


def _get(path: Path, batch: dict, key: str) -> Any:
    """Looks up a value by its key; Python 2 wrote keys as bytes."""
    for name in (key, key.encode()):
        if isinstance(batch, dict) and name in batch:
            return batch[name]
    raise ValueError(f"{path} has no {key!r}; it is not a file of CIFAR's python version.")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler for plain values and numpy arrays; it refuses any other object, so no code is run."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return multiarray._reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}, which could run arbitrary code; it was not executed"
        )


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            # Python 2 wrote the files: its strings, as of array data, are bytes and not text.
            return _ArrayUnpickler(file, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # a pickle of garbage can raise anything
        raise ValueError(f"{path} cannot be loaded: {error}.") from error


def _from_arrays(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Dataset:
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(names):
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}, but there are {len(names)} class names.")
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    rows = {"image": [fromarray(image) for image in images], "label": labels.astype(np.int64).tolist()}
    return Dataset.from_dict(rows, features=features)
