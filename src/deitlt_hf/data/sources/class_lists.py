"""Reads class names and class maps from files."""

import json
from os import PathLike
from pathlib import Path

from ...io import file_errors, read_json, read_text
from .labels import check_class_names


def read_class_names(path: str | PathLike) -> list[str]:
    """Reads the names of classes, in label order.

    Args:
        path: A text file with one name per line, or JSON: a list of names, or an object from label to name.

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

    Args:
        path: A JSON list, or the folder of a model that was converted from such a checkpoint.

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
