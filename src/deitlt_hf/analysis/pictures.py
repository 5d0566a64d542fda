"""Draws a recipe's data: the class counts, and the training images of student and teacher after augmentation."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel

from ..data.loading import training_counts
from ..data.long_tail import ShotGroups
from ..data.transforms import ImageFormat, model_processor
from ..io import check_can_be_folder
from ..models.deitlt.configuration_deitlt import DeiTLTConfig
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..recipes import StudentArguments, TeacherArguments, load_recipe
from ..training import DeiTLTTrainer, DeiTLTTrainingArguments
from ..training.inputs import label_names
from ..training.recipe import Recipe
from .figures import draw_counts, draw_images, literal

COLUMNS = 8


def draw_data(recipe: str, overrides: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Draws the class histogram, `classes.png`, and training images before and after the DRW epoch, `images.png`.

    Args:
        recipe: Name or path of a recipe.
        overrides: Fields of its data and student; see [`Recipe`].
        folder: Folder to write to. It is created if it does not exist.

    Returns:
        Paths of the two files.

    Raises:
        FileExistsError: If `folder` is a file.
        ValueError: If matplotlib is not installed, or data and arguments do not fit.
        SystemExit: If the command line cannot be parsed.
    """
    require_matplotlib()
    folder = Path(folder).expanduser()
    check_can_be_folder(folder)
    with tempfile.TemporaryDirectory() as scratch:
        run = Recipe.load(recipe).student(**{**overrides, "output_dir": scratch, "dataloader_num_workers": 0})
        data = run.data.load()
        groups = run.data.groups(data)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "classes.png", folder / "images.png"]
        _draw_classes(data["train"], groups, recipe, files[0])
        rows = _training_images(recipe, data, groups, run.model, run.args, run.data.background)
        _draw_images(rows, recipe, files[1])
    return files


def require_matplotlib() -> None:
    """Raises `ValueError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'deitlt-hf[analysis]'.") from error


def _draw_classes(train: Dataset, groups: ShotGroups, title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    draw_counts(axes, training_counts(train), groups, train.features["label"].names)
    axes.set_title(literal(f"{title} ({groups.rule})"))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


class _RecordingTeacher(PreTrainedModel):
    """Stand-in for the teacher that records its input images."""

    def __init__(self, config: FlatTeacherConfig) -> None:
        super().__init__(config)
        self.seen: list[torch.Tensor] = []

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        self.seen.append(pixel_values)
        return SimpleNamespace(logits=torch.zeros(len(pixel_values), len(label_names(self.config))))


def _training_images(
    recipe: str,
    data: DatasetDict,
    groups: ShotGroups,
    model_args: StudentArguments,
    args: DeiTLTTrainingArguments,
    background: str | None,
) -> dict[str, tuple]:
    """Returns rows of images in [0, 1] with captions, prepared by the trainer itself."""
    names = data["train"].features["label"].names
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    size, patch = model_args.image_size, model_args.patch_size
    student = DeiTLTForImageClassification(
        DeiTLTConfig(
            image_size=size, patch_size=patch, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, **labels
        )
    )
    known = {field.name for field in fields(TeacherArguments)}
    values = {key: value for key, value in load_recipe(recipe)["teacher"].items() if key in known}
    teacher = _RecordingTeacher(TeacherArguments(**values).config("ce", **labels))
    trainer = DeiTLTTrainer(
        model=student,
        teacher=teacher,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        groups=groups,
        processing_class=model_processor(student.config, args.image_resize, background),
    )
    rows = {}
    drw = args.drw_start_epoch
    phases = {"all epochs": 0} if drw is None else {f"before epoch {drw:g}": 0, f"from epoch {drw:g}, re-weighted": drw}
    for phase, epoch in phases.items():
        trainer.state.epoch = epoch
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.seed_micro_batch(0)
        prepared = trainer.training_batch(batch)
        targets = prepared["labels"]
        captions = [_caption(target, names) for target in targets[:COLUMNS]]
        student_format = ImageFormat.of(trainer.processing_class)
        rows[f"student, {phase}"] = (student_format.visible(prepared["pixel_values"][:COLUMNS]), captions)
        if teacher.seen:
            rows[f"teacher, {phase}"] = (trainer.formats["teacher"].visible(teacher.seen.pop()[:COLUMNS]), captions)
    return rows


def _caption(target: torch.Tensor, names: Sequence[str]) -> str:
    """Returns the name of the label or, for a mixed image, of its two labels with their shares."""
    if target.dim() == 0:
        return shorten(names[int(target)])
    # Label smoothing gives every class the same small share, which is subtracted here.
    shares = (target - target.min()).double()
    shares = shares / shares.sum()
    top = [label for label in shares.topk(min(2, len(names))).indices.tolist() if shares[label] > 0.005]
    return "\n".join(f"{shorten(names[label])} {100 * shares[label]:.0f} %" for label in top)


def shorten(name: str) -> str:
    """Shortens a name to 16 characters, which fit above a small image."""
    return name if len(name) <= 16 else name[:15] + "…"


def _draw_images(rows: dict[str, tuple], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.35 * COLUMNS, 1.95 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), COLUMNS, squeeze=False)
    for axes, (name, (images, captions)) in zip(grid, rows.items(), strict=True):
        draw_images(axes, images, captions)
        side = images.shape[1]
        axes[0].text(-0.12, 0.5, f"{name}\n{side} x {side}", rotation=90, ha="center", va="center", fontsize=7,
                     transform=axes[0].transAxes)  # fmt: skip
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=120)
