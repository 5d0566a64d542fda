"""Base class of the trainers that takes the two gradients of sharpness-aware minimisation (SAM) in a step."""

import contextlib
from abc import ABC
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..hub.card_facts import in_phases, optimizer_name
from .provenance import optimizer_record, without_wrapper
from .sam import SAM
from .schedule import value_in_phase
from .steps import WholeBatchTrainer


class SharpnessAwareTrainer(WholeBatchTrainer, ABC):
    """A [`WholeBatchTrainer`] that trains under [`SAM`] in the phases in which `args.sam_rho` is not 0.

    The perturbation follows the gradient of the whole batch, over all micro-batches and processes. With
    `sam_per_process`, each process perturbs along the gradient of its part of the batch. Batch-norm statistics and logs
    are updated in the unperturbed pass only. Both passes drop the same paths.

    A given optimiser is wrapped in SAM. A given SAM optimiser is used unchanged, with the rho of its groups.

    Attributes:
        rho_is_given: Whether the optimiser is a given SAM optimiser.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.optimizer is not None:
            self.optimizer = self._under_sam(self.optimizer)

    def check_accelerator(self) -> None:
        """Raises `ValueError` if gradients are sharded under SAM."""
        if max(self.args.sam_rho) > 0 and self.is_sharded:
            raise ValueError("SAM needs unsharded gradients; leave out DeepSpeed and FSDP, or set sam_rho to 0.")

    def make_optimizer(self, model: PreTrainedModel) -> Optimizer:
        """Creates the optimiser of the arguments, without SAM."""
        return super().create_optimizer(model)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = self._under_sam(self.make_optimizer(self.model if model is None else model))
        return self.optimizer

    def _under_sam(self, optimizer: Optimizer) -> Optimizer:
        """Wraps an optimiser in SAM if `sam_rho` is not 0 in every phase. A SAM optimiser is returned unchanged."""
        self.rho_is_given = isinstance(optimizer, SAM)
        if self.rho_is_given or max(self.args.sam_rho) == 0:
            return optimizer
        return SAM(optimizer, self.args.sam_rho[0], self.args.sam_adaptive)

    def optimizer_plan(self) -> str:
        """Name of the optimiser for the plan, with SAM's radius: the given one, or the one of the arguments."""
        if self.optimizer is not None:
            return optimizer_name(optimizer_record(self.optimizer))
        if self.optimizer_cls_and_kwargs is not None:
            name = getattr(self.optimizer_cls_and_kwargs[0], "__name__", "given")
        else:
            name = self.default_optimizer
        rho = in_phases(self.args.sam_rho, self.args.sam_rho_epochs)
        return f"{name}, SAM with rho {rho}" if max(self.args.sam_rho) > 0 else name

    @property
    def default_optimizer(self) -> str:
        """Name of the optimiser of the arguments."""
        return str(getattr(self.args.optim, "value", self.args.optim))

    @property
    def rho(self) -> float:
        """Radius of SAM in the current phase."""
        return value_in_phase(self.args.sam_rho, self.args.sam_rho_epochs, self.state.epoch or 0.0)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        optimizer = without_wrapper(self.optimizer)  # Accelerate's wrapper has no `ascend`
        if isinstance(optimizer, SAM) and not self.rho_is_given:
            # In every step: the radius follows from the epoch. A resumed run begins with that of the first phase.
            for group in optimizer.param_groups:
                group["rho"] = self.rho
        # A phase of radius 0 is the plain optimiser: no second gradient, half the cost.
        if not isinstance(optimizer, SAM) or all(group["rho"] == 0 for group in optimizer.param_groups):
            return super().training_step(model, inputs, num_items_in_batch)
        # First pass: gradients accumulate over the micro-batches. DDP averages them over the processes in the last one,
        # so that `ascend` sees the gradient of the whole batch, in every process the same.
        # With `sam_per_process`, each process ascends along its own gradient, as in Foret et al.; it saves a reduction.
        with self._gradients_stay(model, self.args.sam_per_process):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last micro-batch
            # A gradient scaler unscales only after both passes, when clipping or stepping: its scale is the same in
            # both, and does not change the direction of the ascent.
            optimizer.ascend()
            try:
                with _frozen_batch_norm_statistics(model), self.logs_unchanged():
                    self._perturbed_pass(model)
            finally:  # an interrupted step must not leave perturbed weights in the model
                optimizer.restore()
        return loss

    def _perturbed_pass(self, model: nn.Module) -> None:
        """Computes the gradient of the whole batch at the perturbed weights."""
        for index, batch in enumerate(self._window):
            self.seed_micro_batch(index)  # both passes drop the same paths
            # One reduction over processes, with the last micro-batch.
            with self._gradients_stay(model, index < len(self._window) - 1):
                with self.compute_loss_context_manager():
                    perturbed_loss = self.compute_loss(model, batch)
                self.accelerator.backward(perturbed_loss)  # does not divide: transformers gives it 1 accumulation step
            self.nonfinite_guard.note(perturbed_loss, self.state.global_step + 1)

    def _gradients_stay(self, model: nn.Module, stay: bool) -> contextlib.AbstractContextManager:
        """Context in which backward passes do not average gradients over processes, if `stay` is set."""
        return self.accelerator.no_sync(model) if stay else contextlib.nullcontext()


@contextlib.contextmanager
def _frozen_batch_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which batch norms normalise by the batch as in training, without updating their running averages.

    The saved model has the unperturbed weights, so its averages must not contain features of perturbed weights.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [layer.track_running_stats for layer in layers]
    for layer in layers:
        # Also freezes `num_batches_tracked`. Evaluation mode would normalise by the averages instead of by the batch.
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, tracked in zip(layers, tracking, strict=True):
            layer.track_running_stats = tracked
