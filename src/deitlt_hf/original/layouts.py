"""Parameter names and sizes in the state dicts of the authors' students (also timm's DeiTs) and CNN teachers.

All functions are pure functions of state dicts. A `KeyError` names a missing tensor, or a tensor with an unknown name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..models.trunks import TIMM_BLOCK_MODULES, TIMM_MODULES, split_qkv

StateDict = Mapping[str, torch.Tensor]

# Modules and bare parameters of the student: the authors' name (also timm's), then the name in this package.
_STUDENT_MODULES = {original: f"deit.{ours}" for original, ours in TIMM_MODULES.items()} | {
    "head": "cls_classifier",
    "head_dist": "distillation_classifier",
}
# Backbone by the number of blocks in each stage, and whether the blocks are bottlenecks.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {((n, n, n), False): f"resnet{6 * n + 2}" for n in (3, 5, 7, 9)} | {
    ((2, 2, 2, 2), False): "timm/resnet18",
    ((3, 4, 6, 3), False): "timm/resnet34",
    ((3, 4, 6, 3), True): "timm/resnet50",
    ((3, 4, 23, 3), True): "timm/resnet101",
    ((3, 8, 36, 3), True): "timm/resnet152",
}


def student_sizes(state_dict: StateDict) -> dict[str, Any]:
    """Reads fields of [`DeiTLTConfig`] from the authors' tensors. Heads are assumed 64 wide, as in all DeiTs."""
    width, num_channels, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    num_patches = state_dict["pos_embed"].shape[1] - 2  # without the CLS and DIST tokens
    if num_patches < 1:
        raise ValueError(f"pos_embed is {tuple(state_dict['pos_embed'].shape)}, without a patch")
    if num_channels != 3:
        raise ValueError(f"it takes images of {num_channels} channels; only RGB is known here")
    return {
        "hidden_size": width,
        "num_channels": num_channels,
        "patch_size": patch_size,
        "image_size": patch_size * round(num_patches**0.5),
        "num_hidden_layers": _depth(state_dict, "blocks."),
        "num_attention_heads": max(width // 64, 1),
        "intermediate_size": state_dict["blocks.0.mlp.fc1.bias"].shape[0],
        "num_labels": state_dict["head.bias"].shape[0],
    }


def student_to_ours(state_dict: StateDict) -> dict[str, torch.Tensor]:
    """Renames the authors' student parameters to the names of this package, and splits queries, keys and values."""
    modules = _student_modules(_depth(state_dict, "blocks."))
    return {_renamed(name, modules): tensor for name, tensor in split_qkv(state_dict)}


def student_to_original(state_dict: StateDict) -> dict[str, torch.Tensor]:
    """The inverse of [`student_to_ours`]."""
    modules = {ours: original for original, ours in _student_modules(_depth(state_dict, "deit.layers.")).items()}
    renamed = {_renamed(name, modules): tensor for name, tensor in state_dict.items()}
    original = {}
    for name, tensor in renamed.items():
        if ".attn.q." in name:
            # timm and the authors compute queries, keys and values by one matrix, in this order.
            parts = [renamed[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            original[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            original[name] = tensor
    return original


@dataclass(frozen=True)
class TeacherLayout:
    """Layout of a CNN teacher's state dict: a ResNet under a name prefix, and a classifier."""

    prefix: str  # of the backbone's parameter names
    may_be_cosine: bool  # whether a classifier without a bias is a cosine classifier, of shape (features, classes)
    classifier: str = "linear"  # name of the classifier

    def sizes(self, state_dict: StateDict) -> dict[str, Any]:
        """Reads fields of [`FlatTeacherConfig`] from the authors' tensors.

        Raises:
            ValueError: If the stages match none of the supported ResNets.
            IndexError: If a tensor has too few dimensions.
        """
        depths = tuple(_depth(state_dict, f"{self.prefix}layer{stage}.") for stage in range(1, 5))
        depths = depths if depths[3] else depths[:3]  # those for CIFAR have three stages
        backbone = _RESNETS.get((depths, f"{self.prefix}layer1.0.conv3.weight" in state_dict))
        if backbone is None:
            raise ValueError(f"its stages have {', '.join(map(str, depths))} blocks, which matches no supported ResNet")
        num_channels = state_dict[f"{self.prefix}conv1.weight"].shape[1]
        if num_channels != 3:
            raise ValueError(f"it takes images of {num_channels} channels; only RGB is known here")
        cosine = self.may_be_cosine and f"{self.classifier}.bias" not in state_dict
        return {
            "backbone": backbone,
            "classifier": "cosine" if cosine else "linear",
            "image_size": 224 if backbone.startswith("timm/") else 32,
            "num_channels": num_channels,
            "num_labels": state_dict[f"{self.classifier}.weight"].shape[1 if cosine else 0],
        }

    def to_ours(self, state_dict: StateDict) -> dict[str, torch.Tensor]:
        """Renames the authors' parameters to the names of this package."""
        return self._swap(state_dict, (f"{self.classifier}.", self.prefix), ("classifier.", "backbone."))

    def to_original(self, state_dict: StateDict) -> dict[str, torch.Tensor]:
        """The inverse of [`to_ours`]."""
        return self._swap(state_dict, ("classifier.", "backbone."), (f"{self.classifier}.", self.prefix))

    def _swap(self, state_dict: StateDict, old: tuple[str, str], new: tuple[str, str]) -> dict[str, torch.Tensor]:
        """Replaces the prefixes of classifier and backbone, and transposes a cosine classifier's weight."""
        transposed = self.may_be_cosine and f"{old[0]}bias" not in state_dict
        swapped = {}
        for name, tensor in state_dict.items():
            is_classifier = name.startswith(old[0])
            ours = 0 if is_classifier else 1
            swapped[new[ours] + name.removeprefix(old[ours])] = tensor.T if is_classifier and transposed else tensor
        return swapped


PACO_LAYOUT = TeacherLayout("encoder_q.", may_be_cosine=False)
LDAM_LAYOUT = TeacherLayout("", may_be_cosine=True)
LDAM_RESNET50_LAYOUT = TeacherLayout("", may_be_cosine=True, classifier="fc")  # ImageNet-LT and iNaturalist


def _student_modules(depth: int) -> dict[str, str]:
    """Maps the authors' module names to those of this package, for a student with `depth` blocks."""
    blocks = {
        f"blocks.{index}.{original}": f"deit.layers.{index}.{ours}"
        for index in range(depth)
        for original, ours in TIMM_BLOCK_MODULES.items()
    }
    return _STUDENT_MODULES | blocks


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    module, dot, parameter = name.rpartition(".")
    return modules[module] + dot + parameter if module in modules else modules[name]


def _depth(names: Iterable[str], prefix: str) -> int:
    """Number of blocks: distinct indices that follow the prefix in the names."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})
