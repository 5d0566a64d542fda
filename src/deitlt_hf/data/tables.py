"""Sources that are tables (CSV, TSV, parquet) or webdataset shards; and labels of any type as class indices."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet

from ..io import file_errors
from .files import Split, find_split, located, named, split_of

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
PATH_COLUMNS = ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "class", "category", "target", "species", "class_name", "cls")


def find_tables(folder: Path, image_column: str | None = None, label_column: str | None = None) -> dict[str, Path]:
    """Finds tables (CSV, TSV, parquet): of `train` and a test split by name, or a single one for both.

    Tables without the columns are left out beside others, and beside folders unless a column is named.

    Raises:
        ValueError: If no table has the columns that are named, or there are several for one split.
    """
    places = [*folder.iterdir(), *folder.glob("data/*.parquet")]  # the latter as on the Hub
    tables = [path for path in sorted(places) if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    wanted = (image_column, PATH_COLUMNS), (label_column, LABEL_COLUMNS)
    usable = [path for path in tables if embeds_images(path) or _has_columns(path, wanted)]
    if tables and not usable and (image_column or label_column):  # not what else is here: its labels may be others
        columns = dict.fromkeys(_column_names(tables[0]))
        _column(tables[0], columns, label_column, LABEL_COLUMNS, "label")
        _column(tables[0], columns, image_column, PATH_COLUMNS, "image")
    if usable or any(path.is_dir() for path in folder.iterdir()):
        tables = usable
    found: dict[str, list[Path]] = {}
    for path in tables:
        found.setdefault(split_of(path.name) or "train", []).append(path)
    if any(len(paths) > 1 for paths in found.values()) and not embeds_images(tables[0]):
        doubled = next(paths for paths in found.values() if len(paths) > 1)
        raise ValueError(f"{folder} has several tables for one split ({named(doubled)}); keep one a split.")
    return {split: paths[0] for split, paths in found.items()} if "train" in found else {}


def load_tables(
    folder: Path, tables: Mapping[str, Path], image_column: str | None = None, label_column: str | None = None
) -> datasets.DatasetDict:
    """Loads tables with a column of paths, relative to the folder, and one of labels; or parquet with images in it.

    A column `split` parts a single table into `train` and a test split. Label columns of any type become classes.

    Raises:
        ValueError: If a column is missing, or a table cannot be read.
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    if embeds_images(tables["train"]):
        files = {split: sibling_tables(path) for split, path in tables.items()}
        with file_errors(folder):
            return datasets.load_dataset("parquet", data_files=files)
    splits: dict[str, Split] = {}
    for name, path in tables.items():
        columns = _read_table(path)
        image = _column(path, columns, image_column, PATH_COLUMNS, "image")
        label = _column(path, columns, label_column, LABEL_COLUMNS, "label")
        column = find_split(columns, ["split"])
        parts = [name] * len(columns[image]) if column is None else [str(value) for value in columns[column]]
        parts = [split_of(part) or part for part in parts]
        for part in dict.fromkeys(parts):
            rows = [row for row, value in enumerate(parts) if value == part]
            paths = [str(columns[image][row]) for row in rows]
            labels = [columns[label][row] for row in rows]
            missing = sum(value is None or value == "" or value != value for value in labels)
            if missing:
                raise ValueError(f"{path}: {missing} of {len(rows)} {part} images have no {label}.")
            splits[part] = Split(paths, np.asarray(labels))
    names, labels = encode_labels({name: split.labels for name, split in splits.items()})
    encoded = {name: Split(split.paths, labels[name]) for name, split in splits.items()}
    columns = {"image": image_column or "image", "label": label_column or "label"}
    return located(folder, encoded, names).rename_columns(columns)


def encode_labels(labels: Mapping[str, Sequence]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Makes class indices of labels of any type, the same in all splits.

    Numbers are in numerical order, also when they are text, and names in alphabetical order.
    """
    values = np.unique(np.concatenate([np.asarray(split) for split in labels.values()]))
    # Whole numbers, also as text, or with ".0" as pandas writes them beside empty cells; not codes such as 007.
    if values.dtype.kind in "USf" and all(re.fullmatch(r"-?(0|[1-9]\d*)(\.0*)?", str(value)) for value in values):
        whole = {name: np.asarray(split).astype(np.float64).astype(np.int64) for name, split in labels.items()}
        numbers = np.unique(np.concatenate(list(whole.values())))
        if len(numbers) == len(values):  # long numbers could become the same
            values, labels = numbers, whole
    return [str(value) for value in values], {name: np.searchsorted(values, split) for name, split in labels.items()}


def _read_table(path: Path) -> dict[str, list]:
    if path.suffix.lower() == ".parquet":
        with file_errors(path):
            return pyarrow.parquet.read_table(path).to_pydict()
    with file_errors(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=_delimiter(path))
        header = next(reader, [])
        columns: dict[str, list] = {name.strip(): [] for name in header}
        if len(columns) < len(header):
            raise ValueError(f"{path} has two columns of the same name: {', '.join(header)}.")
        for number, row in enumerate(reader, start=2):
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"line {number} of {path} has {len(row)} fields, but the header has {len(header)}.")
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value.strip())
    return columns


def _column(path: Path, columns: Iterable[str], given: str | None, known: Sequence[str], kind: str) -> str:
    if given is not None:
        if given not in columns:
            raise ValueError(
                f"no {kind} column {given!r}; the columns of {path} are {', '.join(columns)}. Name one of "
                f"them, or pass --{kind}_column none if the images are not those of the table."
            )
        return given
    name = find_split(columns, known)
    if name is None:
        raise ValueError(
            f"cannot tell the {kind} column of {path}; the columns are {', '.join(columns)}. Name it with "
            f"{kind}_column."
        )
    return name


def _has_columns(path: Path, wanted: Sequence[tuple[str | None, Sequence[str]]]) -> bool:
    names = _column_names(path)
    return all(given in names if given else find_split(names, known) is not None for given, known in wanted)


def _column_names(path: Path) -> list[str]:
    if path.suffix.lower() == ".parquet":
        return _schema(path).names
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return [name.strip() for name in next(csv.reader(file, delimiter=_delimiter(path)), [])]


def _schema(path: Path) -> pyarrow.Schema:
    with file_errors(path):
        return pyarrow.parquet.read_schema(path)


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def embeds_images(path: Path) -> bool:
    """Whether a table is a parquet file with the images in it."""
    if path.suffix.lower() != ".parquet":
        return False
    types = {field.name: field.type for field in _schema(path)}
    if any(pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 for kind in types.values()):
        return True
    # Bytes beside paths are something else.
    paths = [name for name, kind in types.items() if name.lower() in PATH_COLUMNS and "string" in str(kind)]
    return not paths and any("binary" in str(kind) for kind in types.values())


def sibling_tables(path: Path) -> list[str]:
    """All parquet files of the split that one of them belongs to."""
    split = split_of(path.name)
    return [str(other) for other in sorted(path.parent.glob("*.parquet")) if split_of(other.name) == split]


def find_shards(folder: Path) -> dict[str, list[str]]:
    """Finds webdataset shards (tar files) by split, in the folder and directly below."""
    shards: dict[str, list[str]] = {}
    for path in sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")]):
        split = split_of(path.name) or (split_of(path.parent.name) if path.parent != folder else None) or "train"
        shards.setdefault(split, []).append(str(path))
    return shards
