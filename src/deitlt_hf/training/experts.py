"""Evaluation of all experts of a model in one pass over the data."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalPrediction

from ..data.long_tail import Integers, class_counts
from ..evaluation import ExpertTable, group_accuracies
from .arguments import LongTailTrainingArguments


class ExpertEvaluation(Trainer):
    """A [`~transformers.Trainer`] that measures the accuracy of each expert of its model.

    Attributes:
        experts: Output field with the logits of each expert, by the expert's name. The first is the model's prediction.
        groups: Class indices of the head, medium and tail classes.
        averaged_model: A second model that is evaluated with the first, or None.
        last_table: Accuracies of the last evaluation.
    """

    experts: Mapping[str, str] = {}
    groups: Mapping[str, Integers]
    last_table: ExpertTable
    preprocess_logits_for_metrics: Callable | None  # wrapped if predictions are pairs, see `evaluation_loop`
    args: LongTailTrainingArguments
    model: PreTrainedModel

    _keeps_logits = False

    @property
    def averaged_model(self) -> PreTrainedModel | None:
        """A second model that is evaluated with the first, or None."""
        return None

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns the predicted class of each expert and the loss, as columns of one tensor with a row per image.

        The loss is the last column, one value per image. transformers would average the loss over batches, and count
        the images twice that pad the last batches of several processes. If logits are needed, they are the second
        element of a pair.
        """
        inputs = self._prepare_inputs(inputs)
        pixel_values, labels = inputs["pixel_values"], inputs["labels"]
        with self.compute_loss_context_manager():
            all_outputs = [model(pixel_values=pixel_values)]
            if self.averaged_model is not None:
                all_outputs.append(self.averaged_model(pixel_values=pixel_values))
        loss = F.cross_entropy(all_outputs[0].logits.float(), labels, reduction="none")
        columns = [outputs[field].argmax(dim=1) for outputs in all_outputs for field in self.experts.values()]
        counted = torch.stack([*columns, loss], dim=1)
        if not self._keeps_logits:
            return None, counted, labels
        if ignore_keys is None:
            ignore_keys = getattr(self.model.config, "keys_to_ignore_at_inference", [])
        kept = tuple(value for name, value in all_outputs[0].items() if name not in (*ignore_keys, "loss"))
        return None, (counted, kept[0] if len(kept) == 1 else kept), labels

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        """Runs the parent's loop, and adds the metrics of the experts to those of `compute_metrics`.

        The predictions are the same as in transformers: the logits and the other output fields that are not in
        `ignore_keys`. They are kept for `predict` and `compute_metrics` only.
        """
        compute, preprocess = self.compute_metrics, self.preprocess_logits_for_metrics
        self._keeps_logits = description == "Prediction" or compute is not None
        self.compute_metrics = lambda prediction: self._all_metrics(prediction, compute)
        if preprocess is not None and self._keeps_logits:
            self.preprocess_logits_for_metrics = lambda pair, labels: (pair[0], preprocess(pair[1], labels))
        elif preprocess is not None:
            self.preprocess_logits_for_metrics = None
        try:
            with self._evaluated_dtype():
                output = super().evaluation_loop(dataloader, description, *args, **kwargs)
            kept = output.predictions if self._keeps_logits else None
            predictions = None if kept is None else tuple(kept)[1]
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = compute, preprocess
            self._keeps_logits = False
        return output._replace(predictions=predictions)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _evaluated_dtype(self) -> Iterator[None]:
        """Converts the weights to the dtype of `bf16_full_eval` or `fp16_full_eval`, and restores them at the end.

        transformers does not restore them: later training steps and saved models would have the converted weights.
        """
        dtype = torch.float16 if self.args.fp16_full_eval else torch.bfloat16 if self.args.bf16_full_eval else None
        if dtype is None or self.is_in_train:
            yield
            return
        models: list[nn.Module] = [model for model in (self.model, self.averaged_model) if model is not None]
        modules = [module for model in models for module in model.modules()]
        held = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]
        data = [(tensor, tensor.data) for model in models for tensor in model.parameters()]
        try:
            for model in models:
                model.to(dtype=dtype, device=self.args.device)
            yield
        finally:
            for module, parameters, buffers in held:
                module._parameters.update(parameters)
                module._buffers.update(buffers)
            for parameter, values in data:
                parameter.data = values

    def _all_metrics(self, prediction: EvalPrediction, compute: Callable | None) -> dict[str, float]:
        """Metrics of the experts, updated with those that `compute` returns for the logits (images, classes)."""
        parts: Sequence = tuple(prediction.predictions) if self._keeps_logits else [prediction.predictions]
        counted = np.asarray(parts[0])
        metrics = self.expert_metrics(counted, np.asarray(prediction.label_ids))
        if compute is None:
            return metrics
        losses = counted[:, -1] if "loss" in self.args.include_for_metrics else None
        given = EvalPrediction(parts[1], prediction.label_ids, inputs=prediction.inputs, losses=losses)
        return metrics | compute(given)

    def expert_metrics(self, counted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Computes the loss and the accuracies of each expert, overall and by group, and sets `last_table`.

        Args:
            counted: Predicted class of each expert, and the loss in the last column; (images, experts + 1).
            labels: True classes; (images,).
        """
        classes, losses = counted[:, :-1].astype(np.int64), counted[:, -1]
        experts = [*self.experts, *(f"ema_{expert}" for expert in self.experts if self.averaged_model is not None)]
        accuracies = {
            expert: group_accuracies(classes[:, column], labels, self.groups) for column, expert in enumerate(experts)
        }
        counts = class_counts(labels, self.model.config.num_labels).tolist()
        self.last_table = ExpertTable("evaluation", accuracies, self.groups, counts)
        metrics = {"loss": float(losses.mean()), "accuracy": accuracies[next(iter(self.experts))]["overall"]}
        for expert, values in accuracies.items():
            metrics.update({f"{expert}_{group}": value for group, value in values.items() if not math.isnan(value)})
        return metrics
