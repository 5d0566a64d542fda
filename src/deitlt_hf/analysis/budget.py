"""Estimates the cost of a training run in advance: operations, memory, hours and communication."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from ..console import show
from ..data.check import BENCHMARKS
from ..data.loading import training_counts
from ..data.long_tail import long_tailed_indices
from ..data.sampling import ROUND, batches_of_epoch
from ..data.transforms import ImageFormat
from ..models.deitlt.configuration_deitlt import DeiTLTConfig
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..recipes import DataArguments, StudentArguments, TeacherArguments, fill_arguments, own_loss, paper_accuracies
from ..serving.classifiers import load_classifier, load_processor
from ..training import DeiTLTTrainingArguments, FlatTeacherTrainingArguments
from ..training.arguments import divide_batch
from ..training.schedule import low_peak
from ..training.starting import FREE_SIZES, SIZES, check_start
from ..training.tuning import FULL, HEADS, check_tunable, freeze, last_blocks, trained_parameters

# Per parameter, in float32: weight, gradient, and the two moments of AdamW, or momentum and SAM's copy of the weight.
STATE_BYTES = 16
OVERHEAD_BYTES = 2**30  # approximate memory of a GPU's context and libraries
REDUCE_LATENCY = 20e-6  # approximate seconds that each doubling of the processes adds to a reduction
GPUS_A_MACHINE = 8
COLUMNS = "GPUs", "batch x micro-batches", "updates", "memory", "images / s", "a step", "waiting", "hours", "GPU hours"


@dataclass(frozen=True)
class Gpu:
    """Specification of a GPU, from its vendor.

    Args:
        flops: Dense peak in half precision, in operations per second.
        memory: Memory in bytes.
        link: Bandwidth to another GPU in the machine, in bytes per second and direction.
        network: Usual bandwidth of one GPU to other machines, in bytes per second.
    """

    flops: float
    memory: float
    link: float
    network: float


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
class Model:
    """Training cost of one model.

    Args:
        parameters: Number of parameters.
        flops: Operations of a forward pass per image; a multiplication and an addition are two.
        training_flops: Operations of a training step per image.
        state_bytes: Bytes kept between steps: weights, gradients, optimiser state and other copies of the weights.
        activation_bytes: Bytes that the forward pass keeps for the backward pass, per image.
        trained: Number of trained parameters.
    """

    parameters: int
    flops: int
    training_flops: float
    state_bytes: int
    activation_bytes: int
    trained: int


@dataclass(frozen=True)
class Budget:
    """Estimated cost of a run on a number of GPUs.

    Args:
        batch_size: Size of a micro-batch on one GPU.
        accumulation: Number of micro-batches in an optimiser step.
        images_per_epoch: Images used in an epoch.
        steps: Optimiser steps of the run.
        operations: Operations of the whole run.
        memory: Bytes on each GPU.
        step_seconds: Time of an optimiser step.
        exposed_seconds: Part of that time in which GPUs wait for communication.
        hours: Time of the run, without evaluations.
        fits: Whether the memory of the GPU is sufficient.
    """

    batch_size: int
    accumulation: int
    images_per_epoch: int
    steps: int
    operations: float
    memory: float
    step_seconds: float
    exposed_seconds: float
    hours: float
    fits: bool


def counted_flops(model: nn.Module, image_size: int) -> int:
    """Operations of a forward pass per image, as counted by torch; the model may be on the meta device."""
    return _flop_counter(model, image_size).get_total_flops()


def student_flops(config: DeiTLTConfig) -> tuple[int, list[int]]:
    """Operations of a student's forward pass per image, and of each of its blocks.

    The last block costs less: it computes only the CLS and DIST tokens, from all tokens.
    """
    with torch.device("meta"):
        model = DeiTLTForImageClassification(config)
    counter = _flop_counter(model, config.image_size)  # type: ignore[arg-type]
    counts, blocks = counter.get_flop_counts(), range(config.num_hidden_layers)
    of_blocks = [sum(counts[f"{type(model).__name__}.deit.layers.{index}"].values()) for index in blocks]
    return counter.get_total_flops(), of_blocks


def _flop_counter(model: nn.Module, image_size: int) -> FlopCounterMode:
    """Torch's counter after a forward pass of one image."""
    images = torch.empty(1, 3, image_size, image_size, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(pixel_values=images)
    return counter


def activation_bytes(model: nn.Module, image_size: int, half: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, per image; measured on the CPU.

    Args:
        model: The model; it is set to training mode.
        image_size: Side of the images in pixels.
        half: Use mixed precision (bfloat16).
    """
    # The difference removes memory that does not grow with the batch, such as weights in half precision.
    few, more = (_kept_bytes(model.train(), torch.zeros(size, 3, image_size, image_size), half) for size in (2, 4))
    return (more - few) // 2


def _kept_bytes(model: nn.Module, images: torch.Tensor, half: bool) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)  # both batches drop the same share of residual branches
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=half):
        # The graph stays alive until `del`: memory is not reused meanwhile, so the addresses in `kept` stay unique.
        outputs = model(pixel_values=images)
    del outputs
    return sum(kept.values())


def student_model(
    student_args: StudentArguments, num_labels: int, teacher: Model | None, args: DeiTLTTrainingArguments
) -> Model:
    """Training cost of a student with AdamW, with the forward pass of its teacher."""
    config = student_args.config(num_labels=num_labels)
    rates = np.linspace(0.0, config.drop_path_rate, config.num_hidden_layers)  # share of images that skip each block
    flops, of_blocks = student_flops(config)
    trained = flops - float(rates @ of_blocks)
    teacher_flops, frozen_bytes = (0, 0) if teacher is None else (teacher.flops, 4 * teacher.parameters)
    config.drop_path_rate = 0.0  # without stochastic depth, a step keeps the most memory
    model = DeiTLTForImageClassification(config)
    parameters = model.num_parameters()
    check_tunable(model, args.tune)
    freeze(model, args.tune, args.lora_rank)
    tuned = trained_parameters(model)
    if args.gradient_checkpointing:
        # transformers 5.23 has the newer name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    weight_bytes = 4 + 4 * (args.ema_decay is not None)
    return Model(
        parameters=parameters,
        flops=flops,
        training_flops=args.gradients_per_step * (1 + _backward_share(args.tune, config)) * trained + teacher_flops,
        state_bytes=weight_bytes * parameters + (STATE_BYTES - 4) * tuned + frozen_bytes,
        activation_bytes=activation_bytes(model, student_args.image_size, half=True),
        trained=tuned,
    )


def _backward_share(tune: str, config: PreTrainedConfig) -> float:
    """Operations of the backward pass, relative to the forward pass.

    The gradients of the activations cost one forward pass, and those of the weights another. With `last_N` and LoRA the
    former reach down to the tokens.
    """
    if tune in (FULL, HEADS):
        return 2.0 if tune == FULL else 0.0
    return 1.0 + (last_blocks(tune) or 0) / config.num_hidden_layers


def teacher_model(config: FlatTeacherConfig, args: FlatTeacherTrainingArguments) -> Model:
    """Training cost of a teacher with SGD, including SAM's second pass and PaCo's second view."""
    model = FlatTeacherForImageClassification(config)
    parameters, flops = model.num_parameters(), counted_flops(model, config.image_size)
    return Model(
        parameters=parameters,
        flops=flops,
        training_flops=(3 * args.gradients_per_step + args.loss.contrast) * flops,
        state_bytes=(STATE_BYTES + 4 * args.loss.contrast) * parameters,
        activation_bytes=activation_bytes(model, config.image_size, half=True),
        trained=parameters,
    )


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
    """Estimates the cost of a run with data-parallel training.

    The compute time assumes a given share of the GPU's peak. The all-reduce of the gradients overlaps with the backward
    pass of the last micro-batch, which is two thirds of its time. If the all-reduce takes longer, the GPUs wait.

    Args:
        model: Training cost of the model.
        gpu: Type of the GPUs.
        gpus: Number of GPUs.
        images: Number of training images.
        utilisation: Share of the GPU's peak that is reached.
        args: Training arguments of the run.

    Raises:
        ValueError: If the batch cannot be divided among the GPUs, or there are fewer images than one batch.
    """
    batch_size, accumulation = divide_batch(args.global_batch_size, gpus, args.per_device_train_batch_size)
    if batch_size % 2 and getattr(args, "mixes", False):
        raise ValueError(f"mixing needs an even batch on each GPU, but {gpus} GPUs have {batch_size} image(s) each.")
    drawn = images // ROUND * ROUND if args.repeats > 1 else images
    sizes = batches_of_epoch(drawn, batch_size, gpus, accumulation, args.partial_steps)
    batches = len(sizes)
    if batches == 0:
        raise ValueError(f"{images} training images are fewer than one batch of {gpus} x {batch_size}.")
    per_epoch = sum(sizes) * gpus
    per_epoch_steps = math.ceil(batches / accumulation)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch_steps)
    micro_batch_seconds = model.training_flops * batch_size / (gpu.flops * utilisation)
    compute = micro_batch_seconds * min(accumulation, batches)
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
    """Hardware assumptions of an estimate."""

    gpu: str = field(default="h100", metadata={"help": f"Type of the GPUs: one of {', '.join(GPUS)}."})
    gpus: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Numbers of GPUs; the table has a row for each."}
    )
    utilisation: float = field(
        default=0.35,
        metadata={"help": "Share of the vendor's peak that a student reaches; measure it on your hardware."},
    )
    teacher_utilisation: float = field(
        default=0.08,
        metadata={"help": "Share of the peak that a teacher reaches; a ResNet waits for memory most of the time."},
    )

    measure: bool = field(
        default=False,
        metadata={"help": "Instead, measure a few steps on this machine, and print the expected time of the run here."},
    )

    def __post_init__(self):
        if self.gpu not in GPUS:
            raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {self.gpu!r}.")
        for name in ("utilisation", "teacher_utilisation"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}.")
        if min(self.gpus) < 1:
            raise ValueError(f"gpus must be 1 or more, got {min(self.gpus)}.")


def print_budgets(
    recipe: str,
    plan: PlanArguments,
    data_args: DataArguments,
    student_args: StudentArguments,
    args: DeiTLTTrainingArguments,
) -> None:
    """Prints the estimated cost of a recipe's teacher and student, with a row for each number of GPUs.

    Raises:
        ValueError: If a batch cannot be divided among any of the numbers of GPUs.
    """
    if student_args.init_from is not None:
        start = check_start(student_args, (args.recipe or {}).get("overrides", {}))
        student_args = replace(student_args, **{name: start.config[name] for name in (*SIZES, *FREE_SIZES)})
    classes, images = training_images(data_args)
    show(f"{recipe}: {images:,} training images of {classes:,} classes")
    paper, changed = paper_accuracies(recipe), {*(args.recipe or {}).get("overrides", {})}
    if paper is not None and changed <= {field.name for field in fields(plan)}:  # not the paper's with other settings
        show(paper.sentence())
    teacher = None
    if args.needs_teacher and student_args.teacher is not None:
        teacher = _trained_teacher(student_args.teacher)
    elif args.needs_teacher:
        loss = student_args.teacher_loss or own_loss(recipe)
        overrides = {"teacher_loss": loss, "output_dir": args.output_dir}
        kinds = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)
        _, teacher_args, taught = fill_arguments("teacher", kinds, recipe, overrides)
        teacher = teacher_model(teacher_args.config(loss, num_labels=classes), taught)
        _show_budgets(f"teacher, {teacher_args.backbone}, {loss}", teacher, plan, images, taught)
    if teacher is not None and student_args.tail_teacher is not None:  # an image goes to one of them
        second = _trained_teacher(student_args.tail_teacher)
        flops = max(teacher.flops, second.flops)
        teacher = replace(teacher, parameters=teacher.parameters + second.parameters, flops=flops)
    if note := low_peak(args.peak_learning_rate, student_args.init_from):
        show(f"Note: {note}")
    student = student_model(student_args, classes, teacher, args)
    _show_budgets(f"student, {student_args.image_size} px", student, plan, images, args)


def _trained_teacher(path: str) -> Model:
    model = load_classifier(path)
    size = ImageFormat.of(load_processor(path)).size[0]
    return Model(model.num_parameters(), counted_flops(model, size), 0.0, 0, 0, 0)


def _show_budgets(title: str, model: Model, plan: PlanArguments, images: int, args) -> None:
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
            table.add_row(f"{gpus:,}", "uneven shares")
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
