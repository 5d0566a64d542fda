"""The first minutes on a GPU: device checks, speed beside timm's, Fashion-MNIST-LT at the paper's length.

    DATA=/usr/share/datasets/fashion-mnist benchmarks/gpu_first.sh

`gpu_first.sh` prepares the environment and calls this program. Each step is a process with a time limit of its own and
writes its result before the next step begins (the device checks run a few at a time): one that fails or hangs costs the
others nothing. A second call skips steps that have a result, and resumes trainings from their checkpoints. After each
step, `summary.json` and `summary.md` in the folder of the results have what is known.

Without a GPU, SMALL=1 tries all steps in tiny sizes; its figures mean nothing.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from comparisons import COMPILED_ON_GPU, EAGER_ON_GPU, GPU_COMPARISONS, IS_TRIAL, VIT_B, Comparison
from series import GROUPS, RESULTS, ROOT, end_with_parent, slug, write_record

from deitlt_hf.analysis.budget import GPUS
from deitlt_hf.analysis.model_cost import student_flops

sys.path.append(str(ROOT / "research"))
import arms

SETTING = "fashion_trial" if IS_TRIAL else "fashion_long"
ARMS = ("deit-lt", "labels", "ours")
PATIENCE = 5 if IS_TRIAL else 1  # by which limits are multiplied; a CPU compiles for minutes
LEAST = 20  # seconds without which a step does not begin
GRACE = 20  # seconds in which a stopped training writes its checkpoint


@dataclass(frozen=True)
class Step:
    """One process with a result.

    Args:
        title: Name in the summary; that of the result's file is made of it.
        command: A Python program of the repository, with its arguments.
        limit: Seconds after which it is stopped.
        collect: Returns the result; None if the program writes it itself, to the file after `--json`.
    """

    title: str
    command: Sequence
    limit: float
    collect: Callable[[], dict] | None = None


class Session:
    """A call of the program: its results, and the time that is left.

    Args:
        folder: Folder of the results.
        minutes: Time in which all ends.
    """

    def __init__(self, folder: Path, minutes: float):
        self.folder, self._end = folder, time.monotonic() + 60 * minutes - GRACE
        self.scratch = ROOT / "build" / f"{folder.name}_scratch"  # runs and logs
        self.steps: list[Step] = []
        (self.scratch / "logs").mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds that are left before running steps are stopped."""
        return self._end - time.monotonic()

    def path(self, step: Step) -> Path:
        """File of a step's result."""
        return self.folder / f"{slug(step.title)}.json"

    def result(self, step: Step) -> dict | None:
        """Result of a step, which has an `error` if it failed; None if it has not run."""
        path = self.path(step)
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, steps: Sequence[Step], jobs: int = 1) -> None:
        """Runs steps, several at the same time if `jobs` is above 1, and updates the summary after each."""
        self.steps += steps
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(self._attempt, steps):
                self.summarise()

    def _attempt(self, step: Step) -> None:
        before = self.result(step)
        if before is not None and not is_failure(before):
            print(f"{step.title}: has a result", flush=True)
            return
        limit = min(PATIENCE * step.limit, self.left)
        if limit < LEAST:
            print(f"{step.title}: no time is left", flush=True)
            return
        print(f"{step.title}: begins, at most {limit:.0f} s", flush=True)
        self.path(step).unlink(missing_ok=True)
        begun = time.monotonic()
        log = self.scratch / "logs" / f"{slug(step.title)}.log"
        error = stopped_after(step, limit, log)
        result = self.result(step) or {}
        if error is None and step.collect is not None:
            result = step.collect()
        if error is not None and not result.get("checks"):  # a check that failed has written why
            result["error"] = f"{error}; {log.name}: {last_line(log)}"
        write_record(self.path(step), result | {"wall_seconds": round(time.monotonic() - begun, 1)})
        print(f"{step.title}: {'FAILED' if is_failure(result) else 'done'}", flush=True)

    def summarise(self) -> None:
        """Writes what is known as JSON and as text for docs/performance.md."""
        found = {step.title: result for step in self.steps if (result := self.result(step)) is not None}
        write_record(self.folder / "summary.json", found)
        (self.folder / "summary.md").write_text("\n".join(summary(found)) + "\n")


