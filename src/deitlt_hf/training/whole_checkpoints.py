"""Base class of the trainers that writes complete checkpoints, and loads them strictly, also of sharded models."""

import contextlib
import copy
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..io import one_line
from ..model_folder import STAGING
from .adapters import ADAPTER_FOLDER, has_adapter, inside_wrapper, load_adapter, merged, save_adapter
from .arguments import LongTailTrainingArguments
from .checkpoints import (
    begin_checkpoint,
    finish_checkpoint,
    remove_old_checkpoints,
    replace_model,
    step_in_name,
)
from .provenance import without_wrapper


def class_without_shards(model: nn.Module) -> type[nn.Module]:
    """The class that a model had before FSDP 2 sharded it, which replaces the class by a subclass of its own."""
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed."))


def model_name(model: nn.Module) -> str:
    """Name of a model's class, without what FSDP 2 and PEFT make of it."""
    return class_without_shards(inside_wrapper(model)).__name__


@contextlib.contextmanager
def saved_as_own_class(model: nn.Module) -> Iterator[None]:
    """Gives a sharded model its own class while it is saved.

    `save_pretrained` copies the file that defines the class, and names it in `config.json`: without this, torch's file.
    """
    sharded = model.__class__
    model.__class__ = class_without_shards(model)
    try:
        yield
    finally:
        model.__class__ = sharded


