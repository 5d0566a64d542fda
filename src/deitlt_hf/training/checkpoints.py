"""Checkpoints that are whole or not there."""

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from ..io import file_sha256, sync_to_disk
from .adapters import ADAPTER_FOLDER, has_adapter, load_adapter, merged, save_adapter

MANIFEST = "manifest.json"
STAGING = ".saving"


def begin_checkpoint(output_dir: str | Path) -> Path:
    """Makes an empty folder beside the checkpoints, in which one is written."""
    staging = Path(output_dir) / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def finish_checkpoint(staged: Path, output_dir: str | Path) -> Path:
    """Brings all files of a checkpoint to the disk, with a manifest of their sizes and hashes, and then into its place.

    Another checkpoint of the same name is replaced.

    Args:
        staged: The folder that it was written to, in that of [`begin_checkpoint`].
        output_dir: The folder of the checkpoints.

    Returns:
        Where it is now.
    """
    manifest = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        manifest[path.relative_to(staged).as_posix()] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        sync_to_disk(path)
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    sync_to_disk(staged / MANIFEST)
    for folder in [path for path in staged.rglob("*") if path.is_dir()] + [staged]:
        sync_to_disk(folder)
    place = Path(output_dir) / staged.name
    replaced = place.with_name(f"{place.name}.replaced")  # a name that is still a checkpoint's
    if place.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    staged.rename(place)
    sync_to_disk(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(staged.parent)
    return place


def replace_model(output_dir: str | Path, save: Callable[[str], None]) -> None:
    """Writes a model beside another, and then each of its files over the other's, the weights last.

    Args:
        output_dir: The folder of the model.
        save: Writes all files into the folder that it is given.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        staged = begin_checkpoint(output_dir) / "model"
        save(str(staged))
        _replace_files(staged, output_dir)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"the model cannot be written to {output_dir}: {' '.join(str(error).split())}; make room there, and go on "
            "with --resume_from_checkpoint auto."
        ) from error


def _replace_files(staged: Path, output_dir: str | Path) -> None:
    for path in sorted(staged.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
        sync_to_disk(path)
        os.replace(path, Path(output_dir) / path.name)
    sync_to_disk(Path(output_dir))
    shutil.rmtree(staged.parent)


def remove_old_checkpoints(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Keeps as many checkpoints as wanted, by the time of writing: always the last one and the best one."""
    rotate_checkpoints(str(output_dir), limit, best, use_mtime=True)


def damage(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint; None if its files are those of its manifest."""
    checkpoint = Path(checkpoint)
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except ValueError:
        return f"its {MANIFEST} is not valid JSON"
    for name, entry in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if file_sha256(path) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """The whole checkpoint with the most steps, or None if a run has not come to its first one.

    Later ones that are damaged are left out, with a warning.

    Raises:
        ValueError: If all are damaged, or there are none beside a finished model, which a new run would write over.
    """
    folder = Path(output_dir)
    found = list(reversed(sort_checkpoints(str(folder)))) if folder.is_dir() else []
    for path in found:
        wrong = damage(path)
        if wrong is None:
            return path
        warnings.warn(f"the checkpoint {path} is left out: {wrong}.", stacklevel=2)
    if found or any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{output_dir} has no whole checkpoint to go on from; choose another --output_dir, or pass --overwrite."
        )
    return None


def whole_checkpoint(path: str) -> str:
    """The path of a checkpoint to go on from; one without a manifest, as transformers writes them, is taken as it is.

    Raises:
        ValueError: If it is damaged, or no folder.
    """
    wrong = damage(path) if (Path(path) / MANIFEST).is_file() else None
    if not Path(path).is_dir():
        wrong = "there is no such folder"
    if wrong is not None:
        raise ValueError(f"cannot go on from the checkpoint {path}: {wrong}.")
    return str(path)


def step_of_checkpoint(folder: str | Path) -> int:
    """The step after which a checkpoint was written."""
    return TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME)).global_step


class WholeCheckpointTrainer(Trainer):
    """A [`~transformers.Trainer`] whose checkpoints are written beside the others, and moved among them once whole.

    Raises:
        OSError: In training, if a checkpoint cannot be written; those before are as they were.
    """

    _staging: Path | None = None  # where a checkpoint is being written

    def _save_checkpoint(self, model, trial):
        """Writes a checkpoint beside the others, and moves it among them once it is whole on the disk."""
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
                f"{' '.join(str(error).split())}; those before are as they were."
            ) from error
        finally:
            self._staging = None

    def _finish_checkpoint(self, output_dir: str) -> None:
        staged = Path(output_dir) / STAGING / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.state.best_model_checkpoint == str(staged):  # in every process, which all load it at the end
            self.state.best_model_checkpoint = os.path.join(output_dir, staged.name)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        if not self.args.should_save:
            return
        finish_checkpoint(staged, output_dir)
        remove_old_checkpoints(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir=None, state_dict=None):
        """Writes the model; one that is in the folder already stays whole until the new one is."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        # A pickle of the arguments is written too, and a token belongs in no file.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            if self._staging is not None or not self.args.should_save:
                super()._save(output_dir, state_dict)
                return
            if not has_adapter(self.model):
                save = super()._save
                replace_model(output_dir, lambda folder: save(folder, state_dict))
                return
            replace_model(output_dir, self._save_merged)
            if self.args.save_adapter:
                adapter = Path(output_dir) / ADAPTER_FOLDER
                replace_model(adapter, lambda folder: save_adapter(self.model, folder))
        finally:
            self.args.hub_token = token

    def _save_merged(self, folder: str) -> None:
        merged(self.model).save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Loads weights under the names that they have in files.

        transformers 5.23 does not translate them here, as `from_pretrained` does, and goes on without them.

        Raises:
            ValueError: If weights are missing.
        """
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel) and has_adapter(model):
            load_adapter(model, resume_from_checkpoint)
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        loaded, info = type(model).from_pretrained(
            resume_from_checkpoint,
            config=copy.deepcopy(model.config),
            ignore_mismatched_sizes=True,  # is refused below
            output_loading_info=True,
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
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """The checkpoint at a path, or for True and `auto` the newest; None to begin with the first step."""
        found = [None]
        if wanted and self.args.should_save:
            newest = wanted is True or wanted == "auto"
            found = [newest_checkpoint(self.args.output_dir) if newest else whole_checkpoint(wanted)]
        return broadcast_object_list(found)[0]
