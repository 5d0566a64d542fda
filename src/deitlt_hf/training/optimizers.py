"""Muon optimiser for students: Muon for the weight matrices of the transformer blocks, AdamW for other parameters."""

import contextlib
import functools
from collections.abc import Collection, Iterator
from typing import Any

import timm.optim
import torch
from timm.optim import muon as timm_muon
from torch import nn
from transformers import TrainingArguments

MUON = "muon"  # value of the argument `optim`
_HEADS = ("cls_classifier", "distillation_classifier")


@contextlib.contextmanager
def float32_iteration() -> Iterator[None]:
    """Context in which timm's Muon orthogonalises in float32. timm itself always uses bfloat16."""
    original = timm_muon.zeropower_via_newtonschulz
    timm_muon.zeropower_via_newtonschulz = functools.partial(original, dtype=torch.float32)
    try:
        yield
    finally:
        timm_muon.zeropower_via_newtonschulz = original


class Muon(timm.optim.Muon):
    """timm's Muon, with orthogonalisation in float32 on a CPU and in bfloat16 on other devices.

    On a CPU without bfloat16 instructions, a step in bfloat16 takes 14 to 28 times as long as in float32
    (`benchmarks/muon_step.py`). All CPUs use float32, so that results do not depend on such instructions.
    """

    def step(self, closure: Any = None) -> Any:
        is_on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with float32_iteration() if is_on_cpu else contextlib.nullcontext():
            return super().step(closure)


def muon(model: nn.Module, args: TrainingArguments, decayed: Collection[str]) -> Muon:
    """Creates Muon (Jordan et al., 2024) for the linear layers of the blocks, with AdamW for all other parameters.

    AdamW updates embeddings, tokens, norms, biases and classifiers, as in Jordan's code. Muon's updates are scaled to
    the size of AdamW's (0.2 times the square root of the longer side, Liu et al., arXiv 2502.16982, equation 4).
    Therefore both use the same learning rate and weight decay.

    Args:
        model: A student.
        args: Training arguments with `learning_rate`, `weight_decay`, and the betas and epsilon of Adam.
        decayed: Names of the parameters with weight decay.

    Returns:
        The optimiser, with up to four parameter groups.
    """
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _is_head(name)
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in matrices, name in decayed), []).append(parameter)
    return Muon(
        [
            {
                "params": parameters,
                "weight_decay": args.weight_decay if has_decay else 0.0,
                "use_muon": is_matrix,
                "nesterov": is_matrix,  # would turn the AdamW fallback into NAdamW
            }
            for (is_matrix, has_decay), parameters in groups.items()
        ],
        lr=args.learning_rate,
        **muon_settings(args),
    )


def muon_settings(args: TrainingArguments) -> dict[str, Any]:
    """Settings of Muon and of its AdamW fallback, except learning rate and weight decay."""
    return {
        "momentum": 0.95,
        "adjust_lr_fn": "match_rms_adamw",
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def _is_head(name: str) -> bool:
    return any(part in _HEADS for part in name.split("."))
