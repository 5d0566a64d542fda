"""Sources whose images are files: class folders, list files, iNaturalist's annotations, tables and shards.

Each becomes splits with the columns `image` (paths, or bytes in shards) and `label`; no image is opened here.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from PIL import Image

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "validation", "valid", "val", "eval", "dev")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
PATH_COLUMNS = ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "class", "category", "target", "species", "class_name", "cls")
MISSING_NAMED = 3


class Split(NamedTuple):
    """Images of a split by path, with their labels."""

    paths: list[str]
    labels: np.ndarray

    def dataset(self, names: Sequence[str]) -> datasets.Dataset:
        """Makes the data set, without looking into the files."""
        features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"image": self.paths, "label": self.labels}, features=features)
        return rows.cast_column("image", datasets.Image())


def find_split(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of `names` that is one of `wanted`, in the order of `wanted`, whatever its case."""
    by_lower = {name.lower(): name for name in sorted(names, reverse=True)}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


# ---- Class folders ----


def has_split_folders(folder: Path) -> bool:
    """Whether there are a training and a test folder, each with folders in it."""
    folders = _folders(folder)
    splits = [find_split(folders, names) for names in (TRAIN_NAMES, TEST_NAMES)]
    return all(split is not None and _folders(folder / split) for split in splits)


def load_class_folders(folder: Path) -> datasets.DatasetDict:
    """Loads images below `train/CLASS/` and `test/CLASS/`, or all in one split below `CLASS/`.

    A class is a folder at that level, with whatever is below it, as in torchvision. Other files are left alone.

    Raises:
        FileNotFoundError: If there is no image in a class folder.
    """
    folders = _folders(folder)
    train, test = find_split(folders, TRAIN_NAMES), find_split(folders, TEST_NAMES)
    places = {"train": folder / train if train else folder}
    if train and test:
        places[test.lower()] = folder / test
    found = {split: _scan(place) for split, place in places.items()}
    if not found["train"]:
        raise FileNotFoundError(
            f"{places['train']} has no folders with images; put them below train/CLASS/ and test/CLASS/ (test, val and "
            "the like), or below CLASS/ and give --test_fraction."
        )
    names = sorted(set().union(*found.values()))
    return datasets.DatasetDict(
        {split: _class_split(classes, names).dataset(names) for split, classes in found.items()}
    )


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _scan(folder: Path) -> dict[str, list[str]]:
    """Image files of each class folder, sorted."""
    Image.init()
    suffixes = tuple(suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN)
    classes = {}
    for name in _folders(folder):
        paths = [
            os.path.join(root, file)
            for root, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith(suffixes) and not file.startswith(".")
        ]
        if paths:
            classes[name] = sorted(paths)
    return classes


def _class_split(classes: Mapping[str, list[str]], names: Sequence[str]) -> Split:
    positions = {name: label for label, name in enumerate(names)}
    labels = np.repeat([positions[name] for name in classes], [len(paths) for paths in classes.values()])
    return Split([path for paths in classes.values() for path in paths], labels)


# ---- List files ----


def find_lists(folder: Path, train_list: str | None = None, test_list: str | None = None) -> dict[str, Path]:
    """Finds the list files of `train` and `test`: as given, else by name in the folder or directly below.

    Raises:
        FileNotFoundError: If a given one does not exist.
        ValueError: If several could be the training list.
    """
    given = {"train": train_list, "test": test_list}
    lists = {split: _existing(folder, name) for split, name in given.items() if name is not None}
    candidates = [path for pattern in ("*.txt", "*/*.txt") for path in sorted(folder.glob(pattern)) if _is_list(path)]
    if "train" not in lists:
        trains = [path for path in candidates if re.search("train", path.stem, re.IGNORECASE)]
        if len(trains) > 1:
            raise ValueError(f"{folder} has several training lists ({_named(trains)}); choose one with --train_list.")
        if not trains:
            return {}
        lists["train"] = trains[0]
    if "test" not in lists:
        tests = [path for kind in ("test", "val") for path in candidates if re.search(kind, path.stem, re.IGNORECASE)]
        if tests:
            lists["test"] = tests[0]
    return lists


