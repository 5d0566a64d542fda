"""Growth of the training cost with batch, image size, classes and processes, compared with the arithmetic.

    python benchmarks/scaling.py                            # measures what the record lacks, and draws
    python benchmarks/scaling.py --only classes --again     # measures one curve again
    python benchmarks/scaling.py --draw                     # the picture and the table from the record

A training step mixes labels, and has the student's forward pass, the loss with class weights and a hard teacher's
random logits, the backward pass and fused AdamW. With many classes its parts are also measured separately. The curve of
processes uses `DeiTLTTrainer` with input and a ResNet-20 as teacher; the processes share a batch of 128 digits. All
points of a curve are measured in turn, and a change of the machine's speed affects all equally. The first turn is for
warm-up. The record has medians and 10th and 90th percentiles of the turns, in seconds. The arithmetic is the FLOP of
matrix products for each core: 3 x the forward pass as torch counts it. For a part without matrix products it is the
number of elements.

The table gives the growth of the time from one point to the next, divided by the growth of the arithmetic. Run it on a
quiet machine: two threads that share a core with another program wait for each other.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from series import RESULTS, ROOT, run, write_record
from timm.data.mixup import mixup_target
from transformers import TrainerCallback

from deitlt_hf import (
    DeiTLTConfig,
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
)
from deitlt_hf.analysis.model_cost import counted_flops
from deitlt_hf.data import load_long_tailed
from deitlt_hf.evaluation.expert_table import COLOURS
from deitlt_hf.losses import DistillationLoss, effective_number_weights

RECORD = RESULTS / "scaling.json"
PICTURE = ROOT / "docs" / "pictures" / "scaling.png"
BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)
IMAGE_SIZES = (32, 64, 96, 128, 192, 256, 384)
CLASSES = (10, 100, 1_000, 10_000, 100_000)
# Processes, and threads of each.
ARRANGEMENTS = {"1 process\n1 thread": (1, 1), "1 process\n2 threads": (1, 2), "2 processes\n1 thread each": (2, 1)}
GLOBAL_BATCH = 128
SMALL = {"patch_size": 4, "hidden_size": 192, "num_hidden_layers": 9, "num_attention_heads": 3}
VIT_S = {"patch_size": 16, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
DIGITS = {"image_size": 16, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3}
TEACHER = FlatTeacherConfig(backbone="resnet20", image_size=DIGITS["image_size"], num_labels=10)
WARMUP_STEPS, STEPS = 5, 30  # steps of the trainer in a turn
SHORTEST = 0.1  # seconds; a shorter call is repeated within its turn
TOLERANCE = 1.05  # larger growth, relative to the arithmetic, is marked in the table


@dataclass(frozen=True)
class Point:
    """One point of a curve: its position on the axis, its arithmetic, and a function that measures its time once."""

    at: int | str
    arithmetic: float
    seconds: Callable[[], float]


def repeatedly(call: Callable[[], object]) -> Callable[[], float]:
    """A function that measures the time of a call, repeated until the time is measurable."""

    def seconds() -> float:
        begun = time.perf_counter()
        for calls in itertools.count(1):
            call()
            elapsed = time.perf_counter() - begun
            if elapsed >= SHORTEST:
                return elapsed / calls

    return seconds


def student_config(image_size: int, classes: int, hidden_size: int, **shape: int) -> DeiTLTConfig:
    """A configuration without stochastic depth; all turns then do the same work."""
    sizes = {"image_size": image_size, "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size}
    return DeiTLTConfig(**sizes, **shape, num_labels=classes, drop_path_rate=0.0)


def step_flops(config: DeiTLTConfig) -> int:
    """FLOP of a training step for one image."""
    with torch.device("meta"):
        model = DeiTLTForImageClassification(config)
    return 3 * counted_flops(model, config.image_size)


class Step:
    """A training step and its parts, each on one random batch."""

    def __init__(self, batch_size: int, image_size: int, shape: dict[str, int], classes: int = 10):
        generator = torch.Generator().manual_seed(0)
        self.config, self.batch_size = student_config(image_size, classes, **shape), batch_size
        self.model = DeiTLTForImageClassification(self.config).train()
        self.class_counts = np.geomspace(1280, 5, classes).astype(int).tolist()  # ImageNet-LT's extremes
        self.criterion = DistillationLoss(class_weights=self.class_weights())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
        self.labels = torch.randint(classes, (batch_size,), generator=generator)
        self.teacher_logits = torch.randn(batch_size, classes, generator=generator)
        self.tokens = torch.randn(batch_size, 2, self.config.hidden_size, generator=generator).requires_grad_()
        self.targets = self.mixed_labels()

    def class_weights(self) -> torch.Tensor:
        return effective_number_weights(self.class_counts)

    def mixed_labels(self) -> torch.Tensor:
        return mixup_target(self.labels, self.config.num_labels, 0.7, 0.1)

    def whole(self) -> None:
        """The complete step. It keeps its gradients, with which the optimiser is measured separately."""
        self.optimizer.zero_grad()
        outputs = self.model(pixel_values=self.images)
        logits = (outputs.cls_logits, outputs.distillation_logits)
        self.criterion(*logits, self.mixed_labels(), self.teacher_logits).loss.backward()
        self.optimizer.step()

    def heads_and_loss(self) -> None:
        """Forward and backward pass of both heads and the loss, from the student's tokens and back to them."""
        heads = (self.model.cls_classifier, self.model.distillation_classifier)
        logits = [head(self.tokens[:, index]) for index, head in enumerate(heads)]
        loss = self.criterion(*logits, self.targets, self.teacher_logits).loss
        torch.autograd.grad(loss, [self.tokens, *(value for head in heads for value in head.parameters())])

    def point(self, at: int) -> Point:
        return Point(at, step_flops(self.config) * self.batch_size, repeatedly(self.whole))


