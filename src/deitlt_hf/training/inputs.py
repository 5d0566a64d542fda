"""Converts `datasets` data sets to the inputs of the trainers, and checks their labels against the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import BaseImageProcessor, PreTrainedConfig, TrainingArguments

from ..data.columns import find_columns
from ..data.copies import ReducedCopies
from ..data.images import ImageDataset
from ..data.sampling import SeededImages, TrainBatches
from ..data.sources.labels import check_indices
from ..data.streaming import StreamedImages, StreamedSplit
from ..data.transforms import TrainTransform
from .guards import ignore_stop_signals

if TYPE_CHECKING:
    from .arguments import LongTailTrainingArguments


def label_names(config: PreTrainedConfig) -> list[str]:
    """Class names of a model, in label order."""
    names = {int(label): name for label, name in (config.id2label or {}).items()}
    return [names[label] for label in range(len(names))]


def outputs_of(
    function: Callable[[torch.Tensor], torch.Tensor], loader: Iterable, trainer: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields, for each batch of a trainer's loader, a function's output for the images, and the labels.

    Every process gets the batches of all processes.
    """
    device = trainer.args.device
    for batch in loader:
        found = function(batch["pixel_values"].to(device))
        # Not `gather`, which keeps the images that were repeated to fill the last batch.
        yield trainer.accelerator.gather_for_metrics((found, batch["labels"].to(device)))


def ignoring_stop_signals(loader: DataLoader) -> DataLoader:
    """Makes the workers of a data loader ignore signals meant for the main process, and returns the loader."""
    # The loader inside Accelerate's wrapper is the one that starts the workers.
    getattr(loader, "base_dataloader", loader).worker_init_fn = ignore_stop_signals
    return loader


def train_loader(
    images: ImageDataset | StreamedImages, args: "LongTailTrainingArguments", collate_fn: Callable
) -> DataLoader:
    """Data loader of this process's training batches. All batches are full, because mixing pairs their images."""
    loaded: TorchDataset = images
    batches: dict[str, Any] = {"batch_size": args.train_batch_size}
    if not isinstance(images, StreamedImages):
        sampler = TrainBatches(
            len(images),
            args.train_batch_size,
            args.process_index,
            args.world_size,
            args.gradient_accumulation_steps,
            args.repeats,
            args.seed if args.data_seed is None else args.data_seed,
            bool(args.partial_steps),
            images.labels if args.sampling == "class_balanced" else None,
        )
        loaded, batches = SeededImages(images), {"batch_sampler": sampler}
    context = getattr(args, "dataloader_multiprocessing_context", None)
    # Not prepared by Accelerate, which would split the batches over the processes a second time.
    return DataLoader(
        loaded,
        **batches,
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        # transformers has these two arguments since 5.15.
        multiprocessing_context=context if args.dataloader_num_workers else None,
        in_order=getattr(args, "dataloader_in_order", True),
        pin_memory=args.dataloader_pin_memory,
        worker_init_fn=ignore_stop_signals,
    )


def check_streaming(args: TrainingArguments) -> None:
    """Raises `ValueError` if a training argument needs the whole data set, which a stream does not have."""
    for name in ("image_cache", "teacher_cache", "sampling", "partial_steps"):
        value = getattr(args, name, None)
        if value not in (None, False, "", "uniform"):
            by = " (as_published sets it)" if name == "partial_steps" else ""
            raise ValueError(f"{name} {value!r}{by} does not work with --streaming; leave out one of them.")


