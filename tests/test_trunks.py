"""Starts from ViT trunks of transformers and timm: the CLS feature without DIST is that of the source."""

import dataclasses
import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    BitImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from deitlt_hf import DeiTLTConfig
from deitlt_hf.data.transforms import ImageFormat, model_processor
from deitlt_hf.models import safe_loading
from deitlt_hf.models.trunks import resized, student_of, trunk_of
from deitlt_hf.recipes import StudentArguments
from deitlt_hf.training.starting import check_start, starting_student
from helpers import IMAGES, make_student

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NATIVE = SMALL | {"image_size": 8, "patch_size": 4}
TIMM = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
NAMES = ["cat", "dog", "eel"]


def filled(model, seed=0):
    """Random values for all weights, also for those that usually begin as constants: biases, norms, LayerScale."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.dim() == 1) * 0.5)
    return model.eval()


def started(path, changed=None, **values):
    """A student that starts from a model, as in `deitlt distill --init_from PATH`, with options `changed`."""
    changed = changed or {}
    model_args = StudentArguments(init_from=str(path), **values, **changed)
    return starting_student(check_start(model_args, changed), model_args, NAMES).eval()


def reason(path, **changed):
    """Message that refuses a start."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the tests match the message
        check_start(StudentArguments(init_from=str(path), **changed), changed)
    return str(error.value)


@torch.no_grad()
def cls_without_dist(student, images):
    """Final CLS feature of a student whose DIST token is left out of the sequence."""
    tokens = student.deit.embeddings(images)
    tokens = torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1)
    for layer in student.deit.layers:
        tokens = layer(tokens)
    return student.deit.layernorm(tokens)[:, 0]


def assert_same_feature(student, expected, images=IMAGES):
    torch.testing.assert_close(cls_without_dist(student, images), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1
    assert not torch.allclose(expected[0], expected[1], atol=1e-3), "the feature must depend on the image"


@torch.no_grad()
def feature(model, images=IMAGES):
    return model(images).last_hidden_state[:, 0] if hasattr(model, "config") else model.forward_features(images)[:, 0]


NATIVE_SOURCES = {
    "vit": lambda: ViTForImageClassification(ViTConfig(intermediate_size=32, **NATIVE)),
    "vit without biases": lambda: ViTModel(ViTConfig(intermediate_size=24, qkv_bias=False, **NATIVE)),
    "vit of another GELU": lambda: ViTModel(ViTConfig(hidden_act="quick_gelu", layer_norm_eps=1e-2, **NATIVE)),
    "vit_mae": lambda: ViTMAEForPreTraining(
        ViTMAEConfig(
            intermediate_size=32,
            mask_ratio=0.0,
            decoder_hidden_size=8,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=1,
            **NATIVE,
        )
    ),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(mlp_ratio=2, **NATIVE)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=0, **NATIVE)
    ),
}


@pytest.mark.parametrize("kind", NATIVE_SOURCES)
def test_a_model_of_transformers_keeps_its_cls_feature(tmp_path, kind):
    source = filled(NATIVE_SOURCES[kind]())
    source.save_pretrained(tmp_path)
    student = started(tmp_path)
    assert_same_feature(student, feature(source.base_model))
    tokens = student.deit.embeddings
    assert torch.equal(tokens.distillation_token, tokens.cls_token)
    assert torch.equal(tokens.position_embeddings[:, 0], tokens.position_embeddings[:, 1])
    assert tuple(student.cls_classifier.weight.shape) == (3, 16)
    assert list(student.config.id2label.values()) == NAMES


TIMM_SOURCES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit without biases": ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False, "act_layer": "gelu_tanh"}),
    "deit": ("deit_tiny_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "norm after pooling": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
}


