"""The files of checkpoints: written to a staging folder, moved into place when complete, verified by a manifest."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..io import file_sha256, one_line, read_json, sync_to_disk
from ..model_folder import STAGING, weight_files
from ..models.safe_loading import check_readable

MANIFEST = "manifest.json"
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
_FOR_EXACT_RESUME = {
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer*/*", "global_step*/*"),
    "scheduler.pt": ("scheduler.pt", "global_step*/*"),
    "rng_state.pth": ("rng_state*.pth",),
}


def begin_checkpoint(output_dir: str | Path) -> Path:
    """Creates an empty staging folder next to the checkpoints, in which the next checkpoint is written."""
    staging = Path(output_dir) / STAGING
    # What an interrupted save left here would become part of this checkpoint and its manifest.
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def _sync_and_hash(path: Path) -> str:
    sync_to_disk(path)
    return file_sha256(path)


def finish_checkpoint(staged: Path, output_dir: str | Path) -> None:
    """Syncs a checkpoint to disk with a manifest of file sizes and hashes, and then moves it into `output_dir`.

    A checkpoint of the same name is replaced. `staged` is a folder inside that of [`begin_checkpoint`].
    """
    paths = sorted(path for path in staged.rglob("*") if path.is_file())
    # All files reach the disk before the rename: after a power loss, a checkpoint in place is complete. Hashing and
    # syncing release the GIL, and take as long as writing a large model does; so the files take a thread each.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_sync_and_hash, paths))
    manifest = {
        path.relative_to(staged).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    sync_to_disk(staged / MANIFEST)
    # The names of files are in their folders: these must reach the disk, too.
    for folder in [path for path in staged.rglob("*") if path.is_dir()] + [staged]:
        sync_to_disk(folder)
    place = Path(output_dir) / staged.name
    replaced = place.with_name(f"{place.name}.replaced")  # still found by `checkpoints_in` after a crash
    if place.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    staged.rename(place)
    sync_to_disk(place.parent)  # the replaced checkpoint may go only after the rename is on the disk
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(staged.parent)


def replace_model(output_dir: str | Path, save: Callable[[str], None]) -> None:
    """Writes a model to a staging folder, then replaces the files of an existing model one by one, weights last.

    `save` writes all files into the folder that it gets.

    Raises:
        OSError: If the model cannot be written.
    """
    try:
        staged = begin_checkpoint(output_dir) / "model"
        save(str(staged))
        for path in sorted(staged.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
            sync_to_disk(path)
            os.replace(path, Path(output_dir) / path.name)
        sync_to_disk(Path(output_dir))
        # Last: while it exists, a push refuses the folder, whose files can be of two models (hub/pushing.py).
        shutil.rmtree(staged.parent)
    # The staging folder stays: its weights can be the only copy of a finished training.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"the model cannot be written to {output_dir}: {' '.join(str(error).split())}; make room there, and "
            f"{HOW_TO_RESUME}."
        ) from error
    except KeyboardInterrupt:
        shutil.rmtree(Path(output_dir) / STAGING, ignore_errors=True)
        raise


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Checkpoints in a folder, sorted by the step in their names. File times are ignored: copies change them."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[path] = (int(match[1]), match[2] is None)  # of two with one step, the replaced one is older
    return sorted(found, key=found.__getitem__)


def remove_old_checkpoints(
    output_dir: str | Path, limit: int | None, best: str | None, step: int | None = None
) -> None:
    """Removes all but the latest `limit` checkpoints (None or 0: keeps all). The latest and the best one stay.

    Checkpoints of later steps than `step`, the current one, belong to an earlier attempt and are removed.
    """
    found = checkpoints_in(output_dir)
    if step is not None:
        # Otherwise the next `auto` would resume the earlier attempt, at its later step.
        for path in [path for path in found if step_in_name(path) > step]:
            found.remove(path)
            shutil.rmtree(path)
    protected = {*found[-1:], *([] if best is None else [Path(best)])}
    # With limit 1 these can be two, if the best checkpoint is not the latest.
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
        # A foreign manifest must not make this read files outside of the checkpoint.
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
    # transformers resumes without a state that is missing, silently, and the run would end differently.
    for what in (*_NEEDED, *_FOR_EXACT_RESUME):
        if not _has(what, manifest):
            why = " (save_only_model leaves it out)" if what in _FOR_EXACT_RESUME else ""
            return f"its {MANIFEST} does not list {what}{why}"
    # Files with the right hashes can still hold something else, if another program wrote the checkpoint.
    return _unreadable(checkpoint)


def _has(what: str, names: Iterable[str]) -> bool:
    """Whether the files of a checkpoint include the part `what`."""
    patterns = (_NEEDED | _FOR_EXACT_RESUME)[what]
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def divided_by(checkpoint: str | Path) -> str | None:
    """What divided weights or optimiser states in the run of a checkpoint: `DeepSpeed`, `FSDP`, or None."""
    for name, pattern in (("DeepSpeed", "global_step*"), ("FSDP", "pytorch_model_fsdp*")):
        if any(Path(checkpoint).glob(pattern)):
            return name
    return None


def deepspeed_processes(checkpoint: str | Path) -> int:
    """Number of processes that have written the optimiser states in a checkpoint of DeepSpeed."""
    return len(list(Path(checkpoint).glob("global_step*/*_optim_states.pt")))


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

    Corrupt checkpoints are skipped with a warning. It raises `ValueError` if all are corrupt, or the folder has a
    finished model and no checkpoint: a new run would overwrite the model.
    """
    folder = Path(output_dir)
    found = list(reversed(checkpoints_in(folder)))
    for path in found:
        wrong = find_corruption(path)
        if wrong is None:
            return str(path)
        warnings.warn(f"the checkpoint {path} is skipped: {wrong}.", stacklevel=2)
    if found or has_model(folder):
        raise ValueError(
            f"{output_dir} has no complete checkpoint to resume from; choose another --output_dir, or pass --overwrite."
        )
    return None


