"""Measures how often a student's experts agree with its teacher: on test images, and on augmented training images."""

import itertools
import tempfile
from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel

from ..data.long_tail import Groups
from ..data.transforms import model_processor
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..serving.classifiers import load_classifier, load_processor
from ..training import DeiTLTTrainer
from ..training.provenance import results_of
from ..training.recipe import Recipe
from .observe import HEADS, spread_rows

# Settings of a run that determine the training images of student and teacher.
_VIEW_SETTINGS = (
    "train_crop",
    "auto_augment",
    "hflip",
    "random_erasing",
    "mixup",
    "cutmix",
    "mixup_switch",
    "mixup_probability",
    "teacher_view",
)


@torch.no_grad()
def teacher_agreement(
    recipe: str,
    model: PreTrainedModel,
    teacher: str,
    data: Mapping,
    groups: Groups,
    num_batches: int = 8,
) -> dict[str, dict[str, float]]:
    """Share of images for which each expert predicts the teacher's class (DeiT-LT, section 4: out of distribution).

    Args:
        recipe: Its augmentation and mixing are used if the student's record does not have them.
        model: A student of this package; its `results.json` is read from the folder it was loaded from, if it exists.
        teacher: Folder or Hub id of the student's teacher.
        data: The splits `train` and `test`.
        groups: Class indices of each group.
        num_batches: Number of batches of test images, spread over the test split, and of augmented and mixed training
            images.

    Returns:
        For `in distribution` (test images) and `out of distribution` (training images as the student sees them), the
        share of each expert.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Repeated copies of an image add no information, and would require a whole round of repeated augmentation.
        overrides = {"output_dir": folder, "report_to": "none", "distillation": "hard", "repeated_augmentation": 1}
        args = Recipe(recipe).student(**overrides).args
        record = results_of(model.name_or_path)
        settings, background = record.get("settings", {}), record.get("data", {}).get("background")
        for name in _VIEW_SETTINGS:
            setattr(args, name, settings.get(name, getattr(args, name)))
        teaches, processor = load_classifier(teacher), None
        if not isinstance(teaches, FlatTeacherForImageClassification):
            processor = load_processor(teacher)
        trainer = DeiTLTTrainer(
            model=model,
            args=args,
            teacher=teaches,
            teacher_processor=processor,
            train_dataset=data["train"],
            eval_dataset=data["test"].select(spread_rows(len(data["test"]), num_batches * args.eval_batch_size)),
            groups=groups,
            processing_class=model_processor(model.config, args.image_resize, background),
        )
        shares = {
            name: _shares(model, itertools.islice(batches(trainer), num_batches))
            for name, batches in (("in distribution", _test_images), ("out of distribution", _training_images))
        }
        trainer.end_workers()
    return shares


Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # images for the student, and the teacher's logits


def _test_images(trainer: DeiTLTTrainer) -> Batches:
    for batch in trainer.get_eval_dataloader():
        pixel_values = batch["pixel_values"].to(trainer.args.device)
        yield pixel_values, trainer.teacher_logits(pixel_values)


def _training_images(trainer: DeiTLTTrainer) -> Batches:
    for index, batch in enumerate(trainer.get_train_dataloader()):
        trainer.seed_micro_batch(index, purpose=1)
        prepared = trainer.training_batch(batch)
        yield prepared["pixel_values"], prepared["teacher_logits"]


def _shares(model: PreTrainedModel, batches: Batches) -> dict[str, float]:
    """Share of the images for which each expert predicts the teacher's class."""
    same, seen = dict.fromkeys(HEADS, 0.0), 0
    for pixel_values, taught in batches:
        outputs = model.eval()(pixel_values=pixel_values)
        seen += len(pixel_values)
        for expert, field in HEADS.items():
            same[expert] += (outputs[field].argmax(dim=1) == taught.argmax(dim=1)).sum().item()
    return {expert: number / seen for expert, number in same.items()}
