"""Trainer of the flat teacher: SGD with SAM and deferred re-weighting."""

import bisect
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from ..hub.card_facts import in_phases
from ..losses import TEACHER_LOSSES
from .arguments import FlatTeacherTrainingArguments
from .momentum_encoder import MomentumContrast
from .plan_lines import drw_start
from .provenance import without_wrapper
from .sam import SAM
from .schedule import warmup_drops
from .trainer import LongTailTrainer

CONTRAST_FILE = "momentum_contrast.safetensors"


class FlatTeacherTrainer(LongTailTrainer):
    """Trains a flat teacher: cross entropy, LDAM, logit adjustment or PaCo, with deferred re-weighting, under SAM.

    SAM perturbs all weights within a radius that can change by phase of training (`sam_rho`, `sam_rho_epochs`). The
    perturbation follows the gradient of the whole batch, over all micro-batches and processes. With `sam_per_process`,
    each process perturbs along the gradient of its part of the batch. Batch-norm statistics are updated in the
    unperturbed pass only.

    PaCo uses two augmented views of each image. It compares an image with the images of its micro-batch, with their
    keys, and with a queue of keys of earlier batches from all processes. Both passes of SAM use the same keys.

    Args:
        model: A [`FlatTeacherForImageClassification`], or any image classifier.
        args: A [`FlatTeacherTrainingArguments`].
        **kwargs: Parameters of [`LongTailTrainer`]. A given optimiser keeps its groups and learning rates, and is
            wrapped in SAM if `sam_rho` is not 0. A given SAM optimiser is used unchanged.

    Raises:
        ValueError: If the loss needs another classifier or projection.
    """

    arguments_class = FlatTeacherTrainingArguments
    experts = {"teacher": "logits"}
    args: FlatTeacherTrainingArguments

    def __init__(self, model=None, args: FlatTeacherTrainingArguments | None = None, **kwargs):
        self.contrast: MomentumContrast | None = None
        super().__init__(model=model, args=args, **kwargs)
        if self.optimizer is not None:
            self.optimizer = self._under_sam(self.optimizer)

    def check_model(self, model):
        """Checks the model as the parent class does, and that its heads fit the loss."""
        super().check_model(model)
        if self._datasets[0] is not None:
            _check_heads(self.args.teacher_loss, model.config)

    def check_accelerator(self):
        super().check_accelerator()
        if max(self.args.sam_rho) > 0 and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError("SAM needs unsharded gradients; leave out DeepSpeed and FSDP, or set sam_rho to 0.")

    def set_up_model(self, model):
        """Changes the model as the parent class does, and creates the momentum encoder of PaCo."""
        super().set_up_model(model)
        args = self.args
        if self._datasets[0] is not None and args.loss.logit_scale is not None:
            model.config.logit_scale = getattr(args, args.loss.logit_scale)
        if self._datasets[0] is not None and args.loss.contrast:
            self.contrast = MomentumContrast(model.to(args.device), args.paco_queue, args.paco_momentum)

    def train_views(self, args, processor):
        views = super().train_views(args, processor)
        if args.loss.contrast:
            views["key_pixel_values"] = views["pixel_values"]
        return views

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            args, parameters = self.args, [*(model or self.model).parameters()]
            optimizer: Optimizer
            if self.optimizer_cls_and_kwargs is None:
                optimizer = torch.optim.SGD(
                    parameters, args.peak_learning_rate, args.momentum, weight_decay=args.weight_decay
                )
            else:
                optimizer_class, kwargs = self.optimizer_cls_and_kwargs
                group = {"params": parameters, "weight_decay": args.weight_decay}
                optimizer = optimizer_class([group], **{"lr": args.peak_learning_rate, **kwargs})
            self.optimizer = self._under_sam(optimizer)
        return self.optimizer

    def _under_sam(self, optimizer: Optimizer) -> Optimizer:
        """Wraps an optimiser in SAM if `sam_rho` is not 0. A SAM optimiser is returned unchanged."""
        self._has_own_rho = isinstance(optimizer, SAM)
        if self._has_own_rho or max(self.args.sam_rho) == 0:
            return optimizer
        return SAM(optimizer, self.args.sam_rho[0], self.args.sam_adaptive)

    def optimizer_plan(self):
        if self.optimizer is not None:
            return super().optimizer_plan()
        name = "SGD" if self.optimizer_cls_and_kwargs is None else super().optimizer_plan()
        rho = in_phases(self.args.sam_rho, self.args.sam_rho_epochs)
        return f"{name}, SAM with rho {rho}" if max(self.args.sam_rho) > 0 else name

    @property
    def rho(self) -> float:
        """Radius of SAM in the current phase."""
        phase = bisect.bisect_right(self.args.sam_rho_epochs, self.state.epoch or 0.0)
        return self.args.sam_rho[phase - 1]

    def learning_rate_at(self, epoch: float, epochs: float) -> float:
        args = self.args
        if not args.lr_drop_epochs:
            return super().learning_rate_at(epoch, epochs)
        return warmup_drops(
            epoch,
            peak=args.peak_learning_rate,
            drop_epochs=args.lr_drop_epochs,
            factors=args.lr_drops,
            warmup_epochs=args.warmup_epochs,
            warmup_start=args.warmup_learning_rate,
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        optimizer = without_wrapper(self.optimizer)
        if isinstance(optimizer, SAM) and not self._has_own_rho:
            for group in optimizer.param_groups:
                group["rho"] = self.rho
        if not isinstance(optimizer, SAM) or all(group["rho"] == 0 for group in optimizer.param_groups):
            return super().training_step(model, inputs, num_items_in_batch)
        with self._gradients_stay(model, self.args.sam_per_process):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            optimizer.ascend()
            try:
                with _frozen_batch_norm_statistics(model):
                    for index, batch in enumerate(self._window):
                        self.seed_micro_batch(index)  # both passes drop the same paths
                        # One reduction over processes, with the last micro-batch.
                        with self._gradients_stay(model, index < len(self._window) - 1):
                            with self.compute_loss_context_manager():
                                perturbed_loss = self.compute_loss(model, batch)
                            self.accelerator.backward(perturbed_loss)
                        self.nonfinite_guard.note(perturbed_loss, self.state.global_step + 1)
            finally:  # an interrupted step must not leave perturbed weights in the model
                optimizer.restore()
        return loss

    def _gradients_stay(self, model: nn.Module, stay: bool) -> contextlib.AbstractContextManager:
        """Context in which backward passes do not average gradients over processes, if `stay` is set."""
        return self.accelerator.no_sync(model) if stay else contextlib.nullcontext()

    def make_criterion(self, class_weights: torch.Tensor | None) -> nn.Module:
        return self.args.loss.build(self.args, self.class_counts, class_weights).to(self.args.device)

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds the keys of PaCo to the batch: those of the second views, and those of the queue."""
        if self.contrast is None:
            return batch
        with self.accelerator.autocast():
            keys = self.contrast.encode(batch["key_pixel_values"])
        queued, queued_labels = self.contrast.queue()
        batch["keys"] = torch.cat([keys, queued])
        batch["key_labels"] = torch.cat([batch["labels"], queued_labels])
        return batch

    def _prepare_window(self) -> None:
        if self.contrast is None:
            return super()._prepare_window()
        self.contrast.follow(self.accelerator.unwrap_model(self.model))
        super()._prepare_window()
        for batch in self._window:
            del batch["key_pixel_values"]
        sizes = [len(batch["labels"]) for batch in self._window]
        keys = torch.cat([batch["keys"][:size] for batch, size in zip(self._window, sizes, strict=True)])
        labels = torch.cat([batch["labels"] for batch in self._window])
        self.contrast.enqueue(*self.accelerator.gather((keys, labels)))

    def save_model(self, output_dir=None, _internal_call=False):
        """Saves the model, and in checkpoints also the momentum encoder and queue of PaCo."""
        super().save_model(output_dir, _internal_call)
        if self.contrast is not None and self._staging is not None and self.args.should_save:
            save_file(self.contrast.state_dict(), Path(output_dir) / CONTRAST_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.contrast is not None and checkpoint is not None:
            self.contrast.load_state_dict(load_file(Path(checkpoint) / CONTRAST_FILE, str(self.args.device)))

    def loss_denominators(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        labels = batch["labels"]
        if not self.in_drw:
            return torch.full((1,), float(len(labels)), device=labels.device)
        return self.drw_weights[labels].sum().unsqueeze(0)

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
            lines["phases"] = f"re-weighted from epoch {drw_start(self)}"
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


@contextlib.contextmanager
def _frozen_batch_norm_statistics(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [layer.track_running_stats for layer in layers]
    for layer in layers:
        layer.track_running_stats = False  # freezes the statistics and `num_batches_tracked`
    try:
        yield
    finally:
        for layer, tracked in zip(layers, tracking, strict=True):
            layer.track_running_stats = tracked