@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize("kind", TIMM_SOURCES)
def test_a_model_of_timm_keeps_its_cls_feature(tmp_path, monkeypatch, kind, place):
    name, values = TIMM_SOURCES[kind]
    source = filled(timm.create_model(name, num_classes=5, **TIMM, **values))
    path = tmp_path / "start" / "vit.pth"
    if place == "folder":
        path = path.parent
        save_for_hf(source, path, model_args=TIMM | values)
    else:
        path.parent.mkdir()
        torch.save({"model": {f"module.{name}": tensor for name, tensor in source.state_dict().items()}}, path)
    reads = []
    monkeypatch.setattr(safe_loading, "_load", lambda path, load=safe_loading._load: reads.append(path) or load(path))
    if place == "file" and "act_layer" in values:
        source.blocks.apply(lambda module: isinstance(module, timm.layers.Mlp) and setattr(module, "act", nn.GELU()))
    student = started(path, num_attention_heads=2, hidden_size=16)
    assert place == "folder" or len(reads) == 1, "a file is read once"
    expected = feature(source) if isinstance(source.fc_norm, nn.Identity) else source.fc_norm(feature(source)).detach()
    assert_same_feature(student, expected)


@pytest.mark.parametrize("kind", ["transformers", "timm", "file"])
def test_registers_are_left_out_with_a_note(tmp_path, kind):
    if kind == "transformers":
        config = Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=4, **NATIVE)
        source = filled(Dinov2WithRegistersModel(config))
        source.save_pretrained(tmp_path)
        source.embeddings.register_tokens = nn.Parameter(source.embeddings.register_tokens[:, :0])
    else:
        source = filled(timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **TIMM))
        if kind == "timm":
            save_for_hf(source, tmp_path, model_args=TIMM)
        else:  # the names and positions in the files of DINOv2: CLS has a position, registers do not
            weights = source.state_dict()
            zero = torch.zeros(1, 1, 16)
            weights["pos_embed"] = torch.cat([zero, weights["pos_embed"]], dim=1)
            weights["register_tokens"] = weights.pop("reg_token")
            weights["mask_token"] = torch.zeros(1, 16)
            torch.save(weights, tmp_path / "dinov2.pth")
        source.reg_token = None
    path = tmp_path / "dinov2.pth" if kind == "file" else tmp_path
    model_args = StudentArguments(init_from=str(path), num_attention_heads=2, hidden_size=16)
    start = check_start(model_args, {})
    assert start.notes == ("its 4 register tokens are left out, which changes its features",)
    assert_same_feature(starting_student(start, model_args, NAMES).eval(), feature(source))


def test_a_distilled_model_keeps_both_tokens(tmp_path):
    """A DeiT with two tokens keeps both, whatever heads it has, and heads of as many classes."""
    for index, kind in enumerate((DeiTModel, DeiTForImageClassification)):
        source = filled(kind(DeiTConfig(intermediate_size=32, layer_norm_eps=1e-3, **NATIVE)), seed=index)
        source.save_pretrained(tmp_path / kind.__name__)
        student = started(tmp_path / kind.__name__)
        expected = source.base_model(IMAGES).last_hidden_state[:, :2]
        torch.testing.assert_close(student(IMAGES).token_features, expected, atol=1e-5, rtol=0)
    source = filled(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **TIMM))
    save_for_hf(source, tmp_path / "timm", model_args=TIMM)
    student = started(tmp_path / "timm")
    expected = source.forward_features(IMAGES)[:, :2]
    torch.testing.assert_close(student(IMAGES).token_features, expected, atol=1e-5, rtol=0)
    source = make_student(num_labels=3, hidden_dropout_prob=0.25)
    source.save_pretrained(tmp_path / "student")
    student = started(tmp_path / "student")
    torch.testing.assert_close(student(IMAGES).logits, source.eval()(IMAGES).logits, atol=1e-6, rtol=0)
    assert student.config.hidden_dropout_prob == 0.25
    assert started(tmp_path / "student", drop_path_rate=0.3).config.drop_path_rate == 0.3


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_other_image_sizes_interpolate_the_positions_as_the_source_does(tmp_path, kind):
    source = filled(NATIVE_SOURCES[kind]())
    source.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    student = started(tmp_path, {"image_size": 12})
    assert_same_feature(student, feature(source.base_model, images), images)


def test_other_patch_sizes_resample_the_projection(tmp_path):
    """Patches of twice the size give the same feature on images of twice the size, if enlarged pixel by pixel.

    A student that starts from a student can have other sizes, too.
    """
    make_student(num_labels=3).save_pretrained(tmp_path)
    student = started(tmp_path, {"image_size": 16, "patch_size": 8})
    assert (student.config.image_size, student.config.patch_size) == (16, 8)
    small = started(tmp_path)
    large = nn.functional.interpolate(IMAGES, scale_factor=2, mode="bicubic", antialias=True)
    difference = (student(large).token_features - small(IMAGES).token_features).abs().mean()
    assert difference < 0.1 * small(IMAGES).token_features.std()
    trunk = trunk_of(small)
    assert resized(trunk, 8, 2).weights["embeddings.position_embeddings"].shape == (1, 2 + 16, 16)
    assert student_of(trunk, image_size=8, patch_size=2).config.patch_size == 2