def load_lists(folder: Path, lists: Mapping[str, Path]) -> datasets.DatasetDict:
    """Loads list files of lines `relative/path label`, such as those of ImageNet-LT, Places-LT and iNaturalist 2018.

    A class is named after its `categories.json` entry, else after the folder that its training images are in (below
    the folder that all share), else by its number.

    Raises:
        ValueError: If a line is not of that kind.
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    relative = {split: _read_list(path) for split, path in lists.items()}
    num_classes = 1 + max(int(split.labels.max()) for split in relative.values())
    names = _category_names(folder, range(num_classes)) or _folder_names(relative["train"], num_classes)
    return _located(folder, relative, names)


def _existing(folder: Path, name: str) -> Path:
    path = Path(name).expanduser()
    for candidate in (path, folder / path):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"there is no list file {name!r}, here or in {folder}.")


def _is_list(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return re.fullmatch(r"\S.*\.\w+\s+\d+\s*", file.readline()) is not None


def _read_list(path: Path) -> Split:
    paths, labels = [], []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            words = line.rsplit(maxsplit=1)
            if not words:
                continue
            if len(words) != 2 or not words[1].isdecimal():
                raise ValueError(f"line {number} of {path} is not 'relative/path label': {line.strip()[:80]!r}.")
            paths.append(words[0].strip())
            labels.append(int(words[1]))
    if not paths:
        raise ValueError(f"{path} lists no images.")
    return Split(paths, np.asarray(labels))


def _folder_names(split: Split, num_classes: int) -> list[str]:
    folders: dict[int, str] = {}
    numbers = [str(label) for label in range(num_classes)]
    for path, label in zip(split.paths, split.labels.tolist(), strict=True):
        folder = os.path.dirname(path)
        if folders.setdefault(label, folder) != folder:
            return numbers
    if len(folders) < num_classes or len(set(folders.values())) < num_classes or "" in folders.values():
        return numbers
    shared = os.path.commonpath(folders.values())
    return [os.path.relpath(folders[label], shared or ".") for label in range(num_classes)]


# ---- iNaturalist's annotations ----


def find_annotations(folder: Path) -> dict[str, Path]:
    """Finds `train*.json` and `val*.json` (or `test*.json` with labels) of an iNaturalist competition."""
    found = {}
    for split in ("train", "val"):
        files = sorted(folder.glob(f"{split}*.json"))
        if len(files) == 1:
            found["train" if split == "train" else "test"] = files[0]
    return found if "train" in found else {}


def load_annotations(folder: Path, files: Mapping[str, Path]) -> datasets.DatasetDict:
    """Loads an iNaturalist competition: `train2018.json`, `val2018.json`, `categories.json` and the folder of images.

    Labels are the category ids in increasing order; for 2018 these are 0 to 8,141 and the labels of the list files.

    Raises:
        ValueError: If a file is not of that kind.
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    contents = {split: _annotations(path) for split, path in files.items()}
    ids = sorted(set().union(*(set(categories) for _, categories in contents.values())))
    positions = {category: label for label, category in enumerate(ids)}
    relative = {
        split: Split(paths, np.asarray([positions[category] for category in categories]))
        for split, (paths, categories) in contents.items()
    }
    names = _category_names(folder, ids) or _category_names(files["train"], ids) or [str(category) for category in ids]
    return _located(folder, relative, names)