def stopped_after(step: Step, limit: float, log: Path) -> str | None:
    """Runs a step's program; returns why it ended, if not with code 0."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, step.command)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            code = process.wait(limit)
            return f"ended with code {code}" if code else None
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """Ends a process with all its children; trainings have the time to write a checkpoint."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5)):
        until = time.monotonic() + seconds
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < until:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:  # nothing is left of the group
            return


def last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1][:300]


def is_failure(result: dict) -> bool:
    """Whether a step should run again."""
    return "error" in result or any(check["passed"] is False for check in result.get("checks", {}).values())


# ---- The steps ----


def check(session: Session, name: str, limit: float) -> Step:
    """One of device_checks.py."""
    title = f"check {name}"
    command = ["benchmarks/device_checks.py", "--only", name, "--work", session.scratch]
    command += ["--json", session.folder / f"{slug(title)}.json", *(["--trial"] if IS_TRIAL else [])]
    return Step(title, command, limit)


def speed(session: Session, name: str, limit: float) -> Step:
    """One of run.py's comparisons."""
    path = session.folder / f"{slug(name)}.json"
    return Step(name, ["benchmarks/run.py", "--only", name, "--threads", 1, "--json", path], limit)


def fashion(session: Session, data: str, seed: int) -> Step:
    """Teacher and three students of a seed; the students train at the same time."""
    records = session.folder / "records" if IS_TRIAL else arms.RESULTS
    command = ["research/run.py", "--setting", SETTING, "--data_dir", data, "--seeds", seed, "--arms", *ARMS]
    command += ["--jobs", 1 if IS_TRIAL else len(ARMS), "--results", records]
    runs = arms.Runs(SETTING, results=records)

    def collect() -> dict:
        found = {name: json.loads(runs.record(seed, name).read_text()) for name in ("ce-sam", *ARMS)}
        return {
            "accuracies": {name: record["last"]["accuracies"] for name, record in found.items()},
            "steps": {name: record["last"]["step"] for name, record in found.items()},
            "train_seconds": {name: record["train_seconds"] for name, record in found.items()},
            "hardware": found["deit-lt"]["hardware"],
        }

    return Step(f"Fashion-MNIST-LT seed {seed}", command, 600, collect)


def missing_files(data: Path) -> list[str]:
    """Names of the IDX files that a folder has neither plain nor compressed."""
    names = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return [name for name in names if not any((data / f"{name}{end}").is_file() for end in ("", ".gz"))]


# ---- The summary ----


def summary(found: dict[str, dict]) -> Iterator[str]:
    """Lines of a Markdown page."""
    checked = {title: result for title, result in found.items() if title.startswith("check ")}
    devices = {result["device"] for result in checked.values() if "device" in result}
    versions = next((result["versions"] for result in checked.values() if "versions" in result), {})
    yield f"Device: {', '.join(sorted(devices)) or 'unknown'}; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    if IS_TRIAL:
        yield "\nA trial in tiny sizes (SMALL=1): the figures mean nothing."
    yield "\n| check | result | seconds |\n|---|---|---:|"
    for title, result in checked.items():
        yield f"| {title.removeprefix('check ')} | {outcome(result)} | {result.get('wall_seconds', math.nan):.0f} |"
    for name, comparison in GPU_COMPARISONS.items():
        if name in found.get(name, {}):
            yield from speeds(comparison, found[name][name])
            ours = found[name][name]["contenders"].get("deitlt-hf")
            if ours is not None and name == "gpu_vit_b_step" and not IS_TRIAL:
                yield "\n" + utilisation(next(iter(devices), "unknown"), comparison.images / ours["median"])
        elif name in found:
            yield f"\n{comparison.title}: {found[name]['error']}"
    yield from fashions({title: result for title, result in found.items() if title.startswith("Fashion")})


