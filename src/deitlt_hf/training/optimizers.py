"""Optimisers: the check of a given optimiser, and Muon for the weight matrices of a student's blocks."""

import contextlib
import functools
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import timm.optim
import torch
from timm.optim import muon as timm_muon
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import GreedyLR, PreTrainedModel, TrainingArguments

from .tuning import FULL, is_head, parameter_groups

if TYPE_CHECKING:
    from .student_arguments import DeiTLTTrainingArguments

MUON = "muon"  # value of the argument `optim`


@contextlib.contextmanager
def float32_iteration() -> Iterator[None]:
    """Context in which timm's Muon orthogonalises in float32. timm itself always uses bfloat16."""
    original = timm_muon.zeropower_via_newtonschulz
    # By replacement: timm's step calls the function with its default dtype, and has no option for it.
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


def muon(model: nn.Module, args: "DeiTLTTrainingArguments", decayed: Collection[str]) -> Muon:
    """Creates Muon (Jordan et al., 2024) for the linear layers of the blocks, with AdamW for all other parameters.

    AdamW updates embeddings, tokens, norms, biases and classifiers, as in Jordan's code. Muon's updates are scaled to
    the size of AdamW's (0.2 times the square root of the longer side, Liu et al., arXiv 2502.16982, equation 4).
    Therefore both use the same learning rate and weight decay. `decayed` are the names of parameters with weight decay.
    """
    assert args.learning_rate is not None  # set by `settle`
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_head(name)
    }
    # Heads are left to AdamW, and so is the patch projection, a convolution: Muon's orthogonal updates are for hidden
    # matrices, whose input and output are both features.
    groups = parameter_groups(model, decayed, args.weight_decay, args.learning_rate, args.layer_decay, matrices)
    for group in groups:
        group["nesterov"] = group["use_muon"]  # would turn the AdamW fallback into NAdamW
    return Muon(groups, lr=args.learning_rate, **muon_settings(args))


def muon_settings(args: TrainingArguments) -> dict[str, Any]:
    """Settings of Muon and of its AdamW fallback, except learning rate and weight decay."""
    return {
        "momentum": 0.95,  # default of torch.optim.Muon, and of its author
        "adjust_lr_fn": "match_rms_adamw",
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def check_given(
    model: PreTrainedModel,
    optimizer: Optimizer | None,
    scheduler: Any,
    class_and_settings: Any,
    args: TrainingArguments,
    makes_models: bool,
) -> None:
    """Raises `ValueError` if a given optimiser and scheduler do not match the model, the arguments or each other.

    `class_and_settings` is the parameter `optimizer_cls_and_kwargs` of [`~transformers.Trainer`]; `makes_models` is
    whether each call of `train` starts with a new model.
    """
    if class_and_settings is not None and optimizer is not None:
        raise ValueError("give optimizers or optimizer_cls_and_kwargs, not both.")
    if makes_models and (optimizer is not None or scheduler is not None):
        raise ValueError("optimizers belong to one model; with model_init, pass optimizer_cls_and_kwargs.")
    if scheduler is not None and (optimizer is None or scheduler.optimizer.param_groups is not optimizer.param_groups):
        raise ValueError("the scheduler in optimizers must belong to the optimizer that is passed with it.")
    if isinstance(scheduler, ReduceLROnPlateau | GreedyLR) and args.metric_for_best_model is None:
        raise ValueError(f"a {type(scheduler).__name__} needs a metric to follow; set metric_for_best_model.")
    if optimizer is not None:
        if getattr(args, "tune", FULL) != FULL or getattr(args, "layer_decay", 1) != 1:
            raise ValueError("tune and layer_decay define the groups of the optimizer; leave out these or optimizers.")
        own = {id(parameter) for parameter in model.parameters()}
        if not all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                "the optimizer has parameters that are not the model's; create it from model.parameters()."
            )
