"""The output folder of a run: detecting an earlier run, locking the folder, and removing files for a new run."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from ..io import check_can_be_folder
from ..model_folder import CURVES_FILE, EMA_FOLDER, LOG_FILE
from ..records import RESULTS_FILE, is_of_run, read_record
from .checkpoints import MODEL_FILES, checkpoints_in, has_model

LOCK_FILE = ".lock"
EMISSIONS_FILE = "emissions.csv"  # codecarbon's name


def run_files(output_dir: str | Path) -> list[str]:
    """Names of the files in a folder that belong to a run (record, checkpoints, model)."""
    folder = Path(output_dir)
    patterns = (RESULTS_FILE, "checkpoint-*", *MODEL_FILES)
    return sorted(path.name for pattern in patterns for path in folder.glob(pattern))


def is_abandoned(output_dir: str | Path) -> bool:
    """Whether a folder holds a run that ended before its first checkpoint, with no model or checkpoint to lose."""
    if has_model(output_dir) or checkpoints_in(output_dir):
        return False
    with contextlib.suppress(OSError, ValueError):
        record = read_record(output_dir)
        return is_of_run(record) and record.get("finished") is False
    return False


def resumes_in(output_dir: str | Path, resume_from_checkpoint: str | bool | None) -> bool:
    """Whether the run to resume is the run in `output_dir`. A checkpoint can also belong to another run."""
    if resume_from_checkpoint is None or isinstance(resume_from_checkpoint, bool) or resume_from_checkpoint == "auto":
        return bool(resume_from_checkpoint)
    return Path(resume_from_checkpoint).resolve().parent == Path(output_dir).resolve()


def check_output_dir(output_dir: str | Path, overwrite: bool, resuming: bool) -> None:
    """Raises `FileExistsError` if a folder holds another run, neither overwritten nor resumed, or is a file."""
    check_can_be_folder(output_dir)
    found = run_files(output_dir)
    if found and not overwrite and not resuming and not is_abandoned(output_dir):
        raise FileExistsError(
            f"{output_dir} holds another run ({', '.join(found[:3])}); choose another --output_dir, resume "
            "it with --resume_from_checkpoint auto, or replace it with --overwrite."
        )


@contextlib.contextmanager
def run_lock(output_dir: str | Path) -> Iterator[None]:
    """Locks a folder against other runs, to the end of the process; `FileExistsError` if one is writing there."""
    path = Path(output_dir) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"another run is writing to {output_dir}; wait until it ends, or choose another --output_dir."
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows cannot delete an open file; the lock file may stay
            path.unlink()
        lock.release()


def claim_output_dir(output_dir: str | Path, overwrite: bool, resuming: bool, accelerator: Accelerator) -> None:
    """Removes checkpoints, results and log of a run that is replaced, after every process has checked the folder.

    The files of a run that was interrupted before its first checkpoint are also removed. A finished model stays until
    the new model is saved over it.
    """
    accelerator.wait_for_everyone()
    abandoned = not resuming and is_abandoned(output_dir)
    if abandoned and accelerator.is_main_process:
        print(
            f"{output_dir} has the record of a run that ended before its first checkpoint; it is replaced.", flush=True
        )
    if (overwrite or abandoned) and not resuming and accelerator.is_main_process:
        for checkpoint in Path(output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        shutil.rmtree(Path(output_dir) / EMA_FOLDER, ignore_errors=True)
        for name in (RESULTS_FILE, LOG_FILE, CURVES_FILE, EMISSIONS_FILE):
            (Path(output_dir) / name).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