@contextlib.contextmanager
def with_master_weights(model: nn.Module) -> Iterator[None]:
    """Gives a model of DeepSpeed the float32 weights of its optimiser while it is saved. All processes must call it.

    In bfloat16 or float16, DeepSpeed (ZeRO 1 and 2) rounds the weights of the model itself, and would save those.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    rounded = {parameter: parameter.data for parameter in model.parameters() if parameter.dtype != torch.float32}
    try:
        for parameter, values in rounded.items():
            # ZeRO 3 divides the weights themselves, and gathers them in its own way when they are saved.
            if not hasattr(parameter, "ds_id"):
                exact = safe_get_full_fp32_param(parameter)  # None: no optimiser has this weight
                parameter.data = values.float() if exact is None else exact
        yield
    finally:
        for parameter, values in rounded.items():
            parameter.data = values


class WholeCheckpointTrainer(Trainer):
    """A [`~transformers.Trainer`] with atomic checkpoints: written to a staging folder and moved when complete.

    Raises:
        OSError: During training, if a checkpoint cannot be written. Earlier checkpoints are unchanged.
    """

    args: LongTailTrainingArguments
    model: PreTrainedModel
    processing_class: BaseImageProcessor

    _staging: Path | None = None  # folder of the checkpoint that is being written

    @property
    def is_sharded(self) -> bool:
        """Whether weights, gradients or optimiser states are divided among the processes."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    @property
    def saved_step(self) -> int:
        """Step of the weights that the model has after training."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return self.state.global_step if best is None else step_in_name(best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, with weights in float32 also under DeepSpeed."""
        with with_master_weights(self.model) if self.is_deepspeed_enabled else contextlib.nullcontext():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint to the staging folder, and moves it into place when it is complete on disk."""
        output_dir = super()._get_output_dir(trial)
        try:
            if self.args.should_save:
                begin_checkpoint(output_dir)
            # Other processes write into the staging folder, too: first it must be emptied of an interrupted save.
            self.accelerator.wait_for_everyone()
            # While this is set, `_get_output_dir` leads the parent into the staging folder: also other processes, which
            # write their random states.
            self._staging = Path(output_dir) / STAGING
            super()._save_checkpoint(model, trial)
            # The main process moves the folder only when the random states of all processes are in it.
            self.accelerator.wait_for_everyone()
            self._staging = None
            self._finish_checkpoint(output_dir)
            # Each process may load it next, as the best model.
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError if the disk is full
            raise OSError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {output_dir}: "
                f"{' '.join(str(error).split())}; earlier checkpoints are unchanged."
            ) from error
        except KeyboardInterrupt:
            shutil.rmtree(Path(output_dir) / STAGING, ignore_errors=True)
            raise
        finally:
            self._staging = None

    def _finish_checkpoint(self, output_dir: str) -> None:
        staged = Path(output_dir) / STAGING / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # The parent recorded the staging path. Corrected in every process, because each one loads it at the end.
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = os.path.join(output_dir, staged.name)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        if not self.args.should_save:
            return
        # Old checkpoints go only after the new one is in place: at any time, one is complete.
        finish_checkpoint(staged, output_dir)
        best = self.state.best_model_checkpoint
        remove_old_checkpoints(output_dir, self.args.save_total_limit, best, self.state.global_step)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes the model. An existing model in the folder is replaced only after the new one is complete."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        # The parent also pickles the arguments; the token must not be written to a file.
        token, self.args.hub_token = self.args.hub_token, None
        save = super()._save  # `super()` would not work in the lambda below
        try:
            with saved_as_own_class(self.model):
                # A checkpoint moves into place as a whole. Its adapters stay apart from the weights, to train on.
                if self._staging is not None or not self.args.should_save:
                    save(output_dir, state_dict)
                elif not has_adapter(self.model):
                    replace_model(output_dir, lambda folder: save(folder, state_dict))
                else:
                    replace_model(output_dir, self._save_merged)
                    if self.args.save_adapter:
                        replace_model(Path(output_dir) / ADAPTER_FOLDER, lambda to: save_adapter(self.model, to))
        finally:
            self.args.hub_token = token

    def _save_merged(self, folder: str) -> None:
        merged(self.model).save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights of a checkpoint by way of `from_pretrained`, which translates the names in files.

        transformers 5.23 does not translate the names here, and continues without the weights.

        Raises:
            ValueError: If weights are missing, unexpected, or of another size.
        """
        model = self.model if model is None else model
        # A PeftModel is left to the parent; an adapter of `add_adapter` is saved by it but not loaded.
        if isinstance(model, PreTrainedModel) and has_adapter(model):
            load_adapter(model, resume_from_checkpoint)
            return
        if self.is_sharded or not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        both: Any = type(model).from_pretrained(
            resume_from_checkpoint,
            config=copy.deepcopy(model.config),
            ignore_mismatched_sizes=True,  # raised below, with the name of the weight
            output_loading_info=True,
        )
        loaded, info = both
        for kind, what in (("missing", "has no"), ("unexpected", "also has"), ("mismatched", "has another size of")):
            names = sorted(key if isinstance(key, str) else key[0] for key in info[f"{kind}_keys"])
            if names:
                raise ValueError(
                    f"the checkpoint {resume_from_checkpoint} is not of this model: it {what} {names[0]} (and "
                    f"{len(names) - 1} other weights)."
                )
        # Copied into the parameters, which the optimiser and the wrapped model refer to.
        model.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        if self.is_sharded:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """Sets the state of a resumed run. A run that is already at its last step has no epoch left.

        Works around four problems of transformers 5.23. At the last step, the parent starts its epoch again and takes
        one more step. It compares steps given as a fraction of the run with absolute steps in the checkpoint. It keeps
        the step intervals of the checkpoint although the arguments give others. It loses the best checkpoint if the
        folder was moved.
        """
        given = self.args
        self.args = copy.copy(given)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            share = getattr(given, name)
            if share is not None and share < 1:
                # Absolute, as in the checkpoint, with which `compare_trainer_and_checkpoint_args` compares it.
                setattr(self.args, name, math.ceil(max_steps * share))
        try:
            begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        finally:
            self.args = given
        # The parent computes the intervals before it loads the state of the checkpoint, which overrides them.
        self.state.compute_steps(given, max_steps)
        # The parent drops a path that does not exist; in a moved folder, the checkpoint has the same name.
        if self.state.best_model_checkpoint is None and self.state.best_global_step:
            best = Path(given.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begun

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Raises `ValueError` in one sentence if the states of a checkpoint belong to another optimiser or model."""
        try:
            if checkpoint and not self.is_sharded and (Path(checkpoint) / OPTIMIZER_NAME_BIN).is_file():
                self._load_state_of_shards(checkpoint)
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
        except torch.OutOfMemoryError:  # the state may still be of this run
            raise
        # What torch raises for other parameters (ValueError, KeyError), shapes (RuntimeError) and other content, such
        # as a number in place of a group or of a tensor (TypeError, AttributeError).
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"the state of the optimiser or of the schedule in {checkpoint} is not of this run: {one_line(error)}."
            ) from error

    def _load_state_of_shards(self, checkpoint: str) -> None:
        """Loads optimiser and schedule of a run with sharded weights, which has names of parameters."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        assert self.optimizer is not None  # created before its state is loaded
        assert self.lr_scheduler is not None
        # Accelerate has saved the whole state with names of parameters; that of a plain optimiser has numbers.
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME_BIN, map_location="cpu", weights_only=True)
        set_optimizer_state_dict(
            self.model, without_wrapper(self.optimizer), state, options=StateDictOptions(full_state_dict=True)
        )
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)
