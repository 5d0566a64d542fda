"""Classifying image files, as many as there are, a batch in memory at a time."""

import glob
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification

from ..configuration_flat_teacher import FlatTeacherConfig
from ..modeling_flat_teacher import FlatTeacherForImageClassification
from .handler import FORMATS, EndpointHandler


def load_classifier(path: str) -> EndpointHandler:
    """Loads a student, a flat teacher, or any image classifier of transformers.

    Args:
        path: Folder or Hub id.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no image classifier.
    """
    AutoConfig.register(FlatTeacherConfig.model_type, FlatTeacherConfig, exist_ok=True)
    AutoModelForImageClassification.register(FlatTeacherConfig, FlatTeacherForImageClassification, exist_ok=True)
    return EndpointHandler(path)


def find_images(entries: Iterable[str]) -> Iterator[str]:
    """Paths of images, in the order of what is asked for, and as often.

    Args:
        entries: Files; folders, for the images in and below them; patterns such as `photos/**/*.jpg`; `-` for entries
            from standard input, one a line. What is none of these is taken for a file, and reading it will fail.
    """
    for entry in entries:
        if entry == "-":
            yield from find_images(line for line in _standard_input() if line not in ("", "-"))
        elif os.path.isdir(entry):
            yield from _images_below(entry)
        elif not os.path.lexists(entry) and (matches := sorted(glob.glob(entry, recursive=True))):
            yield from find_images(matches)
        else:
            yield entry


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
    return (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)


def _images_below(folder: str) -> Iterator[str]:
    Image.init()
    suffixes = tuple(suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS)
    for root, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(suffixes) and not file.startswith("."):
                yield os.path.join(root, file)
