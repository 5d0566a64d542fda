"""Atomic checkpoints: written to a staging folder, moved into place when complete, verified by a manifest."""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..io import file_sha256, one_line, read_json, sync_to_disk, weight_files
from ..models.weight_files import check_readable
from .adapters import ADAPTER_FOLDER, has_adapter, load_adapter, merged, save_adapter
from .arguments import LongTailTrainingArguments

Model = TypeVar("Model", bound=PreTrainedModel)

MANIFEST = "manifest.json"
STAGING = ".saving"
HOW_TO_RESUME = (
    "resume with --resume_from_checkpoint auto (deitlt train and compare: with the same command, without --overwrite)"
)
MODEL_FILES = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*")
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)(\.replaced)?")
# Parts that every checkpoint must have, and parts that an exact resume also needs, with patterns of their files in
# plain training, FSDP ("pytorch_model_fsdp_0/", "optimizer_0/") and DeepSpeed ("global_step8/").
_NEEDED = {
    TRAINER_STATE_NAME: (TRAINER_STATE_NAME,),
    "weights": (*MODEL_FILES, "pytorch_model*/*", "global_step*/*"),
}
_OF_GOING_ON = {
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer*/*", "global_step*/*"),
    "scheduler.pt": ("scheduler.pt", "global_step*/*"),
    "rng_state.pth": ("rng_state*.pth",),
}


def begin_checkpoint(output_dir: str | Path) -> Path:
    """Creates an empty staging folder next to the checkpoints, in which the next checkpoint is written."""
    staging = Path(output_dir) / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def finish_checkpoint(staged: Path, output_dir: str | Path) -> None:
    """Syncs a checkpoint to disk with a manifest of file sizes and hashes, and then moves it into place.

    A checkpoint of the same name is replaced.

    Args:
        staged: Folder of the written checkpoint, inside the folder from [`begin_checkpoint`].
        output_dir: Folder of the checkpoints.
    """
    manifest = {}
    # All files reach the disk before the rename: after a power loss, a checkpoint in place is complete.
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        manifest[path.relative_to(staged).as_posix()] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        sync_to_disk(path)
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    sync_to_disk(staged / MANIFEST)
    for folder in [path for path in staged.rglob("*") if path.is_dir()] + [staged]:
        sync_to_disk(folder)
    place = Path(output_dir) / staged.name
    replaced = place.with_name(f"{place.name}.replaced")  # still found by `checkpoints_in` after a crash
    if place.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    staged.rename(place)
    sync_to_disk(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(staged.parent)


def replace_model(output_dir: str | Path, save: Callable[[str], None]) -> None:
    """Writes a model to a staging folder, then replaces the files of an existing model one by one, weights last.

    Args:
        output_dir: Folder of the model.
        save: Function that writes all files into a given folder.

    Raises:
        OSError: If the model cannot be written.
    """
    try:
        staged = begin_checkpoint(output_dir) / "model"
        save(str(staged))
        _replace_files(staged, output_dir)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"the model cannot be written to {output_dir}: {' '.join(str(error).split())}; make room there, and "
            f"{HOW_TO_RESUME}."
        ) from error
    except KeyboardInterrupt:
        shutil.rmtree(Path(output_dir) / STAGING, ignore_errors=True)
        raise


