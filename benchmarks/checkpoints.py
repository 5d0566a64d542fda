"""The cost of a checkpoint: this package's trainer beside transformers' own, and its parts.

    python benchmarks/checkpoints.py

Both write weights, AdamW's state, schedule and random state of the same student in alternating turns. transformers
writes the files; this package also computes their hashes, waits until they are on the disk, and moves the folder into
place. The figures are medians of seconds. They depend on the disk of the output folder (`TMPDIR`).
"""

import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from series import RESULTS, write_record
from transformers import Trainer, TrainingArguments

import deitlt_hf.training.checkpoints as checkpoints
from deitlt_hf import DeiTLTConfig, DeiTLTForImageClassification, DeiTLTTrainer, DeiTLTTrainingArguments
from deitlt_hf.data import load_long_tailed

STUDENTS = {
    "128 wide, 6 blocks, 28 px": {
        "image_size": 28, "patch_size": 4, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
        "intermediate_size": 512,
    },
    "ViT-B/16, 224 px": {"image_size": 224},
}  # fmt: skip
TURNS = 5
FILE_SHA256, SYNC_TO_DISK = checkpoints.file_sha256, checkpoints.sync_to_disk


def seconds(work, *args) -> float:
    begun = time.perf_counter()
    work(*args)
    return time.perf_counter() - begun


def timed(function, spent: dict[str, float]):
    """The function, which adds its time to `spent` under its name."""

    def call(*args):
        begun = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent[function.__name__] += time.perf_counter() - begun

    return call


def with_state(trainer: Trainer) -> Trainer:
    """The trainer after one update with zero gradients, so that the optimiser has a state."""
    trainer.create_optimizer_and_scheduler(10)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return trainer


def trainers(model: DeiTLTForImageClassification, folder: str) -> dict[str, Trainer]:
    shared = {"report_to": "none", "eval_strategy": "no", "save_total_limit": 2, "use_cpu": True}
    images = load_long_tailed("digits", imbalance_ratio=20)["train"]
    plain = Trainer(model, TrainingArguments(f"{folder}/plain", **shared))
    arguments = DeiTLTTrainingArguments(f"{folder}/ours", distillation="none", **shared)
    return {"transformers": plain, "deitlt-hf": DeiTLTTrainer(model, arguments, train_dataset=images)}


def main():
    record = {}
    print("| student | files, MB | transformers, s | deitlt-hf, s | of this: hashes, s | of this: disk, s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, size in STUDENTS.items():
        model = DeiTLTForImageClassification(DeiTLTConfig(num_labels=10, **size))
        with tempfile.TemporaryDirectory() as folder:
            both = {kind: with_state(trainer) for kind, trainer in trainers(model, folder).items()}
            times = defaultdict(list)
            for turn in range(TURNS + 1):
                for kind, trainer in both.items():
                    spent: dict[str, float] = defaultdict(float)
                    checkpoints.file_sha256, checkpoints.sync_to_disk = (
                        timed(function, spent) for function in (FILE_SHA256, SYNC_TO_DISK)
                    )
                    trainer.state.global_step = turn + 1
                    times[kind].append(seconds(trainer._save_checkpoint, model, None))
                    if kind == "deitlt-hf":
                        times["hashes"].append(spent["file_sha256"])
                        times["disk"].append(spent["sync_to_disk"])
            place = Path(folder) / "ours" / f"checkpoint-{TURNS + 1}"
            megabytes = sum(path.stat().st_size for path in place.iterdir()) / 1e6
        medians = {kind: float(np.median(values[1:])) for kind, values in times.items()}  # the first is a warm-up
        record[name] = {"megabytes": megabytes, **medians}
        cells = [f"{medians[kind]:.2f}" for kind in ("transformers", "deitlt-hf", "hashes", "disk")]
        print(f"| {name} | {megabytes:,.0f} | {' | '.join(cells)} |", flush=True)
    write_record(RESULTS / "checkpoints.json", record)


if __name__ == "__main__":
    main()
