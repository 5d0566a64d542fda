"""The columns of a data set: which one has the images, which one the labels, and the same classes in all splits."""

import logging
from collections.abc import Sequence

import datasets
import numpy as np
from datasets.features.features import FeatureType

from ..io import one_line
from .sources.files import find_split
from .sources.labels import check_class_names, check_indices, encode_labels, look_alikes, read_class_names
from .sources.tables import LABEL_COLUMNS, PATH_COLUMNS

logger = logging.getLogger(__name__)

_BINARY = ("binary", "large_binary", "binary_view")


def find_columns(
    dataset: datasets.Dataset, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """Finds the image and the label column of a data set by their types; a label column also by its name.

    Raises:
        ValueError: If a named column is missing or holds no images, or if not exactly one column has the type. The
            message lists the columns.
    """
    return find_image_column(dataset, image_column), _label_column(dataset, label_column)


def find_image_column(dataset: datasets.Dataset, given: str | None = None) -> str:
    """Finds the image column of a data set as [`find_columns`] does, if none is given."""
    _check_column(dataset, given, "image")
    kinds = {name: _image_kind(feature) for name, feature in dataset.features.items()}
    if given is not None:
        if kinds[given] is None:
            raise ValueError(
                f"the column {given!r} holds no images; the columns are {_describe_columns(dataset)}. Name another "
                f'with image_column, or convert paths with dataset.cast_column("{given}", datasets.Image()).'
            )
        return given
    found = next((names for kind in range(3) if (names := [name for name in kinds if kinds[name] == kind])), [])
    named_so = find_split(found, PATH_COLUMNS) if len(found) > 1 and kinds[found[0]] != 0 else None
    if len(found) != 1 and named_so is None:
        raise ValueError(
            f"cannot determine the image column: {len(found)} columns have type Image; the columns are "
            f"{_describe_columns(dataset)}. Name it with image_column, or convert paths with "
            "dataset.cast_column(NAME, datasets.Image())."
        )
    return named_so or found[0]


def _image_kind(feature: FeatureType) -> int | None:
    """Classifies a column: 0 for type `Image`, 1 for a structure with bytes, 2 for plain bytes, None for no images."""
    if isinstance(feature, datasets.Image):
        return 0
    if isinstance(feature, dict):
        is_image = getattr(feature.get("bytes"), "dtype", None) in _BINARY and set(feature) <= {"bytes", "path"}
        return 1 if is_image else None
    return 2 if getattr(feature, "dtype", None) in _BINARY else None


def _label_column(dataset: datasets.Dataset, given: str | None) -> str:
    _check_column(dataset, given, "label")
    names = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = find_split(dataset.column_names, LABEL_COLUMNS)
    found = [given] if given else names or [usual] * (usual is not None)
    if len(found) != 1:
        raise ValueError(
            f"cannot determine the label column: {len(names)} columns have type ClassLabel; the columns are "
            f"{_describe_columns(dataset)}. Name it with label_column."
        )
    if not isinstance(dataset.features[found[0]], datasets.Value | datasets.ClassLabel):
        raise ValueError(
            f"the label column {found[0]!r} does not hold one label for each image; the columns are "
            f"{_describe_columns(dataset)}. Name another with label_column."
        )
    return found[0]


def _check_column(dataset: datasets.Dataset, name: str | None, kind: str) -> None:
    if name is not None and name not in dataset.column_names:
        raise ValueError(
            f"no {kind} column {name!r}; the columns are {_describe_columns(dataset)}. Name one of them with "
            f"{kind}_column."
        )


def _describe_columns(dataset: datasets.Dataset) -> str:
    columns = (f"{name} ({type(feature).__name__})" for name, feature in dataset.features.items())
    return one_line(", ".join(columns))


def as_image_column(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Gives a column of encoded images the type `datasets.Image`; it may hold bytes, or structs of bytes and path."""
    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        return rows
    if "_view" in str(feature):  # types of polars, which pyarrow casts only to bytes and text
        rows = rows.cast_column(column, _without_views(feature))
    return rows.cast_column(column, datasets.Image())


def _without_views(feature: FeatureType) -> FeatureType:
    if isinstance(feature, dict):
        return {name: _without_views(part) for name, part in feature.items()}
    return datasets.Value(feature.dtype.removesuffix("_view"))


def standard_columns(
    splits: datasets.DatasetDict,
    image_column: str | None,
    label_column: str | None,
    class_names: Sequence[str] | str | None = None,
) -> datasets.DatasetDict:
    """Reduces all splits to the columns `image`, `label` (with the same classes) and `source_index`.

    Args:
        splits: Splits with any columns, by name.
        image_column: Name of the column of images; None finds it.
        label_column: Name of the column of labels; None finds it.
        class_names: Names of the classes in the order of their indices, or a file of [`read_class_names`]; None keeps
            the names of the data.

    Returns:
        The splits; `label` is a `ClassLabel` with the classes of the training split.

    Raises:
        FileNotFoundError: If the file of the names does not exist.
        ValueError: If a column is missing or ambiguous, a label is missing or out of range, the names do not fit the
            classes, or another split has classes that the training split does not have.
    """
    standard = {}
    for name, split in splits.items():
        columns = find_columns(split, image_column, label_column)
        renamed = {old: new for old, new in zip(columns, ("image", "label"), strict=True) if old != new}
        split = split.with_format(None).select_columns(list(columns)).rename_columns(renamed)
        split = as_image_column(split, "image")
        # Before rows are chosen: errors and `subset_hash` refer to rows of the source.
        standard[name] = split.add_column("source_index", np.arange(len(split)))
    if class_names is not None:
        class_names = read_class_names(class_names) if isinstance(class_names, str) else list(class_names)
        check_class_names(class_names, "class_names")
    if not all(isinstance(split.features["label"], datasets.ClassLabel) for split in standard.values()):
        standard = _encode_classes(standard)
    for name, split in standard.items():
        names = split.features["label"].names
        check_indices(split["label"][:], class_names or names, f"the {name} split", len(names))
        if class_names is not None:
            if len(class_names) != len(names):
                raise ValueError(f"class_names has {len(class_names)} names but the data have {len(names)} classes.")
            standard[name] = split.cast_column("label", datasets.ClassLabel(names=class_names))
    classes = standard.get("train", next(iter(standard.values()))).features["label"]
    alike = look_alikes(classes.names)
    if alike:
        logger.warning("classes whose names look alike: %s (%d in all)", ", ".join(alike[:5]), len(alike))
    return datasets.DatasetDict({name: with_classes(split, classes) for name, split in standard.items()})


def _encode_classes(splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """Replaces labels of any type by class indices that are the same in all splits."""
    values = {}
    for name, split in splits.items():
        labels, feature = split["label"][:], split.features["label"]
        if isinstance(feature, datasets.ClassLabel):  # of another split than the labels of another type
            labels = feature.int2str(check_indices(labels, feature.names, f"the {name} split").tolist())
        values[name] = labels
    names, indices = encode_labels(values)
    classes = datasets.ClassLabel(names=names)
    return {name: _with_labels(split, indices[name].tolist(), classes) for name, split in splits.items()}


def with_classes(split: datasets.Dataset, classes: datasets.ClassLabel) -> datasets.Dataset:
    """Renumbers the labels of a split to match the given classes, by class name.

    Raises:
        ValueError: If the split has images of a class that is not among the given classes.
    """
    names = split.features["label"].names
    if names == classes.names:
        return split
    labels = np.asarray(split["label"][:], dtype=np.int64)
    unknown = [names[label] for label in np.unique(labels) if names[label] not in set(classes.names)]
    if unknown:
        shown = one_line(", ".join(map(repr, unknown[:5])), 200)
        raise ValueError(
            f"the test split has classes that the training split does not have: {shown} ({len(unknown)} in all)."
        )
    return _with_labels(split, [classes.str2int(names[label]) for label in labels], classes)


def _with_labels(split: datasets.Dataset, labels: list[int], classes: datasets.ClassLabel) -> datasets.Dataset:
    return split.remove_columns("label").add_column("label", labels).cast_column("label", classes)
