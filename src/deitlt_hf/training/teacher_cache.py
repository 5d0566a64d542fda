"""Cache of what the DIST head learns from a teacher, by epoch and position: further runs need no teacher forward."""

import hashlib
import json
import math
import platform
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.images import decoder_versions
from ..data.loading import images_hash, subset_hash
from ..io import atomic_write, one_line, read_json, write_json
from .provenance import class_name, float32_precisions, hardware
from .results import installed_versions

if TYPE_CHECKING:
    from .taught import TaughtTrainer

HARD = "hard"  # the target that needs only the predicted class
FORMAT = 1  # of the files; another one is another cache
IDENTITY_FILE = "identity.json"
# Arguments that decide the images that the teacher sees.
_OF_VIEWS = (
    *("seed", "data_seed", "sampling", "repeated_augmentation", "partial_steps", "train_crop", "auto_augment", "hflip"),
    *("color_jitter", "random_erasing", "mixup", "cutmix", "mixup_switch", "mixup_probability", "mixing_in_drw"),
    *("teacher_view", "teacher_antialias", "world_size", "train_batch_size", "gradient_accumulation_steps"),
)
_NOT_OF_FUNCTION = ("_name_or_path", "transformers_version", "class_counts", "class_groups", "prediction_sets")


class _Part(NamedTuple):
    """What is stored for a micro-batch: a digest of its views, and labels (images,) or logits (images, classes)."""

    views: int
    values: np.ndarray


