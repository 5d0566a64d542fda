"""Tests of external teachers: any image classifier of transformers or timm."""

import copy
import json
import runpy
import sys

import pytest
import timm
import torch
from timm.models import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTForImageClassification,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    RegNetConfig,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
)

from deitlt_hf import (
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherTrainer,
    FlatTeacherTrainingArguments,
)
from deitlt_hf.cli.sharpness import main as measure_sharpness
from deitlt_hf.data import image_processor
from deitlt_hf.data.transforms import ImageFormat
from deitlt_hf.serving.classifiers import load_classifier
from deitlt_hf.training.provenance import teacher_record
from deitlt_hf.training.taught import label_order
from helpers import ROOT, make_student

SHUFFLED = [str(label) for label in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
LABELS = {"id2label": dict(enumerate(SHUFFLED)), "label2id": {name: label for label, name in enumerate(SHUFFLED)}}
OTHER_NORM = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def transformers_teacher(kind):
    torch.manual_seed(0)
    if kind == "convnext":
        config = ConvNextConfig(patch_size=2, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], **LABELS)
        processor = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0, **OTHER_NORM)
    elif kind == "regnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "groups_width": 4}
        config = RegNetConfig(**sizes, **LABELS)
        processor = ViTImageProcessor(size={"height": 24, "width": 32}, **OTHER_NORM)
    else:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", **LABELS)
        processor = image_processor(16, 20, OTHER_NORM["image_mean"], OTHER_NORM["image_std"])
    return AutoModelForImageClassification.from_config(config).eval(), processor


def timm_teacher():
    torch.manual_seed(0)
    data = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
    return timm.create_model("resnet10t", num_classes=10, pretrained_cfg_overlay=data).eval()


def student_trainer(folder, digits, **kwargs):
    args = DeiTLTTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=32, repeated_augmentation=1, train_crop="padded"
    )
    return DeiTLTTrainer(
        model=make_student(), args=args, train_dataset=digits["train"], eval_dataset=digits["test"], **kwargs
    )


@pytest.mark.parametrize("kind", ["resnet", "convnext", "regnet", "timm"])
def test_a_teacher_receives_the_input_of_its_own_pipeline(tmp_path, digits, kind):
    """A teacher loaded from a folder receives what its own pipeline would give it: size, normalisation, class order.

    The images already have the teacher's size, and both ways compute the same.
    """
    if kind == "timm":
        teacher = timm_teacher()
        save_for_hf(teacher, tmp_path / "teacher", model_config={"label_names": SHUFFLED})
    else:
        teacher, processor = transformers_teacher(kind)
        teacher.save_pretrained(tmp_path / "teacher")
        processor.save_pretrained(tmp_path / "teacher")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "teacher")
    loaded = load_classifier(str(tmp_path / "teacher"))
    trainer = student_trainer(tmp_path / "student", digits, teacher=loaded, teacher_processor=processor)
    pixels = torch.randint(0, 256, (2, 3, *trainer.formats["teacher"].size), generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (trainer.processing_class.image_mean, trainer.processing_class.image_std)
    )
    got = trainer.teacher_logits((pixels / 255 - mean) / std)
    images = [image.permute(1, 2, 0).byte().numpy() for image in pixels]
    if kind == "resnet":
        processor.do_resize = False  # to 20 pixels, of which it would crop the middle 16
    with torch.no_grad():
        own = teacher(processor(images, return_tensors="pt").pixel_values)
    own = own if kind == "timm" else own.logits
    expected = own[:, [SHUFFLED.index(str(label)) for label in range(10)]]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_sharpness_uses_the_teachers_class_order(tmp_path, digits, monkeypatch):
    """Sharpness uses the class order of the teacher; with another order, the loss would use wrong labels."""
    teacher, processor = transformers_teacher("resnet")
    figures = []
    for name, order in (("own", SHUFFLED), ("sorted", sorted(SHUFFLED))):
        with torch.no_grad():
            rows = [SHUFFLED.index(label) for label in order]
            layer = copy.deepcopy(teacher)
            layer.classifier[1].weight.copy_(teacher.classifier[1].weight[rows])
            layer.classifier[1].bias.copy_(teacher.classifier[1].bias[rows])
        layer.config.id2label = dict(enumerate(order))
        layer.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        command = ["--recipe", "digits_lt", "--model", str(tmp_path / name), "--num_images", "9", "--num_vectors", "1"]
        measure_sharpness([*command, "--json", str(tmp_path / "figures.json")])
        figures.append(json.loads((tmp_path / "figures.json").read_text())["tail"]["loss"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


@pytest.mark.parametrize("content", ['[{"acc": 1}]', '{"data": "imagenet", "settings": {}}', '{"settings": null}', "{"])
def test_an_unrelated_results_file_of_a_teacher_is_ignored(tmp_path, content):
    """An unrelated file named results.json in a teacher's repository does not stop its student."""
    make_student().save_pretrained(tmp_path)
    (tmp_path / "results.json").write_text(content)
    record = teacher_record(AutoModelForImageClassification.from_pretrained(tmp_path), None)
    assert record["training"] is None
    assert record["source"] == tmp_path.name


def test_any_classifier_can_be_evaluated(tmp_path, monkeypatch, capsys):
    names = [str(label) for label in range(10)]
    save_for_hf(timm_teacher(), tmp_path / "model", model_config={"label_names": names})
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--recipe", "digits_lt", "--model", str(tmp_path / "model")])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert "│ teacher     │" in capsys.readouterr().out


def test_a_deit_with_one_head_is_refused_as_a_student(tmp_path, monkeypatch, capsys):
    """A DeiT with one head is refused as a student, because its second head would be random."""
    labels = {"id2label": {label: str(label) for label in range(10)}, "label2id": {str(n): n for n in range(10)}}
    config = DeiTConfig(image_size=16, hidden_size=12, num_hidden_layers=1, intermediate_size=12, **labels)
    DeiTForImageClassification(config).save_pretrained(tmp_path)
    image_processor(16).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--recipe", "digits_lt", "--model", str(tmp_path)])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "│ teacher     │" in output
    assert "distillation" not in output


@pytest.mark.parametrize(
    "processor",
    [
        EfficientNetImageProcessor(size={"height": 16, "width": 16}),
        MobileViTImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    ],
    ids=["twice", "bgr"],
)
def test_processors_with_further_steps_are_refused(processor):
    """Processors with further steps are refused: EfficientNet's normalises twice, MobileViT's swaps the channels."""
    with pytest.raises(ValueError, match="changes images in other ways than by size"):
        ImageFormat.of(processor)


def test_classes_without_names_are_matched_by_index(tmp_path, digits):
    """Classes without names are matched by index; timm's training script saves no names."""
    model = timm.create_model("resnet10t", num_classes=10)
    teacher = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=10))
    teacher.timm_model.load_state_dict(model.state_dict())
    trainer = student_trainer(
        tmp_path, digits, teacher=teacher, teacher_processor=image_processor(32, 32, [0.5] * 3, [0.25] * 3)
    )
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = model.eval()((images - 0.5) / 0.25)
    torch.testing.assert_close(trainer.teacher_logits((images - mean) / std), expected, atol=1e-5, rtol=1e-4)