def class_points() -> dict[str, list[Point]]:
    """The step, and separately its parts that grow with the number of classes."""
    parts: dict[str, list[Point]] = {}
    for classes in CLASSES:
        step = Step(32, 32, SMALL, classes)
        head_flops = 3 * 2 * 2 * step.batch_size * step.config.hidden_size * classes
        points = {
            "training step": step.point(classes),  # first, because AdamW alone uses its gradients
            "heads + loss": Point(classes, head_flops, repeatedly(step.heads_and_loss)),
            "AdamW": Point(classes, step.model.num_parameters(), repeatedly(step.optimizer.step)),
            "mixed labels": Point(classes, step.batch_size * classes, repeatedly(step.mixed_labels)),
            "class weights": Point(classes, classes, repeatedly(step.class_weights)),
        }
        for part, point in points.items():
            parts.setdefault(part, []).append(point)
    return parts


def process_points() -> dict[str, list[Point]]:
    teacher = FlatTeacherForImageClassification(TEACHER)
    flops = step_flops(student_config(classes=10, **DIGITS)) + counted_flops(teacher, DIGITS["image_size"])
    points = [
        Point(name, flops * GLOBAL_BATCH / (processes * threads), launched(processes, threads))
        for name, (processes, threads) in ARRANGEMENTS.items()
    ]
    return {"training step": points}


def launched(processes: int, threads: int) -> Callable[[], float]:
    """A function that measures a step of the trainer in separate processes."""
    # accelerate launch looks for GPUs before it reads its configuration, unless an option forbids it.
    os.environ["ACCELERATE_USE_CPU"] = "1"
    configuration = ROOT / "scripts" / "accelerate" / "cpu.yaml"
    # Port 0 is a free port; another run may use the default.
    launcher = ["-m", "accelerate.commands.launch", "--config_file", configuration, "--main_process_port", 0]
    launcher += ["--num_processes", processes]

    def seconds() -> float:
        with tempfile.TemporaryDirectory() as folder:
            run(*(launcher if processes > 1 else []), __file__, "--trainer", folder, threads=threads)
            return json.loads((Path(folder) / "seconds.json").read_text())

    return seconds


class StepTimes(TrainerCallback):
    """A callback that records when each step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def time_trainer(folder: Path) -> None:
    """Writes the mean time of a step, with ends of epochs, to `seconds.json`; runs in every process."""
    torch.manual_seed(0)
    args = DeiTLTTrainingArguments(
        output_dir=str(folder / "run"), max_steps=WARMUP_STEPS + STEPS, drw_start_epoch=0, mixing_in_drw=True,
        global_batch_size=GLOBAL_BATCH, per_device_train_batch_size=GLOBAL_BATCH, train_crop="padded", hflip=0,
        repeated_augmentation=1, eval_strategy="no", save_strategy="no", logging_steps=1000, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = DeiTLTTrainer(
        model=DeiTLTForImageClassification(student_config(classes=10, **DIGITS)),
        args=args,
        teacher=FlatTeacherForImageClassification(TEACHER),
        train_dataset=load_long_tailed("digits", imbalance_ratio=1)["train"],
    )
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    trainer.accelerator.end_training()  # gloo may abort a process whose group is open when it exits
    if trainer.is_world_process_zero():
        write_record(folder / "seconds.json", (times.ends[-1] - times.ends[WARMUP_STEPS - 1]) / STEPS)


CURVES: dict[str, Callable[[], dict[str, list[Point]]]] = {
    "batch": lambda: {"training step": [Step(size, 32, SMALL).point(size) for size in BATCH_SIZES]},
    "images": lambda: {"training step": [Step(2, size, VIT_S).point(size) for size in IMAGE_SIZES]},
    "classes": class_points,
    "processes": process_points,
}
# Title and label of the axis.
PANELS = {
    "batch": ("Batch: 192 wide, 9 layers, 32 px", "images in a batch"),
    "images": ("Image size: ViT-S/16, batch of 2", "side of the images in pixels"),
    "classes": ("Classes: 192 wide, 9 layers, batch of 32", "classes"),
    "processes": (f"Processes: trainer on digits, batch of {GLOBAL_BATCH}", ""),
}
DRAWN = ("training step", "heads + loss", "AdamW")


def measure(parts: dict[str, list[Point]], turns: int) -> dict[str, list[dict]]:
    """Measures all points in alternating turns."""
    points = [point for part in parts.values() for point in part]
    times = np.array([[point.seconds() for point in points] for _ in range(turns + 1)])[1:]
    low, median, high = (iter(values.tolist()) for values in np.percentile(times, [10, 50, 90], axis=0))

    def figures(point: Point) -> dict:
        spread = {"seconds": next(median), "p10": next(low), "p90": next(high)}
        return {"at": point.at, **spread, "arithmetic": point.arithmetic}

    return {name: [figures(point) for point in part] for name, part in parts.items()}


def print_growth(record: dict) -> None:
    """Prints the table of all pairs of neighbouring points."""
    print("| curve | part | from, to | time | arithmetic | ratio | |\n|---|---|---|---:|---:|---:|---|")
    for curve, found in record.items():
        for part, points in found["parts"].items():
            for first, second in itertools.pairwise(points):
                ends = " to ".join(str(point["at"]).replace("\n", ", ") for point in (first, second))
                seconds, arithmetic = (second[name] / first[name] for name in ("seconds", "arithmetic"))
                ratio = seconds / arithmetic
                remark = f"above {TOLERANCE}" if ratio > TOLERANCE else ""
                print(f"| {curve} | {part} | {ends} | {seconds:.2f} | {arithmetic:.2f} | {ratio:.2f} | {remark} |")


def columns(points: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Medians, percentiles (2, points) and the arithmetic at the rate of the best point; in seconds."""
    median, low, high, arithmetic = (
        np.array([point[name] for point in points]) for name in ("seconds", "p10", "p90", "arithmetic")
    )
    return median, np.stack([low, high]), arithmetic * (median / arithmetic).min()


