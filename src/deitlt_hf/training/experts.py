"""Evaluation of several experts in one pass."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalPrediction

from ..data.long_tail import class_counts
from ..evaluation import ExpertTable, group_accuracies


class ExpertEvaluation:
    """The part of a [`~transformers.Trainer`] that counts what each expert of its model gets right.

    Attributes:
        experts: The logits of each expert in the model's output, by its name; the first is the model's prediction.
        groups: Class indices of head, mid and tail.
        averaged_model: A second model that is evaluated beside the first, or None.
        last_table: Accuracies of the last evaluation.
    """

    experts: Mapping[str, str] = {}
    groups: Mapping[str, Sequence[int]]
    averaged_model: PreTrainedModel | None
    last_table: ExpertTable

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predicted classes of each expert in place of logits, a few bytes an image, and the prediction's loss.

        The loss is a last column: as a mean of batches, as transformers takes it, it would count the images twice that
        fill up the last batches of several processes.
        """
        inputs = self._prepare_inputs(inputs)
        pixel_values, labels = inputs["pixel_values"], inputs["labels"]
        with self.compute_loss_context_manager():
            all_outputs = [model(pixel_values=pixel_values)]
            if self.averaged_model is not None:
                all_outputs.append(self.averaged_model(pixel_values=pixel_values))
        loss = F.cross_entropy(all_outputs[0].logits.float(), labels, reduction="none")
        columns = [outputs[field].argmax(dim=1) for outputs in all_outputs for field in self.experts.values()]
        return None, torch.stack([*columns, loss], dim=1), labels

    def evaluation_loop(self, *args, **kwargs):
        """As the parent's; the predictions are classes, (images, experts)."""
        output = super().evaluation_loop(*args, **kwargs)
        if output.predictions is None:
            return output
        return output._replace(predictions=output.predictions[:, :-1].astype(np.int64))

    def expert_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Loss and accuracies of each expert, overall and by group; they make the table too."""
        classes, losses = prediction.predictions[:, :-1].astype(np.int64), prediction.predictions[:, -1]
        labels = prediction.label_ids
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
