"""Tests of the student and the teacher as transformers models."""

import dataclasses
import json
import runpy
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import flash_attention_mask

from deitlt_hf import (
    DeiTLTConfig,
    DeiTLTForImageClassification,
    DeiTLTModel,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
)
from deitlt_hf.data import image_processor
from deitlt_hf.data.transforms import model_processor
from helpers import IMAGES, make_student


def test_outputs_are_the_same_in_training_and_evaluation(student):
    """Outputs are the same in training and evaluation.

    The original returns four values in training and two in evaluation, which breaks generic tools.
    """
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
    expected = sum(nn.functional.cross_entropy(logits, torch.tensor([0, 3, 9])) for logits in heads) / 2
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


def test_bare_model_loads_from_a_classifier(tmp_path, student):
    student.eval().save_pretrained(tmp_path)
    for model in (DeiTLTModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        tokens = model.eval()(IMAGES).last_hidden_state
        torch.testing.assert_close(tokens[:, :2], student(IMAGES).token_features, atol=1e-6, rtol=0)
        whole = student.deit.layernorm(student(IMAGES, output_hidden_states=True).hidden_states[-1])
        torch.testing.assert_close(tokens, whole, atol=1e-6, rtol=0)  # the patch tokens are equal, too


@pytest.mark.parametrize("source", [DeiTForImageClassification, DeiTForImageClassificationWithTeacher])
def test_starts_from_any_deit_checkpoint_with_other_classes(tmp_path, source):
    """A student starts from any DeiT checkpoint with other classes and loads its weights.

    transformers renames parameters on loading, but not for custom classes; without this all of them would silently be
    random.
    """
    config = DeiTConfig(**{**make_student().config.to_dict(), "num_labels": 5, "id2label": None, "label2id": None})
    pretrained = source(config)
    pretrained.save_pretrained(tmp_path)
    model = DeiTLTForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model(IMAGES).logits.shape == (3, 7)
    ours = model.deit.state_dict()
    for name, tensor in pretrained.deit.state_dict().items():
        torch.testing.assert_close(ours[name], tensor)


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        ({}, True),
        ({"num_labels": 10}, True),
        ({"num_labels": 3}, False),
        ({"id2label": {0: "ant", 1: "bee"}, "label2id": {"ant": 0, "bee": 1}}, False),
        ({"id2label": {label: f"other {label}" for label in range(10)}}, False),
    ],
)
def test_other_classes_remove_counts_and_groups_of_the_old_ones(tmp_path, labels, kept):
    counts, class_map = list(range(60, 0, -6)), list(range(9, -1, -1))
    known = {"class_counts": counts, "class_groups": {"head": [0, 1], "tail": [2, 9]}, "class_map": class_map}
    make_student(**known).save_pretrained(tmp_path / "old")
    model = DeiTLTForImageClassification.from_pretrained(tmp_path / "old", ignore_mismatched_sizes=True, **labels)
    assert {name: getattr(model.config, name) for name in known} == (known if kept else dict.fromkeys(known))
    model.save_pretrained(tmp_path / "new")
    assert DeiTLTForImageClassification.from_pretrained(tmp_path / "new").config.id2label == model.config.id2label


def test_initialisation_is_that_of_the_authors():
    """Each parameter is initialised as by the authors.

    The test has a rule for every parameter, which reveals a new parameter with the defaults of another library.
    """
    config = DeiTLTConfig(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, num_labels=100
    )
    torch.manual_seed(0)
    for name, parameter in DeiTLTForImageClassification(config).named_parameters():
        module, kind = name.split(".")[-2:]
        mean, deviation = parameter.mean().item(), parameter.std().item()
        if kind == "cls_token":
            assert 5e-7 < deviation < 2e-6
        elif module.startswith("layernorm"):
            assert torch.all(parameter == (1.0 if kind == "weight" else 0.0)), name
        elif module == "projection":
            bound = (3 * 16 * 16) ** -0.5
            assert 0.95 * bound < parameter.abs().max() <= bound
            assert deviation == pytest.approx(bound / 3**0.5, rel=0.15)
        elif kind == "bias":
            assert torch.all(parameter == 0.0), name
        else:
            is_linear = module in ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
            assert is_linear or module.endswith("classifier") or kind in ("distillation_token", "position_embeddings")
            assert deviation == pytest.approx(0.02, rel=0.15), name
            assert abs(mean) < 6 * 0.02 / parameter.numel() ** 0.5, name