def _annotations(path: Path) -> tuple[list[str], list[int]]:
    """Paths of images, in the file's order, and their categories."""
    content = _read_json(path)
    try:
        category = {row["image_id"]: row["category_id"] for row in content["annotations"]}
        paths = [row["file_name"] for row in content["images"]]
        return paths, [category[row["id"]] for row in content["images"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an iNaturalist annotation file with labels: it lacks {error}.") from error


def _category_names(source: Path, ids: Sequence[int]) -> list[str] | None:
    """Names from `categories.json` in a folder, or from the categories of an annotation file, if they fit."""
    path = source / "categories.json" if source.is_dir() else source
    if not path.is_file():
        return None
    content = _read_json(path)
    categories = content.get("categories") if isinstance(content, dict) else content
    try:
        names = {row["id"]: str(row["name"]) for row in categories}
    except (KeyError, TypeError):
        return None
    if not set(ids) <= set(names):
        return None
    chosen = [names[category] for category in ids]
    return chosen if len(set(chosen)) == len(chosen) else None


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


# ---- Tables ----


def find_tables(folder: Path) -> dict[str, Path]:
    """Finds tables (CSV, TSV, parquet): of `train` and a test split by name, or a single one for both."""
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    found: dict[str, list[Path]] = {}
    for path in tables:
        found.setdefault(_split_of(path.name) or "train", []).append(path)
    if any(len(paths) > 1 for paths in found.values()) and not _embeds_images(tables[0]):
        doubled = next(paths for paths in found.values() if len(paths) > 1)
        raise ValueError(f"{folder} has several tables for one split ({_named(doubled)}); keep one a split.")
    return {split: paths[0] for split, paths in found.items()}


def load_tables(
    folder: Path, tables: Mapping[str, Path], image_column: str | None, label_column: str | None
) -> datasets.DatasetDict:
    """Loads tables with a column of paths, relative to the folder, and one of labels; or parquet with images in it.

    A column `split` parts a single table into `train` and a test split. Label columns of any type become classes.

    Raises:
        ValueError: If a column is missing.
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    if _embeds_images(tables["train"]):
        return datasets.load_dataset(
            "parquet", data_files={split: sibling_tables(path) for split, path in tables.items()}
        )
    splits: dict[str, Split] = {}
    for name, path in tables.items():
        columns = _read_table(path)
        image = _column(path, columns, image_column, PATH_COLUMNS, "image")
        label = _column(path, columns, label_column, LABEL_COLUMNS, "label")
        parts = columns.get("split") or [name] * len(columns[image])
        for part in dict.fromkeys(parts):
            rows = [row for row, value in enumerate(parts) if value == part]
            paths = [str(columns[image][row]) for row in rows]
            splits[_split_of(part) or part] = Split(paths, np.asarray([columns[label][row] for row in rows]))
    names, labels = encode_labels({name: split.labels for name, split in splits.items()})
    encoded = {name: Split(split.paths, labels[name]) for name, split in splits.items()}
    columns = {"image": image_column or "image", "label": label_column or "label"}
    return _located(folder, encoded, names).rename_columns(columns)


def encode_labels(labels: Mapping[str, Sequence]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Makes class indices of labels of any type, the same in all splits.

    Numbers are in numerical order, also when they are text, and names in alphabetical order.
    """
    values = np.unique(np.concatenate([np.asarray(split) for split in labels.values()]))
    if values.dtype.kind in "US" and all(re.fullmatch(r"-?\d+", str(value)) for value in values):
        values = np.sort(values.astype(np.int64))
        labels = {name: np.asarray(split).astype(np.int64) for name, split in labels.items()}
    return [str(value) for value in values], {name: np.searchsorted(values, split) for name, split in labels.items()}


def _read_table(path: Path) -> dict[str, list]:
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pydict()
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        header = next(reader, [])
        columns: dict[str, list] = {name.strip(): [] for name in header}
        for number, row in enumerate(reader, start=2):
            if len(row) != len(header):
                raise ValueError(f"line {number} of {path} has {len(row)} fields, but the header has {len(header)}.")
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value.strip())
    return columns


def _column(path: Path, columns: Mapping[str, list], given: str | None, known: Sequence[str], kind: str) -> str:
    if given is not None:
        if given not in columns:
            raise ValueError(f"no {kind} column {given!r}; the columns of {path} are {', '.join(columns)}.")
        return given
    name = find_split(columns, known)
    if name is None:
        raise ValueError(
            f"cannot tell the {kind} column of {path}; the columns are {', '.join(columns)}. Name it with "
            f"{kind}_column."
        )
    return name


def _embeds_images(path: Path) -> bool:
    if path.suffix.lower() != ".parquet":
        return False
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(path)
    return any(str(field.type).startswith("struct<bytes") for field in schema)


def sibling_tables(path: Path) -> list[str]:
    """All parquet files of the split that one of them belongs to."""
    split = _split_of(path.name)
    return [str(other) for other in sorted(path.parent.glob("*.parquet")) if _split_of(other.name) == split]


# ---- Webdataset shards ----


def find_shards(folder: Path) -> dict[str, list[str]]:
    """Finds webdataset shards (tar files) by split, in the folder and directly below."""
    shards: dict[str, list[str]] = {}
    for path in sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")]):
        split = _split_of(path.name) or _split_of(path.parent.name) or "train"
        shards.setdefault(split, []).append(str(path))
    return shards


# ---- Shared ----


def _split_of(name: str) -> str | None:
    """`train`, or the name of a test split, from a name that contains it as a word."""
    words = re.split(r"[^a-z]+", name.lower())
    if any(word in TRAIN_NAMES for word in words):
        return "train"
    return next((word for word in words if word in TEST_NAMES), None)


def _located(folder: Path, relative: Mapping[str, Split], names: Sequence[str]) -> datasets.DatasetDict:
    """Splits with whole paths; all files are there."""
    located = {name: Split(list(_locate(folder, split.paths)), split.labels) for name, split in relative.items()}
    missing = [path for split in located.values() for path in split.paths if path.startswith(_MISSING)]
    if missing:
        listed = _named(path.removeprefix(_MISSING) for path in missing[:MISSING_NAMED])
        total = sum(len(split.paths) for split in located.values())
        raise FileNotFoundError(f"{len(missing):,} of {total:,} images are not in {folder}: {listed} are the first.")
    return datasets.DatasetDict({name: split.dataset(list(names)) for name, split in located.items()})


_MISSING = "\0"


def _locate(folder: Path, paths: Iterable[str]) -> Iterator[str]:
    """Whole paths, or a marked path if there is no file; each folder is listed once.

    A validation image may also lie without its class folder, as ImageNet's are distributed.
    """
    listings: dict[str, set[str]] = {}

    def exists(directory: str, name: str) -> bool:
        if directory not in listings:
            try:
                listings[directory] = set(os.listdir(os.path.join(folder, directory)))
            except OSError:
                listings[directory] = set()
        return name in listings[directory]

    for path in paths:
        directory, name = os.path.split(path)
        if exists(directory, name):
            yield os.path.join(folder, path)
        elif exists(os.path.dirname(directory), name):
            yield os.path.join(folder, os.path.dirname(directory), name)
        else:
            yield _MISSING + path


def _named(paths: Iterable[Path | str]) -> str:
    return ", ".join(str(path) for path in paths)
