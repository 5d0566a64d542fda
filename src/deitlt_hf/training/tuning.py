"""How much of a student is trained, with which learning rates, and heads that begin at class means."""

import re
import warnings
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from .adapters import has_adapter
from .inputs import outputs_of

if TYPE_CHECKING:
    from .trainer import LongTailTrainer

FULL, HEADS, LORA = "full", "heads", "lora"
TUNE_CHOICES = f"{FULL}, {HEADS}, {LORA} or last_N, such as last_4"
_HEADS = ("cls_classifier", "distillation_classifier")
_TOKENS = ("cls_token", "distillation_token")
# The linear layers of the blocks.
_ADAPTED = r".*layers\.\d+\.(attention\.[qkvo]_proj|mlp\.fc[12])"
_BLOCK = re.compile(r"layers\.(\d+)\.")


def last_blocks(tune: str) -> int | None:
    """Number of blocks in `last_N`; None for other values of `tune`."""
    found = re.fullmatch(r"last_([1-9]\d*)", tune)
    return int(found[1]) if found else None


def check_tune(tune: str) -> None:
    """Raises `ValueError` if a value of `tune` is unknown, or the package that it needs is not installed."""
    if tune not in (FULL, HEADS, LORA) and last_blocks(tune) is None:
        raise ValueError(f"tune must be {TUNE_CHOICES}, got {tune!r}.")
    if tune == LORA and not is_peft_available():
        raise ValueError("tune 'lora' needs PEFT; install it with pip install peft.")


def check_tunable(model: PreTrainedModel, tune: str) -> None:
    """Raises `ValueError` if a student has adapters already, or fewer blocks than `last_N` in `tune`."""
    blocks, depth = last_blocks(tune), model.config.num_hidden_layers
    if tune != FULL and has_adapter(model):
        raise ValueError(f"the student has adapters already, which are trained alone; leave out tune {tune!r}.")
    if blocks is not None and blocks > depth:
        raise ValueError(f"tune {tune!r} is more than the {depth} blocks of the student; choose at most last_{depth}.")


def freeze(model: PreTrainedModel, tune: str, lora_rank: int) -> nn.Module:
    """Leaves only the chosen part of a student to be trained, and returns the student; with LoRA, its `PeftModel`.

    Blocks without a trained weight lose their stochastic depth, which would only add noise to frozen features. LoRA (Hu
    et al., 2021) adapts all linear layers of the blocks, with a scale of 1; tokens and heads are trained as they are.

    The arguments are those of the training arguments. The student is changed in place.
    """
    if tune == FULL:
        return model
    if tune == LORA:
        return _with_adapters(model, lora_rank)
    blocks = last_blocks(tune) or 0
    first = model.config.num_hidden_layers - blocks
    for name, parameter in model.named_parameters():
        index = _BLOCK.search(name)
        is_late = int(index[1]) >= first if index else "layernorm" in name or name.endswith(_TOKENS)
        parameter.requires_grad_(is_head(name) or (blocks > 0 and is_late))
    layers: Any = model.get_submodule("deit.layers")
    for block in layers[:first]:
        block.drop_path.drop_prob = 0.0
    return model


def _with_adapters(model: PreTrainedModel, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    # CLS and DIST can begin as copies of each other: only trained tokens let them differ. PEFT saves whole modules.
    whole = ["deit.embeddings", *_HEADS]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_ADAPTED, modules_to_save=whole)
    # Not transformers' `add_adapter`, for which version 5.24 requires PEFT 0.22: the newest release was 0.21.2.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute by a name that transformers deprecates
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".embeddings." in name:
            parameter.requires_grad_("modules_to_save" in name and name.endswith(_TOKENS))
    return adapted


