"""Series of runs over seeds, each a separate process with its own record; recorded runs are not repeated."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
GROUPS = ("overall", "head", "mid", "tail")
# Option of Linux's prctl (linux/prctl.h): the signal that a process receives when its parent dies.
_PR_SET_PDEATHSIG = 1
_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def slug(name: str) -> str:
    """Turns the name of a method into a part of a file name."""
    return name.lower().replace(",", "").replace(" ", "_")


def run(*command, threads: int | None = None) -> resource.struct_rusage:
    """Runs a Python program of the repository; on Linux it ends if this process dies.

    Args:
        *command: The program and its arguments.
        threads: Number of torch's threads; by default torch chooses.

    Returns:
        The resources that the process used: `ru_maxrss` in KiB, `ru_utime` and `ru_stime` in seconds.

    Raises:
        RuntimeError: If it fails; the message has the end of its output.
    """
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent,
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{errors[-4000:]}")
    return usage


def end_with_parent() -> None:
    """Ends this process with its parent (Linux); otherwise it would write into the folder of the next driver."""
    if _LIBRARY is not None:
        _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def write_record(path: Path, content: dict) -> None:
    """Writes a record atomically."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def mean_and_deviation(values: np.ndarray, decimals: int = 1) -> list[str]:
    """Table cells of values (seeds, columns)."""
    cells = [f"{mean:.{decimals}f}" for mean in values.mean(axis=0)]
    if len(values) == 1:
        return cells
    spread = values.std(axis=0, ddof=1)
    return [f"{cell} ± {deviation:.{decimals}f}" for cell, deviation in zip(cells, spread, strict=True)]
