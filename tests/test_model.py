"""The student and the teacher as transformers models."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
)

from conftest import make_student
from deitlt_hf import (
    DeiTLTConfig,
    DeiTLTForImageClassification,
    DeiTLTModel,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
)

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_outputs_are_the_same_in_training_and_evaluation(student):
    """The original returns four values in training and two in evaluation, which breaks every generic tool."""
    fields = {mode: set(student.train(mode)(IMAGES).keys()) for mode in (True, False)}
    assert fields[True] == fields[False] == {"logits", "cls_logits", "distillation_logits", "token_features"}


def test_logits_are_the_mean_of_both_heads(student):
    outputs = student.eval()(IMAGES)
    torch.testing.assert_close(outputs.logits, (outputs.cls_logits + outputs.distillation_logits) / 2)
    torch.testing.assert_close(student.cls_classifier(outputs.token_features[:, 0]), outputs.cls_logits)


@pytest.mark.parametrize("labels", [torch.tensor([0, 3, 9]), torch.eye(10)[[0, 3, 9]]])
def test_loss_is_the_mean_cross_entropy_of_both_heads(student, labels):
    outputs = student.eval()(IMAGES, labels=labels)
    heads = (outputs.cls_logits, outputs.distillation_logits)
    expected = sum(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3, 9])) for logits in heads) / 2
    torch.testing.assert_close(outputs.loss, expected)


def test_saved_folder_loads_three_ways_with_the_same_logits(tmp_path, student):
    student = make_student(id2label={label: f"class {label}" for label in range(10)}).eval()
    student.save_pretrained(tmp_path)
    expected = student(IMAGES).logits
    native = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(native) is DeiTForImageClassificationWithTeacher
    ours = DeiTLTForImageClassification.from_pretrained(tmp_path).eval()
    remote = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(remote).__name__ == "DeiTLTForImageClassification"
    for model in (native, ours, remote):
        torch.testing.assert_close(model(IMAGES).logits, expected, atol=1e-6, rtol=0)
        assert model.config.id2label[3] == "class 3"
    assert [layer.drop_path.drop_prob for layer in ours.deit.layers] == [0.0, 0.05, 0.1]


def test_saved_folder_loads_without_the_package(tmp_path, student):
    """Hosted inference has no `deitlt_hf`: with and without `trust_remote_code`, in a process that cannot import it."""
    student.eval().save_pretrained(tmp_path / "model")
    torch.save(IMAGES, tmp_path / "images.pt")
    torch.save(student(IMAGES).logits.detach(), tmp_path / "logits.pt")
    code = f"""
import sys
sys.modules["deitlt_hf"] = None
import torch
from transformers import AutoModelForImageClassification
images, logits = (torch.load(r"{tmp_path}/" + name, weights_only=True) for name in ("images.pt", "logits.pt"))
for trust in (False, True):
    model = AutoModelForImageClassification.from_pretrained(r"{tmp_path}/model", trust_remote_code=trust).eval()
    assert (model(images).logits - logits).abs().max() < 1e-6
    print(type(model).__name__)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DeiTForImageClassificationWithTeacher", "DeiTLTForImageClassification"]


def test_bare_model_loads_from_a_classifier(tmp_path, student):
    student.eval().save_pretrained(tmp_path)
    for model in (DeiTLTModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        tokens = model.eval()(IMAGES).last_hidden_state[:, :2]
        torch.testing.assert_close(tokens, student(IMAGES).token_features, atol=1e-6, rtol=0)


@pytest.mark.parametrize("source", [DeiTForImageClassification, DeiTForImageClassificationWithTeacher])
def test_starts_from_any_deit_checkpoint_with_other_classes(tmp_path, source):
    """transformers renames parameters on loading, but not for custom classes: all of them would silently be new."""
    config = DeiTConfig(**{**make_student().config.to_dict(), "num_labels": 5, "id2label": None, "label2id": None})
    pretrained = source(config)
    pretrained.save_pretrained(tmp_path)
    model = DeiTLTForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model(IMAGES).logits.shape == (3, 7)
    ours = model.deit.state_dict()
    for name, tensor in pretrained.deit.state_dict().items():
        torch.testing.assert_close(ours[name], tensor)


def test_initialisation_is_that_of_the_authors():
    config = DeiTLTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768)
    torch.manual_seed(0)
    for name, parameter in DeiTLTForImageClassification(config).state_dict().items():
        if name.endswith("cls_token"):
            assert 1e-7 < parameter.std() < 1e-5
        elif name.endswith(("position_embeddings", "distillation_token")) or "_proj.weight" in name or "mlp" in name:
            expected = 0.0 if name.endswith("bias") else 0.02
            assert parameter.std() == pytest.approx(expected, rel=0.15), name
        elif "projection" in name:
            assert parameter.abs().max() <= (3 * 16 * 16) ** -0.5
        elif "layernorm" in name:
            assert torch.all(parameter == (1.0 if name.endswith("weight") else 0.0))


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean(student):
    drop_path = student.deit.layers[2].drop_path.train()
    drop_path.drop_prob = 0.25
    dropped = drop_path(torch.ones(20_000, 2, 2))
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.all(dropped == dropped[:, :1, :1])
    assert dropped.mean() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop_path.eval()(torch.ones(4, 2)), torch.ones(4, 2))