def test_resolution_and_normalisation_come_from_the_processor(tmp_path):
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    ViTModel(ViTConfig(**NATIVE)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}, **half).save_pretrained(tmp_path / "vit")
    config = started(tmp_path / "vit").config
    assert ImageFormat.of(model_processor(config)) == ImageFormat((16, 16), (0.5,) * 3, (0.5,) * 3)
    config = started(tmp_path / "vit", {"image_size": 8, "image_mean": [0.1, 0.2, 0.3]}).config
    assert ImageFormat.of(model_processor(config)) == ImageFormat((8, 8), (0.1, 0.2, 0.3), (0.5,) * 3)
    Dinov2Model(Dinov2Config(**SMALL, image_size=24, patch_size=4)).save_pretrained(tmp_path / "dinov2")
    BitImageProcessor(size={"shortest_edge": 10}, crop_size=8).save_pretrained(tmp_path / "dinov2")
    assert started(tmp_path / "dinov2").config.image_size == 8
    source = timm.create_model("vit_tiny_patch16_224", **TIMM)
    source.pretrained_cfg = dict(source.pretrained_cfg, input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    save_for_hf(source, tmp_path / "timm", model_args=TIMM)
    assert started(tmp_path / "timm").config.image_mean == [0.5] * 3
    assert DeiTLTConfig(**NATIVE).image_mean is None
    with pytest.raises(ValueError, match="image_std must be above 0"):
        DeiTLTConfig(image_std=[0.0, 1.0, 1.0], **NATIVE)


def test_half_precision_and_large_layer_scale_are_folded_in_float32(tmp_path):
    source = filled(Dinov2Model(Dinov2Config(mlp_ratio=2, **NATIVE)))
    source.half().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in started(tmp_path).parameters()} == {torch.float32}
    assert_same_feature(started(tmp_path), feature(source.float()))


NATIVE_REFUSALS = {
    "RoPE": lambda: DINOv3ViTModel(DINOv3ViTConfig(intermediate_size=32, **NATIVE)),
    "SwiGLU": lambda: Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **NATIVE)),
    "windows": lambda: SwinModel(
        SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1], num_heads=[1], window_size=2)
    ),
    "relative position biases": lambda: BeitModel(BeitConfig(intermediate_size=32, **NATIVE)),
    "before its first block": lambda: CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **NATIVE)),
    "its activation is relu": lambda: ViTModel(ViTConfig(hidden_act="relu", **NATIVE)),
    "1 channel,": lambda: ViTModel(ViTConfig(num_channels=1, **NATIVE)),
    "not square": lambda: ViTModel(ViTConfig(**SMALL, image_size=(8, 12), patch_size=4)),
}


@pytest.mark.parametrize("why", NATIVE_REFUSALS)
def test_models_of_transformers_that_do_not_fold_are_refused_with_the_reason(tmp_path, why):
    NATIVE_REFUSALS[why]().save_pretrained(tmp_path)
    message = reason(tmp_path)
    assert re.search(f"cannot become a student: .*{why}", message), message
    if why == "before its first block":  # transformers has no classifier for CLIP's vision model alone
        assert "teacher" not in message
    else:
        whose = "timm's version of it" if why == "RoPE" else "It"
        assert f"{whose} can be a teacher" in message


TIMM_REFUSALS = {
    "QK-norm": ("vit_tiny_patch16_224", TIMM | {"qk_norm": True}),
    "before its first block": ("vit_base_patch16_clip_224", TIMM),
    "no class token": ("vit_base_patch16_siglip_224", TIMM),
    "gated": ("vit_giant_patch14_dinov2", TIMM | {"mlp_ratio": 4}),
    "RoPE": ("vit_small_patch16_dinov3", TIMM),
    "windows": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "embed_dim": 8, "depths": [1], "num_heads": [1]},
    ),
    "not those of a plain ViT": ("vit_small_patch16_18x2_224", TIMM),
    "timm's ResNet is not a plain ViT": ("resnet18", {}),
}