class TeacherCache:
    """The labels, or for soft distillation the logits, of one teacher on the views of one training, in files.

    A subfolder has the digest of everything that decides views and labels (`identity`) as its name. It holds a file for
    each epoch and process. A file holds the micro-batches that were computed so far, and a digest of its content. Files
    are replaced atomically and under a lock, and keep what other runs have stored. With `is_hard`, only the predicted
    class of an image is stored.
    """

    def __init__(
        self, folder: str | Path, identity: Mapping[str, Any], process: int, classes: int, is_hard: bool
    ) -> None:
        content = json.dumps(identity, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(content.encode()).hexdigest()[:32]
        self.identity, self.process, self.classes, self.is_hard = json.loads(content), process, classes, is_hard
        self._epoch: int | None = None
        self._stored: dict[int, _Part] = {}
        self._new: dict[int, _Part] = {}
        self._has_warned = self._is_closed = False

    @property
    def bytes_per_image(self) -> int:
        """Size of what is stored for an image in an epoch."""
        return self._label_type().itemsize if self.is_hard else 4 * self.classes

    def epochs(self) -> int:
        """Number of epochs of which this process has a file."""
        return len([*self.folder.glob(self._name("*"))])

    def get(self, epoch: int, index: int, views: torch.Tensor) -> torch.Tensor | None:
        """Returns the teacher's logits for a micro-batch of this process in an epoch, if they are stored.

        For hard distillation these are 1 for the predicted class and 0 for others. The views are the images that the
        teacher sees, (images, 3, height, width).
        """
        if epoch != self._epoch:  # one epoch at a time is in memory
            self.flush()
            self._epoch, self._stored = epoch, self._read(self._path(epoch))
        part = self._stored.get(index)
        if part is None:
            return None
        # The identity has hashes of a sample of the images; this notices other pixels in any micro-batch.
        if part.views != _digest_of(views) or len(part.values) != len(views):
            self._warn(f"{self._path(epoch)} is of other images")
            return None
        values = torch.from_numpy(part.values.astype(np.int64) if self.is_hard else part.values).to(views.device)
        return F.one_hot(values, self.classes).float() if self.is_hard else values

    def put(self, index: int, views: torch.Tensor, logits: torch.Tensor) -> None:
        """Keeps logits of the teacher for a micro-batch of the epoch of the last `get`, until they are written."""
        if self.is_hard:
            values = logits.argmax(dim=1).cpu().numpy().astype(self._label_type())
        else:
            values = logits.float().cpu().numpy()  # numpy has no bfloat16, as of autocast
        self._new[index] = _Part(_digest_of(views), values)

    def flush(self) -> None:
        """Writes what is new. If the folder cannot be written to, the run continues without storing."""
        if not self._new or self._is_closed:
            return
        self._store(self._write_epoch)
        self._new = {}

    def _write_epoch(self) -> None:
        assert self._epoch is not None  # set by `get`
        if not (self.folder / IDENTITY_FILE).is_file():
            write_json(self.folder / IDENTITY_FILE, self.identity)
        # Read again, under the lock: another run may have stored more of this epoch since `get`.
        self._stored = self._read(self._path(self._epoch)) | self._new
        with atomic_write(self._path(self._epoch)) as part:
            _write(part, self._stored)

    def _store(self, write: Callable[[], None]) -> None:
        """Calls a function under the lock of the folder. If the folder cannot be written to, nothing more is stored."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                write()
        except OSError as error:
            self._is_closed = True
            warnings.warn(f"the teacher's labels cannot be stored in {self.folder}: {one_line(error)}.", stacklevel=3)

    def accuracies(self, evaluation: str) -> dict[str, Any] | None:
        """Accuracies of the teachers that an earlier run measured on the same images; None if there are none."""
        try:
            found = read_json(self._accuracies_path(evaluation))
        except (OSError, ValueError):
            return None
        # A group without test images is NaN, which JSON does not have.
        return {
            name: {group: math.nan if value is None else value for group, value in row.items()}
            for name, row in found.items()
        }

    def put_accuracies(self, evaluation: str, accuracies: Mapping[str, Any]) -> None:
        """Stores accuracies of the teachers. `evaluation` is a digest of the images and groups."""
        self._store(lambda: write_json(self._accuracies_path(evaluation), accuracies))

    def _accuracies_path(self, evaluation: str) -> Path:
        return self.folder / f"accuracies-{evaluation}.json"

    def _name(self, epoch: str) -> str:
        return f"epoch-{epoch}.process-{self.process}.safetensors"

    def _path(self, epoch: int) -> Path:
        return self.folder / self._name(f"{epoch:05d}")

    def _label_type(self) -> np.dtype:
        return np.min_scalar_type(self.classes - 1)  # up to 256 classes, a byte for each image

    def _read(self, path: Path) -> dict[int, _Part]:
        if not path.is_file():
            return {}
        try:
            return _read(path)
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            self._warn(f"{path} is damaged ({one_line(error, 80)})")
            return {}

    def _warn(self, what: str) -> None:
        """Warns once in a run: damaged files often are many."""
        if not self._has_warned:
            warnings.warn(f"{what}: the teacher's labels are computed again, and stored.", stacklevel=2)
        self._has_warned = True


def _write(path: Path, parts: Mapping[int, _Part]) -> None:
    arrays = {
        "micro_batches": np.asarray([*parts], np.int64),
        "views": np.asarray([part.views for part in parts.values()], np.int64),
        "sizes": np.asarray([len(part.values) for part in parts.values()], np.int64),
        "values": np.concatenate([part.values for part in parts.values()]),
    }
    save_file(arrays, path, {"sha256": _sha256(arrays)})


def _read(path: Path) -> dict[int, _Part]:
    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in ("micro_batches", "views", "sizes", "values")}
        if (file.metadata() or {}).get("sha256") != _sha256(arrays):
            raise ValueError("its content has changed since it was written")
    values = np.split(arrays["values"], np.cumsum(arrays["sizes"])[:-1])
    found = zip(arrays["micro_batches"].tolist(), arrays["views"].tolist(), values, strict=True)
    return {index: _Part(views, part) for index, views, part in found}


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _digest_of(views: torch.Tensor) -> int:
    """Digest of a grid of pixels of each image, which other images, draws or mixes change."""
    height, width = views.shape[-2:]
    # A grid: all pixels would be copied from the device and hashed in every step.
    pixels = views[:, :, :: max(height // 8, 1), :: max(width // 8, 1)].contiguous().cpu().numpy()
    # Signed, because the file has int64.
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little", signed=True)


# ---- Identities ----


def model_digest(model: PreTrainedModel) -> str:
    """Digest of the class, configuration and weights of a model."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_FUNCTION}
    digest = hashlib.sha256(json.dumps([class_name(type(model)), config], sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def identity_of(trainer: "TaughtTrainer", teachers: list[str]) -> dict[str, Any]:
    """Everything that decides the views of a student's training and the labels of its teachers (their digests).

    Libraries and hardware belong to it: others round differently, which can change the label of an image.
    """
    args, images = trainer.args, trainer.given_train
    ends_mixing = args.mixes and not args.mixing_in_drw
    return {
        "format": FORMAT,
        "teachers": teachers,
        "teacher_formats": [repr(trainer.formats.get(name)) for name in ("teacher", "tail_teacher")],
        "classes": trainer.class_names,
        # Label smoothing does not change views, but could decide between equal shares of a mix.
        "tail": [trainer.tail_classes, args.label_smoothing_factor] if trainer.tail_classes else None,
        "images": [images_hash(images), subset_hash(images)],
        "student_format": repr(trainer.student_format),
        "background": getattr(trainer.processing_class, "background", None),
        "views": {name: getattr(args, name) for name in _OF_VIEWS} | {"image_cache": bool(args.image_cache)},
        "mixing_ends": args.drw_start_epoch if ends_mixing else None,
        "is_hard": args.distillation == HARD,
        "precision": [args.fold_teacher, trainer.accelerator.mixed_precision, float32_precisions()],
        "hardware": [hardware(args), platform.machine()],
        "versions": installed_versions() | {"numpy": np.__version__} | decoder_versions(),
    }


def evaluation_digest(trainer: "TaughtTrainer") -> str:
    """Digest of the images and groups on which the teachers are checked."""
    images = trainer.given_eval
    content = images_hash(next(iter(images.values())) if isinstance(images, Mapping) else images)
    facts = [content, trainer.groups, trainer.args.per_device_eval_batch_size, str(trainer.processing_class.to_dict())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def cache_of(trainer: "TaughtTrainer", teachers: list[str]) -> TeacherCache:
    """The cache in `teacher_cache` for a run of a trainer."""
    args = trainer.args
    assert args.teacher_cache is not None  # called for a run with it
    identity, is_hard = identity_of(trainer, teachers), args.distillation == HARD
    return TeacherCache(args.teacher_cache, identity, args.process_index, len(trainer.class_names), is_hard)


def cache_plan(cache: TeacherCache, trainer: "TaughtTrainer") -> str:
    """Describes a cache in the plan of a run: its folder, what it has, and its size."""
    args = trainer.args
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps / trainer.steps_per_epoch()
    assert args.global_batch_size is not None  # set by `settle`
    images = trainer.steps_per_epoch() * args.global_batch_size
    size = cache.bytes_per_image * images
    kind = "labels" if cache.is_hard else "logits (soft distillation needs all)"
    return (
        f"{cache.folder}: {kind} of {cache.epochs()} epochs so far; about {decimal(size)} an epoch, "
        f"{decimal(round(size * epochs))} for {epochs:g} epochs"
    )
