"""Classifying image files, as many as there are, a batch in memory at a time."""

import glob
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification

from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..models.weight_files import check_model_files
from .handler import EndpointHandler, image_suffixes


def load_classifier(path: str | PathLike) -> EndpointHandler:
    """Loads a student, a flat teacher, or any image classifier of transformers.

    Args:
        path: Folder or Hub id.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no image classifier, or a file is damaged.
    """
    if Path(path).is_dir():
        check_model_files(path)
    AutoConfig.register(FlatTeacherConfig.model_type, FlatTeacherConfig, exist_ok=True)
    AutoModelForImageClassification.register(FlatTeacherConfig, FlatTeacherForImageClassification, exist_ok=True)
    return EndpointHandler(path)


def find_images(entries: Iterable[str], others: Counter | None = None) -> Iterator[str]:
    """Paths of images, in the order of what is asked for, and as often.

    Args:
        entries: Files; folders, for the images in and below them; patterns such as `photos/**/*.jpg`; `-` for entries
            from standard input, one a line. Links to folders are followed, but no entry gives a folder twice. What is
            none of these is taken for a file; reading it will fail, as will a folder that cannot be listed.
        others: Counts the files in folders whose names are not those of images, by suffix.
    """
    for entry in entries:
        if entry == "-":
            yield from find_images((line for line in _standard_input() if line not in ("", "-")), others)
        elif os.path.lexists(entry):
            yield from _images_in(entry, others)
        else:
            matches = sorted(_matches(entry)) or [entry]
            yield from _once(image for match in matches for image in _images_in(match, others))


def predict_images(
    classifier: EndpointHandler, paths: Iterable[str], top_k: int = 5, batch_size: int = 32
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Classifies files, in their order; a file that cannot be read does not keep others from it.

    Args:
        classifier: The model.
        paths: Image files; they are taken as they are needed.
        top_k: Classes of each image.
        batch_size: Images that go through the model together.

    Yields:
        A path, and what [`EndpointHandler`] answers for one image, or why the file cannot be read.
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
            os.scandir(path).close()  # why it cannot be listed
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device could have no end
            return ValueError(f"{path!r} is not a file.")
        return classifier.prepare(Path(path).read_bytes(), repr(path))
    except FileNotFoundError:
        return ValueError(f"there is no file {path!r}.")
    except OSError as error:
        return ValueError(f"{path!r} cannot be read: {error.strerror}.")
    except ValueError as error:
        return error


def _standard_input() -> Iterator[str]:
    # Names of files are bytes; not all are text in any encoding.
    return (os.fsdecode(line.rstrip(b"\r\n")) for line in (sys.stdin.buffer if sys.stdin else ()))


def _images_in(path: str, others: Counter | None) -> Iterator[str]:
    """The images in and below a folder, and what of it cannot be listed; all else is itself."""
    if not os.path.isdir(path):
        yield path
        return
    suffixes = image_suffixes()
    for folder, files in _walk(path):
        if files is None:
            yield folder
            continue
        for file in sorted(files):
            if file.startswith("."):
                continue
            if file.lower().endswith(suffixes):
                yield os.path.join(folder, file)
            elif others is not None:
                others[os.path.splitext(file)[1].lower()] += 1


def _walk(top: str) -> Iterator[tuple[str, list[str] | None]]:
    """A folder and those below it, each once although links can lead round, with their files; None if unreadable."""
    visited: set[str] = set()
    unreadable: list[str] = []
    steps = os.walk(top, onerror=lambda error: unreadable.append(error.filename), followlinks=True)
    for folder, folders, files in steps:
        place = os.path.realpath(folder)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        folders.sort()
        yield folder, files
    yield from ((folder, None) for folder in unreadable)


def _matches(pattern: str) -> Iterator[str]:
    """What a pattern matches; `**` of glob itself would follow links round and round."""
    before, *after = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
    if not after:
        yield from glob.glob(pattern)
        return
    for top in glob.glob(before) if before else ["."]:
        if not after[0]:
            yield top
            continue
        for folder, files in _walk(top):
            if "/." in f"/{folder[len(top) :]}":  # hidden, which no star matches
                continue
            if files is None:
                yield folder
            else:
                rest = os.path.join(glob.escape(folder), after[0])
                yield from (match if before else match.removeprefix("./") for match in _matches(rest))


def _once(paths: Iterable[str]) -> Iterator[str]:
    """Leaves out what comes again, as do files that a pattern matches and that are in a folder that it matches."""
    seen: set[tuple[str, str]] = set()
    for path in paths:
        folder, name = os.path.split(path)
        place = (os.path.realpath(folder), name)
        if place not in seen:
            seen.add(place)
            yield path