def draw_growth(axis, parts: dict[str, list[dict]]) -> None:
    """Draws time against size, on logarithmic axes."""
    from matplotlib.ticker import LogLocator, NullLocator

    for colour, name in zip(COLOURS.values(), DRAWN, strict=True):
        if name in parts:
            places = [point["at"] for point in parts[name]]
            median, ends, arithmetic = (1000 * values for values in columns(parts[name]))
            errors = np.abs(ends - median)
            axis.errorbar(places, median, errors, marker="o", markersize=4, capsize=3, color=colour, label=name)
            axis.plot(places, arithmetic, linestyle="--", color=colour)
    axis.plot([], linestyle="--", color="#444444", label="arithmetic")
    axis.set(xscale="log", yscale="log", ylabel="time in ms")
    axis.set_xticks(places, [f"{place:,}" for place in places])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=99))  # the axis may span one decade only
    axis.yaxis.set_major_formatter("{x:,g}")
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_minor_locator(NullLocator())


def draw_processes(axis, parts: dict[str, list[dict]]) -> None:
    """Draws steps per second, from 0."""
    points = parts["training step"]
    median, ends, arithmetic = (1 / values for values in columns(points))
    places = np.arange(len(points))
    errors = np.abs(ends - median)[::-1]  # the longest time is the lowest rate
    axis.bar(places, median, 0.5, yerr=errors, capsize=3, color=COLOURS["mean"], ecolor="#444444", label="trainer")
    axis.hlines(arithmetic, places - 0.35, places + 0.35, linestyles="--", colors="#444444", label="arithmetic")
    axis.set_xticks(places, [point["at"] for point in points])
    axis.set(ylabel="steps / s", ylim=(0, 1.15 * arithmetic.max()))


def draw(record: dict) -> None:
    """Draws all curves of the record in one picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7.2), layout="constrained")
    for axis, (curve, (title, label)) in zip(axes.flat, PANELS.items(), strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        if curve in record:
            (draw_processes if curve == "processes" else draw_growth)(axis, record[curve]["parts"])
            axis.legend(loc="upper left" if curve == "processes" else "lower right")
    note = "Dashed: the arithmetic at the rate of the best point. Error bars: 10th to 90th percentile of the turns."
    figure.supxlabel(note, fontsize=9)
    figure.savefig(PICTURE, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES), metavar="CURVE")
    parser.add_argument("--turns", type=int, default=7, help="turns of each curve, after one for warm-up")
    parser.add_argument("--again", action="store_true", help="also measure curves that the record has")
    parser.add_argument("--draw", action="store_true", help="only draw the record")
    parser.add_argument("--trainer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainer is not None:
        time_trainer(args.trainer)
        return
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for curve in [] if args.draw else args.only:
        if args.again or curve not in record:
            parts = measure(CURVES[curve](), args.turns)
            record[curve] = {"threads": torch.get_num_threads(), "turns": args.turns, "parts": parts}
            write_record(RECORD, record)
    print_growth(record)
    draw(record)


if __name__ == "__main__":
    main()
