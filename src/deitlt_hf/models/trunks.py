"""Converts ViT trunks of transformers and timm to students: configuration, weights, and other image or patch sizes.

A trunk is a ViT without its head. A student computes the same CLS feature as its source if its DIST token is left out.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm import layers as timm_layers
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from transformers import DeiTForImageClassificationWithTeacher, PreTrainedConfig, PreTrainedModel

from ..io import one_line
from .deitlt.configuration_deitlt import DeiTLTConfig
from .deitlt.modeling_deitlt import DeiTLTForImageClassification, DeiTLTModel

# Model types of transformers whose trunk can become a student.
NATIVE_TYPES = ("deit", "vit", "vit_mae", "dinov2", "dinov2_with_registers")
TIMM_TYPE = "timm_wrapper"

_ROPE = "it uses rotary position embeddings (RoPE)"
_SWIGLU = "its MLPs are gated (SwiGLU)"
_WINDOWS = "its attention sees only windows of the image"
_RELATIVE = "its attention has relative position biases"
_NORM_FIRST = "it normalises the tokens before its first block"
_NO_CLASS_TOKEN = "it has no class token"
# Reasons by model type of transformers, and by class of timm.
_REASONS = {
    **dict.fromkeys(("dinov3_vit", "eomt_dinov3", "Eva"), _ROPE),
    **dict.fromkeys(("swin", "swinv2", "maxvit", "SwinTransformer", "SwinTransformerV2", "MaxxVit"), _WINDOWS),
    **dict.fromkeys(("beit", "data2vec-vision", "Beit", "VisionTransformerRelPos"), _RELATIVE),
    **dict.fromkeys(("clip", "clip_vision_model"), _NORM_FIRST),
    **dict.fromkeys(("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model", "ijepa"), _NO_CLASS_TOKEN),
}
# Reasons by a part of the name of a weight that a student does not have.
_UNKNOWN_WEIGHTS = {
    "q_norm": "its attention normalises queries and keys (QK-norm)",
    "k_norm": "its attention normalises queries and keys (QK-norm)",
    "norm_pre": _NORM_FIRST,
    "rel_pos": _RELATIVE,
    "relative_position": _RELATIVE,
    "rope": _ROPE,
}
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "gelu_accurate", "quick_gelu")
_TIMM_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}

# Names of timm (and of the authors' students), then of the student's trunk: bare parameters and modules, and modules of
# a block.
TIMM_MODULES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "dist_token": "embeddings.distillation_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
TIMM_BLOCK_MODULES = {
    "norm1": "layernorm_before",
    "attn.q": "attention.q_proj",
    "attn.k": "attention.k_proj",
    "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# Names of transformers that differ from the student's, in any of its versions.
_NATIVE_BLOCK_MODULES = {
    "norm1": "layernorm_before",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "norm2": "layernorm_after",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_BLOCK_PREFIXES = ("blocks.", "layers.", "layer.", "encoder.layers.", "encoder.layer.")
# LayerScale of the two branches, and the module whose output it scales.
_SCALES = {
    "ls1.gamma": "attention.o_proj",
    "layer_scale1.lambda1": "attention.o_proj",
    "ls2.gamma": "mlp.fc2",
    "layer_scale2.lambda1": "mlp.fc2",
}
# Parts that only heads and pre-training use, and registers.
_LEFT_OUT = ("pooler.", "head.", "head_dist.", "attn_pool.", "fc_norm.", "embeddings.mask_token")
_REGISTERS = ("reg_token", "embeddings.register_tokens")
_POSITIONS = "embeddings.position_embeddings"
_PATCHES = "embeddings.patch_embeddings.projection.weight"


@dataclass(frozen=True)
class Trunk:
    """A ViT trunk in the form of a student's."""

    config: dict[str, Any]  # fields of [`DeiTLTConfig`]: sizes, activation, epsilon of the norms
    weights: dict[str, torch.Tensor]  # by the names of [`DeiTLTModel`]; on the meta device if the source is
    antialias: bool = False  # whether the source smooths its position embeddings when it reduces them
    notes: tuple[str, ...] = ()  # differences between source and student that a user should know, as sentences


def check_type(model_type: str) -> None:
    """Raises `ValueError`, with the reason, if a student cannot start from models of a `model_type` of transformers."""
    if model_type not in (*NATIVE_TYPES, TIMM_TYPE):
        raise ValueError(_REASONS.get(model_type, f"a model of type {model_type!r} is not a plain ViT"))


