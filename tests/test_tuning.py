"""Part of a student that is trained: what changes, what is saved, learning rates of layers, heads at class means."""

import copy
import dataclasses
import json

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel

from deitlt_hf.analysis.model_cost import student_model
from deitlt_hf.cli import main
from deitlt_hf.models.trunks import student_of, trunk_of
from deitlt_hf.original.layouts import student_to_ours
from deitlt_hf.recipes import StudentArguments
from deitlt_hf.training import runs
from deitlt_hf.training.tuning import begin_heads, check_tune, features_of, freeze, rate_factor, trained_parameters
from helpers import IMAGES, make_student, student_arguments, student_trainer

HEADS = ("cls_classifier.", "distillation_classifier.")
TOKENS = ("deit.embeddings.cls_token", "deit.embeddings.distillation_token")
ALONE = {"distillation": "none", "max_steps": 2, "learning_rate": 1e-2}


@pytest.fixture
def vit():
    """A student whose trunk is a ViT with one token: CLS and DIST begin as copies of each other."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(intermediate_size=32, **sizes))
    return student_of(trunk_of(vit), num_labels=10, drop_path_rate=0.3)


PARTS = {
    "heads": lambda name: name.startswith(HEADS),
    "last_1": lambda name: name.startswith((*HEADS, *TOKENS, "deit.layers.2.", "deit.layernorm.")),
    "lora": lambda name: (
        name.startswith((*HEADS, *TOKENS)) or (".layers." in name and "norm" not in name and name.endswith(".weight"))
    ),
    "full": lambda name: True,
}


@pytest.mark.parametrize("tune", PARTS)
def test_only_the_chosen_part_is_trained_and_a_plain_folder_is_saved(tmp_path, digits, vit, tune, capsys):
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    trainer = student_trainer(tmp_path, digits, model=vit, tune=tune, layer_decay=0.8, ema_decay=0.5, **ALONE)
    trainer.train()
    trainer.save_model()
    after = type(vit).from_pretrained(tmp_path).state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, tensor in after.items() if not torch.allclose(tensor, before[name], atol=1e-7)}
    no_gradient = {name for name in before if name.endswith("k_proj.bias")}  # softmax cancels it
    assert changed - no_gradient == {name for name in before if PARTS[tune](name)} - no_gradient
    native = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    expected = trainer.model.eval()(pixel_values=IMAGES).logits
    torch.testing.assert_close(native(IMAGES).logits, expected, atol=1e-5, rtol=0)
    AutoModelForImageClassification.from_pretrained(tmp_path / "ema")
    record = json.loads((tmp_path / "results.json").read_text())
    assert (record["settings"]["tune"], record["settings"]["layer_decay"]) == (tune, 0.8)
    assert record["model"] == "DeiTLTForImageClassification"
    plan = capsys.readouterr().out
    assert "DeiTLTForImageClassification, 0.0" in plan
    assert (" trained)" in plan) == (tune != "full")


def test_frozen_blocks_have_no_stochastic_depth(vit):
    freeze(vit, "last_1", 16)
    assert [block.drop_path.drop_prob for block in vit.deit.layers] == [0.0, 0.0, 0.3]


def test_lora_lets_both_tokens_differ_and_resumes(tmp_path, digits, vit):
    """CLS and DIST are the same until a step, then differ. A resumed run ends with the same bytes."""
    values = ALONE | {"tune": "lora", "lora_rank": 2, "save_strategy": "steps", "save_steps": 1, "save_adapter": True}
    again = copy.deepcopy(vit)
    trainer = student_trainer(tmp_path, digits, model=vit, **values)
    tokens = trainer.model.eval()(pixel_values=IMAGES).token_features
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1], atol=1e-6, rtol=0)
    trainer.train()
    trainer.save_model()
    tokens = trainer.model.eval()(pixel_values=IMAGES).token_features
    assert (tokens[:, 0] - tokens[:, 1]).abs().max() > 1e-4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    weights = (tmp_path / "model.safetensors").read_bytes()
    trainer = student_trainer(tmp_path, digits, model=again, **values)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="has adapters already"):
        student_trainer(tmp_path / "other", digits, model=trainer.model, **values)


def test_layer_decay_is_that_of_timm(tmp_path, digits):
    vit = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=10
    )
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    scales = {
        names[id(parameter)]: torch.full_like(parameter, group["lr_scale"])
        for group in param_groups_layer_decay(vit, layer_decay=0.5)
        for parameter in group["params"]
    }
    expected = {name: scale.flatten()[0].item() for name, scale in student_to_ours(scales).items()}
    assert expected == {name: rate_factor(name, 3, 0.5) for name in make_student().state_dict()}
    for optim in ("adamw_torch", "muon"):
        trainer = student_trainer(tmp_path, digits, layer_decay=0.5, optim=optim, **ALONE)
        optimizer = trainer.create_optimizer()
        rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        found = {name: rates[id(parameter)] / 1e-2 for name, parameter in trainer.model.named_parameters()}
        assert found == pytest.approx(expected)
        for group in optimizer.param_groups:
            assert (group["weight_decay"] == 0) == all(parameter.dim() not in (2, 4) for parameter in group["params"])


def test_heads_predict_the_nearest_class_mean():
    student = make_student(num_labels=4)
    features, labels = torch.randn(30, 2, 16, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    begin_heads(student, [(features[:20], labels[:20]), (features[20:], labels[20:])])
    for token, head in enumerate((student.cls_classifier, student.distillation_classifier)):
        of_token = features[:, token]
        means = torch.stack([of_token[labels == label].mean(dim=0) for label in range(3)])
        logits = head(of_token)
        assert torch.equal(logits[:, :3].argmax(dim=1), torch.cdist(of_token, means).argmin(dim=1))
        torch.testing.assert_close(logits[:, 3], torch.zeros(30), atol=1e-5, rtol=0)  # a class without images
        spread = (of_token - means[labels]).square().sum(dim=1).mean()
        expected = -torch.cdist(of_token, means).square() / (2 * spread)
        torch.testing.assert_close(logits[:, :3].log_softmax(1), expected.log_softmax(1), atol=1e-4, rtol=0)
    begin_heads(student, [(features[:3], labels[:3])])  # one image for each class
    assert student.cls_classifier.weight.isfinite().all()


def test_frozen_heads_begin_at_the_means_of_the_training_images(tmp_path, digits):
    values = ALONE | {"tune": "heads", "max_steps": 1, "learning_rate": 1e-12}
    trainer = student_trainer(tmp_path, digits, **values)
    trainer.train()
    found = trainer.model.cls_classifier.weight.detach().clone()
    begin_heads(trainer.model, features_of(trainer, digits["train"]))
    torch.testing.assert_close(found, trainer.model.cls_classifier.weight, atol=1e-4, rtol=1e-4)
    assert not student_arguments(tmp_path).starts_heads_at_means
    assert not student_arguments(tmp_path, tune="heads", heads_from_means=False).starts_heads_at_means


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"tune": "some"}, "tune must be full, heads, lora or last_N, such as last_4, got 'some'"),
        ({"tune": "last_0"}, "tune must be full"),
        ({"tune": "last_4"}, "more than the 3 blocks of the student; choose at most last_3"),
        ({"lora_rank": 4}, "lora_rank must be left out without tune lora, got 4"),
        ({"tune": "lora", "lora_rank": 0}, "lora_rank must be 1 or more"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
    ],
)
def test_values_that_do_not_fit_are_refused(tmp_path, digits, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        student_trainer(tmp_path, digits, **values)


def test_lora_without_peft_is_refused(monkeypatch):
    monkeypatch.setattr("deitlt_hf.training.tuning.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match="needs PEFT; install it with pip install peft"):
        check_tune("lora")


def test_the_estimate_knows_how_much_is_trained(tmp_path):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    found = {}
    for tune in PARTS:
        args = student_arguments(tmp_path, tune=tune, distillation="none")
        found[tune] = student_model(StudentArguments(**sizes), 10, None, args)
    whole = make_student(num_labels=10, intermediate_size=64)
    assert {model.parameters for model in found.values()} == {whole.num_parameters()}
    assert found["full"].trained == whole.num_parameters()
    assert found["heads"].trained == 2 * 10 * 17
    freeze(whole, "last_1", 16)
    assert found["last_1"].trained == trained_parameters(whole)
    for name in ("training_flops", "state_bytes"):
        values = {tune: dataclasses.asdict(model)[name] for tune, model in found.items()}
        assert values["heads"] < values["last_1"] < values["full"], name
    assert found["heads"].activation_bytes < 0.1 * found["full"].activation_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "last_99"], "tune 'last_99' is more than the 6 blocks"),
        (["--tune", "last_0"], "tune must be"),
        (["--sampling", "class_balanced", "--repeated_augmentation", "3"], "repeated_augmentation must be 1"),
    ],
)
def test_refused_before_the_teacher_is_trained(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(runs, "train_teacher", lambda *_: pytest.fail("hours of training came first"))
    with pytest.raises(SystemExit):
        main(["distill", "--recipe", "digits_lt", "--output_dir", str(tmp_path / "student"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "student").exists()
