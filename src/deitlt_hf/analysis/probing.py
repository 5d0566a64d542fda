"""Linear probe: a balanced logistic regression on the frozen features of a backbone."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..data.images import ImageCollator, ImageDataset
from ..data.long_tail import Groups, Integers, class_counts
from ..evaluation.accuracy import group_accuracies, number_of_classes
from ..evaluation.expert_table import ExpertTable
from ..evaluation.findings import few_images
from ..evaluation.metrics import with_intervals
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..options import option
from ..serving.classifiers import load_backbone, load_processor
from ..training.linear_head import fit_balanced
from .observe import BATCH

CLS_TOKENS = ("cls_token", "class_embedding")  # names of the parameter in the models of transformers


@dataclass
class ProbeArguments:
    """The backbone to probe, and the output."""

    model: str = option(
        help="Folder or Hub id of a student, a teacher, or any image model of transformers or timm. Its weights "
        "are not changed."
    )
    resamples: int = option(1000, "Bootstrap samples for the intervals.")
    json: str | None = option(None, "Also write the figures to this file; - prints them instead of the table.")

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples must be 1 or more, got {self.resamples}.")


@dataclass(frozen=True)
class Probe:
    """The result of a linear probe."""

    model: str
    predictions: list[int]  # predicted class of each test image; (images,)
    strength: float  # the chosen inverse regularisation, C of scikit-learn
    held_out: int  # images on which it was chosen
    features: int  # number of features
    seconds: float  # for features and regressions


def probe(path: str, data: Mapping) -> Probe:
    """Fits a linear classifier to the frozen features of a backbone, and predicts the test images.

    The images are those of an evaluation, without augmentation. The regularisation is chosen on the split `validation`,
    or without it on a part of the training images, by the mean over the classes of the cross entropy; the classifier is
    then fitted to all training images. Test images choose nothing.

    Raises:
        FileNotFoundError, ValueError: If the backbone cannot be loaded or has no features of an image.
    """
    started = time.perf_counter()
    model = load_backbone(path).to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    collate = ImageCollator(load_processor(path))
    seen = {split: _features(model, collate.images(images), collate) for split, images in data.items()}
    regression, strength, held_out = fit_balanced(seen["train"], seen.get("validation"))
    predictions = regression.predict(seen["test"][0])
    size, seconds = seen["train"][0].shape[1], time.perf_counter() - started
    return Probe(path, predictions.tolist(), strength, held_out, size, round(seconds, 1))


@torch.no_grad()
def _features(model: PreTrainedModel, dataset: ImageDataset, collate: ImageCollator) -> tuple[np.ndarray, np.ndarray]:
    """Features of the images of a split, (images, size), and their classes, (images,)."""
    parts, labels = [], []
    for batch in DataLoader(dataset, BATCH, collate_fn=collate):
        parts.append(pooled(model, batch["pixel_values"].to(model.device)).float().cpu().numpy())
        labels.append(batch["labels"].numpy())
    return np.concatenate(parts), np.concatenate(labels)


def pooled(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """One feature vector for each image, (images, size), of a model of [`load_backbone`].

    It is what a classifier of the model reads: the input of a teacher's classifier, the CLS token of a ViT (of a DeiT,
    CLS and DIST side by side), the image features of a CLIP, or the pooled output of any other model.

    Raises:
        ValueError: If the model gives none of these for an image.
    """
    if isinstance(model, FlatTeacherForImageClassification):
        backbone: nn.Module = model.backbone
        return backbone(pixel_values)
    if hasattr(model, "get_image_features"):
        features: Any = model.get_image_features
        found = features(pixel_values=pixel_values)
        return found if isinstance(found, torch.Tensor) else found.pooler_output  # by version of transformers
    if model.main_input_name != "pixel_values":
        raise ValueError(f"a {type(model).__name__} does not take images; give an image model.")
    outputs: Any = model(pixel_values=pixel_values)
    hidden, pooler = outputs.get("last_hidden_state"), outputs.get("pooler_output")
    own = {name.rpartition(".")[2] for name, _ in model.named_parameters() if not name.startswith("timm_model.")}
    if hidden is not None and hidden.ndim == 3 and own.intersection(CLS_TOKENS):
        return hidden[:, : 1 + ("distillation_token" in own)].flatten(1)
    if pooler is not None:
        return pooler.flatten(1)
    if hidden is None or hidden.ndim not in (3, 4):
        raise ValueError(f"a {type(model).__name__} has no features of an image; give an image model.")
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))


def probe_figures(found: Probe, labels: Integers, groups: Groups, resamples: int) -> tuple[ExpertTable, dict[str, Any]]:
    """The table of a probe's accuracies with bootstrap intervals, and its figures for `--json`."""
    labels, predictions = np.asarray(labels), np.asarray(found.predictions)

    def of(rows: np.ndarray) -> dict[str, dict[str, float]]:
        return {"probe": group_accuracies(predictions[rows], labels[rows], groups)}

    accuracies, intervals = with_intervals(of, labels, resamples=resamples)["probe"]
    tested = class_counts(labels, number_of_classes(labels, groups))
    title = f"linear probe of {found.model}"
    notes = few_images(tested, groups)
    table = ExpertTable(
        title, {"probe": accuracies}, groups, tested.tolist(), notes, intervals={"probe": intervals}, of="model"
    )
    facts = {name: value for name, value in asdict(found).items() if name != "predictions"}
    return table, facts | {"accuracies": accuracies, "intervals": intervals}