def _replace_files(staged: Path, output_dir: str | Path) -> None:
    for path in sorted(staged.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
        sync_to_disk(path)
        os.replace(path, Path(output_dir) / path.name)
    sync_to_disk(Path(output_dir))
    shutil.rmtree(staged.parent)


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Checkpoints in a folder, sorted by the step in their names. File times are ignored: copies change them."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[path] = (int(match[1]), match[2] is None)
    return sorted(found, key=found.__getitem__)


def remove_old_checkpoints(
    output_dir: str | Path, limit: int | None, best: str | None, step: int | None = None
) -> None:
    """Removes all but the latest checkpoints. The best checkpoint is always kept.

    Args:
        output_dir: Folder of the checkpoints.
        limit: Number of checkpoints to keep, at least one; None or 0 keeps all.
        best: Path of the checkpoint with the best evaluation.
        step: Current step of the run. Checkpoints of later steps belong to an earlier attempt and are removed.
    """
    found = checkpoints_in(output_dir)
    if step is not None:
        for path in [path for path in found if step_in_name(path) > step]:
            found.remove(path)
            shutil.rmtree(path)
    protected = {*found[-1:], *([] if best is None else [Path(best)])}
    surplus = len(found) - max(limit, len(protected & set(found))) if limit else 0
    for path in [path for path in found if path not in protected][: max(surplus, 0)]:
        shutil.rmtree(path)


def step_in_name(checkpoint: str | Path) -> int:
    """Step in the name of a checkpoint."""
    return int(Path(checkpoint).name.removesuffix(".replaced").rpartition("-")[2])


def find_corruption(checkpoint: str | Path) -> str | None:
    """Describes why a checkpoint is corrupt or incomplete; None if a run can resume from it exactly."""
    checkpoint = Path(checkpoint)
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except ValueError:
        return f"its {MANIFEST} is not a JSON object"
    for name, entry in manifest.items():
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            return f"its {MANIFEST} names a file outside of it, {one_line(name, 80)}"
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            return f"its {MANIFEST} does not say what {one_line(name, 80)} should be"
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {one_line(entry['size'], 40)}"
        if file_sha256(path) != entry["sha256"]:
            return f"{name} has changed since it was written"
    for what in (*_NEEDED, *_OF_GOING_ON):
        if not _has(what, manifest):
            why = " (save_only_model leaves it out)" if what in _OF_GOING_ON else ""
            return f"its {MANIFEST} does not list {what}{why}"
    return _unreadable(checkpoint)


def _has(what: str, names: Iterable[str]) -> bool:
    """Whether the files of a checkpoint include the part `what`."""
    patterns = (_NEEDED | _OF_GOING_ON)[what]
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _unreadable(checkpoint: Path) -> str | None:
    """Describes the first file of a checkpoint that cannot be read; None if all can be read."""
    try:
        read_state(checkpoint)
        states = [path for pattern in ("*.pt", "rng_state*.pth", "optimizer.bin", "*.safetensors")
                  for path in sorted(checkpoint.glob(pattern))]  # fmt: skip
        for path in dict.fromkeys([*weight_files(checkpoint), *states]):
            check_readable(path)
    except (ValueError, FileNotFoundError) as error:
        return str(error).rstrip(".")
    return None


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """Finds the latest intact checkpoint; None if the run did not reach its first checkpoint.

    Corrupt checkpoints are skipped with a warning.

    Raises:
        ValueError: If all checkpoints are corrupt, or the folder has a finished model and no checkpoint. A new run
            would overwrite the model.
    """
    folder = Path(output_dir)
    found = list(reversed(checkpoints_in(folder)))
    for path in found:
        wrong = find_corruption(path)
        if wrong is None:
            return str(path)
        warnings.warn(f"the checkpoint {path} is left out: {wrong}.", stacklevel=2)
    if found or has_model(folder):
        raise ValueError(
            f"{output_dir} has no whole checkpoint to resume from; choose another --output_dir, or pass --overwrite."
        )
    return None


def has_model(folder: str | Path) -> bool:
    """Whether a folder contains the weights of a model. Checkpoints in subfolders do not count."""
    return any(any(Path(folder).glob(pattern)) for pattern in MODEL_FILES)


def whole_checkpoint(path: str) -> str:
    """Checks that a run can resume from a checkpoint, and returns its path.

    A checkpoint of transformers has no manifest. It is accepted, with a warning that names missing parts.

    Raises:
        ValueError: If the checkpoint is corrupt, is not a folder, or lacks weights or the step.
    """
    folder = Path(path)
    wrong: str | None
    if not folder.is_dir():
        wrong = "there is no such folder"
    elif (folder / MANIFEST).is_file():
        wrong = find_corruption(folder)
    else:
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        wrong = next((f"it has no {what}" for what in _NEEDED if not _has(what, names)), None) or _unreadable(folder)
        missing = [what for what in _OF_GOING_ON if not _has(what, names)]
        if wrong is None and missing:
            warnings.warn(
                f"the checkpoint {path} has no {', no '.join(missing)}: these start from scratch, and the result will "
                "differ from an uninterrupted run.",
                stacklevel=2,
            )
    if wrong is not None:
        raise ValueError(f"cannot resume from the checkpoint {path}: {wrong}.")
    return str(path)


def load_with_info(cls: type[Model], path: str, **options) -> tuple[Model, dict[str, Any]]:
    """Calls `from_pretrained`; returns the model and its report of missing, unexpected and mismatched weights."""
    return cls.from_pretrained(path, output_loading_info=True, **options)  # type: ignore[return-value]


def read_state(checkpoint: str | Path) -> TrainerState:
    """Reads the `TrainerState` of a checkpoint: its step, logs and best evaluation.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it cannot be read.
    """
    path = Path(checkpoint) / TRAINER_STATE_NAME
    content = read_json(path)
    try:
        state = TrainerState(**content)
    except TypeError as error:  # fields that this version of transformers does not have
        raise ValueError(f"{path} cannot be read: {one_line(error)}.") from error
    wanted = {"global_step": int, "train_batch_size": int, "log_history": list}
    wrong = next((name for name, kind in wanted.items() if type(getattr(state, name)) is not kind), None)
    if wrong is None and not all(isinstance(entry, dict) and "step" in entry for entry in state.log_history):
        wrong = "log_history"
    if wrong is None and not isinstance(state.best_model_checkpoint, str | None):
        wrong = "best_model_checkpoint"
    if wrong is not None:
        raise ValueError(f"{path} cannot be read: its {wrong} is {one_line(repr(getattr(state, wrong)), 60)}.")
    return state


def of_first_process(is_first: bool, find: Callable[[], Any]) -> Any:
    """Calls a function in the main process, and returns its result, or raises its error, in all processes.

    Raises:
        ValueError, OSError: If the function raises one.
    """
    outcome: list[Any] = [None, None]
    if is_first:
        try:
            outcome = [find(), None]
        except (ValueError, OSError) as error:
            outcome = [None, error]
    found, raised = broadcast_object_list(outcome)
    if raised is not None:
        raise raised
    return found


def class_without_shards(model: nn.Module) -> type[nn.Module]:
    """The class that a model had before FSDP 2 sharded it, which replaces the class by a subclass of its own."""
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed."))


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
    def saved_step(self) -> int:
        """Step of the weights that the model has after training."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return self.state.global_step if best is None else step_in_name(best)

    def _save_checkpoint(self, model, trial):
        """Writes a checkpoint to the staging folder, and moves it into place when it is complete on disk."""
        output_dir = super()._get_output_dir(trial)
        try:
            if self.args.should_save:
                begin_checkpoint(output_dir)
            self.accelerator.wait_for_everyone()
            self._staging = Path(output_dir) / STAGING
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._staging = None
            self._finish_checkpoint(output_dir)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
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
        finish_checkpoint(staged, output_dir)
        best = self.state.best_model_checkpoint
        remove_old_checkpoints(output_dir, self.args.save_total_limit, best, self.state.global_step)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir=None, state_dict=None):
        """Writes the model. An existing model in the folder is replaced only after the new one is complete."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        # The parent also pickles the arguments; the token must not be written to a file.
        token, self.args.hub_token = self.args.hub_token, None
        save = super()._save
        try:
            with saved_as_own_class(self.model):
                if self._staging is not None or not self.args.should_save:
                    save(output_dir, state_dict)
                elif not has_adapter(self.model):
                    replace_model(output_dir, lambda folder: save(folder, state_dict))
                else:
                    self._save_adapted(output_dir)
        finally:
            self.args.hub_token = token

    def _save_adapted(self, output_dir: str) -> None:
        """Writes a model with an adapter merged, and the adapter beside it on request."""
        replace_model(output_dir, self._save_merged)
        if self.args.save_adapter:
            replace_model(Path(output_dir) / ADAPTER_FOLDER, lambda folder: save_adapter(self.model, folder))

    def _save_merged(self, folder: str) -> None:
        merged(self.model).save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Loads the weights of a checkpoint by way of `from_pretrained`, which translates the names in files.

        transformers 5.23 does not translate the names here, and continues without the weights.

        Raises:
            ValueError: If weights are missing, unexpected, or of another size, or a run with FSDP resumes one without.
        """
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel) and has_adapter(model):
            load_adapter(model, resume_from_checkpoint)
            return
        if self.is_fsdp_enabled and not any(Path(resume_from_checkpoint).glob("pytorch_model_fsdp*")):
            raise ValueError(
                f"the checkpoint {resume_from_checkpoint} is of a run without FSDP; resume it without FSDP, or start "
                "with --init_from and another --output_dir."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        loaded, info = load_with_info(
            type(model),
            resume_from_checkpoint,
            config=copy.deepcopy(model.config),
            ignore_mismatched_sizes=True,  # raised below, with the name of the weight
        )
        for kind, what in (("missing", "has no"), ("unexpected", "also has"), ("mismatched", "has another size of")):
            names = sorted(key if isinstance(key, str) else key[0] for key in info[f"{kind}_keys"])
            if names:
                raise ValueError(
                    f"the checkpoint {resume_from_checkpoint} is not of this model: it {what} {names[0]} (and "
                    f"{len(names) - 1} other weights)."
                )
        model.load_state_dict(loaded.state_dict())

    def _load_best_model(self):
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
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
                setattr(self.args, name, math.ceil(max_steps * share))
        try:
            begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        finally:
            self.args = given
        self.state.compute_steps(given, max_steps)
        if self.state.best_model_checkpoint is None and self.state.best_global_step:
            best = Path(given.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begun

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Loads the states of optimiser and scheduler from a checkpoint.

        Raises:
            ValueError: If the states belong to another optimiser or model.
        """
        try:
            shards = self.is_deepspeed_enabled or self.is_fsdp_enabled
            if checkpoint and not shards and (Path(checkpoint) / OPTIMIZER_NAME_BIN).is_file():
                self._load_state_of_shards(checkpoint)
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"the state of the optimiser or of the schedule in {checkpoint} is not of this run: {one_line(error)}."
            ) from error

    def _load_state_of_shards(self, checkpoint: str) -> None:
        """Loads optimiser and schedule of a run with sharded weights, which has names of parameters."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        assert self.optimizer is not None  # created before its state is loaded
        assert self.lr_scheduler is not None
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME_BIN, map_location="cpu", weights_only=True)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside Accelerate's wrapper
        set_optimizer_state_dict(self.model, optimizer, state, options=StateDictOptions(full_state_dict=True))
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)
