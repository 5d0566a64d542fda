"""Converts `datasets` data sets to the inputs of the trainers, and checks their labels against the model."""

from collections.abc import Mapping

from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig

from ..data.copies import ReducedCopies
from ..data.images import ImageDataset
from ..data.loading import find_columns
from ..data.sources.labels import check_indices
from ..data.streaming import StreamedImages, StreamedSplit
from ..data.transforms import TrainTransform
from .guards import outlive_signals


def label_names(config: PreTrainedConfig) -> list[str]:
    """Class names of a model, in label order."""
    names = {int(label): name for label, name in (config.id2label or {}).items()}
    return [names[label] for label in range(len(names))]


def outliving(loader: DataLoader) -> DataLoader:
    """Makes the workers of a data loader ignore signals meant for the main process, and returns the loader."""
    getattr(loader, "base_dataloader", loader).worker_init_fn = outlive_signals
    return loader


def as_images(dataset, processor, args, views: Mapping[str, TrainTransform] | None = None):
    """Wraps a data set: its rows become model inputs. Data sets that already have such rows are returned unchanged.

    Args:
        dataset: A data set, or a mapping from names to data sets.
        processor: Image processor of the model.
        args: Training arguments.
        views: Training transforms by model input; None for evaluation, by the processor.
    """
    background = getattr(processor, "background", None)
    if isinstance(dataset, StreamedSplit):
        if args.image_cache:
            raise ValueError(f"image_cache {args.image_cache!r} does not work with --streaming; leave out one of them.")
        if args.partial_steps:
            raise ValueError(
                "partial_steps does not work with --streaming; leave out one of them (as_published sets partial_steps)."
            )
        return StreamedImages(
            dataset,
            views or {},
            args.train_batch_size,
            args.process_index,
            args.world_size,
            args.repeats,
            args.data_seed,
            args.gradient_accumulation_steps,
            background,
        )
    if isinstance(dataset, DatasetDict | IterableDatasetDict | IterableDataset):
        _check_kind(dataset)
    if isinstance(dataset, dict):
        return {name: as_images(images, processor, args) for name, images in dataset.items()}
    if not isinstance(dataset, Dataset):
        return dataset
    dataset = dataset.with_format(None)
    copies = None
    if args.image_cache and views:
        copies = ReducedCopies.for_training(args.image_cache, max(view.size for view in views.values()))
    elif args.image_cache:
        copies = ReducedCopies.for_evaluation(args.image_cache, processor)
    return ImageDataset(dataset, *find_columns(dataset), views, background, copies)


def match_labels(config: PreTrainedConfig, dataset: Dataset) -> None:
    """Sets the label names of the model from the data, or checks that they agree with the data.

    Raises:
        ValueError: If the labels do not agree, the data are not a `datasets.Dataset`, or the model is not a
            single-label classifier.
    """
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
    model_names = label_names(config)
    if model_names == [f"LABEL_{label}" for label in range(len(names))]:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: label for label, name in enumerate(names)}
    elif model_names != names:
        label = next(label for label, pair in enumerate(zip(model_names, names, strict=True)) if len(set(pair)) > 1)
        raise ValueError(
            f"the model's label {label} is {model_names[label]!r} but the data's is {names[label]!r}; model and data "
            "need the same classes in the same order."
        )


def _check_kind(dataset) -> None:
    """Checks that an object is a data set that the trainers support.

    Raises:
        ValueError: If it is not, or if it has a transform, which the trainer would ignore.
    """
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
