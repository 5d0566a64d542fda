"""The plan of a run, which is printed before the first step."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..console import show
from ..data.transforms import ImageFormat
from ..io import one_line
from .tuning import trained_parameters
from .whole_checkpoints import model_name

if TYPE_CHECKING:
    from .arguments import LongTailTrainingArguments
    from .trainer import LongTailTrainer


def plan_lines(trainer: "LongTailTrainer") -> dict[str, str]:
    """Lines of the plan by label, from the optimiser on, without those of [`print_plan`]."""
    args = trainer.args
    lines = {"optimiser": trainer.optimizer_plan()}
    if "scheduler" in trainer.given:
        lines["learning rate"] = f"by the {type(trainer.lr_scheduler).__name__} that was given"
    elif "optimizer" in trainer.given and trainer.optimizer is not None:
        rates = sorted({group["lr"] for group in trainer.optimizer.param_groups})
        lines["learning rate"] = f"{', '.join(f'{rate:.3g}' for rate in rates)} of the optimiser at its peak"
    if args.class_weights:
        assert isinstance(args.class_weights, Mapping)  # `check` reads a text
        named = ", ".join(f"{name} {weight:g}" for name, weight in args.class_weights.items())
        lines["class weights"] = f"{one_line(named, 200)}, other classes 1; scaled to mean 1, in all phases"
    if args.save_only_model and (args.save_strategy != "no" or args.save_minutes):
        lines["checkpoints"] = "the model only (save_only_model): the run cannot be resumed"
    if args.as_published:
        words = [f"{name} {getattr(args, name)}" for name in args.published_values()]
        if args.device.type != "cuda":
            words.append("full precision, as this device has no half precision")
        lines["as published"] = ", ".join(words)
    return lines | trainer.plan()


def print_plan(trainer: "LongTailTrainer", steps_per_epoch: int, extra: Mapping[str, str]) -> None:
    """Prints the plan of a run: model, data, batch sizes, schedule and output folder."""
    args, model = trainer.args, trainer.model
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps / steps_per_epoch
    counts = trainer.class_counts
    assert counts is not None  # of the training images
    groups = (
        f"{name} {len(group)} ({sum(counts[label] for label in group):,})" for name, group in trainer.groups.items()
    )
    parameters, trained = sum(parameter.numel() for parameter in model.parameters()), trained_parameters(model)
    part = "" if trained == parameters else f" ({trained:,} trained)"
    image_format = ImageFormat.of(trainer.processing_class)
    lines = {
        "model": f"{model_name(model)}, {parameters / 1e6:.2f} M parameters{part}, {image_format}",
        "classes (images)": f"{len(counts)} ({sum(counts):,}): {', '.join(groups)}",
        "groups": trainer.group_rule,
        "subset": f"sha256 {trainer.subset_sha256}" if trainer.subset_sha256 else "as given",
        **{
            name.replace("_", " "): f"{number:,}" if number else "none"
            for name, number in trainer.images_of_evaluation.items()
        },
        **_step_lines(args, epochs, steps_per_epoch, trainer.total_steps()),
        **extra,
        "output": str(args.output_dir),
    }
    table = Table.grid(padding=(0, 2))
    for label, text in lines.items():
        table.add_row(f"[bold]{label}[/bold]", escape(text))
    show(Panel(table, title="This will run", title_align="left", expand=False))


def _step_lines(
    args: "LongTailTrainingArguments", epochs: float, steps_per_epoch: int, total_steps: int
) -> dict[str, str]:
    """Lines about the optimiser's steps; none for a run without steps."""
    if not total_steps:
        return {}
    return {
        "global batch size": f"{args.global_batch_size} = {args.world_size} process(es) x {args.train_batch_size} x "
        f"{args.gradient_accumulation_steps} accumulation step(s)",
        "learning rate": f"{args.learning_rate:.3g} at its peak, {args.warmup_epochs:g} epochs of warm-up",
        "steps": f"{math.ceil(epochs * steps_per_epoch):,} in {epochs:g} epochs of {steps_per_epoch}",
    }


def drw_start_text(trainer: "LongTailTrainer") -> str:
    """Start epoch of deferred re-weighting, with a note if `max_steps` ends the run earlier."""
    start, steps = trainer.args.drw_start_epoch, trainer.args.max_steps
    assert start is not None  # called for a run with it
    is_cut_off = 0 < steps <= start * trainer.steps_per_epoch()
    return f"{start:g}" + (" (max_steps ends the run before it)" if is_cut_off else "")
