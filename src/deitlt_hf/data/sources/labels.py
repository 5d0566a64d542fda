"""Rules for labels, the same for all readers: valid labels, and the class index of each label.

A class is a name or a whole number from 0 on. Readers pass the label values of a table to [`encode_labels`]. They pass
class names (of folders, of a `ClassLabel`, of a file of names) to [`check_class_names`].
"""

import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...io import file_errors, one_line, read_json, read_text

logger = logging.getLogger(__name__)

# Texts that programs write for a missing value: the list of pandas, without the signed and the numbered forms of NaN.
MISSING_WORDS = frozenset(
    ("nan", "NaN", "NAN", "-nan", "-NaN", "None", "null", "Null", "NULL", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaT")
)
# Whole numbers as text, also with ".0" as pandas writes them in a column with empty cells; but not codes such as 007.
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)(\.0*)?")
Labels = Sequence | np.ndarray | Mapping[Any, int]  # a mapping gives the number of images with each label
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)")
_NAMED = 5


def encode_labels(
    labels: Mapping[str, Labels], sources: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Converts labels of any type to class indices that are the same in all splits.

    Numbers are sorted numerically, also if they are text, and names alphabetically. Space around a name is ignored.
    Booleans are the classes `False` and `True`.

    Args:
        labels: Labels of the images of each split, or the number of images by label.
        sources: Source of the labels of each split, for messages; by default its name.

    Returns:
        The names of the classes in label order, and by split the int64 class indices of the labels.

    Raises:
        ValueError: If a label is missing, negative, not a whole number or name, or if names and numbers are mixed.
    """
    places = {split: (sources or {}).get(split, f"the {split} split") for split in labels}
    known = {split: _classes(values, places[split]) for split, values in labels.items()}
    classes = {item for found in known.values() for item in found.values()}
    spellings = Counter({value: item for found in known.values() for value, item in found.items()}.values())
    spaced = [item for item, times in spellings.items() if times > 1 and isinstance(item, str)]
    if spaced:
        logger.warning("labels that differ only by space around them are one class: %s", ", ".join(spaced[:_NAMED]))
    texts = {item for item in classes if isinstance(item, str)}
    numbers = {}
    if texts and all(map(_NUMBER.fullmatch, texts)):
        fractions = sorted(text for text in texts if "." in text and float(text) != int(float(text)))
        if fractions:
            _refuse_fractions(next(place for split, place in places.items() if fractions[0] in known[split]), fractions)
        if all(map(_WHOLE.fullmatch, texts)):
            numbers = {text: int(text.partition(".")[0]) for text in texts}
            classes = {numbers.get(item, item) for item in classes}
    if len({type(item) for item in classes}) > 1:
        shown = ", ".join(one_line(repr(item), 40) for item in sorted(classes, key=str)[:_NAMED])
        raise ValueError(
            f"{' and '.join(places.values())}: labels are of several types ({shown}); a column of labels holds names "
            "or numbers, not both."
        )
    ordered = sorted(classes)
    indices = {item: label for label, item in enumerate(ordered)}
    encoded = {
        split: np.array(
            [indices[numbers.get(found[value], found[value])] for value in _plain(labels[split])], dtype=np.int64
        )
        for split, found in known.items()
    }
    return [str(item) for item in ordered], encoded


def class_of(value: object, indices: Mapping[str, int]) -> int | None:
    """Finds the class index of a label value by class name; None if no class has that name."""
    text = str(value).strip()
    number = text.partition(".")[0] if _WHOLE.fullmatch(text) else text
    return indices.get(text, indices.get(number))


def _plain(values: Labels) -> list:
    """Converts labels to plain Python objects."""
    values = np.asarray(values).tolist() if isinstance(values, np.ndarray) else values
    return [value.item() if isinstance(value, np.generic) else value for value in values]


def _classes(values: Labels, place: str) -> dict:
    """Maps each label of a split to its class: a stripped text, a whole number, or a boolean."""
    values = values if isinstance(values, Mapping) else _plain(values)
    kinds = {type(value): value for value in values}
    for kind, value in kinds.items():
        if not issubclass(kind, (str, int, float, type(None))):
            raise ValueError(
                f"{place}: a label is {one_line(repr(value), 60)} ({kind.__name__}); labels are names or whole numbers "
                "from 0 on, one for each image."
            )
    if {bool} < set(kinds) - {type(None)}:
        raise ValueError(f"{place}: labels are of several types (booleans and others); use one type.")
    counts = Counter(values)
    classes, fractions = {}, []
    missing: Counter[str] = Counter()
    for value, times in counts.items():
        item = value.strip() if isinstance(value, str) else value
        if item is None or item != item or item == "" or item in MISSING_WORDS or _is_negative(item):
            missing[repr(value) if isinstance(value, str) and not _is_negative(item) else str(value)] += times
        elif isinstance(item, float) and not item.is_integer():
            fractions.append(item)
        else:
            classes[value] = int(item) if isinstance(item, float) else item
    if missing:
        refuse_missing(place, missing, sum(counts.values()))
    if fractions:
        _refuse_fractions(place, sorted(fractions))
    return classes


def _is_negative(item: str | float) -> bool:
    return re.fullmatch(r"-[0-9]*\.?[0-9]+\.?", item) is not None if isinstance(item, str) else item < 0


def _refuse_fractions(place: str, found: Sequence) -> None:
    shown = ", ".join(map(str, found[:_NAMED]))
    raise ValueError(
        f"{place}: {len(found):,} labels are not whole numbers ({shown}); does this column hold the classes? Name "
        "another with --label_column, or rename the classes."
    )


def refuse_missing(place: str, missing: Mapping[str, int], total: int) -> None:
    """Raises `ValueError` for images without a label.

    `missing` has the number of images by the value that stands for the missing label, `total` is that of all images.
    """
    shown = ", ".join(one_line(word, 40) or "''" for word in list(missing)[:_NAMED])
    raise ValueError(
        f"{place}: {sum(missing.values()):,} of {total:,} images have no label ({shown}); give each a class, or remove "
        "them (rename a class that has such a name; test_split chooses another test split)."
    )


def check_indices(
    labels: Sequence[int | None], names: Sequence[str], place: str, num_classes: int | None = None
) -> np.ndarray:
    """Checks class indices of a `ClassLabel` column against the names of the classes, and returns them as int64.

    Args:
        labels: Class index of each image.
        names: Names of the classes.
        place: Source of the labels, for messages.
        num_classes: Number of classes, by default the number of names.

    Raises:
        ValueError: If a label is missing, negative or too large, or [`check_class_names`] refuses a name.
    """
    check_class_names(names, place)
    num_classes = len(names) if num_classes is None else num_classes
    counts = Counter(_plain(labels))
    missing = {str(label): times for label, times in counts.items() if label is None or label < 0}
    if missing:
        refuse_missing(place, missing, sum(counts.values()))
    if counts and max(counts) >= num_classes:
        raise ValueError(f"{place}: label {max(counts):,} is beyond its {num_classes:,} classes.")
    return np.asarray(labels, dtype=np.int64)


def check_training_counts(names: Sequence[str], counts: Sequence[int] | np.ndarray) -> None:
    """Checks that there are two classes or more, and that every class has a training image.

    Raises:
        ValueError: If there is one class, or a class has no image.
    """
    if len(names) < 2:
        raise ValueError(
            f"the data have {len(names)} class ({one_line(', '.join(names), 100)}); a classifier needs at least two. "
            "Is data_dir the folder with the classes?"
        )
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if empty:
        shown = one_line(", ".join(empty[:_NAMED]), 200)
        raise ValueError(f"classes without a training image: {shown} ({len(empty)} in all).")


def check_class_names(names: Sequence[str], source: str) -> None:
    """Checks that every class has a valid and unique name.

    Raises:
        ValueError: If a name is empty, occurs twice, is a negative number, or stands for a missing value.
    """
    for label, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(
                f"{source} has the name {one_line(repr(name), 60)} for class {label}, which is not a string."
            )
        if not name.strip():
            raise ValueError(f"{source} has an empty name for class {label}.")
        if name.strip() in MISSING_WORDS or _is_negative(name.strip()):
            raise ValueError(
                f"{source} has a class {name!r}, which stands for images without a label; remove them, or rename the "
                "class."
            )
    if len(set(names)) < len(names):
        name, times = Counter(names).most_common(1)[0]
        raise ValueError(f"{source} has the name {one_line(name)!r} {times} times; class names must be unique.")


def sorted_names(names: Iterable[str]) -> list[str]:
    """Sorts class names into label order: numerically if all are whole numbers, else alphabetically."""
    names = set(names)
    return sorted(names, key=int) if all(re.fullmatch(r"0|[1-9][0-9]*", name) for name in names) else sorted(names)


def look_alikes(names: Iterable[str]) -> list[str]:
    """Describes pairs of classes whose names differ only in case, space or Unicode form."""
    first: dict[str, str] = {}
    pairs = []
    for name in names:
        other = first.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), name)
        if other != name:
            pairs.append(f"{one_line(repr(other), 60)} and {one_line(repr(name), 60)}")
    return pairs


def read_class_names(path: str | PathLike) -> list[str]:
    """Reads the names of classes, in label order: one per line, or as JSON (a list, or an object by label).

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it has none of these formats, or a name is empty or occurs twice.
    """
    text = read_text(path)
    if text.lstrip().startswith(("[", "{")):
        with file_errors(path):
            names = json.loads(text)
    else:
        names = [line.strip() for line in text.rstrip().split("\n")]
    if isinstance(names, dict):
        labels = [str(label) for label in range(len(names))]
        if set(names) != set(labels):
            raise ValueError(f"{path} must have the keys 0 to {len(names) - 1}; it begins with {list(names)[:3]}.")
        names = [names[label] for label in labels]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold names as strings.")
    check_class_names(names, str(path))
    return names


def read_class_map(path: str | PathLike) -> list[int]:
    """Reads a class map: the row of each class in the head of a checkpoint of the authors.

    The path is a JSON list, or the folder of a model that was converted from such a checkpoint.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it has no class map.
    """
    file = Path(path, "config.json") if Path(path).is_dir() else Path(path)
    content = read_json(file, object)
    class_map = content.get("class_map") if isinstance(content, dict) else content
    if not isinstance(class_map, list) or not all(isinstance(row, int) for row in class_map):
        raise ValueError(f"{file} has no class_map, a list of integers.")
    return class_map