@pytest.mark.parametrize("why", TIMM_REFUSALS)
def test_models_of_timm_that_do_not_fold_are_refused_with_the_reason(tmp_path, why):
    name, values = TIMM_REFUSALS[why]
    save_for_hf(timm.create_model(name, num_classes=3, **values), tmp_path, model_args=values)
    message = reason(tmp_path)
    assert re.search(f"cannot become a student: .*{why}.*\\. It can be a teacher .*--teacher", message), message


def test_incomplete_and_foreign_weights_are_refused(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, qk_norm=True, **TIMM)
    torch.save(vit.state_dict(), tmp_path / "norms.pth")
    assert reason(tmp_path / "norms.pth").endswith("queries and keys (QK-norm).")
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TIMM).state_dict()
    del weights["blocks.1.mlp.fc1.bias"]
    torch.save(weights, tmp_path / "part.pth")
    assert "lacks 1 weights of a ViT (blocks.1.mlp.fc1.bias)" in reason(tmp_path / "part.pth")
    weights["pos_embed"] = weights["pos_embed"][:, :3]
    torch.save(weights, tmp_path / "positions.pth")
    assert "cannot become a student" in reason(tmp_path / "positions.pth")
    torch.save({name: tensor for name, tensor in weights.items() if "blocks" not in name}, tmp_path / "none.pth")
    assert "cannot become a student: its weights are not those of a ViT" in reason(tmp_path / "none.pth")
    source = ViTModel(ViTConfig(**NATIVE))
    source.save_pretrained(tmp_path / "vit")
    assert "hidden_size 16, not 24" in reason(tmp_path / "vit", hidden_size=24)
    assert "patch_size 4 does not divide image_size 10" in reason(tmp_path / "vit", image_size=10)
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 16 weights of a ViT"):
        started(tmp_path / "vit")


SPOILT = {
    "its weights are quantised": lambda folder: change_config(folder, quantization_config={"quant_method": "gptq"}),
    "it has adapters of PEFT": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "its folder has no weights": lambda folder: (folder / "model.safetensors").unlink(),
}


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("why", SPOILT)
def test_weights_that_are_not_whole_are_refused_before_they_are_loaded(tmp_path, why):
    ViTModel(ViTConfig(**NATIVE)).save_pretrained(tmp_path)
    SPOILT[why](tmp_path)
    assert f"{tmp_path} cannot become a student: {why}" in reason(tmp_path)


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_weights_of_other_shapes_are_refused(tmp_path, kind):
    """transformers would leave such weights random, and a head of other classes has them, too."""
    models = {"vit": (ViTModel, ViTConfig), "deit": (DeiTForImageClassification, DeiTConfig)}
    model, config = models[kind]
    model(config(intermediate_size=32, **NATIVE)).save_pretrained(tmp_path)
    change_config(tmp_path, intermediate_size=48)
    with pytest.raises(ValueError, match=r"has \d+ weights of other shapes than those of a ViT"):
        started(tmp_path)


def test_files_of_other_layouts_are_refused_with_the_reason(tmp_path):
    save_file(ViTModel(ViTConfig(**NATIVE)).state_dict(), tmp_path / "native.safetensors")
    assert "names of transformers; give their folder" in reason(tmp_path / "native.safetensors")
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TIMM).state_dict()
    torch.save({f"backbone.{name}": tensor for name, tensor in weights.items()}, tmp_path / "prefix.pth")
    assert "names of a ViT of timm (cls_token, pos_embed, ...); they begin with" in reason(tmp_path / "prefix.pth")
    del weights["cls_token"]
    torch.save(weights, tmp_path / "mean.pth")
    assert reason(tmp_path / "mean.pth").endswith("it has no class token.")


def test_a_trunk_of_the_meta_device_has_the_same_configuration():
    source = ViTMAEModel(ViTMAEConfig(**NATIVE))
    with torch.device("meta"):
        empty = ViTMAEModel(ViTMAEConfig(**NATIVE))
    assert dataclasses.replace(trunk_of(empty), weights={}) == dataclasses.replace(trunk_of(source), weights={})
