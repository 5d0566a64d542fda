"""Base class of the trainers that defines an optimiser step: its batch, random numbers, learning rate and logs."""

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NoReturn

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from ..data.images import ImageDataset
from ..data.sampling import seed_streams
from ..data.streaming import StreamedImages
from ..data.transforms import TrainTransform
from ..losses import effective_number_weights
from ..losses.class_weights import named_weights, product_of_weights
from .guards import NonFiniteGuard, SaveByMinutes, StopOnSignal, Voter
from .inputs import train_loader
from .schedule import published_epoch, warmup_cosine
from .whole_checkpoints import WholeCheckpointTrainer

# Settings of parameter groups that the arguments set, in addition to the learning rate.
_SET_BY_ARGUMENTS = {"weight_decay", "betas", "eps", "momentum", "rho"}


class WholeBatchTrainer(WholeCheckpointTrainer, ABC):
    """A [`~transformers.Trainer`] whose loss is normalised over the whole batch of an optimiser step.

    The batch consists of micro-batches, over all processes. Random numbers depend only on seed, step, micro-batch and
    process. The learning rate follows the schedule of the method, unless a scheduler is given. `views` are the training
    transforms, by the name of the model input that each creates.

    Attributes:
        given: Which of "optimizer" and "scheduler" were passed in.
        nonfinite_guard, stop_signal, voters: Callbacks, which the subclass adds; `stop_signal` is one of the voters.
        class_counts: Training images of each class, which the subclass counts; None without training images.
        class_names: Names of the classes in label order, which the subclass reads.
        given_weights, drw_weights: Class weights before and after the start of DRW, (classes,). The first are None
            without `class_weights`.
        waited: Seconds that the training loop has waited for batches.
    """

    train_dataset: ImageDataset | StreamedImages | None
    class_counts: list[int] | None
    class_names: list[str]
    given_weights: torch.Tensor | None
    drw_weights: torch.Tensor

    def __init__(
        self,
        *,
        views: Mapping[str, TrainTransform],
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            compute_loss_func=self.compute_training_loss,  # without it, the parent divides by accumulation
            **kwargs,
        )
        given = {"optimizer": optimizers[0] or optimizer_cls_and_kwargs, "scheduler": optimizers[1]}
        self.given = tuple(name for name, value in given.items() if value is not None)
        self.views = views
        self.nonfinite_guard, self.stop_signal = NonFiniteGuard(self), StopOnSignal()
        self.voters: list[Voter] = [self.stop_signal, *([SaveByMinutes()] if self.args.save_minutes else [])]
        self._window: list[dict[str, Any]] = []  # micro-batches of the current optimiser step
        self._micro_batch = 0  # index of the current one
        self.prepared_micro_batch = 0  # index of the one that `prepare_batch` changes
        self.waited = 0.0
        self._logged: dict[str, torch.Tensor] = {}
        self._steps_logged = 0

    # ---- For subclasses ----

    @abstractmethod
    def make_criterion(self, class_weights: torch.Tensor | None) -> nn.Module:
        """Creates the loss of a phase, with its class weights, (classes,), or without weights."""

    @abstractmethod
    def compute_training_loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Computes the loss of one micro-batch: sums over its images, divided by `batch["denominators"]`.

        The losses of all micro-batches and processes then add up to the weighted mean over the whole batch. (A mean of
        the micro-batches' weighted means would be another loss: each would be divided by its own sum of weights.)
        """

    @abstractmethod
    def loss_denominators(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Computes the contribution of a micro-batch to the denominators of the loss."""

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Hook that changes a batch on its device before the loss is computed, for example by mixing."""
        return batch

    def learning_rate_at(self, epoch: float, epochs: float) -> float:
        """Learning rate at a (fractional) epoch of a run of `epochs`."""
        return warmup_cosine(epoch, epochs, self.args)

    # ---- Losses of the phases ----

    def make_losses(self) -> None:
        """Creates weights (of mean 1) and losses of both phases: `class_weights`, then these times those of DRW."""
        if self.train_dataset is not None:
            assert self.class_counts is not None  # known whenever training images are given
            args, given = self.args, named_weights(self.args.class_weights, self.class_names)
            self.given_weights = None if given is None else given.to(args.device)
            weights = product_of_weights(effective_number_weights(self.class_counts, args.drw_beta), given)
            self.drw_weights = weights.to(args.device)
            self.criterion = self.make_criterion(self.given_weights)
            self.drw_criterion = self.make_criterion(self.drw_weights)

    @property
    def in_drw(self) -> bool:
        """Whether training is in the phase of deferred re-weighting."""
        start = self.args.drw_start_epoch
        return start is not None and (self.state.epoch or 0.0) >= start

    @property
    def active_criterion(self) -> nn.Module:
        """The loss of the current phase."""
        return self.drw_criterion if self.in_drw else self.criterion

    # ---- Steps ----

    def get_train_dataloader(self) -> DataLoader:
        """Data loader of this process's training batches, see [`train_loader`]."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset.")
        return train_loader(self.train_dataset, self.args, self.data_collator)

    def seed_micro_batch(self, index: int, purpose: int = 0) -> None:
        """Seeds the random streams of a micro-batch of the next optimiser step, for dropped paths (0) or mixing (1).

        The seeds depend only on seed, step, micro-batch and process: a resumed run draws the same numbers whatever was
        drawn before, and both passes of SAM drop the same paths.
        """
        # With `purpose`: from one stream, the same numbers would choose the mix and the dropped paths.
        key = (self.args.seed, self.state.global_step, index, self.args.process_index, purpose)
        seed_streams(*key, device=self.args.device)

    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        # A loader starts no worker before it is iterated, so one that is made for its length costs nothing.
        return math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)

    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        args = self.args
        return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.steps_per_epoch())

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        started = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))  # the parent's method also synchronises the device
        self.waited += time.perf_counter() - started
        self._window, self._micro_batch = batches, 0
        # Here, because only here transformers has all micro-batches of a step before its first forward pass.
        if batches:
            self._prepare_window()
        return batches, None  # no number of items: `denominators` normalises the loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        self.seed_micro_batch(self._micro_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.nonfinite_guard.note(loss, self.state.global_step + 1)  # the counter has finished steps only
        self._micro_batch += 1
        # The logged loss is without this factor of `compute_loss`, which only the gradient needs.
        return self._finite(loss) / self._window_weight

    def _finite(self, value: torch.Tensor) -> torch.Tensor:
        """Replaces values that are not finite by 0 if updates may be skipped, for the means in the logs."""
        # One NaN would spoil the mean of a whole log interval; an `if` would wait for the device.
        return torch.where(value.isfinite(), value, 0.0) if self.args.on_nonfinite == "skip" else value

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        # DistributedDataParallel averages gradients over processes, but the loss is normalised for a sum. Nothing
        # divides by the micro-batches: transformers does not with `compute_loss_func`, and gives Accelerate 1 of them.
        return self.compute_training_loss(model, inputs) * self.accelerator.num_processes * self._window_weight

    @property
    def _window_weight(self) -> float:
        """Factor of the gradient in a step with fewer micro-batches. The authors divide by those of a full step."""
        if self.args.loss_normalization == "global":
            return 1.0
        return len(self._window) / self.args.gradient_accumulation_steps

    def training_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Moves a batch of the data loader to the device, normalises its images and prepares it for the loss."""
        # Asynchronous; the copy in transformers waits for the device.
        inputs = send_to_device(dict(batch), self.args.device, non_blocking=True)
        for name, view in self.views.items():
            if inputs[name].dtype == torch.uint8:  # other data loaders may return normalised images
                inputs[name] = view.finish(inputs[name])
        return self.prepare_batch(inputs)

    def _prepare_window(self) -> None:
        """Prepares all micro-batches of an optimiser step, and sets the denominators of the whole batch in each.

        All must be prepared before the first backward pass: with DRW the denominator is the sum of the class weights of
        the labels that the teacher predicts, which is not known from the number of images.
        """
        for index, batch in enumerate(self._window):
            self.seed_micro_batch(index, purpose=1)
            self.prepared_micro_batch = index
            batch.update(self.training_batch(batch))  # in place: the loop of transformers has this object
        own = torch.stack([self.loss_denominators(batch) for batch in self._window])
        # One reduction for denominators and votes: each reduction costs a round trip.
        total = torch.cat([own.sum(dim=0), *(voter.vote(own.device) for voter in self.voters)])
        total, votes = self.accelerator.reduce(total, "sum").split([own.shape[1], len(self.voters)])
        # A single process acts on its own vote at once, see `Voter.decided`.
        if self.accelerator.num_processes > 1:
            for voter, number in zip(self.voters, votes, strict=True):
                voter.count(number)
        micro_batches = len(self._window) * self.accelerator.num_processes
        for batch, denominators in zip(self._window, own, strict=True):
            # per_process: the mean of each micro-batch, averaged over all micro-batches and processes.
            is_global = self.args.loss_normalization == "global"
            batch["denominators"] = total if is_global else denominators * micro_batches
        self._steps_logged += 1

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Creates the learning-rate schedule of the method, a function of the epoch that is updated at every step."""
        if self.lr_scheduler is None:
            micro_batches, batches = self.args.gradient_accumulation_steps, len(self.get_train_dataloader())
            steps_per_epoch = self.steps_per_epoch()
            # Not `num_train_epochs`: with `max_steps`, too, the cosine ends at the last step.
            epochs = num_training_steps / steps_per_epoch

            def epoch_of(step: int) -> float:
                if self.args.as_published:
                    return published_epoch(step, batches, micro_batches)
                return step / steps_per_epoch

            optimizer = optimizer or self.optimizer
            assert optimizer is not None  # created before
            # A factor instead of a rate, for the initial rate of each group: layer decay, or a given optimiser.
            self.lr_scheduler = LambdaLR(
                optimizer,
                lambda step: self.learning_rate_at(epoch_of(step), epochs) / self.args.peak_learning_rate,
            )
            self._created_lr_scheduler = True  # otherwise a second `train()` would continue with this schedule
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        assert optimizer is not None  # both are created before
        assert scheduler is not None
        # Read before the state is loaded, which replaces groups and base rates.
        wanted = [{name: group[name] for name in _SET_BY_ARGUMENTS & group.keys()} for group in optimizer.param_groups]
        rates = list(getattr(scheduler, "base_lrs", ()))  # a given ReduceLROnPlateau has none
        super()._load_optimizer_and_scheduler(checkpoint)
        # `load_state_dict` also restores the hyperparameters of the groups, but the current arguments override them.
        for group, values in zip(optimizer.param_groups, wanted, strict=True):
            group.update(values)
        if "scheduler" in self.given or scheduler.base_lrs == rates:
            return
        # Another learning rate was requested: rescale the schedule at the step of the checkpoint.
        scheduler.base_lrs = rates
        for group, rate, factor in zip(optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = rate  # from which the record takes the peak (`optimizer_record`)
            group["lr"] = rate * factor(scheduler.last_epoch)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # With `save_total_limit`, checkpoints with NaN would push out the good ones.
        self.nonfinite_guard.check()
        super()._save_checkpoint(model, trial)

    def was_asked_to_stop(self) -> bool:
        """Whether any process received SIGTERM or SIGINT in training, including after its last step."""
        return bool(self.accelerator.reduce(self.stop_signal.vote(self.args.device), "sum").item() > 0)

    def end_on_signal(self, text: str) -> NoReturn:
        """Prints how the run ended, and ends the process as its signal normally does."""
        if self.is_world_process_zero():
            print(text, flush=True)
        # A launcher kills the other processes as soon as one has ended: the main process may still be writing.
        self.accelerator.wait_for_everyone()
        self.stop_signal.end()

    def end_workers(self) -> None:
        """Ends the worker processes of the data loaders.

        Left to garbage collection, which has no fixed order, each would take 5 seconds.
        """
        self.callback_handler.train_dataloader = self.callback_handler.eval_dataloader = None
        self.__dict__.get("_eval_dataloaders", {}).clear()
        self.accelerator._dataloaders.clear()  # `free_memory` would also drop the model

    # ---- Logging ----

    def log_sum(self, name: str, value: torch.Tensor) -> None:
        """Logs the sum over the batch of an optimiser step, of which `value` is the part of one micro-batch."""
        self._log_part(name, value.detach() * self.accelerator.num_processes)  # the log averages over processes

    def log_mean(self, name: str, value: torch.Tensor) -> None:
        """Logs the mean over the micro-batches of an optimiser step, of which `value` is that of one micro-batch."""
        self._log_part(name, value.detach() / len(self._window))

    def _log_part(self, name: str, value: torch.Tensor) -> None:
        """Adds a value to a logged quantity: summed over micro-batches, averaged over processes and steps."""
        self._logged[name] = self._logged.get(name, 0.0) + self._finite(value)

    @contextlib.contextmanager
    def logs_unchanged(self) -> Iterator[None]:
        """Context in which `log_sum` and `log_mean` have no effect: a second pass over the same batch."""
        logged = self._logged.copy()
        try:
            yield
        finally:
            self._logged = logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.nonfinite_guard.check()  # a log waits for the device anyway
            logs = {**logs, **self.logged_means(over_processes=True)}
            self._logged.clear()
            self._steps_logged = 0
            if self.nonfinite_guard.skipped:
                logs["skipped_steps"] = self.nonfinite_guard.skipped
        super().log(logs, start_time)

    def logged_means(self, over_processes: bool = False) -> dict[str, float]:
        """Means per step of the values passed to `log_sum` and `log_mean` since the last log."""
        if not self._logged:
            return {}
        # One tensor: one reduction and one wait for the device, whatever the number of values.
        means = torch.stack(list(self._logged.values())) / self._steps_logged
        if over_processes:
            means = self.accelerator.reduce(means, "mean")
        return dict(zip(self._logged, means.tolist(), strict=True))
