"""DeiT-LT: Vision Transformers trained from scratch on long-tailed images, as a Hugging Face package."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader

__version__ = "0.1.0"

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
}
__all__ = [*_MODULES, "__version__"]
# Earlier names of modules, which can still be imported, and their names now: no two modules share a base name.
_EARLIER = {
    f"{__name__}.{earlier}": f"{__name__}.{now}"
    for earlier, now in {
        "analysis.sharpness": "analysis.flatness",
        "hub.push": "hub.pushing",
        "losses.distillation": "losses.student",
        "recipes.arguments": "recipes.sections",
        "serving.demo": "serving.web_demo",
        "serving.loading": "serving.classifiers",
        "serving.predict": "serving.prediction",
    }.items()
}


class _EarlierNames(MetaPathFinder, Loader):
    """Imports a module by an earlier name: both names are the same module, so that no value exists twice."""

    def find_spec(self, fullname, path=None, target=None):
        return spec_from_loader(fullname, self) if fullname in _EARLIER else None

    def exec_module(self, module):
        sys.modules[module.__name__] = import_module(_EARLIER[module.__name__])


sys.meta_path.append(_EarlierNames())  # last: it is asked only for modules without a file


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_MODULES])
