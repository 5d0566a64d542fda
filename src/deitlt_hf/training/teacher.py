"""Trainer of the flat teacher: SGD with SAM and deferred re-weighting."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from ..data.transforms import TrainTransform
from ..losses import TEACHER_LOSSES
from .arguments import LongTailTrainingArguments
from .momentum_encoder import MomentumContrast
from .plan_lines import drw_start_text
from .schedule import warmup_drops
from .teacher_arguments import FlatTeacherTrainingArguments
from .trainer import LongTailTrainer

CONTRAST_FILE = "momentum_contrast.safetensors"


class FlatTeacherTrainer(LongTailTrainer):
    """Trains a flat teacher: cross entropy, LDAM, logit adjustment or PaCo, with deferred re-weighting, under SAM.

    SAM perturbs all weights within a radius that can change by phase of training (`sam_rho`, `sam_rho_epochs`), see
    [`SharpnessAwareTrainer`].

    PaCo uses two augmented views of each image. It compares an image with the images of its micro-batch, with their
    keys, and with a queue of keys of earlier batches from all processes. Both passes of SAM use the same keys.

    Args:
        model: A [`FlatTeacherForImageClassification`], or any image classifier.
        **kwargs: Parameters of [`LongTailTrainer`]. A given optimiser keeps its groups and learning rates, and is
            wrapped in SAM if `sam_rho` is not 0. A given SAM optimiser is used unchanged.

    Raises:
        ValueError: If the loss needs another classifier or projection.
    """

    arguments_class = FlatTeacherTrainingArguments
    experts = {"teacher": "logits"}
    args: FlatTeacherTrainingArguments

    def __init__(
        self, model: PreTrainedModel | None = None, args: FlatTeacherTrainingArguments | None = None, **kwargs: Any
    ) -> None:
        self.contrast: MomentumContrast | None = None  # before the parent's constructor, which calls `set_up_model`
        super().__init__(model=model, args=args, **kwargs)

    def check_model(self, model: PreTrainedModel) -> None:
        super().check_model(model)
        if self.given_train is not None:
            _check_heads(self.args.teacher_loss, model.config)

    def set_up_model(self, model: PreTrainedModel) -> None:
        super().set_up_model(model)
        args = self.args
        if self.given_train is not None and args.loss.logit_scale is not None:
            model.config.logit_scale = getattr(args, args.loss.logit_scale)
        if self.given_train is not None and args.loss.contrast:
            # On the device first: the encoder and its queue are created where the model is.
            on_device = model.to(args.device)  # type: ignore[arg-type]  # its decorator in transformers hides `self`
            self.contrast = MomentumContrast(on_device, args.paco_queue, args.paco_momentum)

    def train_views(self, args: LongTailTrainingArguments, processor: BaseImageProcessor) -> dict[str, TrainTransform]:
        views = super().train_views(args, processor)
        if self.args.loss.contrast:
            views["key_pixel_values"] = views["pixel_values"]  # the same transform, with other random draws
        return views

    def make_optimizer(self, model: PreTrainedModel) -> Optimizer:
        args, parameters = self.args, [*model.parameters()]
        if self.optimizer_cls_and_kwargs is None:
            return torch.optim.SGD(parameters, args.peak_learning_rate, args.momentum, weight_decay=args.weight_decay)
        optimizer_class, kwargs = self.optimizer_cls_and_kwargs
        group = {"params": parameters, "weight_decay": args.weight_decay}
        return optimizer_class([group], **{"lr": args.peak_learning_rate, **kwargs})

    @property
    def default_optimizer(self) -> str:
        return "SGD"

    def learning_rate_at(self, epoch: float, epochs: float) -> float:
        return warmup_drops(epoch, self.args) if self.args.lr_drop_epochs else super().learning_rate_at(epoch, epochs)

    def make_criterion(self, class_weights: torch.Tensor | None) -> nn.Module:
        return self.args.loss.build(self.args, self.class_counts, class_weights).to(self.args.device)

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds the keys of PaCo to the batch: those of the second views, and those of the queue."""
        if self.contrast is None:
            return batch
        # As the queries, whose forward pass the trainer runs under autocast.
        with self.accelerator.autocast():
            keys = self.contrast.encode(batch["key_pixel_values"])
        queued, queued_labels = self.contrast.queue()
        batch["keys"] = torch.cat([keys, queued])
        batch["key_labels"] = torch.cat([batch["labels"], queued_labels])
        return batch

    def _prepare_window(self) -> None:
        if self.contrast is None:
            return super()._prepare_window()
        # Once in an optimiser step, before any key is computed: both passes of SAM and all micro-batches then compare
        # with the same keys, as if the batch were not divided.
        self.contrast.follow(self.accelerator.unwrap_model(self.model))
        super()._prepare_window()
        for batch in self._window:
            del batch["key_pixel_values"]  # frees half of the images on the device
        # Own keys come first in `keys`. Queued only now: all micro-batches compare with the same queue.
        sizes = [len(batch["labels"]) for batch in self._window]
        keys = torch.cat([batch["keys"][:size] for batch, size in zip(self._window, sizes, strict=True)])
        labels = torch.cat([batch["labels"] for batch in self._window])
        # Every process keeps the keys of all, so that the queue is the same everywhere.
        self.contrast.enqueue(*self.accelerator.gather((keys, labels)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and in checkpoints also the momentum encoder and queue of PaCo."""
        super().save_model(output_dir, _internal_call)
        if self.contrast is not None and self._staging is not None and self.args.should_save:
            assert output_dir is not None  # the folder of a checkpoint
            save_file(self.contrast.state_dict(), Path(output_dir) / CONTRAST_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.contrast is not None and checkpoint is not None:
            self.contrast.load_state_dict(load_file(Path(checkpoint) / CONTRAST_FILE, str(self.args.device)))

    def loss_denominators(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        labels, weights = batch["labels"], self.drw_weights if self.in_drw else self.given_weights
        if weights is None:
            return torch.full((1,), float(len(labels)), device=labels.device)  # a copy from the host would wait
        return weights[labels].sum().unsqueeze(0)

    def compute_training_loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        outputs = model(pixel_values=batch["pixel_values"])
        if self.contrast is None:
            loss = self.active_criterion(outputs.logits.float(), batch["labels"])
        else:
            queries = F.normalize(outputs.projections.float(), dim=1)
            loss = self.active_criterion(outputs.logits, queries, batch["labels"], batch["keys"], batch["key_labels"])
        return loss / batch["denominators"][0]

    def plan(self) -> dict[str, str]:
        args = self.args
        lines = {"loss": args.teacher_loss}
        if args.drw_start_epoch is not None:
            lines["phases"] = f"re-weighted from epoch {drw_start_text(self)}"
        return lines


def _check_heads(loss: str, config: PreTrainedConfig) -> None:
    """Checks that a model has the classifier and the projection that a loss needs."""
    classifier, projection_size = getattr(config, "classifier", "linear"), getattr(config, "projection_size", 0)
    entry = TEACHER_LOSSES[loss]
    if classifier != entry.classifier:
        raise ValueError(f"teacher_loss {loss!r} needs a {entry.classifier} classifier, the model's is {classifier}.")
    if entry.contrast != (projection_size > 0):
        projected = " or ".join(repr(name) for name, other in TEACHER_LOSSES.items() if other.contrast)
        raise ValueError(
            f"teacher_loss {loss!r} with projection_size {projection_size}: {projected} needs a projection (32 for "
            "CIFAR, 128 for larger images), other losses must have none."
        )