def trunk_of(model: nn.Module) -> Trunk:
    """Converts a ViT to the form of a student's trunk; the arithmetic stays the same.

    LayerScale is folded into the weights before it. Missing biases become zeros. A missing DIST token and its position
    begin as copies of those of CLS. Registers and everything after the final norm are left out. The model is a ViT of
    transformers (one of `NATIVE_TYPES`), its wrapper for timm models, or a ViT of timm, possibly on the meta device.

    Raises:
        ValueError: If the model has parts that a student lacks. The text is the reason, without a full stop.
    """
    vit = model.base_model if isinstance(model, PreTrainedModel) else model  # that of timm's wrapper is timm's model
    if isinstance(vit, PreTrainedModel):
        check_type(vit.config.model_type)
        config = _native_fields(vit.config)
        named = {_renamed(name, {}, _NATIVE_BLOCK_MODULES): tensor for name, tensor in vit.state_dict().items()}
        # The only one of these models whose position embeddings transformers reduces with antialiasing.
        antialias = vit.config.model_type == "dinov2_with_registers"
    else:
        config, named = _timm_fields(vit), dict(_timm_names(vit.state_dict()))
        antialias = True  # the default of timm's `resample_abs_pos_embed`
    named = {name: tensor.float() for name, tensor in named.items()}  # half precision would lose digits in folding
    if config["num_channels"] != 3:
        channels = config["num_channels"]
        raise ValueError(f"its images have {channels} channel{'s' * (channels != 1)}, not 3")
    if config["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"its activation is {config['hidden_act']}, not a GELU")
    registers = [named.pop(name) for name in _REGISTERS if name in named]
    notes = []
    if registers:
        notes.append(f"its {registers[0].shape[1]} register tokens are left out, which changes its features")
    if "layernorm.weight" not in named and "fc_norm.weight" in named:
        named |= {f"layernorm.{part}": named[f"fc_norm.{part}"] for part in ("weight", "bias")}
        notes.append("its norm after the mean over patches becomes the final norm of the tokens")
    named = {name: tensor for name, tensor in named.items() if not name.startswith(_LEFT_OUT)}
    return Trunk(config, _completed(_folded(named), config), antialias, tuple(notes))


def resized(trunk: Trunk, image_size: int, patch_size: int) -> Trunk:
    """Changes a trunk, which is not on the meta device, to another image size or patch size, in pixels.

    Patch projections are resampled as in FlexiViT (Beyer et al., CVPR 2023, section 3.4), position embeddings by
    bicubic interpolation; both with timm. The image size is a multiple of the patch size.
    """
    grid = image_size // patch_size
    weights = dict(trunk.weights)
    weights[_POSITIONS] = timm_layers.resample_abs_pos_embed(
        weights[_POSITIONS], [grid, grid], num_prefix_tokens=2, antialias=trunk.antialias
    )
    weights[_PATCHES] = timm_layers.resample_patch_embed(weights[_PATCHES], [patch_size, patch_size])
    config = trunk.config | {"image_size": image_size, "patch_size": patch_size}
    return replace(trunk, config=config, weights=weights)


def student_with_weights_of(native: DeiTForImageClassificationWithTeacher) -> DeiTLTForImageClassification:
    """Makes a student that shares the parameter objects of a DeiT of transformers with two heads."""
    attention = native.config._attn_implementation
    config = DeiTLTConfig.from_dict(native.config.to_dict(), attn_implementation=attention)
    # On the meta device, because `assign` replaces every parameter; `keep_vars` keeps the parameter objects.
    with torch.device("meta"):
        student = DeiTLTForImageClassification(config)
    student.load_state_dict(native.state_dict(keep_vars=True), assign=True)
    student.name_or_path = native.name_or_path
    return student.train(native.training)


def student_of(trunk: Trunk, attn_implementation: str | None = None, **config: Any) -> DeiTLTForImageClassification:
    """Makes a student of a trunk, which is not on the meta device, with new heads.

    `config` are further fields of [`DeiTLTConfig`]: `image_size` and `patch_size` resize the trunk.

    Raises:
        ValueError: If the configuration is not valid.
    """
    made = DeiTLTConfig(**trunk.config | config)
    trunk = resized(trunk, _side(made.image_size), _side(made.patch_size))
    # The constructor takes no attention, and the automatic classes make the native DeiT.
    student = DeiTLTForImageClassification._from_config(made, attn_implementation=attn_implementation)
    student.deit.load_state_dict(trunk.weights)
    return student


def vit_of_file(weights: dict[str, torch.Tensor], num_attention_heads: int | None = None) -> VisionTransformer:
    """Makes a ViT of timm from the names and shapes in a file of weights.

    The layout is timm's, which the original files of DeiT, DINO, DINOv2 and MAE share. A file does not say the number
    of heads, the activation and the epsilon of the norms: heads are 64 wide if no number is given, and the others have
    timm's defaults (GELU and 1e-6).

    Raises:
        ValueError: If the file holds parts that a plain ViT lacks, or lacks parts. The text is the reason, without a
            full stop.
    """
    names = {"register_tokens": "reg_token"}
    weights = {names.get(name, name): tensor for name, tensor in weights.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(("head", "mask_", "decoder_"))}
    if "cls_token" not in weights or "pos_embed" not in weights or "patch_embed.proj.weight" not in weights:
        raise ValueError(_not_of_timm(weights))
    try:
        projection, positions = weights["patch_embed.proj.weight"], weights["pos_embed"]
        width, _, patch_size, _ = projection.shape
        registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
        grid = math.isqrt(positions.shape[1])
        extra = positions.shape[1] - grid**2  # positions of tokens
        with torch.device("meta"):
            vit = VisionTransformer(
                img_size=grid * patch_size,
                patch_size=patch_size,
                in_chans=projection.shape[1],
                num_classes=0,
                global_pool="avg" if "fc_norm.weight" in weights else "token",
                embed_dim=width,
                depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
                num_heads=num_attention_heads or max(width // 64, 1),
                mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
                qkv_bias="blocks.0.attn.qkv.bias" in weights,
                proj_bias="blocks.0.attn.proj.bias" in weights,
                init_values=1.0 if "blocks.0.ls1.gamma" in weights else None,
                no_embed_class=extra == 0,
                reg_tokens=registers,
            )
        if extra == 1 and registers:  # the files of DINOv2 have no positions for registers
            zeros = positions.new_zeros(1, registers, width)
            weights["pos_embed"] = torch.cat([positions[:, :1], zeros, positions[:, 1:]], dim=1)
        found = vit.load_state_dict(weights, strict=False, assign=True)
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"its weights are not those of a ViT ({one_line(error, 160)})") from error
    if found.unexpected_keys:
        raise ValueError(_unknown(found.unexpected_keys[0]))
    if found.missing_keys:
        raise ValueError(f"it lacks {len(found.missing_keys)} weights of a ViT ({found.missing_keys[0]})")
    return vit


# ---- Configurations ----


def _native_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of a student's configuration, from one of transformers."""
    if getattr(config, "use_swiglu_ffn", False):
        raise ValueError(_SWIGLU)
    fields = ("num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")
    width = getattr(config, "intermediate_size", None) or int(config.hidden_size * config.mlp_ratio)
    return {
        "image_size": _side(config.image_size),
        "patch_size": _side(config.patch_size),
        "intermediate_size": width,
        **{field: getattr(config, field) for field in fields},
    }


def _timm_fields(vit: nn.Module) -> dict[str, Any]:
    """Fields of a student's configuration, from a ViT of timm."""
    # Not `isinstance`: a subclass can compute something else from weights of the same names.
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        name = type(vit).__name__
        raise ValueError(_REASONS.get(name, f"timm's {name} is not a plain ViT"))
    assert isinstance(vit, VisionTransformer)
    blocks: list[Any] = list(vit.blocks)
    norms = [module for module in vit.modules() if "norm" in type(module).__name__.lower()]
    if type(vit.patch_embed) is not timm_layers.PatchEmbed:
        raise ValueError("its patches do not come from one projection")
    if not all(type(block) is Block and type(block.attn) is timm_layers.Attention for block in blocks):
        raise ValueError("its blocks are not those of a plain ViT")
    if not all(type(block.mlp) is timm_layers.Mlp for block in blocks):
        raise ValueError(_SWIGLU)
    if vit.cls_token is None:
        raise ValueError(_NO_CLASS_TOKEN)
    if vit.pos_embed is None:
        raise ValueError("it has no position embeddings")
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or len({norm.eps for norm in norms}) != 1:
        raise ValueError("its norms are not layer norms of one epsilon")
    activation = blocks[0].mlp.act
    name = type(activation).__name__
    tanh = getattr(activation, "approximate", "none") == "tanh"
    return {
        "image_size": _side(vit.patch_embed.img_size),
        "patch_size": _side(vit.patch_embed.patch_size),
        "num_channels": vit.in_chans,
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu_pytorch_tanh" if tanh else _TIMM_ACTIVATIONS.get(name, name),
        "layer_norm_eps": norms[0].eps,
    }


def _side(size: int | Iterable[int]) -> int:
    """Side of square images or patches."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"its images or patches are not square ({' x '.join(map(str, size))})")  # type: ignore[arg-type]
    return sides.pop()


# ---- Weights ----


def split_qkv(state_dict: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields timm's weights by name, with queries, keys and values apart; timm computes them by one matrix."""
    for name, tensor in state_dict.items():
        if ".attn.qkv." in name:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace("qkv", part), values
        else:
            yield name, tensor


def _timm_names(state_dict: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in split_qkv(state_dict):
        yield _renamed(name, TIMM_MODULES, TIMM_BLOCK_MODULES), tensor


def _renamed(name: str, modules: dict[str, str], block_modules: dict[str, str]) -> str:
    prefix = next((prefix for prefix in _BLOCK_PREFIXES if name.startswith(prefix)), None)
    start = ""
    if prefix is not None:
        index, _, name = name.removeprefix(prefix).partition(".")
        start, modules = f"layers.{index}.", block_modules
    module, dot, parameter = name.rpartition(".")
    return start + (modules[module] + dot + parameter if module in modules else modules.get(name, name))


def _folded(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Folds LayerScale into the linear layer before it: lambda * (W x + b) = (lambda * W) x + lambda * b."""
    folded = dict(named)
    for name, scale in named.items():
        block, _, part = name.partition(".")[2].partition(".")
        if part not in _SCALES:
            continue
        del folded[name]
        module = f"layers.{block}.{_SCALES[part]}"
        folded[f"{module}.weight"] = scale[:, None] * folded[f"{module}.weight"]
        if f"{module}.bias" in folded:
            folded[f"{module}.bias"] = scale * folded[f"{module}.bias"]
    return folded


def _completed(named: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Adds the DIST token, its position and missing biases, and checks names and shapes."""
    named = dict(named)
    if "embeddings.cls_token" not in named:
        raise ValueError(_NO_CLASS_TOKEN)
    has_dist = "embeddings.distillation_token" in named
    if not has_dist:
        named["embeddings.distillation_token"] = named["embeddings.cls_token"].clone()
    named[_POSITIONS] = _two_positions(named[_POSITIONS], (config["image_size"] // config["patch_size"]) ** 2, has_dist)
    with torch.device("meta"):
        expected = DeiTLTModel(DeiTLTConfig(**config)).state_dict()
    for name, like in expected.items():
        if name not in named and name.endswith(".bias"):
            named[name] = torch.zeros_like(like, device=named[_POSITIONS].device)
        if name not in named:
            raise ValueError(f"it lacks {name}")
        if named[name].shape != like.shape:
            raise ValueError(f"its {name} is {tuple(named[name].shape)}, not {tuple(like.shape)}")
    for name in named:
        if name not in expected:
            raise ValueError(_unknown(name))
    return named


def _two_positions(positions: torch.Tensor, patches: int, has_dist: bool) -> torch.Tensor:
    """Positions of CLS, DIST and patches. Tokens without a position get zeros, and registers lose theirs."""
    others, of_patches = positions[:, : positions.shape[1] - patches], positions[:, positions.shape[1] - patches :]
    if others.shape[1] == 0:
        others = torch.zeros_like(positions[:, :1])
    cls, dist = others[:, :1], others[:, 1:2] if has_dist and others.shape[1] > 1 else others[:, :1]
    return torch.cat([cls, dist, of_patches], dim=1)


def _not_of_timm(names: Iterable[str]) -> str:
    """Reason why a file whose weights have these names cannot be read as a ViT in timm's layout."""
    names = list(names)
    known = next((reason for part, reason in _UNKNOWN_WEIGHTS.items() if any(part in name for name in names)), None)
    if known is not None:
        return known
    if "patch_embed.proj.weight" in names and "cls_token" not in names:
        return _NO_CLASS_TOKEN
    if any("embeddings.cls_token" in name for name in names):
        return (
            "its weights have the names of transformers; give their folder, with its config.json, instead of the file"
        )
    shown = ", ".join(sorted(names)[:3])
    return f"its weights do not have the names of a ViT of timm (cls_token, pos_embed, ...); they begin with {shown}"


def _unknown(name: str) -> str:
    """Reason why a weight cannot be in a student."""
    return next(
        (reason for part, reason in _UNKNOWN_WEIGHTS.items() if part in name), f"it has {name}, which a DeiT lacks"
    )
