"""Base class of the trainers of students and teachers."""

import contextlib
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import broadcast, send_to_device
from datasets import Dataset, IterableDataset
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, GreedyLR, PreTrainedModel, PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_utils import TrainOutput

from ..console import show
from ..data.images import ImageCollator
from ..data.loading import images_hash, subset_hash, training_counts
from ..data.long_tail import Integers, shot_groups
from ..data.sampling import Rows, SeededImages, TrainBatches, seed_streams
from ..data.streaming import StreamedImages
from ..data.transforms import TrainTransform, model_processor, train_transform
from ..hub.card_facts import optimizer_name
from ..hub.cards import write_card
from ..losses import effective_number_weights
from ..records import RESULTS_FILE
from .arguments import LongTailTrainingArguments
from .checkpoints import WholeCheckpointTrainer, newest_checkpoint, of_first_process, read_state, whole_checkpoint
from .ema import EMA_FOLDER, MovingAverage
from .experts import ExpertEvaluation
from .guards import NonFiniteGuard, StopOnSignal, outlive_signals
from .inherited import check_parameters
from .inputs import as_images, match_labels, outliving
from .memory import keep_freed_memory
from .output_folder import check_output_dir, claim_output_dir, goes_on_in, run_lock
from .provenance import WhatRan, optimizer_record
from .publishing import PublishingTrainer
from .results import Results, print_plan
from .resuming import (
    Beginning,
    BeginRun,
    EpochOrder,
    MissedEvaluation,
    check_same_run,
    former_records,
    steps_per_epoch,
)
from .run_log import RunFile, RunLog
from .schedule import published_epoch, warmup_cosine

# Settings of parameter groups that the arguments set, in addition to the learning rate.
_SET_BY_ARGUMENTS = {"weight_decay", "betas", "eps", "momentum", "rho"}


