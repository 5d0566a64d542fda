"""Data: loading image data sets, making long-tailed subsets, and turning images into batches."""

from importlib import import_module
from typing import Any

# Imported on first use: the functions that need only labels then do not import torch.
_MODULES = {
    "class_counts": "long_tail",
    "decreasing_count_map": "long_tail",
    "indices_hash": "long_tail",
    "long_tailed_indices": "long_tail",
    "shot_groups": "long_tail",
    "stratified_split": "long_tail",
    "validation_split": "long_tail",
    "read_class_map": "sources.labels",
    "read_class_names": "sources.labels",
    "find_columns": "columns",
    "load_long_tailed": "loading",
    "ImageCollator": "images",
    "ImageDataset": "images",
    "repeated_augmentation_order": "sampling",
    "image_processor": "transforms",
    "train_transform": "transforms",
    "weak_transform": "transforms",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