def as_images(
    dataset: Any,
    processor: BaseImageProcessor,
    args: "LongTailTrainingArguments",
    views: Mapping[str, TrainTransform] | None = None,
) -> Any:
    """Wraps a data set or a mapping of them: rows become model inputs. Other data sets are returned unchanged.

    `views` are the training transforms by model input; None for evaluation, by the processor.
    """
    background = getattr(processor, "background", None)
    if isinstance(dataset, StreamedSplit):
        check_streaming(args)
        return StreamedImages(
            dataset,
            views or {},
            args.train_batch_size,
            args.process_index,
            args.world_size,
            args.repeats,
            args.seed if args.data_seed is None else args.data_seed,
            args.gradient_accumulation_steps,
            background,
        )
    if isinstance(dataset, DatasetDict | IterableDatasetDict | IterableDataset):
        _check_kind(dataset)
    if isinstance(dataset, dict):
        return {name: as_images(images, processor, args) for name, images in dataset.items()}
    if not isinstance(dataset, Dataset):
        return dataset
    dataset = dataset.with_format(None)  # a format of the user, such as torch, would change what cells hold
    copies = None
    if args.image_cache and views:
        copies = ReducedCopies.for_training(args.image_cache, max(view.size for view in views.values()))
    elif args.image_cache:
        copies = ReducedCopies.for_evaluation(args.image_cache, processor)
    return ImageDataset(dataset, *find_columns(dataset), views, background, copies)


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """Fields of a configuration with the names of its classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def name_classes(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Sets the label names of a model, if it has other ones."""
    if label_names(config) != names:
        for field, value in label_fields(names).items():
            setattr(config, field, value)


def first_difference(first: Sequence, second: Sequence) -> int:
    """Index at which two sequences of the same length begin to differ."""
    return next(index for index, (one, other) in enumerate(zip(first, second, strict=True)) if one != other)


def common_classes(config: PreTrainedConfig, datasets: Iterable[Dataset]) -> list[str]:
    """Class names that a model and data sets have in common, in label order. Names from the data replace missing ones.

    It raises `ValueError` if the labels do not agree, the data are not a `datasets.Dataset`, or the model is not a
    single-label classifier.
    """
    names = label_names(config)
    for dataset in datasets:
        names = _matched(names, config, dataset)
    return names


def _matched(known: list[str], config: PreTrainedConfig, dataset: Dataset) -> list[str]:
    """Class names of a data set, after the check that they are those of the model (`known`), if it has names."""
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"the model's config has problem_type {problem!r}, but an image has one class here; set it to None."
        )
    _check_kind(dataset)
    _, column = find_columns(dataset)
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel):
        how = f'dataset.class_encode_column("{column}")'
        if "int" in feature.dtype:
            how = (
                f'dataset.cast_column("{column}", ClassLabel(num_classes={config.num_labels})), or names= for its names'
            )
        raise ValueError(
            f"the labels in column {column!r} are plain values ({feature.dtype}) without class names: pass {how}, "
            "with the same classes for training and test data."
        )
    if isinstance(dataset, Dataset):
        check_indices(dataset.with_format(None)[column][:], feature.names, "the data set")
    names = feature.names
    if len(names) != config.num_labels:
        raise ValueError(f"the model has {config.num_labels} classes but the data have {len(names)}.")
    if known not in (names, [f"LABEL_{label}" for label in range(len(names))]):
        label = first_difference(known, names)
        raise ValueError(
            f"the model's label {label} is {known[label]!r} but the data's is {names[label]!r}; model and data "
            "need the same classes in the same order."
        )
    return names


def _check_kind(dataset: object) -> None:
    """Raises `ValueError` for what is no supported data set, or has a transform, which the trainer would ignore."""
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise ValueError(
            f"train_dataset and eval_dataset must each be one datasets.Dataset, got a {type(dataset).__name__} of "
            f"{', '.join(dataset)}; give one of these splits each, such as data['train']."
        )
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "a datasets.IterableDataset cannot be used directly: train on deitlt_hf.data.streaming.StreamedSplit("
            "dataset, image_column, label_column, counts), and evaluate on a datasets.Dataset."
        )
    if not isinstance(dataset, Dataset | StreamedSplit):
        raise ValueError(
            f"train_dataset and eval_dataset must each be a datasets.Dataset (or a StreamedSplit), got "
            f"{type(dataset).__name__}."
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            "the data set has a transform (set_transform or with_transform), which the trainer would ignore: it "
            "applies its own transforms; pass dataset.with_format(None)."
        )