def test_stochastic_depth_is_used_in_training_only():
    student = make_student(drop_path_rate=0.5)
    assert torch.equal(student.eval()(IMAGES).logits, student(IMAGES).logits)
    torch.manual_seed(0)
    assert not torch.equal(student.train()(IMAGES).logits, student(IMAGES).logits)


def test_attention_functions_agree(student):
    eager = make_student(attn_implementation="eager").eval()
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(IMAGES).logits, student.eval()(IMAGES).logits, atol=1e-6, rtol=1e-5)


def test_hidden_states_and_attentions():
    outputs = make_student(attn_implementation="eager").eval()(
        IMAGES, output_hidden_states=True, output_attentions=True
    )
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(3, 6, 16)] * 4
    assert [tuple(attention.shape) for attention in outputs.attentions] == [(3, 2, 6, 6)] * 3
    torch.testing.assert_close(outputs.attentions[0].sum(dim=-1), torch.ones(3, 2, 6))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make_student(drop_path_rate=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(IMAGES, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_other_image_sizes_and_channels(student):
    larger = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"16\*16"):
        student(larger)
    assert student(larger, interpolate_pos_encoding=True).logits.shape == (2, 10)
    assert make_student(num_channels=1)(torch.randn(2, 1, 8, 8)).logits.shape == (2, 10)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 3, "patch_size 3 does not divide image_size 8"),
        ("drop_path_rate", 1.0, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ("num_attention_heads", 3, "num_attention_heads 3 does not divide hidden_size 16"),
        ("class_counts", [5, 4], "class_counts has 2 entries but the model has 10 labels"),
    ],
)
def test_configuration_refuses(field, value, message):
    with pytest.raises(ValueError, match=message):
        make_student(**{field: value})


def test_configuration_survives_a_round_trip(tmp_path):
    config = DeiTLTConfig(drop_path_rate=0.3, num_labels=3, class_counts=[9, 5, 1], image_size=32, patch_size=8)
    config.save_pretrained(tmp_path)
    assert DeiTLTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "deit"


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        ({"backbone": "resnet20"}, 3),
        ({"backbone": "resnet32", "classifier": "cosine"}, 3),
        ({"backbone": "timm/resnet18", "image_size": 64}, 4),
    ],
)
def test_teacher_survives_a_round_trip(tmp_path, config, stages):
    torch.manual_seed(0)
    teacher = FlatTeacherForImageClassification(FlatTeacherConfig(**config, num_labels=4)).eval()
    teacher.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    images = torch.randn(2, 3, teacher.config.image_size, teacher.config.image_size)
    loaded = FlatTeacherForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(images).logits, teacher(images).logits)
    assert len(teacher.stages()) == stages
    parameters = [parameter for stage in teacher.stages() for parameter in stage]
    assert {id(p) for p in parameters} == {id(p) for p in teacher.parameters()}
    assert len(parameters) == len(list(teacher.parameters()))
    if config.get("classifier") == "cosine":
        assert teacher(1000 * images).logits.abs().max() <= 1.0 + 1e-6


def test_teacher_refuses_an_unknown_backbone():
    with pytest.raises(ValueError, match="unknown backbone 'resnet18'; choose one of resnet20"):
        FlatTeacherConfig(backbone="resnet18")


def test_import_is_lazy():
    """`import deitlt_hf` must not wait for torch."""
    code = "import sys, deitlt_hf; assert 'torch' not in sys.modules; deitlt_hf.DeiTLTConfig; print(dir(deitlt_hf))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
