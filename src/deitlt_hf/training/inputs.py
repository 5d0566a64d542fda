"""From a user's data sets to what the trainers read."""

from collections.abc import Mapping

from datasets import Dataset
from torch.utils.data import DataLoader

from ..data.images import ImageDataset
from ..data.loading import find_columns
from ..data.streaming import StreamedImages, StreamedSplit
from ..data.transforms import TrainTransform
from .guards import outlive_signals


def outliving(loader: DataLoader) -> DataLoader:
    """A loader whose processes outlive a signal that is meant for this one."""
    getattr(loader, "base_dataloader", loader).worker_init_fn = outlive_signals
    return loader


def as_images(dataset, views: Mapping[str, TrainTransform] | None = None, args=None):
    """Rows of model inputs, of what the data loaders give; what has such rows already is taken as it is."""
    if isinstance(dataset, StreamedSplit):
        return StreamedImages(
            dataset,
            views,
            args.train_batch_size,
            args.process_index,
            args.world_size,
            args.repeats,
            args.data_seed,
            args.gradient_accumulation_steps,
        )
    if isinstance(dataset, dict):
        return {name: as_images(images) for name, images in dataset.items()}
    if not isinstance(dataset, Dataset):
        return dataset
    return ImageDataset(dataset, *find_columns(dataset), views)


def match_labels(config, dataset: Dataset) -> None:
    """Names the model's labels after the data, or checks that they agree.

    Raises:
        ValueError: If they do not, the data are no `datasets.Dataset`, or the model is made for another problem than to
            choose one class.
    """
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"the model's config has problem_type {problem!r}, but an image has one class here; set it to None."
        )
    if not isinstance(dataset, Dataset | StreamedSplit):
        raise ValueError(
            "train_dataset and eval_dataset must each be a datasets.Dataset (or a StreamedSplit, which the recipes' "
            f"streaming makes), got {type(dataset).__name__}."
        )
    _, column = find_columns(dataset)
    names = dataset.features[column].names
    if len(names) != config.num_labels:
        raise ValueError(f"the model has {config.num_labels} classes but the data have {len(names)}.")
    model_names = [config.id2label[label] for label in range(len(names))]
    if model_names == [f"LABEL_{label}" for label in range(len(names))]:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: label for label, name in enumerate(names)}
    elif model_names != names:
        label = next(label for label, pair in enumerate(zip(model_names, names, strict=True)) if len(set(pair)) > 1)
        raise ValueError(
            f"the model's label {label} is {model_names[label]!r} but the data's is {names[label]!r}; model and data "
            "need the same classes in the same order."
        )