def test_a_seed_gives_the_same_student_as_ever():
    """A seed gives the same student in every version of this package; otherwise recorded runs could not be repeated."""
    torch.manual_seed(0)
    student = make_student()
    assert sum(parameter.abs().sum().item() for parameter in student.parameters()) == pytest.approx(
        274.582547, rel=1e-5
    )
    assert torch.rand(1).item() == pytest.approx(0.401689, rel=1e-5)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean(student):
    drop_path = student.deit.layers[2].drop_path.train()
    drop_path.drop_prob = 0.25
    seen = []

    def branch(states, kept):
        assert kept is None or len(kept) == len(states)
        seen.append(len(states))
        return 2 * states

    dropped = drop_path(torch.ones(20_000, 2, 2), branch)
    assert dropped.unique().tolist() == pytest.approx([1.0, 1 + 2 * 4 / 3])
    assert torch.all(dropped == dropped[:, :1, :1])
    assert dropped.mean() == pytest.approx(3.0, abs=0.06)
    assert seen == [(dropped[:, 0, 0] > 1).sum()]  # dropped samples are not computed
    assert torch.equal(drop_path.eval()(torch.ones(4, 2), branch), torch.full((4, 2), 3.0))


@pytest.mark.parametrize("compiling", [False, True])
def test_stochastic_depth_scales_each_sample_and_its_gradient(student, monkeypatch, compiling):
    """Stochastic depth scales each sample and its gradient, compiled or not.

    A step that keeps no sample must give zero gradients, because other processes wait for gradients.
    """
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    drop_path = student.deit.layers[2].drop_path.train()
    drop_path.drop_prob = 0.5
    states, weight = torch.randn(6, 2, 3), torch.ones((), requires_grad=True)
    torch.manual_seed(1)
    kept = torch.rand(6) < 0.5
    assert 0 < kept.sum() < 6
    torch.manual_seed(1)
    added = drop_path(states, lambda values, _: values * weight) - states
    torch.testing.assert_close(added, torch.where(kept.view(-1, 1, 1), 2 * states, 0.0))
    added.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * states[kept].sum())
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.ones(size))
    weight.grad = None
    nothing = drop_path(states, lambda values, _: values * weight)
    assert torch.equal(nothing, states)
    nothing.sum().backward()
    assert weight.grad == 0


