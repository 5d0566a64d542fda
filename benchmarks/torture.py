"""A run that is killed repeatedly, compared with an undisturbed run: both must end with the same bytes.

    python benchmarks/torture.py --kills 20
    python benchmarks/torture.py --kills 20 --kind teacher

The student's run has the recipe's distillation, mixing, dropped paths, accumulation, data loader workers and a moving
average; the teacher's has SAM and PaCo's queue. Every process receives SIGKILL: two in three at a random moment, one in
three while a checkpoint is being written. The record is in `benchmarks/results/`.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from series import RESULTS, ROOT, write_record

COMMON = ["--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1", "--use_cpu", "true"]
COMMON += ["--eval_strategy", "epoch", "--global_batch_size", "64", "--per_device_train_batch_size", "32"]
RUNS = {
    "student": ["distill.py", "--num_train_epochs", "120", "--drw_start_epoch", "80", "--ema_decay", "0.99"],
    "teacher": ["train_teacher.py", "--num_train_epochs", "120", "--teacher_loss", "paco"],
}


def start(kind: str, folder: Path, *arguments: str) -> subprocess.Popen:
    """Starts or resumes a run in a separate process group."""
    script, *values = RUNS[kind]
    command = [sys.executable, ROOT / "scripts" / script, "--recipe", "digits_lt", *COMMON, *values]
    command += ["--output_dir", folder, "--resume_from_checkpoint", "auto", *arguments]
    log = (folder.parent / f"{folder.name}.log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def written(folder: Path) -> int:
    """Time at which a run last wrote to its log."""
    log = folder / "log.jsonl"
    return log.stat().st_mtime_ns if log.exists() else 0


def steps(folder: Path) -> int:
    """Number of steps of the newest checkpoint."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*[0-9]")), default=0)


def kill(process: subprocess.Popen, folder: Path, in_a_save: bool, chance: random.Random) -> bool:
    """Kills a run after it has started training; returns whether it was alive and, if requested, in a save."""
    before = written(folder)
    while process.poll() is None and written(folder) == before:
        time.sleep(0.02)
    end = time.monotonic() + chance.uniform(0, 1.5)
    while process.poll() is None and (not (folder / ".saving").exists() if in_a_save else time.monotonic() < end):
        time.sleep(0.001)
    if in_a_save:
        time.sleep(chance.uniform(0, 0.03))
    alive, was_saving = process.poll() is None, (folder / ".saving").exists()
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive and (was_saving or not in_a_save)


def digest(folder: Path) -> str:
    """Hash of the final weights of a run and of their average."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("model.safetensors")) + sorted(folder.glob("ema/model.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=RUNS, default="student")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        undisturbed, tortured = Path(place) / "undisturbed" / "run", Path(place) / "tortured" / "run"
        for folder in (undisturbed, tortured):
            folder.parent.mkdir()
        # One run has a worker and the other none: neither the kills nor the workers may change the result.
        if start(args.kind, undisturbed, "--dataloader_num_workers", "0").wait():
            sys.exit((undisturbed.parent / "run.log").read_text()[-2000:])
        if args.kind == "student":
            (tortured.parent / "teacher").symlink_to(undisturbed.parent / "teacher")
        kills, in_saves, starts = 0, 0, 0
        while True:
            process = start(args.kind, tortured, "--dataloader_num_workers", str(starts % 2))
            starts += 1
            in_a_save = kills % 3 == 2
            if kills < args.kills:
                if kill(process, tortured, in_a_save, chance):
                    kills += 1
                    in_saves += in_a_save
                    print(
                        f"kill {kills}{' in a save' if in_a_save else ''} with a checkpoint of step {steps(tortured)}",
                        flush=True,
                    )
                elif process.returncode == 0:
                    sys.exit("the run ended before it was killed often enough; make it longer.")
            elif process.wait():
                sys.exit((tortured.parent / "run.log").read_text()[-2000:])
            else:
                break
        digests = digest(undisturbed), digest(tortured)
    same = digests[0] == digests[1]
    print(f"{kills} kills, {in_saves} of them in a save: {'the same bytes' if same else 'OTHER bytes'}, {digests}")
    record = {"kills": kills, "in_a_save": in_saves, "starts": starts, "sha256": list(digests), "same": same}
    write_record(RESULTS / f"torture-{args.kind}.json", record)
    sys.exit(not same)


if __name__ == "__main__":
    main()
