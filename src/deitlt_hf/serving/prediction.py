"""Finds and classifies image files; only one batch is in memory at a time."""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageClassification, DeiTForImageClassificationWithTeacher

from ..data.sources.files import is_image
from ..io import one_line
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..models.trunks import student_with_weights_of
from ..out_of_memory import advice_if_out_of_memory
from .classifiers import read_model_config
from .handler import EndpointHandler, read_image

ImageReader = Callable[[str, str | None], Image.Image]
TOGETHER = 2**19  # pixels of the images that are preprocessed in one call


def read_file(path: str, background: str | None) -> Image.Image:
    """Reads an image file as the handler does; `ValueError` with a sentence if it cannot be read."""
    try:
        if os.path.isdir(path):
            os.scandir(path).close()  # raises the reason why the folder cannot be listed
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or a device may never end
            raise ValueError(f"{path!r} is not a file.")
        return read_image(Path(path).read_bytes(), repr(path), background)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path!r}.") from error
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read: {error.strerror}.") from error


def load_handler(path: str | PathLike, device: str | None = None) -> EndpointHandler:
    """Loads a student, a flat teacher, or any image classifier of transformers, from a folder or the Hub.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the Hub has no such model, or cannot be reached.
        ValueError: If the path holds no image classifier, or a file is corrupt.
    """
    read_model_config(path)  # an error names the corrupt file
    AutoConfig.register(FlatTeacherConfig.model_type, FlatTeacherConfig, exist_ok=True)
    AutoModelForImageClassification.register(FlatTeacherConfig, FlatTeacherForImageClassification, exist_ok=True)
    classifier = EndpointHandler(path, device)
    if isinstance(classifier.model, DeiTForImageClassificationWithTeacher):
        # A student computes its last block for two tokens only.
        classifier.model = student_with_weights_of(classifier.model)
    return classifier


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


def batches_of(paths: Iterable[str], batch_size: int) -> Iterator[list[str]]:
    """Divides an iterable of paths lazily into batches."""
    paths = iter(paths)
    while batch := list(itertools.islice(paths, batch_size)):
        yield batch


def smaller_batches(batch_size: int) -> str:
    """Advice for a user whose memory does not suffice for a batch."""
    return f"use a --batch_size below {batch_size}"


def predict_images(
    classifier: EndpointHandler,
    paths: Iterable[str],
    top_k: int = 5,
    batch_size: int = 32,
    num_workers: int = 0,
    read: ImageReader = read_file,
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Classifies image files in order. A file that cannot be read does not stop the others.

    Args:
        classifier: The model.
        paths: Image files; the iterable is consumed lazily.
        top_k: Number of classes for each image.
        batch_size: Number of images in one forward pass.
        num_workers: Processes that read images, each two batches ahead; with 0, this process reads them, one batch at
            a time.
        read: Reads the image of a path, over a background colour. It is pickled for workers.

    Yields:
        A path, and the result of [`EndpointHandler`] for the image or, if the file cannot be read, the error.
    """
    for batch in read_batches(classifier, batches_of(paths, batch_size), num_workers, read):
        places = [place for of_stack, _ in batch.stacks for place in of_stack]
        images = [image for _, stack in batch.stacks for image in stack.split(1)]
        with advice_if_out_of_memory(lambda: smaller_batches(batch_size)):
            results = dict(zip(places, classifier.classify(images, top_k), strict=True))
        for place, path in enumerate(batch.paths):
            yield path, results[place] if place in results else ValueError(batch.errors[place])


def read_batches(
    classifier: EndpointHandler,
    batches: Iterable[list[str]],
    num_workers: int = 0,
    read: ImageReader = read_file,
) -> Iterator["ReadBatch"]:
    """Reads and preprocesses batches of images, in order and lazily; parameters as in [`predict_images`].

    Raises:
        ValueError: If a worker process was ended by the system.
    """
    loader: DataLoader = DataLoader(
        BatchReader(classifier, read),  # type: ignore[arg-type]
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        pin_memory=classifier.model.device.type == "cuda",
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a process that reads images was ended, perhaps for lack of memory ({one_line(error).rstrip('.')}); run "
            "the command again with fewer --num_workers."
        ) from error


class ReadBatch(NamedTuple):
    """A batch of image files, read and preprocessed."""

    paths: list[str]
    # images of equal size, (images, channels, height, width), with their places in `paths`; mostly one stack
    stacks: list[tuple[list[int], torch.Tensor]]
    errors: dict[int, str]  # the reason why a file cannot be read, by its place


class BatchReader:
    """Reads batches of files for a `DataLoader`; an index is the list of paths of a batch.

    Small images are preprocessed together, which takes a quarter of the time. A large image is reduced to the model's
    size before the next is decoded: images of more than `TOGETHER` pixels are not in memory at the same time.
    """

    def __init__(self, classifier: EndpointHandler, read: ImageReader) -> None:
        self.processor, self.background, self.read = classifier.processor, classifier.background, read

    def __getitem__(self, paths: list[str]) -> ReadBatch:
        errors: dict[int, str] = {}
        by_shape: dict[torch.Size, dict[int, torch.Tensor]] = {}
        for images in self._read(paths, errors):
            for place, image in self._preprocessed(images, errors).items():
                by_shape.setdefault(image.shape, {})[place] = image
        stacks = [(list(images), torch.stack(list(images.values()))) for images in by_shape.values()]
        return ReadBatch(paths, stacks, errors)

    def _read(self, paths: list[str], errors: dict[int, str]) -> Iterator[dict[int, Image.Image]]:
        """Yields images by their places, as many as are to be preprocessed together."""
        images: dict[int, Image.Image] = {}
        pixels = 0
        for place, path in enumerate(paths):
            try:
                images[place] = self.read(path, self.background)
            except ValueError as error:
                errors[place] = str(error)
                continue
            pixels += images[place].width * images[place].height
            if pixels > TOGETHER:
                yield images
                images, pixels = {}, 0
        yield images

    def _preprocessed(self, images: dict[int, Image.Image], errors: dict[int, str]) -> dict[int, torch.Tensor]:
        if not images:
            return {}
        try:
            pixels = self.processor(list(images.values()), return_tensors="pt").pixel_values
            return dict(zip(images, pixels, strict=True))
        except (ValueError, RuntimeError) as error:
            if len(images) == 1:
                errors[next(iter(images))] = one_line(error)
                return {}
        # The results differ in size, or one image is the reason.
        alone = [self._preprocessed({place: image}, errors) for place, image in images.items()]
        return {place: image for found in alone for place, image in found.items()}


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
