"""Linear probes: features of any backbone, the choice of the regularisation, and the command `deitlt probe`."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from deitlt_hf.analysis.probing import pooled, probe
from deitlt_hf.cli import main
from deitlt_hf.data import image_processor
from deitlt_hf.serving.classifiers import load_backbone
from deitlt_hf.serving.handler import native_config
from deitlt_hf.training.frozen_teacher import load_frozen
from deitlt_hf.training.linear_head import STRENGTHS, choose_strength
from helpers import IMAGES, TINY, make_student, save_image

SMALL = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def saved(model, folder, size=8):
    model.save_pretrained(folder)
    image_processor(size).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def features(model, folder, images=IMAGES):
    return pooled(load_backbone(saved(model, folder)), images)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "kind"), [(ViTConfig(**SMALL), ViTForImageClassification), (Dinov2Config(**SMALL), Dinov2Model)]
)
def test_the_feature_of_a_vit_is_its_cls_token(config, kind, tmp_path):
    model = kind(config).eval()
    backbone = getattr(model, "vit", model)
    expected = backbone(IMAGES).last_hidden_state[:, 0]
    torch.testing.assert_close(features(model, tmp_path), expected)


@torch.no_grad()
def test_the_features_of_a_student_are_those_of_its_heads(tmp_path):
    student = make_student().eval()
    found = features(student, tmp_path)
    cls, distillation = found.chunk(2, dim=1)
    outputs = student(IMAGES)
    torch.testing.assert_close(student.cls_classifier(cls), outputs.cls_logits)
    torch.testing.assert_close(student.distillation_classifier(distillation), outputs.distillation_logits)


@torch.no_grad()
def test_the_feature_of_a_teacher_is_that_of_its_classifier(teacher, teacher_folder):
    teacher.eval()
    found = pooled(load_backbone(str(teacher_folder)), IMAGES)
    torch.testing.assert_close(teacher.classifier(found), teacher(IMAGES).logits)


@torch.no_grad()
def test_an_mae_sees_the_whole_image(tmp_path):
    decoder = {f"decoder_{name}": value for name, value in SMALL.items() if name not in ("image_size", "patch_size")}
    found = [features(ViTMAEForPreTraining(ViTMAEConfig(**SMALL, **decoder)), tmp_path)]
    found.append(pooled(load_backbone(str(tmp_path)), IMAGES))  # the order of its patches is random
    torch.testing.assert_close(*found)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        lambda: TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=3)),
    ],
)
def test_a_cnn_gives_its_pooled_features(make, tmp_path):
    model = make()
    found = features(model, tmp_path, torch.zeros(2, 3, 32, 32))
    assert found.shape == (2, {"resnet": 16}.get(model.config.model_type, 512))


def test_what_has_no_features_of_images_is_refused(tmp_path, digits):
    texts = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    )
    with pytest.raises(ValueError, match="a BertModel does not take images"):
        probe(saved(texts, tmp_path / "bert"), digits)
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        probe(str(tmp_path / "none" / "at" / "all"), digits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"lacks \d+ weights of a ViTModel"),
        ({"intermediate_size": 48}, r"has \d+ weights of other shapes than those of a ViTModel"),
    ],
)
def test_a_backbone_with_missing_weights_is_refused(tmp_path, change, message):
    folder = saved(ViTModel(ViTConfig(**SMALL)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)
    with pytest.raises(ValueError, match=message.replace("ViTModel", "(ViTModel|ViTForImageClassification)")):
        load_frozen(folder, native_config(folder), ["a", "b"])


def test_the_regularisation_follows_the_held_out_images():
    """With features of pure noise the strongest regularisation is best, with separable classes a weaker one."""
    random = np.random.default_rng(0)
    labels, held_labels = (np.repeat(np.arange(4), number) for number in (30, 40))
    noise, held_noise = random.normal(size=(120, 20)), random.normal(size=(160, 20))
    assert choose_strength(noise, labels, held_noise, held_labels) == STRENGTHS[0]
    means = 10 * random.normal(size=(4, 20))
    assert choose_strength(noise + means[labels], labels, held_noise + means[held_labels], held_labels) > STRENGTHS[2]


def test_test_images_choose_nothing(tmp_path, digits):
    folder = saved(make_student(), tmp_path)
    first = probe(folder, digits)
    wrong = digits["test"].map(lambda row: {"label": (row["label"] + 1) % 10})
    second = probe(folder, {"train": digits["train"], "test": wrong})
    assert (first.strength, first.predictions) == (second.strength, second.predictions)
    assert len(first.predictions) == len(digits["test"])
    assert first.held_out < len(digits["train"]) / 3


def test_the_regularisation_is_chosen_on_validation_images(tmp_path, digits):
    folder = saved(make_student(), tmp_path)
    found = probe(folder, {**digits, "validation": digits["test"].select(range(25))})
    assert found.held_out == 25


def test_command_prints_intervals_and_writes_json(teacher_folder, tmp_path, capsys):
    file = tmp_path / "probe.json"
    main(["probe", "--recipe", TINY, "--model", str(teacher_folder), "--resamples", "50", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "with 95 % bootstrap intervals" in printed
    assert "held-out training images" in printed
    found = json.loads(file.read_text())
    low, high = found["intervals"]["overall"]
    assert 0.4 < low < found["accuracies"]["overall"] < high  # of a trained teacher: chance is 0.1
    assert found["features"] == 64


def test_classes_with_one_image_are_probed_and_few_test_images_are_said(teacher_folder, tmp_path, capsys):
    for split in ("train", "test"):
        for index, name in enumerate("abc"):
            save_image(tmp_path / split / name / "1.png", 80 * index)
    main(["probe", "--recipe", "image_folder", "--data_dir", str(tmp_path), "--model", str(teacher_folder)])
    printed = capsys.readouterr().out
    assert "regularisation C = 1 not chosen, with one image a class" in printed
    assert "Note: groups with few test images, whose accuracies are uncertain: head 1, mid 1, tail 1." in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--resamples", "0"], "resamples must be 1 or more, got 0"), (["--streaming", "true"], "streaming")],
)
def test_command_refuses_in_one_sentence(options, message, teacher_folder, capsys):
    with pytest.raises(SystemExit):
        main(["probe", "--recipe", TINY, "--model", str(teacher_folder), *options])
    assert message in capsys.readouterr().err
