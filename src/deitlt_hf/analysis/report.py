"""Analyses a model for the report: the table of its experts, and one figure for each question about them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix
from transformers import PreTrainedModel

from ..data.images import ImageCollator, ImageDataset
from ..data.long_tail import Groups, Integers
from ..data.transforms import ImageFormat
from ..evaluation.accuracy import class_accuracies
from ..evaluation.metrics import Estimate, long_tail_figures, with_intervals
from ..serving.classifiers import load_processor
from . import figures
from .agreement import expert_outcomes, gain_by_class
from .attention import attention_rollout, eager_attention
from .features import effective_rank, singular_values, token_similarity
from .flatness import Batches, images_of_groups, loss_rises
from .observe import Observed, observe, spread_rows
from .pictures import shorten
from .report_page import Picture, Section

SHOWN = 10  # images in a row
MOST_IN_MATRIX = 400  # classes; cells of a larger matrix would be smaller than a pixel
RHOS = (0.0125, 0.025, 0.05, 0.1)  # around 0.05, the radius in the paper of SAM


def analyze(
    path: str,
    model: PreTrainedModel,
    data: Mapping,
    counts: Integers,
    groups: Groups,
    num_images: int = 512,
    resamples: int = 200,
    sharpness_images: int = 128,
    agreement: Mapping[str, Mapping[str, float]] | None = None,
    label_order: torch.Tensor | None = None,
) -> Section:
    """Analyses one model on the split `test` of the data and returns its section of the report.

    Args:
        path: Folder or Hub id of the model, with its image processor.
        model: A DeiT-LT, or a DeiT or ViT of transformers.
        data: The split `train` is used for the flatness of the loss.
        counts: Training images of each class.
        groups: Class indices of each group.
        num_images: Number of images for attention and features.
        resamples: Number of bootstrap samples.
        sharpness_images: Training images, overall and of each group, for the flatness of the loss; 0 leaves it out.
        agreement: Agreement with the model's teacher, see [`teacher_agreement`]; None leaves it out.
        label_order: Positions of the data's classes among the model's classes, (classes,).
    """
    collate = ImageCollator(load_processor(path))
    dataset = collate.images(data["test"])
    observed = observe(model, dataset, collate, num_images, label_order=label_order)
    names = data["test"].features["label"].names
    estimates = _estimates(observed, groups, resamples)
    found = {expert: estimate.values for expert, estimate in estimates.items()}
    intervals = {expert: estimate.ends for expert, estimate in estimates.items()}
    findings: dict[str, Any] = {
        "class_accuracies": {
            expert: class_accuracies(observed.predictions(expert), observed.labels, len(counts)).tolist()
            for expert in observed.logits
        }
    }
    pictures = _of_classes(found, intervals, counts, groups, names)
    if len(names) <= MOST_IN_MATRIX:
        pictures.append(_confusion(observed, counts, names))
    if "distillation" in observed.logits:
        pictures += _of_experts(observed, counts, groups, findings)
    if agreement is not None:
        pictures.append(_of_teacher(agreement, findings))
    pictures += _of_tokens(observed, groups, findings)
    if sharpness_images > 0:
        train = collate.images(data["train"])
        images = images_of_groups(model, train, collate, groups, sharpness_images, label_order)
        pictures.append(_of_weights(model, images, findings))
    pictures += _of_images(model, observed, dataset, collate, names, groups)
    # A published report must not show the full path, which may hold a user name.
    title = "/".join(Path(path).resolve().parts[-2:]) if Path(path).exists() else path
    return Section(title, found, intervals, pictures, findings)


def _estimates(observed: Observed, groups: Groups, resamples: int) -> dict[str, Estimate]:
    """Metrics of each expert with their 95 % intervals."""
    seen = {expert: (observed.predictions(expert), observed.confidences(expert)) for expert in observed.logits}

    def of(rows: np.ndarray) -> dict[str, dict[str, float]]:
        return {
            expert: long_tail_figures(predictions[rows], observed.labels[rows], groups, confidences[rows])
            for expert, (predictions, confidences) in seen.items()
        }

    return with_intervals(of, observed.labels, resamples=resamples)


def _of_classes(
    found: Mapping[str, Mapping],
    intervals: Mapping[str, Mapping],
    counts: Integers,
    groups: Groups,
    names: Sequence[str],
) -> list[Picture]:
    return [
        _picture("classes", "Training images", "Each bar is a class; colours are the groups of the tables.",
                 figures.draw_counts, counts, groups, names),
        _picture("accuracy", "Accuracy by group", "Compare the colours within a group: the highest bar is the best "
                 "expert. Lines are 95 % bootstrap intervals.",
                 figures.draw_accuracies, found, intervals, list(groups)),
    ]  # fmt: skip


def _of_teacher(agreement: Mapping[str, Mapping[str, float]], findings: dict) -> Picture:
    findings["teacher_agreement"] = dict(agreement)
    how = (
        "The DIST expert should predict the same class as the teacher. In distribution: test images. Out of "
        "distribution: augmented and mixed long-tailed training images, from which it learnt."
    )
    return _picture("teacher", "Agreement with the teacher", how, figures.draw_agreement, agreement)


def _confusion(observed: Observed, counts: Integers, names: Sequence[str]) -> Picture:
    from matplotlib.figure import Figure

    matrix = confusion_matrix(observed.labels, observed.predictions("mean"), labels=range(len(names)))
    side = min(3.6 + 0.12 * len(names), 7.5)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    figures.draw_confusion(figure.subplots(), matrix, counts, names)
    how = (
        "Each row is a class, the most frequent first, and shows how its test images are classified. Errors below the "
        "diagonal are images of rare classes that are classified as more frequent ones."
    )
    return Picture("confusion_matrix", "Confusion matrix", how, figure)


def _of_experts(observed: Observed, counts: Integers, groups: Groups, findings: dict) -> list[Picture]:
    cls, distillation = observed.predictions("cls"), observed.predictions("distillation")
    outcomes = expert_outcomes(cls, distillation, observed.labels, groups)
    gains = gain_by_class(cls, distillation, observed.labels, len(counts))
    findings |= {"outcomes": outcomes, "gain_by_class": gains.tolist()}
    return [
        _picture("outcomes", "Which expert is correct", "Green and orange: only one expert is correct. An oracle that "
                 "always chose the correct expert would miss only the light part. The shares of a group are means over "
                 "its classes.",
                 figures.draw_outcomes, outcomes),
        _picture("gains", "Gain of DIST over CLS, by class", "Dots above the line are classes on which the DIST expert "
                 "is better. They should be on the left, where training images are few.",
                 figures.draw_gains, gains, counts),
    ]  # fmt: skip


def _of_tokens(observed: Observed, groups: Groups, findings: dict) -> list[Picture]:
    features = {token: [block[:, index] for block in observed.features] for index, token in enumerate(observed.tokens)}
    ranks = {token: [effective_rank(block) for block in blocks] for token, blocks in features.items()}
    spectra = {token: [singular_values(block) for block in blocks] for token, blocks in features.items()}
    labels = observed.labels[observed.chosen]
    members = {name: np.flatnonzero(np.isin(labels, np.asarray(group))) for name, group in groups.items()}
    members = {name: rows for name, rows in members.items() if len(rows) > 1}
    # The same number of images for each group: the effective rank grows with the number of images, its upper bound.
    number = min(map(len, members.values()), default=0)
    members = {name: rows[spread_rows(len(rows), number)] for name, rows in members.items()}
    by_group = {
        token: {name: [effective_rank(block[rows]) for block in blocks] for name, rows in members.items()}
        for token, blocks in features.items()
    }
    findings |= {
        "attention_distance": observed.distances.tolist(),
        "token_spread": observed.spreads.tolist(),
        "images_of_rank": len(labels),
        "effective_rank": ranks,
        "images_of_group_rank": number,
        "effective_rank_of_groups": by_group,
        "singular_values": {token: [values.tolist() for values in blocks] for token, blocks in spectra.items()},
    }
    pictures = [
        _picture("attention_distance", "Attention distance", "Low is local: a patch attends to its neighbours, a token "
                 "to one area. High is global. A CNN teacher should make early blocks local.",
                 figures.draw_distances, observed.distances, observed.spreads, observed.tokens),
        _picture("rank", "Effective rank of the tokens", f"Number of directions that the features of {len(labels)} "
                 "images use; at most the number of images. With a flat teacher, the DIST token should use fewer.",
                 figures.draw_by_block, ranks, "effective rank"),
        _picture("spectrum", "Singular values after the last block", "The faster a line falls, the fewer directions "
                 "hold the information of the token.",
                 figures.draw_spectra, {token: blocks[-1] for token, blocks in spectra.items()}),
    ]  # fmt: skip
    if members:
        how = f"The same for {number} images of each group. Compare lines of one colour: CLS is dashed, DIST is solid."
        pictures.append(_picture("group_rank", "Effective rank by group", how, figures.draw_group_ranks, by_group))
    if len(features) == 2:
        cosines = [float(token_similarity(*blocks).mean()) for blocks in zip(*features.values(), strict=True)]
        findings["token_similarity"] = cosines
        how = "1: same direction; 0: orthogonal. The lower the cosine, the more the features of the tokens differ."
        curve, label = {"cosine": cosines}, "cosine of CLS and DIST"
        pictures.append(_picture("similarity", "Similarity of the tokens", how, figures.draw_by_block, curve, label))
    return pictures


def _of_weights(model: PreTrainedModel, images: Iterable[tuple[str, Batches]], findings: dict) -> Picture:
    rises = {name: loss_rises(model, batches, RHOS) for name, batches in images}
    findings["loss_rises"] = {"rho": RHOS, **rises}
    how = (
        "The rise of the loss on training images when the weights move in the direction of its steepest ascent. Lower "
        "is flatter, which is the goal of SAM."
    )
    return _picture("flatness", "Flatness of the loss", how, figures.draw_loss_rises, rises, RHOS)


def _of_images(
    model: PreTrainedModel,
    observed: Observed,
    dataset: ImageDataset,
    collate: ImageCollator,
    names: Sequence[str],
    groups: Groups,
) -> list[Picture]:
    predictions, labels = observed.predictions("mean"), observed.labels
    pairs, number = np.unique(
        np.stack([labels, predictions], axis=1)[labels != predictions], axis=0, return_counts=True
    )
    worst = np.argsort(-number, kind="stable")[:SHOWN]
    chosen = [int(np.flatnonzero((labels == pairs[at][0]) & (predictions == pairs[at][1]))[0]) for at in worst]
    captions = [(names[pairs[at][0]], f"classified as {names[pairs[at][1]]}", f"{number[at]} times") for at in worst]
    pictures = []
    if chosen:
        how = "The pairs of classes that the prediction confuses most often, with one image of each pair."
        pictures.append(_row("confusions", "Worst confusions", how, dataset, chosen, captions))
    if "distillation" in observed.logits:
        tail = np.asarray(list(groups.values())[-1])
        only = (observed.predictions("distillation") == labels) & (observed.predictions("cls") != labels)
        rows = np.flatnonzero(only & np.isin(labels, tail))[:SHOWN].tolist()
        if rows:
            cls = observed.predictions("cls")
            by_expert = [(names[labels[row]], f"CLS: {names[cls[row]]}") for row in rows]
            how = "Test images of the rarest classes that DIST classifies correctly and CLS does not."
            pictures.append(_row("only_distillation", "Only DIST is correct", how, dataset, rows, by_expert))
    first = [int(np.flatnonzero(np.isin(labels, np.asarray(group)))[0]) for group in groups.values()
             if np.isin(labels, np.asarray(group)).any()]  # fmt: skip
    pictures.append(_attention_maps(model, observed, dataset, collate, names, first))
    return pictures


@torch.no_grad()
def _attention_maps(
    model: PreTrainedModel,
    observed: Observed,
    dataset: ImageDataset,
    collate: ImageCollator,
    names: Sequence[str],
    rows: Sequence[int],
) -> Picture:
    from matplotlib.figure import Figure

    batch = collate([dataset[row] for row in rows])
    with eager_attention(model):
        outputs = model.eval()(pixel_values=batch["pixel_values"].to(model.device), output_attentions=True)
    tokens = len(observed.tokens)
    rollout = attention_rollout([layer.float().cpu().numpy() for layer in outputs.attentions])
    figure = Figure(figsize=(2.0 * (1 + tokens), 2.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 1 + tokens, squeeze=False)
    # The maps belong to the image after resizing and cropping, so that one is drawn.
    images = ImageFormat.of(collate.image_processor).visible(batch["pixel_values"])
    for axes, row, image, weights in zip(grid, rows, images, rollout, strict=True):
        maps = {
            f"{token} token": weights[index, tokens:].reshape(observed.grid)
            for index, token in enumerate(observed.tokens)
        }
        figures.draw_attention(axes, image, maps, shorten(names[observed.labels[row]]))
    how = "Bright patches contribute most to the final feature of a token, by attention rollout through all blocks."
    return Picture("attention", "Attention maps of the tokens", how, figure)


def _row(
    name: str, title: str, how: str, dataset: ImageDataset, rows: Sequence[int], captions: Sequence[Sequence[str]]
) -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * SHOWN, 2.1), layout="constrained")
    axes = figure.subplots(1, SHOWN, squeeze=False)[0]
    short = ["\n".join(map(shorten, lines)) for lines in captions]
    figures.draw_images(axes, [dataset[row]["image"] for row in rows], short)
    return Picture(name, title, how, figure, [", ".join(lines) for lines in captions])


def _picture(name: str, title: str, how_to_read: str, draw: Callable, *values: Any) -> Picture:
    """Draws a figure with one axis; `values` are the arguments of `draw` after the axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    draw(figure.subplots(), *values)
    return Picture(name, title, how_to_read, figure)
