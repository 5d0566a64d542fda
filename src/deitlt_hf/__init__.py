"""DeiT-LT: Vision Transformers trained from scratch on long-tailed images, as a Hugging Face package."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# Public names and their modules. They are imported on first use, which keeps `import deitlt_hf` fast.
_MODULES = {
    "DeiTLTConfig": "models.deitlt.configuration_deitlt",
    "DeiTLTModel": "models.deitlt.modeling_deitlt",
    "DeiTLTForImageClassification": "models.deitlt.modeling_deitlt",
    "FlatTeacherConfig": "models.flat_teacher.configuration_flat_teacher",
    "FlatTeacherForImageClassification": "models.flat_teacher.modeling_flat_teacher",
    "DeiTLTTrainer": "training",
    "DeiTLTTrainingArguments": "training",
    "FlatTeacherTrainer": "training",
    "FlatTeacherTrainingArguments": "training",
    "Recipe": "training.recipe",
    "train": "quickstart",
    "compare": "comparison",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
