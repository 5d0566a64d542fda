"""A step of `DeiTLTTrainer` compared with one of a bare loop with the same mathematics.

    python benchmarks/trainer_overhead.py

Both train in one process in alternating turns, each with its own student, optimiser and data loader: augmentation,
mixing, the teacher's forward pass on the mixed images, both heads' losses with class weights, AdamW, schedule. The
trainer also measures the gradient's norm, checks for numbers that are not finite, logs the parts of the loss, and can
evaluate, save and stop. The ratio is that of the medians. The script uses a GPU if one is available.
"""

import argparse
import copy
import itertools
import tempfile
import time

import numpy as np
import torch
from series import RESULTS, write_record
from timm.data.mixup import Mixup
from torch.nn import functional as F
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

STUDENTS = {
    "digits_lt, 16 px": {"image_size": 16, "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3},
    "192 wide, 32 px": {"image_size": 32, "hidden_size": 192, "num_hidden_layers": 9, "num_attention_heads": 3},
}


class BareLoop(TrainerCallback):
    """A callback that takes a step of the bare loop after each of the trainer's, and times both."""

    def __init__(self, trainer: DeiTLTTrainer, model: DeiTLTForImageClassification):
        self.trainer, self.model, self.args = trainer, model.train(), trainer.args
        decayed = set(trainer.get_decay_parameter_names(model))
        named = list(model.named_parameters())
        groups = [
            {"params": [value for name, value in named if (name in decayed) == decays], "weight_decay": decay}
            for decays, decay in ((True, self.args.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, self.args.learning_rate)
        self.mixup = Mixup(self.args.mixup, self.args.cutmix, label_smoothing=0.1, num_classes=10)
        loader = trainer.get_train_dataloader()
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))
        self.finish = trainer.views["pixel_values"].finish
        self.times: dict[str, list[float]] = {"trainer": [], "bare loop": []}

    def step(self, epoch: float) -> None:
        """One update."""
        batch = next(self.batches)
        pixels = self.finish(batch["pixel_values"].to(self.args.device, non_blocking=True))
        images, labels = self.mixup(pixels, batch["labels"].to(self.args.device, non_blocking=True))
        with torch.no_grad():
            taught = self.trainer.teacher(images).logits.argmax(dim=1)
        outputs = self.model(pixel_values=images)
        weights = self.trainer.drw_weights
        loss = F.cross_entropy(outputs.cls_logits, labels) + F.cross_entropy(
            outputs.distillation_logits, taught, weights
        )
        (loss / 2).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainer.learning_rate_at(epoch, self.args.num_train_epochs)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def on_step_end(self, args, state, control, **kwargs):
        begun = self.now()
        if state.global_step > 1:
            self.times["trainer"].append(begun - self.ended)
        self.step(state.epoch)
        self.ended = self.now()
        if state.global_step > 1:
            self.times["bare loop"].append(self.ended - begun)

    def now(self) -> float:
        """The time after the device has finished its work."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(name: str, steps: int) -> dict[str, float]:
    """Median seconds of a step of the trainer and of the loop."""
    values = STUDENTS[name]
    data = load_long_tailed("digits", imbalance_ratio=20)
    torch.manual_seed(0)
    config = DeiTLTConfig(patch_size=4, intermediate_size=4 * values["hidden_size"], num_labels=10, **values)
    student = DeiTLTForImageClassification(config)
    teacher = FlatTeacherConfig(backbone="resnet20", image_size=values["image_size"], num_labels=10)
    with tempfile.TemporaryDirectory() as folder:
        args = DeiTLTTrainingArguments(
            output_dir=folder, max_steps=steps, drw_start_epoch=0, mixing_in_drw=True, train_crop="padded", hflip=0,
            per_device_train_batch_size=64, learning_rate=1e-3, repeated_augmentation=1, eval_strategy="no",
            save_strategy="no", logging_steps=20, disable_tqdm=True,
        )  # fmt: skip
        trainer = DeiTLTTrainer(
            model=student, args=args, teacher=FlatTeacherForImageClassification(teacher), train_dataset=data["train"]
        )
        bare = BareLoop(trainer, copy.deepcopy(student).to(args.device))
        trainer.add_callback(bare)
        trainer.train()
    return {kind: float(np.median(times)) for kind, times in bare.times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=[300, 60], help="steps of the small, the large student")
    args = parser.parse_args()
    record, lines = {}, []
    for name, steps in zip(STUDENTS, args.steps, strict=True):
        seconds = measure(name, steps)
        ratio = seconds["trainer"] / seconds["bare loop"]
        record[name] = {**{kind: round(value, 5) for kind, value in seconds.items()}, "ratio": round(ratio, 3)}
        cells = " | ".join(f"{1000 * value:.1f}" for value in seconds.values())
        lines.append(f"| {name} | {cells} | {ratio:.3f} |")
    print("| student | trainer, ms | bare loop, ms | ratio |\n|---|---:|---:|---:|", *lines, sep="\n")
    write_record(RESULTS / "trainer_overhead.json", record)


if __name__ == "__main__":
    main()