def outcome(result: dict) -> str:
    """A cell with the result of a check."""
    if "error" in result:
        return f"failed: {cell(result['error'])}"
    (check,) = result["checks"].values()
    if check["passed"] is None:
        return f"not possible: {check['missing']} is missing"
    said = "passed" if check["passed"] else f"failed: {cell(check.get('error', ''))}"
    shown = {name: value for name, value in check.items() if isinstance(value, float)}
    shown |= {name: " to ".join(f"{value:.3g}" for value in check[name]) for name in ("losses",) if name in check}
    return "; ".join([said, *(f"{n} {v:.3g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown.items())])


def cell(text: str) -> str:
    """The line of a long error that says most, as the text of a table's cell."""
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or [""]
    return lines[0].replace("|", "/")[:200]


def speeds(comparison: Comparison, record: dict) -> Iterator[str]:
    """Images a second and memory of each contender."""
    figures = record["contenders"]
    best = min(values["median"] for name, values in figures.items() if name in comparison.peers)
    yield f"\n{comparison.title}; peak {record['peak_gflops'] / 1000:.3g} TFLOP/s\n"
    yield "| | images / s | share of peak | memory, MiB | times the best peer |\n|---|---:|---:|---:|---:|"
    for name, values in figures.items():
        rate, memory = comparison.images / values["median"], values.get("memory_mib")
        share = comparison.flops() / values["median"] / 1e9 / record["peak_gflops"]
        shown = "" if memory is None else f"{memory:,.0f}"
        yield f"| {name} | {rate:,.0f} | {share:.2f} | {shown} | {best / values['median']:.2f} |"
    for name, error in record.get("errors", {}).items():
        yield f"| {name} | {cell(error)} | | | |"


def utilisation(device: str, rate: float) -> str:
    """What to give `deitlt plan` as `--utilisation`, from the images a second of a ViT-B/16."""
    gpu = next((name for name in GPUS if name in device.lower().replace(" ", "")), None)
    if gpu is None:
        return f"`deitlt plan` does not know the peak of {device}."
    config = VIT_B.config()
    rates = np.linspace(0.0, config.drop_path_rate, config.num_hidden_layers)  # as the plan counts the dropped branches
    flops, of_blocks = student_flops(config)
    operations = 3 * (flops - float(rates @ of_blocks))
    return f"Measured: `deitlt plan --gpu {gpu} --utilisation {rate * operations / GPUS[gpu].flops:.2f}`."


def fashions(found: dict[str, dict]) -> Iterator[str]:
    """Accuracies in % by arm, group and seed."""
    setting = arms.SETTINGS[SETTING]
    yield f"\n{setting.title}; accuracies in %\n"
    yield f"| | expert | {' | '.join(GROUPS)} | steps | seconds |\n|---|---|{'---:|' * (len(GROUPS) + 2)}"
    for title, result in found.items():
        if "error" in result:
            yield f"| {title} | {cell(result['error'])} |{' |' * (len(GROUPS) + 2)}"
            continue
        for name, experts in result["accuracies"].items():
            arm = setting.teachers.get(name) or setting.students[name]
            for expert, row in experts.items():
                cells = [f"{title}: {arm.title}", expert, *(f"{100 * row[group]:.1f}" for group in GROUPS)]
                cells += [f"{result['steps'][name]:,}", f"{result['train_seconds'][name]:.0f}"]
                yield f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Fashion-MNIST's four IDX files; without it, nothing is trained on it")
    parser.add_argument("--minutes", type=float, default=8, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2, while time lasts")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/gpu_trial" if IS_TRIAL else RESULTS / "gpu")
    args = parser.parse_args()
    if args.data is not None and (missing := missing_files(Path(args.data))):
        parser.error(f"{args.data} lacks {', '.join(missing)}; --data (DATA=) is the folder of the four IDX files.")
    session = Session(args.folder.resolve(), args.minutes)
    jobs = max(min((os.cpu_count() or 1) // 3, 4), 1)
    # The teacher of the first check teaches the students of the others. On the H200 that was tried, a process took 25
    # to 30 seconds to its first step, and several at the same time more.
    session.run([check(session, "SAM", 110)])
    checks = {"bf16": 90, "fp16": 90, "flash attention": 60, "compiled": 180, "folder": 240, "waiting": 60}
    checks |= {"resume": 120, "all GPUs": 90, "FSDP2": 90, "DeepSpeed": 90, "memory": 60}
    session.run([speed(session, name, 90) for name in EAGER_ON_GPU])
    session.run([check(session, name, limit) for name, limit in checks.items()], jobs)
    session.run([speed(session, name, 180) for name in COMPILED_ON_GPU])
    if args.data is None:
        print("Fashion-MNIST-LT: not trained, because DATA= is not given", flush=True)
    else:
        session.run([fashion(session, str(Path(args.data).resolve()), seed) for seed in args.seeds])
    print((session.folder / "summary.md").read_text())
    sys.exit(any(is_failure(session.result(step) or {"error": "has not run"}) for step in session.steps))


if __name__ == "__main__":
    main()
