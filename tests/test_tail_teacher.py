"""A second teacher for the classes of the tail."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from deitlt_hf import DeiTLTTrainer, FlatTeacherConfig, FlatTeacherForImageClassification
from deitlt_hf.cli import main
from deitlt_hf.training.taught import tail_classes
from helpers import TINY, make_student, student_arguments

BRIEF = ["--drw_start_epoch", "inf", "--num_train_epochs", "1", "--eval_strategy", "no", "--save_strategy", "no"]


class Constant(torch.nn.Module):
    """A teacher whose logits are one number."""

    def __init__(self, value):
        super().__init__()
        self.value, self.seen = value, 0

    def forward(self, images):
        self.seen += len(images)
        return SimpleNamespace(logits=torch.full((len(images), 10), self.value))


@pytest.fixture
def second(teacher_folder, tmp_path):
    return str(shutil.copytree(teacher_folder, tmp_path / "second"))


def test_an_image_is_taught_by_the_teacher_of_its_dominating_class(tmp_path, digits, teacher, teacher_folder):
    trainer = DeiTLTTrainer(
        model=make_student(),
        args=student_arguments(tmp_path, tail_below=7),
        teacher=teacher,
        tail_teacher=FlatTeacherForImageClassification.from_pretrained(teacher_folder),
        train_dataset=digits["train"],
        eval_dataset=digits["test"],
    )
    assert trainer.tail_classes == [9]  # 60 to 6 images
    trainer.teacher, trainer.tail_teacher = Constant(1.0), Constant(2.0)
    images = torch.zeros(4, 3, 8, 8)
    assert trainer.routed_logits(images, torch.tensor([0, 9, 9, 8]))[:, 0].tolist() == [1.0, 2.0, 2.0, 1.0]
    assert (trainer.teacher.seen, trainer.tail_teacher.seen) == (2, 2)  # each sees its own images only
    mixed = torch.full((4, 10), 0.01)
    for row, (head, tail) in enumerate([(0.6, 0.4), (0.4, 0.6), (0.5, 0.5), (0.0, 1.0)]):
        mixed[row, 0] += head
        mixed[row, 9] += tail
    assert trainer.routed_logits(images, mixed)[:, 0].tolist() == [1.0, 2.0, 1.0, 2.0]
    assert trainer.routed_logits(images, torch.tensor([9] * 4)).unique().tolist() == [2.0]


def test_classes_of_the_tail():
    groups, counts = {"head": [1], "mid": [], "tail": [2, 0]}, [5, 90, 3]
    assert tail_classes(groups, counts, None) == [0, 2]
    assert tail_classes(groups, counts, 5) == [2]
    for wrong in (3, 91):
        with pytest.raises(ValueError, match="set tail_below between 4 and 90"):
            tail_classes(groups, counts, wrong)
    with pytest.raises(ValueError, match="the group tail has 0 of the 3 classes"):
        tail_classes({}, counts, None)


@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_a_run_has_both_teachers_in_plan_record_card_and_cache(
    tmp_path, teacher_folder, second, distillation, capsys, monkeypatch
):
    command = ["distill", "--recipe", TINY, "--teacher", str(teacher_folder), "--tail_teacher", second, *BRIEF]
    command += ["--distillation", distillation, "--teacher_cache", str(tmp_path / "cache")]
    main([*command, "--output_dir", str(tmp_path / "a")])
    plan = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "teaches 3 of 10 classes" in plan
    record = json.loads((tmp_path / "a" / "results.json").read_text())
    assert record["tail_teacher"]["source"] == "second"
    assert record["tail_teacher"]["classes"] == ["7", "8", "9"]
    assert record["tail_teacher"]["accuracies"]["overall"] > 0.3
    assert "Teacher of rare classes: resnet20" in (tmp_path / "a" / "README.md").read_text()
    monkeypatch.setattr(FlatTeacherForImageClassification, "forward", None)
    main([*command, "--output_dir", str(tmp_path / "b")])
    first, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tail_teacher", "FIRST"], "are the same"),
        (["--tail_teacher", "FIRST/."], "are the same"),
        (["--tail_teacher", "OTHER"], "the tail teacher does not know the classes"),
        (["--tail_teacher", "SECOND", "--tail_below", "1"], "set tail_below between"),
        (["--tail_teacher", "SECOND", "--distillation", "none"], "has no effect with distillation 'none'"),
        (["--tail_teacher", "missing"], "there is no model folder 'missing'"),
        (["--tail_below", "20"], "has no effect without --tail_teacher"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, teacher_folder, second, options, message, capsys):
    names = {label: f"class {label}" for label in range(10)}
    FlatTeacherForImageClassification(
        FlatTeacherConfig(backbone="resnet20", image_size=8, id2label=names)
    ).save_pretrained(tmp_path / "other")
    places = {"FIRST": str(teacher_folder), "SECOND": second, "OTHER": str(tmp_path / "other")}
    for name, place in places.items():
        options = [option.replace(name, place) for option in options]
    with pytest.raises(SystemExit):
        main(
            [
                "distill",
                "--recipe",
                TINY,
                "--teacher",
                str(teacher_folder),
                "--output_dir",
                str(tmp_path / "out"),
                *options,
            ]
        )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
