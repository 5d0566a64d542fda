"""Sentences about an evaluation: each is said of the models of which it is true, and of no others."""

import json
import re
import shutil

import numpy as np
import pytest

from deitlt_hf import FlatTeacherForImageClassification
from deitlt_hf.evaluation.findings import findings
from helpers import student_trainer, teacher_trainer

LABELS = np.repeat([0, 1, 2], 40)
GROUPS = {"head": [0], "mid": [1], "tail": [2]}
NAMES = ["ant", "bee", "cow"]


def said(predictions, labels=LABELS, groups=GROUPS):
    return " ".join(findings(predictions, labels, groups, NAMES))


def test_nothing_is_said_of_a_model_without_faults():
    other = np.where(np.arange(120) % 10 == 0, 0, LABELS)
    assert findings({"mean": LABELS, "cls": LABELS, "distillation": other}, LABELS, GROUPS, NAMES) == []


def test_a_class_that_no_expert_predicts_is_named():
    blind = np.where(LABELS == 2, 0, LABELS)
    assert "no expert predicts a test image of 1 of 3 classes correctly (cow)" in said({"cls": blind, "other": blind})
    assert "the model does not predict" in said({"teacher": blind})
    assert "correctly" not in said({"cls": blind, "other": LABELS})  # one of them does


def test_a_class_without_test_images_is_not_named():
    labels = LABELS[:80]
    assert "cow" not in said({"teacher": labels}, labels)


def test_heads_that_agree_are_found():
    almost = LABELS.copy()
    almost[0] = 1
    assert "the same class for 99.2 % of the test images" in said({"cls": LABELS, "distillation": almost})
    almost[:5] = 1
    assert "same class" not in said({"cls": LABELS, "distillation": almost})


def test_groups_with_few_images_are_counted():
    labels = np.array([0] * 40 + [1] * 30 + [2] * 4)
    assert said({"teacher": labels}, labels) == "groups with few test images, whose accuracies are uncertain: tail 4."


def test_the_plan_says_which_groups_the_teacher_does_not_know(tmp_path, digits, teacher, monkeypatch, capsys):
    trainer = student_trainer(tmp_path, digits, teacher, max_steps=1)
    classes = trainer.teacher_logits

    def without_tail(pixel_values, *_):
        logits = classes(pixel_values)
        logits[:, trainer.groups["tail"]] = -1e9
        return logits

    monkeypatch.setattr(trainer, "teacher_logits", without_tail)
    trainer.train()
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "the teacher predicts no tail test image correctly" in printed


def test_the_plan_warns_of_a_teacher_that_knows_less_about_the_students_images(tmp_path, digits, teacher_folder):
    """A student shows its teacher images of another size than those of the teacher's own processor."""
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")

    def warning():
        trainer = student_trainer(tmp_path, digits, FlatTeacherForImageClassification.from_pretrained(folder))
        trainer.prepare_training()
        return trainer.plan_of_teachers().get("warning")

    assert warning() is None
    record = json.loads((folder / "results.json").read_text())
    accuracies = record["last"]["accuracies"]["teacher"]
    lower, accuracies["overall"] = accuracies["overall"], 0.995
    (folder / "results.json").write_text(json.dumps(record))
    assert re.search(rf"classifies 99\.5 % .* but only {100 * lower:.1f} % .* \(8 px\)", warning())
    record["data"]["subset_sha256"] = "0" * 64  # the record is of other images
    (folder / "results.json").write_text(json.dumps(record))
    assert warning() is None


def test_metrics_that_weight_classes_equally_can_choose_the_best_model(tmp_path, digits):
    trainer = teacher_trainer(tmp_path, digits, metric_for_best_model="balanced_accuracy")
    metrics = trainer.evaluate()
    classes = [metrics[f"eval_teacher_{group}"] * len(members) for group, members in trainer.groups.items()]
    assert metrics["eval_balanced_accuracy"] == pytest.approx(sum(classes) / 10)
    assert 0 <= metrics["eval_macro_f1"] <= 1
