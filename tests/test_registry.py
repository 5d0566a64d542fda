"""Tests that a new loss needs only an entry in the registry of losses: the trainers, recipes and messages follow it."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deitlt_hf import (
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
    FlatTeacherTrainingArguments,
)
from deitlt_hf.losses import (
    CLS_LOSSES,
    DISTILLATION_TARGETS,
    TEACHER_LOSSES,
    ClsLoss,
    DistillationTarget,
    LossOptions,
    TeacherLoss,
)
from deitlt_hf.recipes import DataArguments, TeacherArguments, fill_arguments
from deitlt_hf.training.runs import train_teacher
from helpers import make_student


class FocalLoss(nn.Module):
    """Cross entropy that counts images less that are already classified well (Lin et al., ICCV 2017)."""

    def __init__(self, gamma, class_weights):
        super().__init__()
        self.gamma, self.class_weights = gamma, class_weights

    def forward(self, logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        weights = 1 if self.class_weights is None else self.class_weights[labels]
        return ((1 - (-losses).exp()) ** self.gamma * losses * weights).sum()


@dataclass
class FocalOptions(LossOptions):
    limits: ClassVar = {"focal_gamma": (lambda value: value >= 0, "0 or more")}
    focal_gamma: float = 2.0


@dataclass
class FocalArguments(FocalOptions, FlatTeacherTrainingArguments):
    """The training arguments as they are when the entry is in the registry before they are imported."""


def test_a_new_teacher_loss_is_an_entry_of_the_registry(tmp_path, monkeypatch):
    """A teacher trains with a loss, its own argument and its section in a recipe, once the loss is in the registry."""
    build = lambda args, class_counts, class_weights: FocalLoss(args.focal_gamma, class_weights)  # noqa: E731
    monkeypatch.setitem(TEACHER_LOSSES, "focal", TeacherLoss(build, options=FocalOptions))
    tiny = Path(__file__).parent / "fixtures" / "tiny.yaml"
    (tmp_path / "focal.yaml").write_text(f"extends: {tiny}\nteacher_losses: {{focal: {{focal_gamma: 0}}}}")

    def train(loss, **values):
        classes = (DataArguments, TeacherArguments, FocalArguments)
        folder = str(tmp_path / f"{loss}_{len(values)}")
        values |= {"teacher_loss": loss, "output_dir": folder, "max_steps": 2, "report_to": "none"}
        trainer = train_teacher(*fill_arguments("teacher", classes, str(tmp_path / "focal.yaml"), values))
        assert trainer.state.global_step == 2
        assert trainer.args.method_settings()["focal_gamma"] == trainer.args.focal_gamma
        return torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])

    cross_entropy = train("ce")
    torch.testing.assert_close(train("focal"), cross_entropy)  # gamma is 0 in the recipe
    assert not torch.allclose(train("focal", focal_gamma=3.0), cross_entropy)
    with pytest.raises(ValueError, match="focal_gamma must be 0 or more, got -1"):
        train("focal", focal_gamma=-1)
    with pytest.raises(ValueError, match="teacher_loss must be one of ce, ldam, logit_adjusted, paco, focal, got 'foc"):
        train("focl")


def test_a_new_student_loss_is_an_entry_of_the_registry(tmp_path, monkeypatch, digits):
    """A student trains with losses of both heads, once they are in the registry."""

    sums = []

    def squared(logits, targets, class_weights=None, temperature=1.0):
        targets = targets if targets.dim() == 2 else F.one_hot(targets, 10)
        sums.append(F.mse_loss(logits, targets.float(), reduction="sum"))
        return sums[-1]

    monkeypatch.setitem(CLS_LOSSES, "squared", ClsLoss(lambda class_counts, class_weights: squared))
    target = DistillationTarget(lambda labels, teacher_logits: teacher_logits, squared)
    monkeypatch.setitem(DISTILLATION_TARGETS, "logits", target)
    values = {"output_dir": str(tmp_path), "max_steps": 2, "warmup_epochs": 0, "repeated_augmentation": 1}
    values |= {"per_device_train_batch_size": 32, "logging_steps": 1, "eval_strategy": "no", "report_to": "none"}
    args = DeiTLTTrainingArguments(distillation="logits", cls_loss="squared", **values)
    data = {"train_dataset": digits["train"], "eval_dataset": digits["test"]}
    monkeypatch.setattr(DeiTLTTrainer, "check_teacher", lambda *_: {})  # an untrained teacher is enough here
    teacher = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10))
    trainer = DeiTLTTrainer(make_student(), args, teacher=teacher, **data)
    trainer.train()
    assert trainer.state.global_step == 2
    logged = [entry for entry in trainer.state.log_history if "cls_loss" in entry]
    found = [entry[part] for entry in logged for part in ("cls_loss", "distillation_loss")]
    assert found == [pytest.approx(0.5 * value.item() / 32) for value in sums]
    with pytest.raises(ValueError, match="cls_loss must be one of ce, bce, logit_adjusted, squared, got 'square'"):
        DeiTLTTrainingArguments(cls_loss="square", **values)