class LongTailTrainer(ExpertEvaluation, PublishingTrainer, WholeCheckpointTrainer, ABC):
    """A [`~transformers.Trainer`] for classifiers of long-tailed images.

    Differences from its parent:
    - data sets are `datasets.Dataset`s with an image and a `ClassLabel` column; the trainer makes the transforms;
    - losses are normalised over the whole batch of an optimiser step, for any number of micro-batches and processes;
    - the order of images, augmentation, mixing and dropped paths depend only on seed, epoch and step: an interrupted
      run that is resumed ends with the same result as an uninterrupted one;
    - a loss that is not finite stops the run before a checkpoint is written; SIGTERM and Ctrl-C stop it after one;
    - a resumed run must have the same classes, images, model and loss as before; resuming a finished run does nothing;
    - every evaluation reports head, medium and tail classes for each expert, as metrics, as a table and in
      `results.json`, with separate entries for the last and the best epoch; every log is also a line of `log.jsonl`;
    - `ema_decay` keeps a moving average of the weights, which is evaluated with the model and saved in `ema`;
    - a folder that holds another run is not written to;
    - `push_to_hub` in the arguments pushes the finished model in one commit; checkpoints stay in the folder;
    - trained models have float32 weights, also if they were loaded in another dtype, and an evaluation does not change
      the weights.

    Args:
        model: The model to train. If its labels have no names, it takes the names from the data.
        args: Training arguments.
        train_dataset: Training images, or a [`StreamedSplit`] of training images. Not needed for evaluation only.
        eval_dataset: Test images, or a mapping from names to several test sets. `results.json` and checks use the first
            set.
        processing_class: Image processor for evaluation; by default created from the model's image size.
        groups: Class indices of head, medium and tail classes; by default those of [`shot_groups`].
        model_init: Function that creates the model, instead of `model`. Each call of `train` then starts with a new
            model, as `hyperparameter_search` requires.
        optimizers: An optimiser of the model's parameters or None, and its scheduler or None. None as scheduler uses
            the schedule of the method, scaled to the learning rates of the optimiser.
        **kwargs: Parameters of [`~transformers.Trainer`]. Metrics of `compute_metrics` are added to the trainer's
            metrics.

    Raises:
        ValueError: If data, model and optimiser do not match, or a parameter has no effect (`inherited.py`).
    """

    arguments_class: type[LongTailTrainingArguments] = LongTailTrainingArguments
    groups: Mapping[str, list[int]]
    group_rule: str
    train_dataset: Rows | StreamedImages | None
    eval_dataset: Rows | dict[str, Rows] | None
    _given: tuple[str, ...] = ()  # which of "optimizer" and "scheduler" were passed in

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: LongTailTrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: BaseImageProcessor | None = None,
        groups: Mapping[str, Integers] | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        **kwargs,
    ):
        check_parameters(kwargs)
        for name in ("data_collator", "compute_loss_func"):
            kwargs.pop(name, None)
        if (model is None) == (model_init is None):
            raise ValueError("give either a model or model_init.")
        if not isinstance(args, self.arguments_class):
            raise ValueError(f"args must be {self.arguments_class.__name__}, got {type(args).__name__}.")
        if args.include_for_metrics and kwargs.get("compute_metrics") is None:
            raise ValueError(f"include_for_metrics {args.include_for_metrics} has no effect without compute_metrics.")
        self.args = args.settle()
        if model_init is not None:
            self.model_init = model_init
        self._datasets = (train_dataset, eval_dataset)
        self.class_counts: list[int] | None = None
        self.subset_sha256: str | None = None
        self.images_sha256: str | None = None  # computed when training starts
        self._wanted_groups = groups
        if model is None:
            set_seed(args.seed)
            model = self.call_model_init()
        else:
            model = self.prepare_model(model)
        if processing_class is None:
            processing_class = model_processor(model.config, args.image_resize)
        self._take_optimizers(model, model_init is not None, *optimizers, kwargs.get("optimizer_cls_and_kwargs"))

        self.views = {} if train_dataset is None else self.train_views(args, processing_class)
        collator = ImageCollator(processing_class)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=as_images(train_dataset, collator.background, self.views, args),
            eval_dataset=as_images(eval_dataset, collator.background),
            processing_class=processing_class,
            optimizers=optimizers,
            compute_loss_func=self.compute_training_loss,  # without it, the parent divides by accumulation
            **kwargs,
        )
        if model_init is not None:  # not passed to the parent, which would create another model
            self.model_init = model_init
        if self.args.ema_decay is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError("a moving average needs unsharded weights; leave out DeepSpeed and FSDP, or ema_decay.")
        if (self.args.bf16_full_eval or self.args.fp16_full_eval) and (
            self.is_deepspeed_enabled or self.is_fsdp_enabled
        ):
            raise ValueError("bf16_full_eval and fp16_full_eval need unsharded weights; leave out DeepSpeed and FSDP.")
        if self.args.keep_freed_memory and self.args.device.type == "cpu":
            keep_freed_memory()
        self.results = Results(self.args.output_dir)
        for kind in (PrinterCallback, ProgressCallback):
            self.remove_callback(kind)
        self.add_callback(BeginRun(self))
        self.add_callback(RunLog())
        self.add_callback(EpochOrder())
        self.add_callback(WhatRan(self))
        self.run_file = RunFile(self.args.output_dir, self.args.drw_start_epoch)
        self.nonfinite_guard, self.stop_signal = NonFiniteGuard(self), StopOnSignal()
        decay = self.args.ema_decay
        self.ema = None if decay is None else MovingAverage(decay, bool(self.args.ema_every_micro_batch))
        self._check_best_metric()
        for callback in (self.run_file, self.nonfinite_guard, self.stop_signal, self.ema, MissedEvaluation(self)):
            if callback is not None:
                self.add_callback(callback)
        self.resumed_from: str | None = None
        self.beginning = Beginning()
        self._plan: dict[str, str] = {}
        self._resuming = False
        self.run_dir = self.args.output_dir
        self.make_losses()
        self._window: list[dict[str, Any]] = []
        self._micro_batch = 0
        self._logged: dict[str, torch.Tensor] = {}
        self._steps_logged = 0
        self._recording = False

    def prepare_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """Prepares a model for training: float32 weights, class names and class counts from the data.

        Returns:
            The same model, or another model that shares its parameters.

        Raises:
            ValueError: If the classes differ from those of the data, or the model solves another problem.
        """
        train_dataset, eval_dataset = self._datasets
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            if dataset is not None:
                match_labels(model.config, dataset)
        if train_dataset is None:
            self.class_counts = getattr(model.config, "class_counts", None)
        elif self.class_counts is None:
            self.class_counts, self.subset_sha256 = training_counts(train_dataset).tolist(), subset_hash(train_dataset)
        groups = self._wanted_groups
        if groups is None:
            if self.class_counts is None:
                raise ValueError("without a train_dataset or class_counts in the model's config, pass groups.")
            groups = shot_groups(self.class_counts)
        self.group_rule = getattr(groups, "rule", "as given")
        self.groups = {name: np.asarray(group, dtype=np.int64).tolist() for name, group in groups.items()}
        if train_dataset is not None:
            model.config.class_counts, model.config.class_groups = self.class_counts, self.groups
            model.config.return_dict = True
            model.float()  # transformers 5 loads the dtype of the file; half precision loses small updates
            # Versions before transformers 5.23 know this name only; newer versions still accept it.
            if self.args.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
                raise ValueError(
                    f"a {type(model).__name__} cannot checkpoint activations; leave out gradient_checkpointing."
                )
        return model

    def call_model_init(self, trial=None):
        return self.prepare_model(super().call_model_init(trial))  # type: ignore[arg-type]

    def _take_optimizers(
        self, model: PreTrainedModel, makes_models: bool, optimizer, scheduler, optimizer_cls_and_kwargs
    ) -> None:
        """Checks that a given optimiser and scheduler match the model and each other, and records which are given.

        Raises:
            ValueError: If they do not belong to the model, or not to each other.
        """
        if optimizer_cls_and_kwargs is not None and optimizer is not None:
            raise ValueError("give optimizers or optimizer_cls_and_kwargs, not both.")
        if makes_models and (optimizer is not None or scheduler is not None):
            raise ValueError("optimizers belong to one model; with model_init, pass optimizer_cls_and_kwargs.")
        if scheduler is not None and (
            optimizer is None or scheduler.optimizer.param_groups is not optimizer.param_groups
        ):
            raise ValueError("the scheduler in optimizers must belong to the optimizer that is passed with it.")
        if isinstance(scheduler, ReduceLROnPlateau | GreedyLR) and self.args.metric_for_best_model is None:
            raise ValueError(f"a {type(scheduler).__name__} needs a metric to follow; set metric_for_best_model.")
        if optimizer is not None:
            own = {id(parameter) for parameter in model.parameters()}
            if not all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                raise ValueError(
                    "the optimizer has parameters that are not the model's; create it from model.parameters()."
                )
        given = {"optimizer": optimizer or optimizer_cls_and_kwargs, "scheduler": scheduler}
        self._given = tuple(name for name, value in given.items() if value is not None)

    def make_losses(self) -> None:
        """Creates the class weights and the losses of both phases from the arguments."""
        if self._datasets[0] is not None:
            assert self.class_counts is not None  # counted in `prepare_model`
            self.drw_weights = effective_number_weights(self.class_counts, self.args.drw_beta).to(self.args.device)
            self.criterion, self.drw_criterion = self.make_criterion(None), self.make_criterion(self.drw_weights)

    def _hp_search_setup(self, trial):
        """Applies the values of a trial, and recreates everything that depends on the arguments."""
        super()._hp_search_setup(trial)
        if trial is None or self.hp_search_backend is None:
            return
        self.args.settle()
        self.views = self.train_views(self.args, self.processing_class)
        background = self.data_collator.background
        self.train_dataset = as_images(self._datasets[0], background, self.views, self.args)
        self.make_losses()

    def _check_best_metric(self) -> None:
        """Checks that evaluations measure `metric_for_best_model`.

        Raises:
            ValueError: If they do not.
        """
        wanted = self.args.metric_for_best_model
        if wanted is None or self.eval_dataset is None or self.compute_metrics is not None:
            return
        experts = [*self.experts, *(f"ema_{expert}" for expert in self.experts if self.ema is not None)]
        known = [
            "loss",
            "accuracy",
            *(f"{expert}_{group}" for expert in experts for group in ("overall", *self.groups)),
        ]
        if isinstance(self.eval_dataset, dict):
            known = [f"{name}_{metric}" for name in self.eval_dataset for metric in known]
        if wanted.removeprefix("eval_") not in known:
            raise ValueError(f"metric_for_best_model {wanted!r} is not measured; choose one of {', '.join(known)}.")

    # ---- For subclasses ----

    @abstractmethod
    def make_criterion(self, class_weights: torch.Tensor | None) -> nn.Module:
        """Creates the loss, with the class weights of the DRW phase or without weights."""

    @abstractmethod
    def compute_training_loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Computes the loss of one micro-batch: sums over its images, divided by `batch["denominators"]`."""

    @abstractmethod
    def loss_denominators(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Computes the contribution of a micro-batch to the denominators of the loss."""

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Hook that changes a batch on its device before the loss is computed, for example by mixing."""
        return batch

    def train_views(self, args: LongTailTrainingArguments, processor) -> dict[str, TrainTransform]:
        """Training transforms, by the name of the model input that each creates."""
        transform = train_transform(
            processor, args.train_crop, args.auto_augment, args.hflip, args.random_erasing, args.color_jitter
        )
        return {"pixel_values": transform}

    def learning_rate_at(self, epoch: float, epochs: float) -> float:
        """Learning rate at a (fractional) epoch of a run of `epochs`."""
        return warmup_cosine(
            epoch,
            epochs=epochs,
            peak=self.args.peak_learning_rate,
            minimum=self.args.min_learning_rate,
            warmup_epochs=self.args.warmup_epochs,
            warmup_start=self.args.warmup_learning_rate,
        )

    def plan(self) -> dict[str, str]:
        """Lines of the printed plan, by label, in addition to those of both trainers."""
        return {}

    def _published_plan(self) -> dict[str, str]:
        """Line of the plan with the fields that `as_published` sets on this device."""
        if not self.args.as_published:
            return {}
        words = [f"{name} {getattr(self.args, name)}" for name in self.args.arrangements()]
        if self.args.device.type != "cuda":
            words.append("full precision, as this device has no half precision")
        return {"as published": ", ".join(words)}

    def optimizer_plan(self) -> str:
        """Name of the optimiser for the plan: the given one, or the one of the arguments."""
        if self.optimizer is not None:
            return optimizer_name(optimizer_record(self.optimizer))
        if self.optimizer_cls_and_kwargs is not None:
            return getattr(self.optimizer_cls_and_kwargs[0], "__name__", "given")
        return str(getattr(self.args.optim, "value", self.args.optim))

    def _common_plan(self) -> dict[str, str]:
        lines = {"optimiser": self.optimizer_plan()}
        if "scheduler" in self._given:
            lines["learning rate"] = f"by the {type(self.lr_scheduler).__name__} that was given"
        elif "optimizer" in self._given and self.optimizer is not None:
            rates = sorted({group["lr"] for group in self.optimizer.param_groups})
            lines["learning rate"] = f"{', '.join(f'{rate:.3g}' for rate in rates)} of the optimiser at its peak"
        if self.args.save_only_model and self.args.save_strategy != "no":
            lines["checkpoints"] = "the model only (save_only_model): the run cannot be resumed"
        return lines

    def settings(self) -> dict[str, Any]:
        """Arguments that affect the result of this run, without those that a given optimiser or scheduler replaces."""
        replaced = set()
        if "optimizer" in self._given:
            replaced = {"optim", "adam_beta1", "adam_beta2", "adam_epsilon", "momentum", "sam_rho", "sam_adaptive"}
            replaced |= {"learning_rate", "weight_decay"} if self.optimizer_cls_and_kwargs is None else set()
        if "scheduler" in self._given:
            replaced |= {"min_learning_rate", "warmup_epochs", "warmup_learning_rate", "lr_drop_epochs", "lr_drops"}
        return {name: value for name, value in self.args.method_settings().items() if name not in replaced}

    def drw_start(self) -> str:
        """Start epoch of deferred re-weighting for the plan, with a note if `max_steps` ends the run earlier."""
        start, steps = self.args.drw_start_epoch, self.args.max_steps
        if start is None:
            return "inf"
        is_cut_off = 0 < steps <= start * self.steps_per_epoch()
        return f"{start:g}" + (" (max_steps ends the run before it)" if is_cut_off else "")

    # ---- Training ----

    @property
    def in_drw(self) -> bool:
        """Whether training is in the phase of deferred re-weighting."""
        start = self.args.drw_start_epoch
        return start is not None and (self.state.epoch or 0.0) >= start

    @property
    def active_criterion(self) -> nn.Module:
        """The loss of the current phase."""
        return self.drw_criterion if self.in_drw else self.criterion

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains as the parent class does, evaluates at the end, and writes `results.json`.

        If a finished run is resumed and its model is in the folder, the model is loaded and nothing is written.

        Args:
            resume_from_checkpoint: Checkpoint to resume from. True: the newest whole checkpoint in the output folder.
                `auto`: the same, or the first step if no checkpoint exists.
            trial: As in the parent class.
            ignore_keys_for_eval: As in the parent class.

        Raises:
            ValueError: If the training set is smaller than one batch, a phase starts after the last epoch (with
                `max_steps` the plan reports phases that are not reached), no whole checkpoint exists, or the checkpoint
                belongs to another run: with other classes, images, model or loss, or with more steps than this run.
            FileExistsError: If the output folder holds another run that is neither resumed nor overwritten, or another
                run is writing to the folder.
            FloatingPointError: If the loss or a weight is not finite.
            SystemExit: With code 143, after a checkpoint, if the process received SIGTERM.
            KeyboardInterrupt: After a checkpoint, on Ctrl-C; at once on a second Ctrl-C.
        """
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset.")
        self.args.settle()
        if self.model is None:  # Optuna's backend frees it after a trial
            self.model = self.model_wrapped = self.call_model_init(trial)
        self._hp_search_setup(trial)
        self.run_dir = self._get_output_dir(trial)  # a trial has a separate folder
        self.results.path, self.run_file.folder = Path(self.run_dir) / RESULTS_FILE, Path(self.run_dir)
        # All checks come before the first change in the folder: a refused run must not damage another run.
        self._resuming = goes_on_in(self.run_dir, resume_from_checkpoint)
        check_output_dir(self.run_dir, self.args.overwrite, self._resuming)
        images = self.train_dataset
        # `len` of streamed images counts the share of this process only.
        self.args.check_data(len(images.split) if isinstance(images, StreamedImages) else len(images))
        with run_lock(self.run_dir) if self.args.should_save else contextlib.nullcontext():
            self._plan = self._common_plan() | self._published_plan() | self.plan()
            first = self.is_world_process_zero()
            self.images_sha256 = of_first_process(first, lambda: images_hash(self._datasets[0]))
            self.beginning = of_first_process(first, lambda: self._find_beginning(resume_from_checkpoint))
            if self.beginning.is_finished:
                return self._load_finished()
            return self._train_and_evaluate(self.beginning.checkpoint, trial, ignore_keys_for_eval)

    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        args = self.args
        return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.steps_per_epoch())

    def _find_beginning(self, wanted: str | bool | None) -> Beginning:
        """Finds the checkpoint to resume from, and checks that it belongs to the same run."""
        if not wanted:
            return Beginning()
        output_dir, total = self.run_dir, self.total_steps()
        given = None if wanted is True or wanted == "auto" else wanted
        data = self.results.data_of(self)
        finished = self.results.finished_steps() if self._resuming else None
        checkpoint = None
        if finished is None or given is not None:
            checkpoint = newest_checkpoint(output_dir) if given is None else whole_checkpoint(given)
            if checkpoint is None and wanted is True:
                raise ValueError(f"there is no checkpoint in {output_dir} to resume from; 'auto' begins without one.")
            if checkpoint is None:
                return Beginning()
        steps = finished if checkpoint is None else read_state(checkpoint).global_step
        assert steps is not None  # without a checkpoint, the run is finished
        at_step, record = former_records(checkpoint or output_dir, output_dir if self._resuming else None)
        check_same_run(checkpoint or output_dir, at_step, self, data)
        if steps > total:
            raise ValueError(
                f"{checkpoint or output_dir} has taken {steps} steps, more than the {total} of this run; resume from "
                "an earlier checkpoint, or make the run longer."
            )
        if finished == steps == total:
            return Beginning(checkpoint, steps, True, record)
        if checkpoint is None:  # a finished run that is made longer
            checkpoint = newest_checkpoint(output_dir)
            assert checkpoint is not None  # `newest_checkpoint` finds one or raises, as a model exists
            steps = read_state(checkpoint).global_step
        return Beginning(checkpoint, steps, False, record)

    def begin_record(self) -> None:
        """Claims the output folder, starts `results.json` and prints the plan, before the first step."""
        claim_output_dir(self.run_dir, self.args.overwrite, self._resuming, self.accelerator)
        self.results.start(self, self.beginning.step, self.beginning.record)
        if self.is_world_process_zero():
            self.results.write()
            print_plan(self, self.steps_per_epoch(), self._plan)

    def _load_finished(self) -> TrainOutput:
        """Loads the model of a finished run, with the state that the trainer has at the end of training."""
        output_dir, steps, record = self.run_dir, self.beginning.step, self.beginning.record
        assert steps is not None  # the run is finished
        assert record is not None
        self._load_from_checkpoint(output_dir)
        if self.ema is not None and (Path(output_dir) / EMA_FOLDER).is_dir():
            self.ema.on_train_begin(self.args, self.state, self.control, model=self.model)
            self._load_from_checkpoint(str(Path(output_dir) / EMA_FOLDER), self.ema.model)
        self.state.global_step = self.state.max_steps = steps
        self.state.epoch = steps / self.steps_per_epoch()
        self.results.content = dict(record)
        if self.is_world_process_zero():
            print(f"The run in {output_dir} is finished, with {steps} steps: nothing is left to train.", flush=True)
        return TrainOutput(steps, 0.0, {})

    def _train_and_evaluate(
        self, checkpoint: str | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        started = time.perf_counter()
        self._recording = True
        self._logged.clear()
        self._steps_logged = 0
        if self.ema is not None:
            self.ema.checkpoint = checkpoint
        self.resumed_from = checkpoint
        try:
            output = super().train(
                resume_from_checkpoint=checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
            )
            self.nonfinite_guard.check()
            evaluates = self.eval_dataset is not None and not self.stop_signal.stopped
            if evaluates and self.results.last_step != self.state.global_step:
                self.evaluate()
        finally:
            self._recording = False
            self.run_file.is_open = False
            self.stop_signal.restore()
            self.end_workers()
        if self.stop_signal.stopped:
            self._stopped_by_signal()
        if self.is_world_process_zero():
            self.results.finish(time.perf_counter() - started, self.state.global_step, self.saved_step)
        return output

    @property
    def saved_step(self) -> int:
        """Step of the weights that the model has after training."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return self.state.global_step if best is None else int(Path(best).name.rpartition("-")[2])

    def was_asked_to_stop(self) -> bool:
        """Whether any process received SIGTERM or SIGINT in training, including after its last step."""
        return bool(self.accelerator.reduce(self.stop_signal.vote(self.args.device), "sum").item() > 0)

    def _stopped_by_signal(self) -> NoReturn:
        """Prints how to resume, and ends the process in the way that the signal normally does."""
        sentence = (
            f"Stopped by {self.stop_signal.name} after step {self.state.global_step}, with a checkpoint in "
            f"{self.args.output_dir}; resume with --resume_from_checkpoint auto."
        )
        if self.is_world_process_zero():
            print(sentence, flush=True)
        self.stop_signal.end()

    def end_workers(self) -> None:
        """Ends the worker processes of the data loaders.

        Left to garbage collection, which has no fixed order, each would take 5 seconds.
        """
        self.callback_handler.train_dataloader = self.callback_handler.eval_dataloader = None
        self.__dict__.get("_eval_dataloaders", {}).clear()
        self.accelerator._dataloaders.clear()

    def get_train_dataloader(self) -> DataLoader:
        """Data loader of this process's training batches. All batches are full, because mixing pairs their images."""
        args, images = self.args, self.train_dataset
        if images is None:
            raise ValueError("training needs a train_dataset.")
        dataset: StreamedImages | SeededImages
        batches: dict[str, Any]
        if isinstance(images, StreamedImages):
            dataset, batches = images, {"batch_size": args.train_batch_size}
        else:
            sampler = TrainBatches(
                len(images),
                args.train_batch_size,
                args.process_index,
                args.world_size,
                args.gradient_accumulation_steps,
                args.repeats,
                args.seed if args.data_seed is None else args.data_seed,
                bool(args.partial_steps),
            )
            dataset, batches = SeededImages(images), {"batch_sampler": sampler}
        context = getattr(args, "dataloader_multiprocessing_context", None)
        # Not prepared by Accelerate, which would split the batches over the processes a second time.
        return DataLoader(
            dataset,
            **batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            # transformers has these two arguments since 5.15.
            multiprocessing_context=context if args.dataloader_num_workers else None,
            in_order=getattr(args, "dataloader_in_order", True),
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=outlive_signals,
        )

    def seed_micro_batch(self, index: int, purpose: int = 0) -> None:
        """Seeds the random streams of a micro-batch of the next optimiser step, for dropped paths (0) or mixing (1).

        The seeds depend only on seed, step, micro-batch and process: a resumed run draws the same numbers.
        """
        key = (self.args.seed, self.state.global_step, index, self.args.process_index, purpose)
        seed_streams(*key, device=self.args.device)

    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return steps_per_epoch(self.get_train_dataloader(), self.args)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = list(islice(epoch_iterator, num_batches))  # the parent's method also synchronises the device
        self._window, self._micro_batch = batches, 0
        if batches:
            self._prepare_window()
        return batches, None

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seed_micro_batch(self._micro_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.nonfinite_guard.note(loss, self.state.global_step + 1)
        self._micro_batch += 1
        # The logged loss is without this factor of `compute_loss`, which only the gradient needs.
        return self._finite(loss) / self._window_weight

    def _finite(self, value: torch.Tensor) -> torch.Tensor:
        """Replaces values that are not finite by 0 if updates may be skipped, for the means in the logs."""
        return torch.where(value.isfinite(), value, 0.0) if self.args.on_nonfinite == "skip" else value

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # DistributedDataParallel averages gradients over processes, but the loss is normalised for a sum.
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
        """Prepares all micro-batches of an optimiser step, and sets the denominators of the whole batch in each."""
        for index, batch in enumerate(self._window):
            self.seed_micro_batch(index, purpose=1)
            batch.update(self.training_batch(batch))
        own = torch.stack([self.loss_denominators(batch) for batch in self._window])
        # One reduction for denominators and stop votes: each reduction costs a round trip.
        total = torch.cat([own.sum(dim=0), self.stop_signal.vote(own.device)])
        total = self.accelerator.reduce(total, "sum")
        if self.accelerator.num_processes > 1:
            self.stop_signal.count(total[-1])
        micro_batches = len(self._window) * self.accelerator.num_processes
        for batch, denominators in zip(self._window, own, strict=True):
            # per_process: the mean of each micro-batch, averaged over all micro-batches and processes.
            is_global = self.args.loss_normalization == "global"
            batch["denominators"] = total[:-1] if is_global else denominators * micro_batches
        self._steps_logged += 1

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Creates the learning-rate schedule of the method, a function of the epoch that is updated at every step."""
        if self.lr_scheduler is None:
            micro_batches, batches = self.args.gradient_accumulation_steps, len(self.get_train_dataloader())
            steps_per_epoch = self.steps_per_epoch()
            epochs = num_training_steps / steps_per_epoch

            def epoch_of(step: int) -> float:
                return (
                    published_epoch(step, batches, micro_batches) if self.args.as_published else step / steps_per_epoch
                )

            optimizer = optimizer or self.optimizer
            assert optimizer is not None  # created before
            self.lr_scheduler = LambdaLR(
                optimizer,
                lambda step: self.learning_rate_at(epoch_of(step), epochs) / self.args.peak_learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        assert optimizer is not None  # both are created before
        assert scheduler is not None
        wanted = [{name: group[name] for name in _SET_BY_ARGUMENTS & group.keys()} for group in optimizer.param_groups]
        rates = list(getattr(scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        # The checkpoint restores old settings, but the current arguments override them.
        for group, values in zip(optimizer.param_groups, wanted, strict=True):
            group.update(values)
        if "scheduler" in self._given or scheduler.base_lrs == rates:
            return
        # Another learning rate was requested: rescale the schedule at the step of the checkpoint.
        scheduler.base_lrs = rates
        for group, rate, factor in zip(optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = rate
            group["lr"] = rate * factor(scheduler.last_epoch)

    # ---- Logging ----

    def log_part(self, name: str, value: torch.Tensor) -> None:
        """Adds a value to a logged quantity: summed over micro-batches, averaged over processes and steps."""
        self._logged[name] = self._logged.get(name, 0.0) + self._finite(value.detach())

    def log(self, logs, start_time=None):
        if "loss" in logs:
            self.nonfinite_guard.check()
        if "loss" in logs and self._logged:
            logs = {**logs, **self.logged_means(over_processes=True)}
            self._logged.clear()
            self._steps_logged = 0
        if "loss" in logs and self.nonfinite_guard.skipped:
            logs["skipped_steps"] = self.nonfinite_guard.skipped
        super().log(logs, start_time)

    def logged_means(self, over_processes: bool = False) -> dict[str, float]:
        """Means per step of the values passed to `log_part` since the last log."""
        if not self._logged:
            return {}
        means = torch.stack(list(self._logged.values())) / self._steps_logged
        if over_processes:
            means = self.accelerator.reduce(means, "mean")
        return dict(zip(self._logged, means.tolist(), strict=True))

    # ---- Moving average ----

    @property
    def averaged_model(self) -> PreTrainedModel | None:
        """Model with the moving average of the weights; None without `ema_decay` or before training."""
        return None if self.ema is None else self.ema.model

    def save_model(self, output_dir=None, _internal_call=False):
        """Saves the model with its image processor, and the moving average, if one is kept, in the subfolder `ema`.

        With `push_to_hub` in the arguments it also pushes the model, unless a process was asked to stop by a signal.
        """
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save and self._staging is None:
            self._save_average(output_dir or self.args.output_dir)
            self.results.saved(output_dir or self.args.output_dir)
        elif self.args.should_save:
            self.results.write(output_dir)
            if self.ema is not None:
                self.ema.save_checkpoint(output_dir)
        if self.args.push_to_hub and not _internal_call and not self.was_asked_to_stop():
            self.push_to_hub()

    def _save_checkpoint(self, model, trial):
        self.nonfinite_guard.check()
        super()._save_checkpoint(model, trial)

    def _save_average(self, output_dir: str) -> None:
        if self.ema is not None and self.ema.model is not None:
            self.ema.save_pretrained(output_dir, self.processing_class)
        else:  # an average of an earlier run does not belong to this model
            shutil.rmtree(Path(output_dir) / EMA_FOLDER, ignore_errors=True)

    def _load_best_model(self):
        super()._load_best_model()
        if self.ema is not None and self.state.best_model_checkpoint is not None:
            self.ema.load(self.state.best_model_checkpoint)

    def create_model_card(self, model_name: str | None = None, **metadata):  # type: ignore[override]
        """Writes the model card, `README.md`, from the record of this run; see [`write_card`].

        Args:
            model_name: Heading of the card; by default the name of the repository.
            **metadata: Fields of huggingface_hub's `ModelCardData`, such as `license` or `tags`.
        """
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self.hub_model_id, model_name, **metadata)

    # ---- Evaluation ----

    def evaluation_loop(self, *args, **kwargs):
        """Runs the parent's loop with the buffers of the main process: each process has other batch-norm statistics."""
        if self.accelerator.num_processes > 1:
            models = [
                model for model in (self.accelerator.unwrap_model(self.model), self.averaged_model) if model is not None
            ]
            broadcast([buffer for model in models for buffer in model.buffers()])
        return super().evaluation_loop(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        """Data loader for evaluation. Accepts a `datasets.Dataset`, which is wrapped.

        Raises:
            ValueError: If the data set has other classes than the model, or another order of classes.
        """
        return outliving(super().get_eval_dataloader(self._matching_images(eval_dataset)))

    def get_test_dataloader(self, test_dataset):
        """Data loader for prediction, like [`get_eval_dataloader`]."""
        return outliving(super().get_test_dataloader(self._matching_images(test_dataset)))

    def _matching_images(self, dataset):
        if isinstance(dataset, Dataset | IterableDataset):
            match_labels(self.model.config, dataset)
        return as_images(dataset, getattr(self.processing_class, "background", None))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluates every expert and prints the table. During training, results on the trainer's test set are recorded.

        Args:
            eval_dataset: Test images to use instead of the trainer's, or a mapping from names to several test sets.
            ignore_keys: Fields of the model's output that are not passed to `compute_metrics`.
            metric_key_prefix: Prefix of the metric names. With several test sets, the name of the set follows.
        """
        if self.is_in_train:
            self.nonfinite_guard.check()
        wanted = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(wanted, dict):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            tables = {"": self.last_table}
        else:
            metrics, tables = {}, {}
            for name, images in wanted.items():
                chosen: Any = name if eval_dataset is None else images  # a name keeps its data loader
                metrics |= super().evaluate(chosen, ignore_keys, f"{metric_key_prefix}_{name}")
                tables[name] = self.last_table
        if self._recording and eval_dataset is None:
            self.results.record(self.state.epoch, self.state.global_step, next(iter(tables.values())).accuracies)
            if isinstance(wanted, dict):
                self.results.content["last"]["sets"] = {name: table.accuracies for name, table in tables.items()}
        if self.is_world_process_zero():
            if self._recording and eval_dataset is None:
                self.results.write()
            for name, table in tables.items():
                title = f"epoch {self.state.epoch:g}" if self.state.epoch else "evaluation"
                table.title = f"{title}, {name}" if name else title
                show(table)
        return metrics

    @property
    def test_images(self) -> int:
        """Number of test images, over all test sets."""
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return sum(len(images) for images in sets if images is not None)
