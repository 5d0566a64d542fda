"""The authors' student: their files, and its parameter names in transformers' terms."""

import argparse
import pickle
import re
from collections.abc import Mapping
from os import PathLike

import torch

from ..configuration_deitlt import DeiTLTConfig
from ..modeling_deitlt import DeiTLTForImageClassification

# Original name to ours, in this order. The fused qkv projection is split beforehand.
_RENAMES = (
    (r"^cls_token$", "deit.embeddings.cls_token"),
    (r"^dist_token$", "deit.embeddings.distillation_token"),
    (r"^pos_embed$", "deit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "deit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "deit.layernorm."),
    (r"^head\.", "cls_classifier."),
    (r"^head_dist\.", "distillation_classifier."),
    (r"^blocks\.(\d+)\.norm1\.", r"deit.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"deit.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.([qkv])\.", r"deit.layers.\1.attention.\2_proj."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"deit.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"deit.layers.\1.mlp."),
)


def convert_student_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the parameters of the authors' student to ours, and splits queries, keys and values.

    Raises:
        ValueError: If a name is not one of the student's.
    """
    converted = {}
    for name, tensor in state_dict.items():
        parts = {name: tensor}
        if ".attn.qkv." in name:
            parts = {name.replace("qkv", part): t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
        for part, values in parts.items():
            ours = next((re.sub(old, new, part) for old, new in _RENAMES if re.match(old, part)), None)
            if ours is None:
                raise ValueError(f"{part!r} is not a parameter of a DeiT-LT student.")
            converted[ours] = values
    return converted


def load_original_student(path: str | PathLike, **config) -> DeiTLTForImageClassification:
    """Loads a student from the authors' `.pth` file; sizes are read from the tensors.

    The file is a pickle. It is read without running any code of it: tensors and plain values, and the
    `argparse.Namespace` that the authors keep beside them, are all that is let in.

    Args:
        path: The file, with the weights under `model`.
        **config: Further fields of [`DeiTLTConfig`], such as `num_attention_heads` (by default one for 64 of the
            width) or `id2label`.

    Raises:
        ValueError: If the file cannot be read safely, or holds something else than a student.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {str(error).splitlines()[0]}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{path} has no weights under 'model', where the authors keep a student's.")
    converted = convert_student_state_dict(content["model"])
    try:
        projection = converted["deit.embeddings.patch_embeddings.projection.weight"]
        hidden_size, num_channels, patch_size, _ = projection.shape
        patches = converted["deit.embeddings.position_embeddings"].shape[1] - 2
        sizes = {
            "hidden_size": hidden_size,
            "num_channels": num_channels,
            "patch_size": patch_size,
            "image_size": patch_size * round(patches**0.5),
            "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in converted if "layers" in name),
            "num_attention_heads": max(hidden_size // 64, 1),
            "intermediate_size": converted["deit.layers.0.mlp.fc1.bias"].shape[0],
            "num_labels": converted["cls_classifier.bias"].shape[0],
        }
        model = DeiTLTForImageClassification(DeiTLTConfig(**{**sizes, **config}))
        model.load_state_dict(converted)
    except KeyError as error:
        raise ValueError(f"the student's weights lack {error}.") from error
    except RuntimeError as error:
        raise ValueError(f"these are not the weights of a student: {' '.join(str(error).split())[:300]}.") from error
    return model.eval()
