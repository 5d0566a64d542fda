"""Memory and open files of a run of 200 epochs: both must stay constant after the first epochs.

    python benchmarks/memory_over_epochs.py

A small student trains with a teacher, two loader workers and a moving average. It is evaluated and drawn after every
epoch, with a checkpoint every tenth. Resident memory and file handles are those of the process and its workers after
each epoch. The C library returns its free memory before each measurement; growth is therefore memory in use.
"""

import argparse
import ctypes
import gc
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from series import RESULTS, write_record
from transformers import TrainerCallback

from deitlt_hf import (
    DeiTLTConfig,
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
)
from deitlt_hf.data import load_long_tailed


class Gauge(TrainerCallback):
    """Memory in MiB and file handles after each epoch."""

    def __init__(self):
        self.memory, self.files = [], []

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            return
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        process = psutil.Process()
        family = [process, *process.children(recursive=True)]
        self.memory.append(sum(member.memory_info().rss for member in family) / 2**20)
        self.files.append(sum(member.num_fds() for member in family))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    epochs = parser.parse_args().epochs
    data = load_long_tailed("digits", imbalance_ratio=20)
    torch.manual_seed(0)
    config = DeiTLTConfig(
        image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=10,
    )  # fmt: skip
    teacher = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10))
    gauge = Gauge()
    with tempfile.TemporaryDirectory() as folder:
        args = DeiTLTTrainingArguments(
            output_dir=folder, num_train_epochs=epochs, drw_start_epoch=epochs // 2, per_device_train_batch_size=64,
            per_device_eval_batch_size=200, repeated_augmentation=1, train_crop="padded", dataloader_num_workers=2,
            ema_decay=0.99, eval_strategy="epoch", save_strategy="steps", save_steps=60, logging_steps=5,
        )  # fmt: skip
        trainer = DeiTLTTrainer(
            model=DeiTLTForImageClassification(config), args=args, train_dataset=data["train"],
            eval_dataset=data["test"], teacher=teacher, callbacks=[gauge],
        )  # fmt: skip
        trainer.check_teacher = lambda *_: {}  # the teacher is not trained, and does not need to be
        trainer.train()
        log = (Path(folder) / "log.jsonl").stat().st_size
    # The first tenth fills caches.
    tenth = epochs // 10
    first, last = (float(np.median(part)) for part in (gauge.memory[tenth : 2 * tenth], gauge.memory[-tenth:]))
    growth = 100 * (last / first - 1)
    files = gauge.files[tenth], gauge.files[-1]
    print(f"memory {first:.1f} MiB after {tenth} epochs, {last:.1f} MiB at the end: {growth:+.2f} %")
    print(f"file handles {files[0]} and {files[1]}; the log has {log} bytes")
    record = {
        "epochs": epochs,
        "first_mib": round(first, 1),
        "last_mib": round(last, 1),
        "growth_percent": round(growth, 2),
    }
    write_record(RESULTS / "memory_over_epochs.json", {**record, "files": files})


if __name__ == "__main__":
    main()
