"""Finds and classifies image files; only one batch is in memory at a time."""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification

from ..data.sources.files import is_image
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from .classifiers import read_model_config
from .handler import EndpointHandler


def load_classifier(path: str | PathLike) -> EndpointHandler:
    """Loads a student, a flat teacher, or any image classifier of transformers.

    Args:
        path: Folder or Hub id.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the Hub has no such model, or cannot be reached.
        ValueError: If the path holds no image classifier, or a file is corrupt.
    """
    read_model_config(path)  # an error names the corrupt file
    AutoConfig.register(FlatTeacherConfig.model_type, FlatTeacherConfig, exist_ok=True)
    AutoModelForImageClassification.register(FlatTeacherConfig, FlatTeacherForImageClassification, exist_ok=True)
    return EndpointHandler(path)


def find_images(entries: Iterable[str], others: Counter | None = None) -> Iterator[str]:
    """Yields the paths of images, in the order of the entries. An image in two entries is yielded twice.

    Args:
        entries: Files; folders, searched with their subfolders; patterns such as `photos/**/*.jpg`; `-` to read entries
            from standard input, one per line. Links to folders are followed, except by `**`, but an entry never gives a
            folder twice. An entry that matches nothing is yielded as a path, and so is a folder that cannot be listed:
            reading them fails later, with a message.
        others: Counter of the files in folders that do not have the name of an image, by suffix.
    """
    for entry in entries:
        if entry == "-":
            yield from find_images((line for line in _standard_input() if line not in ("", "-")), others)
        elif os.path.lexists(entry):
            yield from _images_in(entry, others)
        else:
            matches = _matches(entry) or [entry]
            yield from _once(image for match in matches for image in _images_in(match, others))


def predict_images(
    classifier: EndpointHandler, paths: Iterable[str], top_k: int = 5, batch_size: int = 32
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Classifies image files in order. A file that cannot be read does not stop the others.

    Args:
        classifier: The model.
        paths: Image files; the iterable is consumed lazily.
        top_k: Number of classes for each image.
        batch_size: Number of images in one forward pass.

    Yields:
        A path, and the result of [`EndpointHandler`] for the image or, if the file cannot be read, the error.
    """
    paths = iter(paths)
    while batch := list(itertools.islice(paths, batch_size)):
        prepared = [_prepared(classifier, path) for path in batch]
        readable = [image for image in prepared if isinstance(image, torch.Tensor)]
        results = iter(classifier.classify(readable, top_k) if readable else [])
        for path, image in zip(batch, prepared, strict=True):
            yield path, next(results) if isinstance(image, torch.Tensor) else image


def _prepared(classifier: EndpointHandler, path: str) -> torch.Tensor | ValueError:
    try:
        if os.path.isdir(path):
            os.scandir(path).close()  # raises the reason why the folder cannot be listed
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or a device may never end
            return ValueError(f"{path!r} is not a file.")
        return classifier.prepare(Path(path).read_bytes(), repr(path))
    except FileNotFoundError:
        return ValueError(f"there is no file {path!r}.")
    except OSError as error:
        return ValueError(f"{path!r} cannot be read: {error.strerror}.")
    except ValueError as error:
        return error


def _standard_input() -> Iterator[str]:
    # File names are bytes that may not be valid text; fsdecode keeps them intact.
    return (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)


def _images_in(path: str, others: Counter | None) -> Iterator[str]:
    """Yields the images in and below a folder, and subfolders that cannot be listed; yields any other path as it is."""
    if not os.path.isdir(path):
        yield path
        return
    visited: set[str] = set()  # links can form cycles
    unreadable: list[str] = []
    for folder, folders, files in os.walk(
        path, onerror=lambda error: unreadable.append(error.filename), followlinks=True
    ):
        place = os.path.realpath(folder)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        folders.sort()
        for file in sorted(files):
            if is_image(file):
                yield os.path.join(folder, file)
            elif others is not None and not file.startswith("."):
                others[os.path.splitext(file)[1].lower()] += 1
    yield from unreadable


def _matches(pattern: str) -> list[str]:
    """Returns the paths that a pattern matches, sorted. As in the shell, a star matches no hidden name."""
    if not any(sign in pattern for sign in "*?["):  # a missing file
        return []
    top, named = Path(pattern).anchor, Path(pattern).parts
    found = Path(top).glob(pattern[len(top) :].lstrip("/"))
    return sorted(str(path) for path in found if not any(name.startswith(".") for name in {*path.parts} - {*named}))


def _once(paths: Iterable[str]) -> Iterator[str]:
    """Removes duplicates: a pattern can match both a folder and the files in it."""
    seen: set[tuple[str, str]] = set()
    for path in paths:
        folder, name = os.path.split(path)
        place = (os.path.realpath(folder), name)
        if place not in seen:
            seen.add(place)
            yield path
