"""Predicts any number of image files into the tables of a folder, which several processes share and a run resumes."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from PIL import Image
from transformers import PreTrainedModel

from ..io import atomic_write, check_can_be_folder, read_json, write_json
from ..out_of_memory import advice_if_out_of_memory
from .handler import EXPERTS, EndpointHandler
from .prediction import ImageReader, ReadBatch, batches_of, read_batches, read_file, smaller_batches

# Programs that read all parquet files of a folder, such as pandas, skip files whose names begin with an underscore.
MANIFEST = "_predictions.json"
FORMATS = ("parquet", "csv")
TOKENS = {"cls": ("cls",), "distillation": ("distillation",), "mean": ("mean",), "tokens": EXPERTS}
FEATURES = (*TOKENS, "head")


@dataclass(frozen=True)
class Contents:
    """What the tables of a folder hold.

    Raises:
        ValueError: If a number is below 1, or features are to be written as CSV.
    """

    top_k: int = 5  # classes for each image
    experts: bool = False  # the choice of each expert of a student
    # one of `FEATURES`: tokens of a student, or the input of the last layer of another classifier
    features: str | None = None
    format: str = "parquet"  # one of `FORMATS`
    shard_size: int = 5000  # images in a table

    def __post_init__(self) -> None:
        if min(self.top_k, self.shard_size) < 1:
            raise ValueError(f"top_k and shard_size must be 1 or more, got {self.top_k} and {self.shard_size}.")
        if self.features is not None and self.format == "csv":
            raise ValueError("features are written as parquet only; leave --format csv out.")


class Shards:
    """The tables of a folder. Each is written atomically, so one that exists is complete.

    Args:
        folder: New, empty, or of an interrupted run.
        paths: All image files, in the order of the rows.
        contents: What the tables hold.
        source: Digest of what the paths alone do not identify.
    """

    def __init__(self, folder: str | PathLike, paths: Sequence[str], contents: Contents, source: str = "") -> None:
        self.folder, self.paths, self.contents, self.source = Path(folder), paths, contents, source
        self.number = math.ceil(len(paths) / contents.shard_size)

    def claim(self, classifier: EndpointHandler) -> None:
        """Writes what the run computes into the folder, or compares it with what the folder says.

        Raises:
            FileExistsError: If the path is a file, or the folder holds something else.
            ValueError: If the folder is of a run with another model, other images or options.
        """
        check_can_be_folder(self.folder)
        listed = "\0".join(self.paths) + self.source  # no path contains NUL
        # A file name is bytes that need not be UTF-8.
        files = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
        wanted = {
            "model": handler_digest(classifier),
            "images": len(self.paths),
            "files": files,
            **asdict(self.contents),
        }
        path = self.folder / MANIFEST
        if not path.is_file():
            # `.part` is an unfinished file of `atomic_write`, of a run that was ended here.
            if self.folder.is_dir() and any(not name.endswith(".part") for name in os.listdir(self.folder)):
                raise FileExistsError(f"{self.folder} is not empty; choose a new folder for --output.")
            write_json(path, wanted)
            return
        found = read_json(path)
        advice = f"repeat the command of {self.folder} to continue it, or choose another --output"
        for name, value in wanted.items():
            if found.get(name) == value:
                continue
            if name == "model":
                raise ValueError(f"{self.folder} holds the predictions of another model; {advice}.")
            if name in ("images", "files"):
                numbers = f" ({found.get('images')}, here {len(self.paths)} are given)" * (name == "images")
                raise ValueError(f"{self.folder} holds the predictions of other files{numbers}; {advice}.")
            raise ValueError(f"{self.folder} holds predictions with {name} {found.get(name)}, not {value}; {advice}.")

    def path(self, index: int) -> Path:
        """The file of a table."""
        return self.folder / f"predictions-{index:05d}-of-{self.number:05d}.{self.contents.format}"

    def missing(self) -> list[int]:
        """Indices of the tables that are not written yet."""
        return [index for index in range(self.number) if not self.path(index).is_file()]

    def paths_of(self, index: int) -> Sequence[str]:
        """The image files of a table."""
        return self.paths[index * self.contents.shard_size : (index + 1) * self.contents.shard_size]

    def write(self, index: int, table: pa.Table) -> None:
        """Writes a table."""
        with atomic_write(self.path(index)) as part:
            if self.contents.format == "parquet":
                pa.parquet.write_table(table, part)
            else:
                pa.csv.write_csv(table, part)


def predict_shards(
    tabulate: "Tabulator",
    shards: Shards,
    indices: Sequence[int],
    batch_size: int = 32,
    num_workers: int = 0,
    read: ImageReader = read_file,
) -> Iterator[tuple[int, int]]:
    """Computes and writes tables one after the other; yields after each batch its images, and how many are unreadable.

    Raises:
        ValueError: If a worker process was ended by the system.
    """
    batches = (batch for index in indices for batch in batches_of(shards.paths_of(index), batch_size))
    batches_read = read_batches(tabulate.classifier, batches, num_workers, read)
    for index in indices:
        tables = []
        for batch in itertools.islice(batches_read, math.ceil(len(shards.paths_of(index)) / batch_size)):
            with advice_if_out_of_memory(lambda: smaller_batches(batch_size)):
                tables.append(tabulate(batch))
            yield len(batch.paths), len(batch.errors)
        shards.write(index, pa.concat_tables(tables))


class Tabulator:
    """Turns batches of read images into tables with one row for each image.

    The columns are `image`; `error`, a sentence if the file could not be read, in which case the others are empty; and
    `label`, `score`, `group` and `training_images` of the best class. With experts, `cls_label`, `cls_label_score`,
    `distillation_label` and `distillation_label_score` are the choice of each. Then come `prediction_set`, if the model
    has thresholds for it; `label_2`, `score_2` and so on; and the features, such as `cls_features`.

    Raises:
        ValueError: If the model has no features of the wanted name.
    """

    def __init__(self, classifier: EndpointHandler, contents: Contents) -> None:
        self.classifier, self.model = classifier, classifier.model
        self.is_csv = contents.format == "csv"
        classes = range(self.model.config.num_labels)
        self.labels = pa.array([str(self.model.config.id2label[label]) for label in classes], pa.string())
        self.groups = pa.array([classifier.group_of.get(label) for label in classes], pa.string())
        self.counts = pa.array(classifier.training_images, pa.int64())
        self.top_k = min(contents.top_k, len(classes))
        has_experts = hasattr(self.model, "distillation_classifier")
        self.experts = EXPERTS if contents.experts and has_experts else ()
        if contents.features is not None and (contents.features in TOKENS) != has_experts:
            names = " or ".join(TOKENS) if has_experts else "head"
            raise ValueError(f"a {self.model.config.model_type} has no features {contents.features!r}; give {names}.")
        self.features = TOKENS.get(contents.features or "", (contents.features,) if contents.features else ())
        self._kept: list[torch.Tensor] = []
        if self.features == ("head",):
            last_layer(self.model).register_forward_pre_hook(lambda _, inputs: self._kept.append(inputs[0]))
        # In place of a batch without a readable image, whose table needs the same columns.
        blank = classifier.processor(Image.new("RGB", (32, 32)), return_tensors="pt").pixel_values
        self._blank = self._outputs(blank)

    def __call__(self, batch: ReadBatch) -> pa.Table:
        """Makes the table of a batch."""
        number = range(len(batch.paths))
        row_of = {place: row for row, place in enumerate(itertools.chain(*(places for places, _ in batch.stacks)))}
        parts = [self._outputs(stack) for _, stack in batch.stacks] or [self._blank]
        columns = self._columns({name: torch.cat([part[name] for part in parts]) for name in self._blank})
        rows = pa.array([row_of.get(place) for place in number], pa.int64())  # None gives an empty row
        known = {
            "image": pa.array([_as_text(path) for path in batch.paths], pa.string()),
            "error": pa.array([batch.errors.get(place) for place in number], pa.string()),
        }
        return pa.table(known | {name: column.take(rows) for name, column in columns.items()})

    @torch.inference_mode()
    def _outputs(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scores and features of images, on the CPU; (images, classes or size) each."""
        outputs = self.model(pixel_values.to(self.model.device, self.model.dtype, non_blocking=True))
        found = {"score": outputs["logits"].float().softmax(dim=-1)}
        for expert in self.experts:
            found[expert] = outputs[f"{expert}_logits"].float().softmax(dim=-1)
        if self._kept:
            found["head_features"] = self._kept.pop().flatten(1).float()
        elif self.features:
            cls, distillation = outputs["token_features"].float().unbind(dim=1)
            tokens = {"cls": cls, "distillation": distillation, "mean": (cls + distillation) / 2}
            found |= {f"{name}_features": tokens[name] for name in self.features}
        return {name: values.cpu() for name, values in found.items()}

    def _columns(self, outputs: dict[str, torch.Tensor]) -> dict[str, pa.Array]:
        scores, labels = (values.T.contiguous().numpy() for values in outputs["score"].topk(self.top_k))
        columns = {
            "label": self.labels.take(pa.array(labels[0])),
            "score": pa.array(scores[0]),
            "group": self.groups.take(pa.array(labels[0])),
            "training_images": self.counts.take(pa.array(labels[0])),
        }
        for expert in self.experts:
            score, label = (values.numpy() for values in outputs[expert].max(dim=-1))
            columns |= {f"{expert}_label": self.labels.take(pa.array(label)), f"{expert}_label_score": pa.array(score)}
        if self.classifier.coverage is not None:
            columns["prediction_set"] = self._sets(outputs["score"])
        for rank in range(1, self.top_k):
            columns[f"label_{rank + 1}"] = self.labels.take(pa.array(labels[rank]))
            columns[f"score_{rank + 1}"] = pa.array(scores[rank])
        for name in (f"{name}_features" for name in self.features):
            # Not lists of a fixed size: pyarrow 24 cannot write, and 25 not read those with an empty row, which an
            # image that cannot be read has.
            values = outputs[name]
            ends = np.arange(0, values.numel() + 1, values.shape[1], dtype=np.int32)
            columns[name] = pa.ListArray.from_arrays(ends, pa.array(values.flatten().numpy()))
        return columns

    def _sets(self, scores: torch.Tensor) -> pa.Array:
        """Names of the classes in the prediction set of each image; CSV, which has no lists, holds them as JSON."""
        names = self.labels.to_pylist()
        sets = [[names[label] for label in labels] for labels in self.classifier.prediction_sets(scores)]
        if self.is_csv:
            return pa.array([json.dumps(labels, ensure_ascii=False) for labels in sets], pa.string())
        return pa.array(sets, pa.list_(pa.string()))


def last_layer(model: PreTrainedModel) -> torch.nn.Module:
    """Finds the linear layer that computes the logits of a classifier.

    Raises:
        ValueError: If there is none.
    """
    modules = list(reversed(list(model.modules())))
    head = getattr(model, "classifier", None)  # not the last module of a teacher with a projection
    for module in [head, *modules] if isinstance(head, torch.nn.Module) else modules:
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and len(weight) == model.config.num_labels:
            return module
    raise ValueError(f"a {model.config.model_type} has no linear layer as its last; leave --features out.")


def handler_digest(classifier: EndpointHandler) -> str:
    """SHA-256 over everything that decides an answer: weights, classes, groups and image processor."""
    about = [
        {str(label): name for label, name in classifier.model.config.id2label.items()},
        {str(label): name for label, name in classifier.group_of.items()},
        classifier.training_images,
        getattr(classifier.model.config, "prediction_sets", None),
        classifier.processor.to_dict(),
    ]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in classifier.model.state_dict().items():
        digest.update(name.encode())
        # As bytes: numpy has no bfloat16.
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _as_text(path: str) -> str:
    """A path as valid Unicode; bytes of a file name that are not UTF-8 become `\\xff`."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
