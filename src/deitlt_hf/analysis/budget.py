"""Estimates the cost of a training run on GPUs in advance: steps, memory, hours and communication."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
from rich.table import Table

from ..console import show
from ..data.check import BENCHMARKS
from ..data.loading import training_counts
from ..data.long_tail import long_tailed_indices
from ..data.sampling import batches_of_epoch, images_of_epoch
from ..options import option
from ..recipes import DataArguments, paper_accuracies
from ..training import FlatTeacherTrainingArguments
from ..training.arguments import LongTailTrainingArguments, divide_batch
from ..training.recipe import Recipe, StudentRun
from ..training.schedule import low_peak
from ..training.starting import FIXED_SIZE_FIELDS, FREE_SIZE_FIELDS, check_start
from .model_cost import Model, frozen_model, student_model, teacher_model

OVERHEAD_BYTES = 2**30  # approximate memory of a GPU's context and libraries
REDUCE_LATENCY = 20e-6  # approximate seconds that each doubling of the processes adds to a reduction
GPUS_A_MACHINE = 8
COLUMNS = "GPUs", "batch x micro-batches", "updates", "memory", "images / s", "a step", "waiting", "hours", "GPU hours"


@dataclass(frozen=True)
class Gpu:
    """Specification of a GPU, from its vendor."""

    flops: float  # dense peak in half precision, in operations per second
    memory: float  # bytes
    link: float  # bandwidth to another GPU in the machine, in bytes per second and direction
    network: float  # usual bandwidth of one GPU to other machines, in bytes per second


GPUS = {
    "h100": Gpu(989e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 141e9, 450e9, 50e9),
    "a100": Gpu(312e12, 80e9, 300e9, 25e9),
    "v100": Gpu(125e12, 32e9, 150e9, 12.5e9),
    "l4": Gpu(121e12, 24e9, 32e9, 12.5e9),
    "t4": Gpu(65e12, 16e9, 16e9, 6.25e9),
    "rtx4090": Gpu(165e12, 24e9, 32e9, 12.5e9),
    "rtx3090": Gpu(71e12, 24e9, 32e9, 12.5e9),
}


@dataclass(frozen=True)
class Budget:
    """Estimated cost of a run on a number of GPUs."""

    batch_size: int  # of a micro-batch on one GPU
    accumulation: int  # micro-batches in an optimiser step
    images_per_epoch: int  # images used in an epoch
    steps: int  # optimiser steps of the run
    operations: float  # of the whole run
    memory: float  # bytes on each GPU
    step_seconds: float  # of an optimiser step
    exposed_seconds: float  # the part of it in which GPUs wait for communication
    hours: float  # of the run, without evaluations
    fits: bool  # whether the memory of the GPU is sufficient


def training_images(data_args: DataArguments) -> tuple[int, int]:
    """Returns the number of classes and training images of a recipe.

    They are known for the benchmarks of the paper; otherwise the data are loaded and counted.

    Raises:
        FileNotFoundError: If the data cannot be found.
    """
    known = BENCHMARKS.get(data_args.dataset)
    if known is None:
        counts = training_counts(data_args.load()["train"])
        return len(counts), int(counts.sum())
    images = known.train_images
    if data_args.imbalance_ratio is not None:
        per_class = min(images // known.classes, data_args.max_per_class or images)
        labels = np.repeat(np.arange(known.classes), per_class)
        images = len(long_tailed_indices(labels, known.classes, data_args.imbalance_ratio, data_args.imbalance_type))
    return known.classes, images


def reduce_seconds(num_bytes: float, gpus: int, gpu: Gpu) -> float:
    """Time of a ring all-reduce over all GPUs, in which each GPU sends 2 (n - 1) / n of the bytes."""
    if gpus == 1:
        return 0.0
    bandwidth = gpu.link if gpus <= GPUS_A_MACHINE else gpu.network
    return 2 * (gpus - 1) / gpus * num_bytes / bandwidth + REDUCE_LATENCY * math.ceil(math.log2(gpus))


def budget(
    model: Model,
    gpu: Gpu,
    gpus: int,
    images: int,
    utilisation: float,
    args: Any,
) -> Budget:
    """Estimates the cost of a run with data-parallel training; `args` are its training arguments.

    The compute time assumes that a share of the GPU's peak is reached, the utilisation. The all-reduce of the gradients
    overlaps with the backward pass of the last micro-batch, which is two thirds of its time. If the all-reduce takes
    longer, the GPUs wait.

    Raises:
        ValueError: If the batch cannot be divided among the GPUs, or there are fewer images than one batch.
    """
    batch_size, accumulation = divide_batch(args.global_batch_size, gpus, args.per_device_train_batch_size)
    if batch_size % 2 and getattr(args, "mixes", False):
        raise ValueError(f"mixing needs an even batch on each GPU, but {gpus} GPUs have {batch_size} image(s) each.")
    drawn = images_of_epoch(images, args.repeats)
    sizes = batches_of_epoch(drawn, batch_size, gpus, accumulation, args.partial_steps)
    batches = len(sizes)
    if batches == 0:
        raise ValueError(f"{images} training images are fewer than one batch of {gpus} x {batch_size}.")
    per_epoch = sum(sizes) * gpus
    per_epoch_steps = math.ceil(batches / accumulation)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch_steps)
    micro_batch_seconds = model.training_flops * batch_size / (gpu.flops * utilisation)
    compute = micro_batch_seconds * min(accumulation, batches)
    # DDP reduces gradients in the dtype of the weights, which is float32 also under mixed precision.
    reduction = args.gradients_per_step * reduce_seconds(4 * model.trained, gpus, gpu)
    exposed = max(0.0, reduction - micro_batch_seconds * 2 / 3)
    memory = model.state_bytes + model.activation_bytes * batch_size + OVERHEAD_BYTES
    return Budget(
        batch_size=batch_size,
        accumulation=accumulation,
        images_per_epoch=per_epoch,
        steps=steps,
        operations=model.training_flops * per_epoch * steps / per_epoch_steps,
        memory=memory,
        step_seconds=compute + exposed,
        exposed_seconds=exposed,
        hours=steps * (compute + exposed) / 3600,
        fits=memory <= gpu.memory,
    )


@dataclass
class PlanArguments:
    """Hardware assumptions of an estimate.

    Attributes:
        listed_by: Command whose help lists the options of transformers.
    """

    listed_by: ClassVar[str] = "deitlt distill --help"

    gpu: str = option("h100", f"Type of the GPUs: one of {', '.join(GPUS)}.")
    gpus: list[int] = option([1, 2, 4, 8], "Numbers of GPUs; the table has a row for each.")
    utilisation: float = option(0.35, "Share of the vendor's peak that a student reaches; measure it on your hardware.")
    teacher_utilisation: float = option(
        0.08, "Share of the peak that a teacher reaches; a ResNet waits for memory most of the time."
    )

    measure: bool = option(
        False, "Instead, measure a few steps on this machine, and print the expected time of the run here."
    )

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {self.gpu!r}.")
        for name in ("utilisation", "teacher_utilisation"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}.")
        if min(self.gpus) < 1:
            raise ValueError(f"gpus must be 1 or more, got {min(self.gpus)}.")


def print_budgets(run: StudentRun, plan: PlanArguments) -> None:
    """Prints the estimated cost of a student's run, and of its teacher's, with a row for each number of GPUs.

    Raises:
        ValueError: If a batch cannot be divided among any of the numbers of GPUs.
    """
    student_args, args = run.model, run.args
    if student_args.init_from is not None:
        start = check_start(student_args, (args.recipe or {}).get("overrides", {}))
        student_args = replace(
            student_args, **{name: start.config[name] for name in (*FIXED_SIZE_FIELDS, *FREE_SIZE_FIELDS)}
        )
    classes, images = training_images(run.data)
    show(f"{run.recipe}: {images:,} training images of {classes:,} classes")
    paper, changed = paper_accuracies(run.recipe), {*(args.recipe or {}).get("overrides", {})}
    if paper is not None and changed <= {field.name for field in fields(plan)}:  # not the paper's with other settings
        show(paper.sentence())
    teacher = None
    if args.needs_teacher and student_args.teacher is not None:
        teacher = frozen_model(student_args.teacher)
    elif args.needs_teacher:
        taught_by = Recipe(run.recipe).teacher(student_args.teacher_loss, output_dir=args.output_dir)
        loss = taught_by.args.teacher_loss
        teacher = teacher_model(taught_by.model.config(loss, num_labels=classes), taught_by.args)
        _show_budgets(f"teacher, {taught_by.model.backbone}, {loss}", teacher, plan, images, taught_by.args)
    if teacher is not None and student_args.tail_teacher is not None:  # an image goes to one of them
        second = frozen_model(student_args.tail_teacher)
        flops = max(teacher.flops, second.flops)
        teacher = replace(teacher, parameters=teacher.parameters + second.parameters, flops=flops)
    if note := low_peak(args.peak_learning_rate, student_args.init_from):
        show(f"Note: {note}")
    student = student_model(student_args, classes, teacher, args)
    _show_budgets(f"student, {student_args.image_size} px", student, plan, images, args)


def _show_budgets(title: str, model: Model, plan: PlanArguments, images: int, args: LongTailTrainingArguments) -> None:
    assert args.global_batch_size is not None  # set by `settle`
    is_teacher = isinstance(args, FlatTeacherTrainingArguments)
    utilisation = plan.teacher_utilisation if is_teacher else plan.utilisation
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    reasons: list[str] = []
    found = None
    for gpus in plan.gpus:
        try:
            found = budget(model, GPUS[plan.gpu], gpus, images, utilisation, args)
        except ValueError as error:
            reasons.append(str(error))
            table.add_row(f"{gpus:,}", "batch not divisible")
            continue
        table.add_row(
            f"{gpus:,}",
            f"{found.batch_size} x {found.accumulation}",
            f"{found.steps:,}",
            f"{found.memory / 1e9:.1f} GB" + ("" if found.fits else " (too much)"),
            f"{args.global_batch_size / found.step_seconds:,.0f}",
            f"{1000 * found.step_seconds:.0f} ms",
            f"{100 * found.exposed_seconds / found.step_seconds:.0f} %",
            f"{found.hours:.1f}",
            f"{gpus * found.hours:,.1f}",
        )
    if found is None:
        raise ValueError(f"{title}: {reasons[0]}")
    part = f", of which {model.trained:,} are trained" if model.trained < model.parameters else ""
    table.caption = (
        f"{model.parameters / 1e6:.1f} M parameters{part}; {model.flops / 1e9:.3g} GFLOP forward and "
        f"{model.training_flops / 1e9:.3g} to train, per image; {found.images_per_epoch:,} images per epoch, "
        f"{found.operations / 1e18:.3g} EFLOP in total. {plan.gpu}: "
        f"{GPUS[plan.gpu].flops / 1e12:.0f} TFLOP/s, of which {100 * utilisation:.0f} % are assumed."
    )
    show(table)