def has_model(folder: str | Path) -> bool:
    """Whether a folder contains the weights of a model. Checkpoints in subfolders do not count."""
    return any(any(Path(folder).glob(pattern)) for pattern in MODEL_FILES)


def whole_checkpoint(path: str) -> str:
    """Returns the path of a checkpoint; `ValueError` if it is corrupt, is not a folder, or lacks weights or the step.

    A checkpoint of transformers has no manifest. It is accepted, with a warning that names missing parts.
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
        missing = [what for what in _FOR_EXACT_RESUME if not _has(what, names)]
        if wrong is None and missing:
            warnings.warn(
                f"the checkpoint {path} has no {', no '.join(missing)}: these start from scratch, and the result will "
                "differ from an uninterrupted run.",
                stacklevel=2,
            )
    if wrong is not None:
        raise ValueError(f"cannot resume from the checkpoint {path}: {wrong}.")
    return str(path)


def read_state(checkpoint: str | Path) -> TrainerState:
    """Reads the `TrainerState` of a checkpoint: its step, logs and best evaluation. `ValueError` if it is damaged."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    content = read_json(path)
    try:
        state = TrainerState(**content)
    except TypeError as error:  # fields that this version of transformers does not have
        raise ValueError(f"{path} cannot be read: {one_line(error)}.") from error
    wanted = {"global_step": int, "train_batch_size": int, "log_history": list}
    # Not `isinstance`, for which True is an integer.
    wrong = next((name for name, kind in wanted.items() if type(getattr(state, name)) is not kind), None)
    if wrong is None and not all(isinstance(entry, dict) and "step" in entry for entry in state.log_history):
        wrong = "log_history"
    if wrong is None and not isinstance(state.best_model_checkpoint, str | None):
        wrong = "best_model_checkpoint"
    if wrong is not None:
        raise ValueError(f"{path} cannot be read: its {wrong} is {one_line(repr(getattr(state, wrong)), 60)}.")
    return state
