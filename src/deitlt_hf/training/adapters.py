"""PEFT adapters such as LoRA: detecting, merging, loading and saving them. The saved model contains them merged."""

import copy
from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from ..io import read_json, write_json

ADAPTER_FOLDER = "adapter"


def has_adapter(model: nn.Module) -> bool:
    """Whether a model is a `PeftModel`, or has an adapter from `add_adapter` of transformers."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return True
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def inside_wrapper(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`, where its adapters stay. Another model is returned itself."""
    # By the method, not by PEFT's class: PEFT need not be installed.
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of a model with the adapters merged into the weights. A model without adapters is returned itself.

    The copy loads without PEFT, and without the weights that the adapters were trained on.
    """
    if not has_adapter(model):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    whole = copy.deepcopy(model)  # training goes on with the unmerged adapters
    # `merge_and_unload` is of PeftModel only; with `add_adapter`, transformers has no method that merges.
    if not isinstance(whole, PreTrainedModel):
        return whole.merge_and_unload()
    for name, module in list(whole.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            whole.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            active = module.active_adapter
            whole.set_submodule(name, module.modules_to_save[active if isinstance(active, str) else active[0]])
    whole._hf_peft_config_loaded = False  # otherwise `save_pretrained` saves the adapters only
    del whole.peft_config
    return whole


def load_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Loads the weights of an adapter from `add_adapter`, which the Trainer of transformers saves but does not load."""
    from peft import set_peft_model_state_dict

    weights = load_file(Path(folder) / "adapter_model.safetensors")
    # transformers adds PEFT's prefix when it saves (`save_peft_format`), but its model has no such modules.
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    set_peft_model_state_dict(model, named, adapter_name=model.active_adapters()[0])


def save_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Saves only the adapters of a model, and removes local paths from their configuration."""
    model.save_pretrained(folder)
    (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's card template, with the path of the base model
    for path in Path(folder).rglob("adapter_config.json"):
        config = read_json(path)
        base = config.get("base_model_name_or_path")
        if base is not None and (Path(base).is_absolute() or Path(base).exists()):
            write_json(path, config | {"base_model_name_or_path": None})
