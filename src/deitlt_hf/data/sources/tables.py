"""Loads tables (CSV, TSV, JSON lines, parquet), and finds webdataset shards."""

import csv
import io
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePath

import datasets
import pyarrow
import pyarrow.parquet

from ...io import file_errors, one_line, read_text
from .files import Split, divided, find_split, images_below, located, named, split_of, splits_by_folder
from .labels import encode_labels

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # in Hugging Face's image folder layout
PATH_COLUMNS = ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "class", "category", "target", "species", "class_name", "cls")
_METADATA_COLUMN = "file_name"
_DELIMITERS = ",;\t|"
_TAR_BLOCK = 512  # bytes; a tar file consists of whole blocks, and the last are zero


# ---- Finding them ----


def find_metadata(folder: Path, image_column: str | None = None, label_column: str | None = None) -> dict[str, Path]:
    """Finds labelled Hugging Face `metadata.csv`, `.jsonl` or `.parquet` files: one per split folder, or one for all.

    Raises:
        ValueError: If a folder has several of these files, or one cannot be read.
    """
    found: dict[str, Path] = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        split, path = split_of(place.name), _metadata_of(place)
        if split is not None and path is not None:
            if split in found:
                raise ValueError(f"{folder} has metadata of one split twice ({found[split]}, {path}); keep one.")
            found[split] = path
    if "train" not in found:
        tables = [path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
        path = _metadata_of(folder) if len(tables) == 1 else None
        found = {} if path is None else {"train": path}

    def is_labelled(path: Path) -> bool:
        columns = _column_names(path)
        has_images = image_column in columns if image_column else _metadata_column(columns) is not None
        return has_images and _find_column(columns, label_column, "label") is not None

    labelled = {split: path for split, path in found.items() if is_labelled(path)}
    if "train" not in labelled:
        return {}
    if len(labelled) < len(found):
        logger.warning("left out, without labels: %s", named(set(found.values()) - set(labelled.values())))
    return labelled


def find_tables(folder: Path, image_column: str | None = None, label_column: str | None = None) -> dict[str, Path]:
    """Finds tables (CSV, TSV, JSON lines, parquet): one for `train` and one for a test split by name, or one for both.

    Tables without an image and a label column are left out if other tables have them, or if the folder has subfolders
    and no column is named.

    Raises:
        ValueError: If no table has the named columns, or one split has several tables.
    """
    if metadata := find_metadata(folder, image_column, label_column):
        return metadata
    places = [*folder.iterdir(), *folder.glob("data/*.parquet")]  # the second pattern is the layout of the Hub
    tables = [path for path in sorted(places) if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    wanted = {"label": label_column, "image": image_column}

    def is_usable(path: Path) -> bool:
        names = _column_names(path)
        return embeds_images(path, image_column) or None not in [
            _find_column(names, wanted[kind], kind) for kind in wanted
        ]

    usable = [path for path in tables if is_usable(path)]
    if tables and not usable and (image_column or label_column):  # other layouts may have other labels
        for kind, given in wanted.items():
            _column(tables[0], _column_names(tables[0]), given, kind)
    if usable or any(path.is_dir() for path in folder.iterdir()):
        tables = usable
    found: dict[str, list[Path]] = {}
    for path in tables:
        found.setdefault(split_of(path.name) or "train", []).append(path)
    if any(len(paths) > 1 for paths in found.values()) and not embeds_images(tables[0], image_column):
        doubled = next(paths for paths in found.values() if len(paths) > 1)
        raise ValueError(f"{folder} has several tables for one split ({named(doubled)}); keep one per split.")
    # Images without a training split can be predicted.
    is_complete = "train" in found or all(embeds_images(path, image_column) for path in tables)
    return {split: paths[0] for split, paths in found.items()} if is_complete else {}


def embeds_images(path: Path, image_column: str | None = None) -> bool:
    """Whether a table is a parquet file that contains the images, as `bytes` in a structure or as plain bytes."""
    if path.suffix.lower() != ".parquet":
        return False
    kinds = {field.name: field.type for field in _schema(path)}
    if image_column in kinds:
        return _is_structure(kinds[image_column]) or _is_binary(kinds[image_column])
    if any(map(_is_structure, kinds.values())):
        return True
    named_so = find_split(kinds, PATH_COLUMNS)
    return any(map(_is_binary, kinds.values() if named_so is None else [kinds[named_so]]))


def sibling_tables(path: Path) -> list[str]:
    """Lists all parquet files of the same split as the given file."""
    split = split_of(path.name)
    return [str(other) for other in sorted(path.parent.glob("*.parquet")) if split_of(other.name) == split]


def find_shards(folder: Path) -> dict[str, list[str]]:
    """Finds webdataset shards (tar files) by split, in the folder and directly below it.

    Raises:
        ValueError: If a shard is truncated, empty, or not a regular file; the message names it.
    """
    shards: dict[str, list[str]] = {}
    for path in sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")]):
        _check_shard(path)
        split = split_of(path.name) or (split_of(path.parent.name) if path.parent != folder else None) or "train"
        shards.setdefault(split, []).append(str(path))
    return shards


def _check_shard(path: Path) -> None:
    """Checks that a tar file is complete: readers may end silently at the end of a truncated file."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file (a pipe or device?); remove it.")
    with path.open("rb") as file:
        is_empty = not any(file.read(_TAR_BLOCK))
        size = file.seek(0, 2)
        file.seek(max(size - _TAR_BLOCK, 0))
        if size % _TAR_BLOCK or file.read() != bytes(_TAR_BLOCK):
            raise ValueError(
                f"{path} is not a whole tar file: it does not end as one does (cut short, or compressed?); copy it "
                "again."
            )
    if is_empty:
        raise ValueError(f"{path} is an empty tar file: it begins with zeros; remove it, or copy it again.")


# ---- Reading them ----


def load_tables(
    folder: Path, tables: Mapping[str, Path], image_column: str | None = None, label_column: str | None = None
) -> datasets.DatasetDict:
    """Loads tables with a column of paths and a column of labels, or parquet files that contain the images.

    Paths are relative to `folder`; those in a `metadata.*` file are relative to the folder of that file. A column
    `split` divides a single table into `train` and a test split. Without it, folders in the paths that are named like
    splits do. Label columns of any type become classes.

    Raises:
        ValueError: If a column is missing, a table cannot be read, or images of a `metadata.*` file have no row.
        FileNotFoundError: If images are missing; the message counts them and names the first.
    """
    if embeds_images(next(iter(tables.values())), image_column):
        files = {split: sibling_tables(path) for split, path in tables.items()}
        with file_errors(folder):
            return datasets.load_dataset("parquet", data_files=files)
    splits: dict[str, Split] = {}
    sources: dict[str, str] = {}
    for name, path in tables.items():
        columns = _read_table(path)
        image, label = _column(path, columns, image_column, "image"), _column(path, columns, label_column, "label")
        paths = _paths(path, columns[image], image)
        base = folder
        if path.name.lower() in METADATA_NAMES and _is_metadata_column(image):
            base = path.parent
            _refuse_unlisted(path, paths)
        parts = _parts(path, columns, paths, name, is_only=len(tables) == 1)
        below = [str(PurePath(base.relative_to(folder), place)) for place in paths]
        found = divided(Split(below, columns[label]), parts)
        splits |= found
        sources |= {part: f"{path} ({part})" if len(found) > 1 else str(path) for part in found}
    names, labels = encode_labels({name: split.labels for name, split in splits.items()}, sources)
    encoded = {name: Split(split.paths, labels[name]) for name, split in splits.items()}
    renamed = {"image": image_column or "image", "label": label_column or "label"}
    return located(folder, encoded, names).rename_columns(renamed)


def _parts(path: Path, columns: Mapping[str, list], paths: Sequence[str], name: str, is_only: bool) -> list[str]:
    """Finds the split of each row: by a column `split`, by its folder if this is the only table, else by the table."""
    column = find_split(columns, ["split"])
    if column is not None:
        values = ["" if value is None else str(value).strip() for value in columns[column]]
        if "" in values:
            raise ValueError(f"{path}: {values.count(''):,} of {len(values):,} rows have no {column}; give each one.")
        return [split_of(value) or value for value in values]
    return (splits_by_folder(paths, str(path)) if is_only else None) or [name] * len(paths)


def _paths(path: Path, values: Sequence, column: str) -> list[str]:
    missing = sum(value is None or value != value or str(value).strip() == "" for value in values)
    if missing:
        raise ValueError(f"{path}: {missing:,} of {len(values):,} rows name no image ({column}); remove them.")
    wrong = next((value for value in values if not isinstance(value, (str, int))), None)
    if wrong is not None:
        raise ValueError(
            f"{path}: the column {column} holds {one_line(repr(wrong), 60)}, not a path; name "
            "another with --image_column."
        )
    return [str(value).strip() for value in values]


def _refuse_unlisted(path: Path, paths: Iterable[str]) -> None:
    """Refuses images below the folder of a `metadata.*` file that have no row in it, as `datasets` does."""
    listed = {(path.parent / name).resolve() for name in paths}
    unlisted = [image for image in images_below(path.parent) if Path(image).resolve() not in listed]
    if unlisted:
        raise ValueError(
            f"{path} has no row for {len(unlisted):,} of the images below its folder ({named(unlisted[:3])}); add "
            "rows, or move the images away."
        )


def _read_table(path: Path) -> dict[str, list]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        with file_errors(path):
            columns = pyarrow.parquet.read_table(path).to_pydict()
    else:
        columns = (_read_json_lines if suffix == ".jsonl" else _read_delimited)(path)
    if not any(columns.values()):
        raise ValueError(f"{path} has no rows (its first line is the header)." if columns else f"{path} is empty.")
    return columns


def _read_json_lines(path: Path) -> dict[str, list]:
    rows = []
    with file_errors(path):
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is not valid JSON: {one_line(error)}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {path} is a {type(row).__name__}, not an object with columns.")
            rows.append(row)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _read_delimited(path: Path) -> dict[str, list]:
    text = read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text.partition("\n")[0]), strict=True)
    rows = filter(None, reader)  # without empty lines
    try:
        header = [name.strip() for name in next(rows, [])]
        columns: dict[str, list] = {name: [] for name in header}
        if len(columns) < len(header):
            raise ValueError(f"{path} has two columns of the same name: {one_line(', '.join(header))}.")
        for row in rows:
            if len(row) != len(header):
                raise ValueError(
                    f"line {reader.line_num} of {path} has {len(row)} fields, but the header has {len(header)}."
                )
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
    except csv.Error as error:  # a cell without its closing quote extends to the end of the file
        raise ValueError(
            f"line {reader.line_num} of {path} cannot be read: {one_line(error)} (a quote that is not closed?)."
        ) from error
    return columns


def _delimiter(path: Path, header: str) -> str:
    """Finds the delimiter: a tab in a `.tsv` file, else the first of comma, semicolon, tab and bar in the header."""
    if path.suffix.lower() == ".tsv" and "\t" in header:
        return "\t"
    return next((mark for mark in _DELIMITERS if mark in header), ",")


# ---- Columns ----


def _column(path: Path, columns: Collection[str], given: str | None, kind: str) -> str:
    """The column of a table that [`_find_column`] finds.

    Raises:
        ValueError: If there is none.
    """
    found = _find_column(columns, given, kind)
    if found is not None:
        return found
    shown = one_line(", ".join(columns))
    if given is not None:
        raise ValueError(
            f"no {kind} column {given!r}; the columns of {path} are {shown}. Name one of them, or pass "
            f"--{kind}_column none if the images are not in the table."
        )
    raise ValueError(
        f"cannot determine the {kind} column of {path}; the columns are {shown} (its first line is the header). "
        f"Name it with {kind}_column."
    )


def _find_column(columns: Collection[str], given: str | None, kind: str) -> str | None:
    """Finds the column with the images or labels (`kind`), by the given name or else a usual one; None without one."""
    if given is not None:
        return given if given in columns else None
    if kind == "label":
        return find_split(columns, LABEL_COLUMNS)
    return find_split(columns, PATH_COLUMNS) or _metadata_column(columns)


def _metadata_column(columns: Iterable[str]) -> str | None:
    """The column that `datasets` reads paths from, `file_name` or `*_file_name`; None if there is not exactly one."""
    found = [name for name in columns if _is_metadata_column(name)]
    return found[0] if len(found) == 1 else None


def _is_metadata_column(name: str) -> bool:
    return name == _METADATA_COLUMN or name.endswith(f"_{_METADATA_COLUMN}")


def _metadata_of(folder: Path) -> Path | None:
    found = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has several metadata files ({named(found)}); keep one.")
    return found[0] if found else None


def _column_names(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _schema(path).names
    with file_errors(path), path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        first = file.readline()
        if suffix == ".jsonl":
            try:
                row = json.loads(first)
            except json.JSONDecodeError:
                return []
            return list(row) if isinstance(row, dict) else []
        return [name.strip() for name in next(csv.reader([first], delimiter=_delimiter(path, first)), [])]


def _schema(path: Path) -> pyarrow.Schema:
    with file_errors(path):
        return pyarrow.parquet.read_schema(path)


def _is_structure(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_struct(kind) and any(
        field.name == "bytes" and (_is_binary(field.type) or pyarrow.types.is_null(field.type)) for field in kind
    )


def _is_binary(kind: pyarrow.DataType) -> bool:
    return any(
        test(kind) for test in (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_binary_view)
    )
