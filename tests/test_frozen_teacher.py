"""Teachers that are a frozen model of transformers or timm with a fitted linear head."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from deitlt_hf.analysis.probing import probe
from deitlt_hf.cli import main
from deitlt_hf.data import image_processor
from deitlt_hf.recipes import DataArguments, TeacherArguments, fill_arguments
from deitlt_hf.serving.handler import native_config
from deitlt_hf.training import FlatTeacherTrainingArguments
from deitlt_hf.training.frozen_teacher import load_frozen
from deitlt_hf.training.linear_head import fit_balanced, fold
from deitlt_hf.training.runs import train_teacher
from helpers import TINY

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
KINDS = {
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**SMALL | {"image_size": 8, "patch_size": 2, "hidden_size": 32})
    ),
    "vit without a head": lambda: ViTModel(ViTConfig(**SMALL)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL)),
    "deit": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL)),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ),
    "mae": lambda: ViTMAEForPreTraining(ViTMAEConfig(**SMALL)),
    "bert": lambda: BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ),
}


def saved(kind, folder):
    torch.manual_seed(0)
    if kind == "timm":
        sizes = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
        save_for_hf(timm.create_model("resnet10t", num_classes=7, pretrained_cfg_overlay=sizes), folder)
        return str(folder)
    KINDS[kind]().save_pretrained(folder)
    image_processor(8 if kind == "vit" else 16, mean=[0.5] * 3).save_pretrained(folder)
    return str(folder)


def made(folder, **values):
    kinds = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)
    values = {"tune": "heads", "output_dir": str(folder), "report_to": ["none"]} | values
    return train_teacher(*fill_arguments("teacher", kinds, TINY, values))


def test_a_frozen_vit_becomes_a_plain_classifier_that_teaches(tmp_path, capsys):
    """The head is the regression of `deitlt probe`, the backbone is unchanged, and plain transformers loads it."""
    source, out = saved("vit", tmp_path / "vit"), tmp_path / "teacher"
    command = ["train-teacher", "--recipe", TINY, "--backbone", source, "--tune", "heads", "--output_dir", str(out)]
    main(command)
    assert not (out / "log.jsonl").exists()  # no steps
    teacher = AutoModelForImageClassification.from_pretrained(out)
    assert type(teacher) is ViTForImageClassification
    assert [*AutoImageProcessor.from_pretrained(out).image_mean] == [0.5] * 3
    before, after = ViTForImageClassification.from_pretrained(source).state_dict(), teacher.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if not name.startswith("classifier"))

    data = fill_arguments("data", (DataArguments,), TINY, {})[0].load()
    processor = AutoImageProcessor.from_pretrained(out)
    with torch.no_grad():
        logits = teacher(**processor([image.convert("RGB") for image in data["test"]["image"]], return_tensors="pt"))
    expected = np.asarray(probe(source, data).predictions)
    assert (logits.logits.argmax(dim=1).numpy() == expected).mean() > 0.99
    record = json.loads((out / "results.json").read_text())
    right = float((expected == np.asarray(data["test"]["label"])).mean())
    assert record["last"]["accuracies"]["teacher"]["overall"] == pytest.approx(right, abs=0.005)
    assert (record["settings"]["tune"], record["finished"], record["steps"]) == ("heads", True, 0)
    card = (out / "README.md").read_text()
    assert "whose weights were not changed" in card
    assert "trust_remote_code" not in card

    written = (out / "model.safetensors").stat().st_mtime_ns
    main([*command, "--resume_from_checkpoint", "auto"])
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    command[4] = str(shutil.copytree(source, tmp_path / "other"))
    with pytest.raises(SystemExit):
        main([*command, "--resume_from_checkpoint", "auto"])
    assert "it began with backbone vit, not other" in capsys.readouterr().err
    brief = ["--max_steps", "1", "--drw_start_epoch", "inf", "--eval_strategy", "no", "--save_strategy", "no"]
    main(["distill", "--recipe", TINY, "--teacher", str(out), "--output_dir", str(tmp_path / "student"), *brief])
    taught = json.loads((tmp_path / "student" / "results.json").read_text())["teacher"]
    assert taught["training"]["settings"]["teacher_loss"] == "logistic_regression"
    assert "ViTForImageClassification, 8 px, sees the student view" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["vit without a head", "dinov2", "deit", "resnet", "timm"])
def test_any_classifier_gets_a_new_head_on_its_own_weights(kind, tmp_path):
    path = saved(kind, tmp_path)
    model, head = load_frozen(path, native_config(path), ["a", "b", "c"])
    side = 32 if kind == "timm" else 16
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        logits = model(pixel_values=torch.zeros(2, 3, side, side)).logits
    assert logits.tolist() == [[1.0, 2.0, 3.0]] * 2  # it reads nothing but this head
    if kind != "timm":
        expected = AutoModel.from_pretrained(path).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.base_model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("classes", [2, 4])
def test_the_layer_gives_the_probabilities_of_the_regression(classes):
    random = np.random.RandomState(0)
    labels = np.arange(80) % classes
    features = (3 + 5 * random.standard_normal((80, 6)) + labels[:, None]).astype(np.float32)
    regression, _, held_out = fit_balanced((features, labels))
    head = torch.nn.Linear(6, classes)
    fold(regression, head)
    found = head(torch.from_numpy(features)).softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(found, regression.predict_proba(features), atol=1e-5)
    assert held_out == 16


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("vit", {"tune": "lora"}, "tune must be full or heads for a teacher, got 'lora'"),
        ("vit", {"tune": "full"}, "a trained model .* needs --tune heads"),
        (None, {"backbone": "resnet32"}, "'resnet32' has no trained weights"),
        (None, {"backbone": "missing/folder/vit"}, "there is no model folder 'missing/folder/vit'"),
        ("vit", {"teacher_loss": "paco"}, "teacher_loss has no effect with tune heads"),
        ("vit", {"num_train_epochs": 3}, "num_train_epochs has no effect with tune heads"),
        ("vit", {"image_resize": 20}, "image_resize has no effect with tune heads"),
        ("bert", {}, "no image classifier for models of type 'bert'"),
        ("mae", {}, "no image classifier for models of type 'vit_mae'"),
        ("vit", {"streaming": True, "imbalance_ratio": None, "max_per_class": None}, "leave out --streaming"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, kind, values, message):
    if kind is not None:
        values = {"backbone": saved(kind, tmp_path / "source")} | values
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        made(tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_a_recipe_names_a_frozen_teacher_that_must_be_made_first(tmp_path, capsys):
    source = saved("vit", tmp_path / "vit")
    (tmp_path / "own.yaml").write_text(f"extends: {TINY}\nteacher:\n  backbone: {source}\n  tune: heads\n")
    command = ["distill", "--recipe", str(tmp_path / "own.yaml"), "--output_dir", str(tmp_path / "out" / "student")]
    with pytest.raises(SystemExit):
        main(command)
    assert "make it first with deitlt train-teacher" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