def test_a_teacher_may_have_more_classes_and_duplicate_names(tmp_path, digits):
    teacher, processor = transformers_teacher("resnet")
    names = ["crane", "5", "x", *map(str, (9, 8, 7, 6)), "crane", *map(str, (4, 3, 2, 1, 0))]
    torch.manual_seed(0)
    teacher.classifier[1] = torch.nn.Linear(8, len(names))
    teacher.config.id2label = dict(enumerate(names))
    trainer = student_trainer(tmp_path, digits, teacher=teacher, teacher_processor=processor)
    assert trainer._orders["teacher"].tolist() == [names.index(str(label)) for label in range(10)]

    student_names = ["crane", "0", "1", "2", "3", "4", "crane", "5", "6", "7"]
    order = label_order(student_names, teacher.config).tolist()
    assert order == [0, 12, 11, 10, 9, 8, 7, 1, 6, 5]


def test_a_model_without_an_image_size_needs_a_processor(tmp_path, digits):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=10)
    with pytest.raises(ValueError, match="ResNetConfig has no integer image_size; give an image"):
        FlatTeacherTrainer(
            model=ResNetForImageClassification(config),
            args=FlatTeacherTrainingArguments(output_dir=str(tmp_path)),
            train_dataset=digits["train"],
        )


def test_a_resnet_of_transformers_trains_with_sam_and_teaches(tmp_path, digits, monkeypatch, capsys):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
    trainer = FlatTeacherTrainer(
        model=ResNetForImageClassification(config),
        args=FlatTeacherTrainingArguments(
            output_dir=str(tmp_path / "teacher"),
            num_train_epochs=12,
            warmup_epochs=0,
            hflip=0,
            per_device_train_batch_size=32,
        ),
        train_dataset=digits["train"],
        eval_dataset=digits["test"],
        processing_class=image_processor(32),
    )
    trainer.train()
    trainer.save_model()
    assert trainer.last_table.accuracies["teacher"]["overall"] > 0.5

    command = ["distill.py", "--recipe", "digits_lt", "--imbalance_ratio", "10", "--max_per_class", "60"]
    command += ["--teacher", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "student"), "--num_train_epochs"]
    command += ["1", "--drw_start_epoch", "inf", "--warmup_epochs", "0", "--hidden_size", "12", "--num_hidden_layers"]
    command += ["1", "--dataloader_num_workers", "0"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / "scripts" / "distill.py"), run_name="__main__")
    plan = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "ResNetForImageClassification, 32 px, sees the student view" in plan
    assert json.loads((tmp_path / "student" / "results.json").read_text())["finished"]
