"""Class names and class maps from files."""

import json
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path


def read_class_names(path: str | PathLike) -> list[str]:
    """Reads the names of classes, in label order.

    Args:
        path: A text file with one name a line, or JSON: a list of names, or an object from label to name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of these, or a name is empty or there twice.
    """
    text = _read(path)
    if text.lstrip().startswith(("[", "{")):
        names = _parse(path, text)
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


def check_class_names(names: Sequence[str], source: str) -> None:
    """Checks that every class has a name of its own.

    Raises:
        ValueError: If a name is empty, or there twice.
    """
    for label, name in enumerate(names):
        if not name:
            raise ValueError(f"{source} has an empty name for class {label}.")
    if len(set(names)) < len(names):
        name, times = Counter(names).most_common(1)[0]
        raise ValueError(f"{source} has the name {name!r} {times} times; each class needs one of its own.")


def read_class_map(path: str | PathLike) -> list[int]:
    """Reads a class map: for each class its row in the head of an authors' checkpoint.

    Args:
        path: A JSON list, or the folder of a model that was converted from one of their files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no class map.
    """
    file = Path(path, "config.json") if Path(path).is_dir() else Path(path)
    content = _parse(file, _read(file))
    class_map = content.get("class_map") if isinstance(content, dict) else content
    if not isinstance(class_map, list) or not all(isinstance(row, int) for row in class_map):
        raise ValueError(f"{file} has no class_map, a list of integers.")
    return class_map


def _read(path: str | PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from error


def _parse(path: str | PathLike, text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