def trained_parameters(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def is_head(name: str) -> bool:
    """Whether this is the name of a head of a student, or of a parameter or module in it."""
    return any(part in _HEADS for part in name.split("."))


# ---- Learning rates ----


def rate_factor(name: str, depth: int, layer_decay: float) -> float:
    """Factor of the learning rate of a parameter: `layer_decay` to the number of layers above it, as in timm.

    The heads have 1. The final norm has the factor of the last block, `layer_decay` (Bao et al., BEiT, 2021, appendix
    H). The name of the parameter can have the prefixes of PEFT; `depth` is the number of blocks.
    """
    index = _BLOCK.search(name)
    layer = int(index[1]) + 1 if index else depth + 1 if is_head(name) else 0 if "embeddings." in name else depth
    return layer_decay ** (depth + 1 - layer)


def parameter_groups(
    model: Any,
    decayed: Collection[str],
    weight_decay: float,
    learning_rate: float,
    layer_decay: float,
    matrices: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Groups the trained parameters of a student by weight decay and learning rate, see [`rate_factor`].

    With the names of matrices, also by whether they are among these (`use_muon`).
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = rate_factor(name, model.config.num_hidden_layers, layer_decay)
            groups.setdefault((factor, name in decayed, name in (matrices or ())), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * factor, "weight_decay": weight_decay if has_decay else 0.0}
        | ({} if matrices is None else {"use_muon": is_matrix})
        for (factor, has_decay, is_matrix), parameters in groups.items()
    ]


# ---- Heads that begin at class means ----


@torch.no_grad()
def begin_heads(model: PreTrainedModel, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Sets both heads of a student to the classifier of the nearest class mean; each class counts the same.

    With class means m_c, their mean m, and the mean squared distance s of an image to the mean of its class, the logits
    for a feature x are ((m_c - m) x - (|m_c|^2 - |m|^2) / 2) / s. A class without images gets the logit 0. The batches
    have the features of both tokens, (images, 2, hidden_size), and labels, (images,), of all training images.
    """
    found = {name.rpartition(".")[2]: module for name, module in model.named_modules() if name.endswith(_HEADS)}
    # PEFT keeps a trained copy inside a wrapper.
    heads: list[Any] = [getattr(found[name], "modules_to_save", {"default": found[name]})["default"] for name in _HEADS]
    num_labels, width = heads[0].weight.shape
    device = heads[0].weight.device
    # In float64: the spread is a small difference of sums over all images.
    sums = torch.zeros(num_labels, 2, width, dtype=torch.float64, device=device)
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    counts = torch.zeros(num_labels, dtype=torch.float64, device=device)
    for features, labels in batches:
        features = features.double()
        sums.index_add_(0, labels, features)
        squares += features.square().sum(dim=(0, 2))
        counts += torch.bincount(labels, minlength=num_labels)
    means = sums / counts.clamp(min=1)[:, None, None]
    spread = (squares - (counts[:, None] * means.square().sum(dim=2)).sum(dim=0)) / counts.sum()
    centre = means[counts > 0].mean(dim=0)
    means = torch.where((counts > 0)[:, None, None], means, centre)
    spread = torch.maximum(spread, 1e-6 * means.square().sum(dim=2).mean(dim=0))  # 0 with one image for each class
    for token, head in enumerate(heads):
        head.weight.copy_((means[:, token] - centre[token]) / spread[token])
        head.bias.copy_((centre[token].square().sum() - means[:, token].square().sum(dim=1)) / (2 * spread[token]))


def features_of(trainer: "LongTailTrainer", images: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Yields features of both tokens and labels of all images, preprocessed as in evaluation, to every process."""
    model = trainer.model
    was_training = model.training
    model.eval()

    def tokens(pixel_values: torch.Tensor) -> torch.Tensor:
        with trainer.accelerator.autocast():
            return model(pixel_values=pixel_values).token_features

    # Not the evaluation loader: transformers would keep its workers for the next evaluation, of other images.
    yield from outputs_of(tokens, trainer.get_test_dataloader(images), trainer)
    model.train(was_training)
