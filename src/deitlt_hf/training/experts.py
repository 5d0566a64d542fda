"""Evaluation of all experts of a model in one pass over the data."""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.trainer_utils import EvalPrediction

from ..data.long_tail import Integers, class_counts
from ..evaluation import ExpertTable, group_accuracies
from ..evaluation.findings import findings
from ..evaluation.metrics import long_tail_figures

if TYPE_CHECKING:
    from .trainer import LongTailTrainer

OVER_CLASSES = ("balanced_accuracy", "macro_f1")  # metrics of the prediction that weight all classes equally


def expert_columns(outputs: Sequence[Mapping], fields: Collection[str], labels: torch.Tensor) -> torch.Tensor:
    """Predicted class of each expert and the loss, as columns of one tensor: (images, models x experts + 1).

    The loss is the last column, one value per image. transformers would average the loss over batches, and count the
    images twice that pad the last batches of several processes.

    Args:
        outputs: Outputs of the evaluated models. The loss is that of the first.
        fields: Names of the output fields with the logits of the experts.
        labels: True classes; (images,).
    """
    loss = F.cross_entropy(outputs[0]["logits"].float(), labels, reduction="none")
    columns = [output[field].argmax(dim=1) for output in outputs for field in fields]
    # One tensor, because transformers gathers and concatenates predictions. As float32, it holds classes exactly.
    return torch.stack([*columns, loss], dim=1)


@contextlib.contextmanager
def expert_metrics_added(trainer: "LongTailTrainer", keeps_logits: bool) -> Iterator[None]:
    """Context in which the trainer's `compute_metrics` adds the metrics of the experts to those of the user.

    The trainer's predictions are the columns of [`expert_columns`], with `keeps_logits` pairs of them and the logits,
    which the user's functions get. It also sets the trainer's `last_table`.
    """
    compute, preprocess = trainer.compute_metrics, trainer.preprocess_logits_for_metrics

    def all_metrics(prediction: EvalPrediction) -> dict[str, float]:
        parts: Sequence = tuple(prediction.predictions) if keeps_logits else [prediction.predictions]
        counted = np.asarray(parts[0])
        labels, names = np.asarray(prediction.label_ids), trainer.expert_names(trainer.averaged_model is not None)
        trainer.last_table, metrics = expert_table(counted, labels, names, trainer.groups, trainer.class_names)
        if compute is None:
            return metrics
        losses = counted[:, -1] if "loss" in trainer.args.include_for_metrics else None
        return metrics | compute(
            EvalPrediction(parts[1], prediction.label_ids, inputs=prediction.inputs, losses=losses)
        )

    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = all_metrics, None
    if preprocess is not None and keeps_logits:
        trainer.preprocess_logits_for_metrics = lambda pair, labels: (pair[0], preprocess(pair[1], labels))
    try:
        yield
    finally:
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = compute, preprocess


@contextlib.contextmanager
def converted(models: Sequence[nn.Module], dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Context in which the weights of models have a dtype (None: their own). They are restored at the end.

    transformers does not restore them: later training steps and saved models would have the converted weights.
    """
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())] if dtype else []
    held = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            # By `data`: optimiser and wrappers refer to the parameter objects, which stay.
            tensor.data = tensor.data.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        yield
    finally:
        for tensor, values in zip(tensors, held, strict=True):
            tensor.data = values


def expert_table(
    counted: np.ndarray,
    labels: np.ndarray,
    experts: Sequence[str],
    groups: Mapping[str, Integers],
    names: Sequence[str],
) -> tuple[ExpertTable, dict[str, float]]:
    """Table of the accuracies of each expert, overall and by group, and metrics with these accuracies and the loss.

    The metrics also have `balanced_accuracy` (the mean over classes) and `macro_f1` of the model's prediction, by which
    `metric_for_best_model` can choose a model that does not neglect rare classes.

    Args:
        counted: Columns of [`expert_columns`].
        labels: True classes; (images,).
        experts: Names of the experts, in the order of the columns. The first is the model's prediction.
        groups: Class indices of the head, mid and tail classes.
        names: Names of the classes.
    """
    classes, losses = counted[:, :-1].astype(np.int64), counted[:, -1]
    accuracies = {expert: group_accuracies(classes[:, column], labels, groups) for column, expert in enumerate(experts)}
    metrics = {"loss": float(losses.mean()), "accuracy": accuracies[experts[0]]["overall"]}
    overall = long_tail_figures(classes[:, 0], labels, groups)
    metrics |= {name: overall[name] for name in OVER_CLASSES}
    for expert, values in accuracies.items():
        metrics.update({f"{expert}_{group}": value for group, value in values.items() if not math.isnan(value)})
    counts = class_counts(labels, len(names)).tolist()
    notes = findings({expert: classes[:, column] for column, expert in enumerate(experts)}, labels, groups, names)
    return ExpertTable("evaluation", accuracies, groups, counts, notes), metrics


def check_best_metric(wanted: str, experts: Collection[str], groups: Collection[str], eval_dataset: Any) -> None:
    """Raises `ValueError` if evaluations do not measure `wanted`, the `metric_for_best_model`."""
    of_experts = (f"{expert}_{group}" for expert in experts for group in ("overall", *groups))
    known = ["loss", "accuracy", *OVER_CLASSES, *of_experts]
    if isinstance(eval_dataset, dict):
        known = [f"{name}_{metric}" for name in eval_dataset for metric in known]
    if wanted.removeprefix("eval_") not in known:
        raise ValueError(f"metric_for_best_model {wanted!r} is not measured; choose one of {', '.join(known)}.")