@pytest.mark.parametrize(("compiling", "expected"), [(False, "cpu"), (True, "meta")])
def test_a_compiled_model_draws_on_its_device(student, monkeypatch, compiling, expected):
    """CUDA graphs cannot contain an operation on the CPU. The device "meta" stands in for a GPU."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    rand, devices = torch.rand, []
    monkeypatch.setattr(torch, "rand", lambda *size, device: devices.append(str(device)) or rand(*size, device=device))
    drop_path = student.deit.layers[2].drop_path.train()
    drop_path.drop_prob = 0.5
    added = drop_path(torch.randn(6, 2, 3, device="meta"), lambda values, _: values)
    assert (added.shape, devices) == ((6, 2, 3), [expected])


def test_stochastic_depth_is_used_in_training_only():
    student = make_student(drop_path_rate=0.5)
    assert torch.equal(student.eval()(IMAGES).logits, student(IMAGES).logits)
    torch.manual_seed(0)
    assert not torch.equal(student.train()(IMAGES).logits, student(IMAGES).logits)


def test_gives_a_tuple_on_request_and_the_same_twice(student):
    logits, cls_logits, distillation_logits, features = student.eval()(IMAGES, return_dict=False)
    outputs = student(IMAGES)
    assert torch.equal(logits, outputs.logits)
    assert torch.equal(cls_logits, outputs.cls_logits)
    assert torch.equal(distillation_logits, outputs.distillation_logits)
    assert torch.equal(features, outputs.token_features)


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


@pytest.mark.parametrize("asked", [["hidden_states"], ["attentions"], ["hidden_states", "attentions"]])
@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_hidden_states_and_attentions_have_all_tokens(tmp_path, asked, by):
    """Requests for hidden states or attentions return all tokens.

    The last block otherwise computes only CLS and DIST; maps and probes would lack the patches.
    """
    student = make_student(attn_implementation="eager").eval()
    student.save_pretrained(tmp_path)
    native = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path, attn_implementation="eager").eval()
    options = {f"output_{name}": True for name in asked}
    expected = native(IMAGES, **options)
    if by == "configuration":
        for name, value in options.items():
            setattr(student.config, name, value)
        options = {}
    outputs = student(IMAGES, **options)
    for name in ("hidden_states", "attentions"):
        assert (name in outputs) == (name in expected) == (name in asked)
        torch.testing.assert_close(outputs.get(name), expected.get(name), atol=1e-6, rtol=0)


def losses_and_gradients(student, class_tokens_only, **options):
    """Outputs of both heads, the gradient of each parameter, and the number of tokens that the last MLP received."""
    seen = []
    hook = student.deit.layers[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    images = torch.randn(8, 3, 8, 8, dtype=student.dtype, generator=torch.Generator().manual_seed(0))
    student.zero_grad()
    torch.manual_seed(0)
    outputs = student(images, labels=torch.arange(8), class_tokens_only=class_tokens_only, **options)
    outputs.loss.backward()
    hook.remove()
    return dict(outputs), {name: parameter.grad for name, parameter in student.named_parameters()}, set(seen)


def masks():
    """Attention masks: one of padded tokens, and one of scores that are added for each query."""
    padding = torch.ones(8, 6, dtype=torch.bool)
    padding[3, 1:4] = padding[5, 4:] = False
    return {"padding": padding, "scores": torch.randn(1, 1, 6, 6, dtype=torch.float64)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("training", "drop_path_rate", "mask"),
    [
        (False, 0.5, None),
        (False, 0.5, "padding"),
        (False, 0.5, "scores"),
        (True, 0.0, "padding"),
        (True, 0.5, "padding"),
        (True, 0.5, None),
        (True, 0.5, "scores"),
        (True, 1 - 1e-9, None),  # the last block keeps no image
    ],
)
def test_class_tokens_only_changes_no_output_and_no_gradient(attention, checkpointing, training, drop_path_rate, mask):
    """Computing only the class tokens in the last block changes no output and no gradient.

    This fails if the mask's rows are those of other queries, or if gradients lack a path.
    """
    student = make_student(attn_implementation=attention, drop_path_rate=drop_path_rate, initializer_range=0.3)
    student = student.double().train(training)
    if checkpointing:
        student.gradient_checkpointing_enable()
    options = {} if mask is None else {"attention_mask": masks()[mask]}
    *expected, whole = losses_and_gradients(student, False, **options)
    *found, few = losses_and_gradients(student, True, **options)
    assert (whole, few) == ({6}, {2})
    # Eager attention computes its softmax in float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if attention == "sdpa" else 1e-6)
    if mask == "scores" and not training:
        changed = losses_and_gradients(student, True)[0]
        assert (changed["logits"] - found[0]["logits"]).abs().max() > 1e-2


def test_class_tokens_only_in_half_precision():
    """Class tokens only agrees in half precision, up to bfloat16 rounding in the branch; the residual is in float32."""
    student = make_student(drop_path_rate=0.5, initializer_range=0.3).train()
    with torch.autocast("cpu", torch.bfloat16):
        (*expected, _), (*found, _) = (losses_and_gradients(student, few) for few in (False, True))
    assert found[0]["logits"].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)


def test_class_tokens_only_with_a_mask_without_query_rows():
    """Class tokens only works with masks that have no row for each query.

    Flash attention's masks are (batch, tokens), and flex attention's is a block mask.
    """
    student = make_student(initializer_range=0.3).double().eval()
    mask = masks()["padding"]
    *expected, _ = losses_and_gradients(student, False, attention_mask=mask)

    def attend(module, query, key, value, mask, scaling, **kwargs):
        assert query.shape == key.shape, "who unpads by the mask needs a query of each token"
        seen = nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None], scale=scaling)
        return seen.transpose(1, 2), None

    AttentionInterface.register("by_token", attend)
    AttentionMaskInterface.register("by_token", flash_attention_mask)
    student.config._attn_implementation = "by_token"
    *found, _ = losses_and_gradients(student, True, attention_mask=mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make_student(drop_path_rate=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
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
        ("patch_size", 0, "patch_size must be 1 or more, got 0"),
        ("image_size", (8, -8), r"image_size must be 1 or more, got \(8, -8\)"),
        ("num_attention_heads", 0, "num_attention_heads must be 1 or more, got 0"),
        ("num_attention_heads", -1, "num_attention_heads must be 1 or more, got -1"),
        ("num_hidden_layers", 0, "num_hidden_layers must be 1 or more, got 0"),
        ("drop_path_rate", 1.0, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ("num_attention_heads", 3, "num_attention_heads 3 does not divide hidden_size 16"),
        ("class_counts", [5, 4], "class_counts has 2 entries but the model has 10 labels"),
    ],
)
def test_invalid_configurations_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        make_student(**{field: value})


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match='attn_implementation="linear"'):
        make_student(attn_implementation="linear")


CHANGED = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.2,
    "initializer_range": 0.03,
    "layer_norm_eps": 1e-5,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 1,
    "qkv_bias": False,
    "encoder_stride": 8,
    "pooler_output_size": 12,
    "pooler_act": "relu",
    "drop_path_rate": 0.3,
    "class_counts": [9, 5, 1],
    "class_groups": {"head": [0], "tail": [1, 2]},
    "class_map": [1, 0, 2],
    "prediction_sets": {"coverage": 0.9, "thresholds": {"head": 0.5, "tail": 0.1}},
    "image_mean": [0.5],
    "image_std": [0.2],
}


def test_configuration_survives_a_round_trip_with_every_field(tmp_path):
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"model_type"}
    assert {field.name for field in dataclasses.fields(DeiTLTConfig)} - inherited == set(CHANGED)
    config = DeiTLTConfig(**CHANGED, id2label={0: "ant", 1: "bee", 2: "cat"}, label2id={"ant": 0, "bee": 1, "cat": 2})
    config.save_pretrained(tmp_path)
    loaded = DeiTLTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for name, value in CHANGED.items():
        assert getattr(loaded, name) == value != getattr(DeiTLTConfig(), name), name
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "deit"
    native = AutoConfig.from_pretrained(tmp_path)
    assert native.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert native.class_counts == [9, 5, 1], "plain transformers keeps what it does not know"
    model = DeiTLTForImageClassification(loaded).eval()
    assert model(torch.randn(1, 1, 32, 32)).logits.shape == (1, 3)


@pytest.mark.parametrize(
    "config",
    [
        {"backbone": "resnet20"},
        {"backbone": "resnet32", "classifier": "cosine"},
        {"backbone": "timm/resnet18", "image_size": 64},
        {"backbone": "timm/resnetblur18", "image_size": 64},  # with buffers that are not saved
    ],
)
def test_teacher_survives_a_round_trip(tmp_path, config):
    torch.manual_seed(0)
    teacher = FlatTeacherForImageClassification(FlatTeacherConfig(**config, num_labels=4)).eval()
    teacher.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    images = torch.randn(2, 3, teacher.config.image_size, teacher.config.image_size)
    loaded = FlatTeacherForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(images).logits, teacher(images).logits)
    if config.get("classifier") == "cosine":
        assert teacher(1000 * images).logits.abs().max() <= teacher.config.logit_scale * (1.0 + 1e-6)


def test_grouped_convolutions_start_with_the_variance_of_their_own_fan_out():
    torch.manual_seed(0)
    config = FlatTeacherConfig(backbone="timm/efficientnet_b0", image_size=32, num_labels=4)
    depthwise = [module for module in FlatTeacherForImageClassification(config).modules() if is_depthwise(module)]
    assert len(depthwise) == 16
    for module in depthwise:
        side = module.kernel_size[0]
        assert module.weight.std().item() == pytest.approx((2 / side**2) ** 0.5, rel=0.15)


def is_depthwise(module):
    return isinstance(module, nn.Conv2d) and module.groups == module.out_channels


@pytest.mark.parametrize(("given", "scale"), [(20.0, 20.0), (None, 30.0)])
def test_logits_of_a_cosine_teacher_are_scaled_cosines(given, scale):
    torch.manual_seed(0)
    config = FlatTeacherConfig(backbone="resnet20", classifier="cosine", image_size=8, num_labels=4, logit_scale=given)
    teacher = FlatTeacherForImageClassification(config).eval()
    outputs = teacher(IMAGES, labels=torch.tensor([0, 1, 2]))
    features = teacher.backbone(IMAGES).unsqueeze(1)
    cosines = nn.functional.cosine_similarity(features, teacher.classifier.weight.unsqueeze(0), dim=-1)
    torch.testing.assert_close(outputs.logits, scale * cosines)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, torch.tensor([0, 1, 2])))


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_plain_trainer_trains_and_predicts(tmp_path, kind):
    """A plain Trainer trains and predicts.

    Four micro-batches give the step of one batch; predictions are logits only.
    """
    rows = [{"pixel_values": image, "labels": label % 10} for label, image in enumerate(torch.randn(16, 3, 8, 8))]
    logs = []
    for size in (16, 4):
        model = make_student(drop_path_rate=0.0)
        if kind == "teacher":
            torch.manual_seed(0)
            model = FlatTeacherForImageClassification(
                FlatTeacherConfig(backbone="resnet20", projection_size=4, image_size=8, num_labels=10)
            )
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train = lambda mode=True, module=module: module  # keeps the statistics fixed
                    module.training = False
        args = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=16 // size,
            max_steps=1,
            logging_steps=1,
            report_to="none",
        )
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        logs.append((trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]))
        assert trainer.predict(rows).predictions.shape == (16, 10)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_a_student_refuses_the_configuration_of_a_plain_deit():
    with pytest.raises(ValueError, match="needs a DeiTLTConfig, got a DeiTConfig"):
        DeiTLTForImageClassification(DeiTConfig())


def test_teacher_refuses_an_unknown_backbone():
    with pytest.raises(ValueError, match="unknown backbone 'resnet18'; choose one of resnet20"):
        FlatTeacherConfig(backbone="resnet18")


def test_import_is_lazy():
    """`import deitlt_hf` does not import torch."""
    code = "import sys, deitlt_hf; assert 'torch' not in sys.modules; deitlt_hf.DeiTLTConfig; print(dir(deitlt_hf))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---- Class information in the configuration ----


def test_saved_code_names_the_version_that_it_needs(tmp_path, student, monkeypatch):
    """The saved code names the transformers version that it needs.

    Before 5.9, the blocks of transformers' DeiT have other parameters, and the weights would silently be random.
    """
    student.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers, "__version__", "5.8.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.9 or newer, and this is 5\.8\.1"):
        runpy.run_path(str(tmp_path / "configuration_deitlt.py"))  # transformers loads this file first


@pytest.mark.parametrize("make", [image_processor, lambda size: model_processor(FlatTeacherConfig(image_size=size))])
def test_image_processor_can_be_loaded_by_all_versions(tmp_path, make):
    """The image processor is of a class that all versions can load.

    DeiT's own refuses `shortest_edge` in transformers 4; benchmarks/versions.py runs these versions.
    """
    make(32).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "BitImageProcessor"
    taken = {"crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean"}
    taken |= {"image_std", "resample", "rescale_factor", "size", "image_processor_type"}
    assert set(written) <= taken
    assert written["size"] == {"shortest_edge": 32}


@pytest.fixture(params=["student", "teacher"])
def counted_folder(request, tmp_path):
    """A saved model with counts, groups and map of its four classes, and its class."""
    classes = {"num_labels": 4, "class_counts": [4, 3, 2, 1], "class_map": [0, 1, 2, 3]}
    classes["class_groups"] = {"head": [0, 1], "tail": [2, 3]}
    classes["id2label"] = dict(enumerate("abcd"))
    if request.param == "student":
        model = make_student(**classes)
    else:
        model = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", **classes))
    model.save_pretrained(tmp_path)
    return tmp_path, type(model)


def test_stale_classes_are_left_out(counted_folder):
    folder, model_class = counted_folder
    for other in (
        {"num_labels": 3},
        {"id2label": dict(enumerate("xyz"))},
        {"id2label": {3: "a", 2: "b", 1: "c", 0: "d"}},
    ):
        config = model_class.from_pretrained(folder, ignore_mismatched_sizes=True, **other).config
        assert (config.class_counts, config.class_groups, config.class_map) == (None, None, None)
    for same in ({}, {"num_labels": 4}, {"id2label": dict(enumerate("abcd"))}):
        assert model_class.from_pretrained(folder, **same).config.class_counts == [4, 3, 2, 1]


def test_a_folder_that_plain_transformers_changed_loads(counted_folder, tmp_path):
    """A folder changed by plain transformers loads, although it keeps our fields when the classes change."""
    folder, model_class = counted_folder
    content = json.loads((folder / "config.json").read_text())
    content["id2label"] = {"0": "x", "1": "y", "2": "z"}
    content["label2id"] = {"x": 0, "y": 1, "z": 2}
    (folder / "config.json").write_text(json.dumps(content))
    config = model_class.config_class.from_pretrained(folder)
    assert (config.num_labels, config.class_counts, config.class_groups, config.class_map) == (3, None, None, None)


def test_counts_of_two_unnamed_classes_are_kept(tmp_path):
    """Counts of two unnamed classes are kept; transformers does not store the names of two unnamed labels."""
    make_student(num_labels=2, class_counts=[5, 2]).save_pretrained(tmp_path)
    assert DeiTLTForImageClassification.from_pretrained(tmp_path, num_labels=2).config.class_counts == [5, 2]


NOT_OF_FOUR = "class_counts has 2 entries|class_groups has classes beyond|class_map must hold each of 0 to 3 once"


@pytest.mark.parametrize(
    "values",
    [{"class_counts": [1, 2]}, {"class_groups": {"head": [0, 4]}}, {"class_map": [0, 1]}, {"class_map": [0, 1, 1, 3]}],
)
def test_class_fields_that_do_not_fit_the_labels_are_refused(counted_folder, values):
    folder, model_class = counted_folder
    with pytest.raises(ValueError, match=NOT_OF_FOUR):
        model_class.config_class(num_labels=4, **values)
    with pytest.raises(ValueError, match=NOT_OF_FOUR):
        model_class.from_pretrained(folder, **values)
