"""Dataclasses of a recipe's data and model fields. The other fields are training arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from transformers import ViTMAEConfig

from ..data.image_rule import colour
from ..data.loading import load_source, long_tailed_splits, training_counts
from ..data.long_tail import ShotGroups, shot_groups
from ..data.streaming import load_streamed
from ..losses import TEACHER_LOSSES
from ..losses.entry import find
from ..models.deitlt.configuration_deitlt import DeiTLTConfig
from ..models.flat_teacher.configuration_flat_teacher import CIFAR_RESNETS, FlatTeacherConfig
from ..options import option

T = TypeVar("T")

_NEED_ALL_IMAGES = (
    *("imbalance_ratio", "max_per_class", "test_fraction", "validation_fraction"),
    *("train_list", "test_list", "class_names"),
)
_SUBSET = ("imbalance_ratio", "imbalance_type", "max_per_class", "subset_seed")


@dataclass
class DataArguments:
    """The data fields of a recipe; see [`load_source`] and [`long_tailed_splits`] for their meaning."""

    dataset: str = option(
        "digits", "'digits' (embedded), the id of a Hub data set, or a name for the data in data_dir."
    )
    data_dir: str | None = option(
        None,
        "Read images from this folder: class folders, Hugging Face's image folders with metadata, list "
        "files, iNaturalist's JSON, tables (CSV, JSON lines, parquet), webdataset shards, CIFAR's or MNIST's "
        "files, or a saved data set.",
    )
    imbalance_ratio: float | None = option(
        None, "Subsample the training images to this ratio n_max / n_min. None: keep all."
    )
    imbalance_type: str = option("exp", "Shape of the long tail: exp or step.")
    max_per_class: int | None = option(None, "Training images of the largest class after subsampling.")
    subset_seed: int = option(0, "Seed of the long-tailed subset, of test_fraction and of validation_fraction.")
    test_split: str | None = option(None, "Name of the test split.")
    test_fraction: float | None = option(
        None, "Share of each class to set apart for testing, for data without a test split."
    )
    validation_fraction: float | None = option(
        None,
        "Share of each class of the training images to set apart: the best epoch, early stopping and "
        "fusions are chosen on them, and the test images are used once, at the end.",
    )
    train_list: str | None = option(None, "List file of the training images.")
    test_list: str | None = option(None, "List file of the test images.")
    image_column: str | None = option(None, "Column with the images.")
    label_column: str | None = option(None, "Column with the labels.")
    class_names: list[str] | None = option(None, "Names of the classes in label order, or a file with the names.")
    background: str | None = option(
        None,
        "Background colour behind transparent pixels, such as white or #ff8000; the saved image processor "
        "keeps it. None: transparency is ignored, as in transformers' pipeline.",
    )
    skip_bad_images: bool = option(False, "Leave out images that cannot be read.")
    streaming: bool = option(False, "Stream the training images from shards (webdataset, parquet, a Hub data set).")
    class_counts: str | None = option(
        None, "JSON file with the images per class of a stream, from data check --counts FILE."
    )
    shuffle_buffer: int = option(2048, "Size of the shuffle window of a stream, in images.")
    group_boundaries: list[int] | None = option(
        None, "Ends of the head and the mid group among the classes sorted by count."
    )
    group_rule: str = option(
        "auto",
        "Rule for groups without group_boundaries: shots (more than 100 images, 20 to 100, fewer), thirds "
        "(of the sorted classes), or auto (shots, but thirds if a group would be empty).",
    )

    def __post_init__(self) -> None:
        if self.background is not None:
            self.background = colour(self.background)
        if self.group_boundaries is not None and self.group_rule != "auto":
            raise ValueError(
                f"group_boundaries {self.group_boundaries} and group_rule {self.group_rule!r} both define "
                "groups of classes; give only one."
            )

    def source(self) -> tuple[str, Mapping]:
        """Loads the unchanged splits. Returns a description of the source, and the splits.

        Raises:
            FileNotFoundError: If the folder does not exist or has no supported layout.
            ValueError: If the files do not have the expected content, or a field needs all images of a stream.
        """
        if self.streaming:
            for name in _NEED_ALL_IMAGES:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} needs the whole data set before training; leave out this field or --streaming."
                    )
            return load_streamed(**self._for(load_streamed))
        return load_source(**self._for(load_source))

    def load(self, source: Mapping | None = None) -> Mapping:
        """Makes the splits for training, testing and, on request, validation, from those that [`source`] loads.

        Raises:
            FileNotFoundError: As [`source`].
            ValueError: As [`source`], or if a split, column or class is missing, or the imbalance cannot be made.
        """
        source = source if source is not None else self.source()[1]
        if self.streaming:
            return source
        options = self._for(long_tailed_splits)
        if self.class_names is not None and len(self.class_names) == 1 and Path(self.class_names[0]).is_file():
            options["class_names"] = self.class_names[0]
        return long_tailed_splits(source, **options)

    def _for(self, function: Callable) -> dict[str, Any]:
        """The fields that a function takes, by name: its parameters have the names of the fields."""
        return {name: getattr(self, name) for name in signature(function).parameters if hasattr(self, name)}

    def record(self) -> dict:
        """The description of the data source in `results.json`."""
        names = ["dataset"] if self.imbalance_ratio is None else ["dataset", *_SUBSET]
        name = without_folders(self.dataset)
        is_local = self.data_dir is not None or name != self.dataset
        if self.background is not None:
            names.append("background")
        if self.validation_fraction is not None:
            names += ["validation_fraction", "subset_seed"]
        return {field: getattr(self, field) for field in names} | {"dataset": name, "local_files": is_local}

    def groups(self, data: Mapping) -> ShotGroups:
        """Groups the classes into head, mid and tail by their training images.

        Raises:
            ValueError: If the boundaries are not two increasing positions among the classes.
        """
        return shot_groups(training_counts(data["train"]), self.group_boundaries, self.group_rule)


@dataclass
class ArchitectureArguments:
    """The sizes of a student's transformer."""

    image_size: int = option(224, "Side of the images, in pixels.")
    patch_size: int = option(16, "Side of a patch, in pixels.")
    hidden_size: int = option(768, "Width of the transformer.")
    num_hidden_layers: int = option(12, "Number of blocks.")
    num_attention_heads: int = option(12, "Number of attention heads.")
    intermediate_size: int | None = option(None, "Width of the MLP. None: 4 x hidden_size.")

    def sizes(self) -> dict[str, Any]:
        """The fields of a configuration of transformers."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size or 4 * self.hidden_size,
        }


@dataclass
class StudentArguments(ArchitectureArguments):
    """The student fields of a recipe: its teacher, initial weights and architecture."""

    teacher: str | None = option(None, "Folder or Hub id of a trained teacher. None: train the teacher of the recipe.")
    tail_teacher: str | None = option(
        None,
        "Folder or Hub id of a second trained teacher, from which the DIST head learns the classes of the "
        "tail; --teacher then teaches the other classes.",
    )
    teacher_loss: str | None = option(
        None,
        f"Without --teacher: train the recipe's teacher with this loss ({', '.join(TEACHER_LOSSES)}), in a "
        "separate folder.",
    )
    init_from: str | None = option(
        None,
        "Start from the trunk of this model instead of from scratch: a student, or a ViT, DeiT, MAE or "
        "DINOv2 of transformers or timm (folder or Hub id), or a file of weights in timm's layout.",
    )
    image_mean: list[float] | None = option(
        None, "Mean for normalising images in [0, 1]. None: that of init_from, else ImageNet's."
    )
    image_std: list[float] | None = option(
        None, "Standard deviation for normalising images. None: that of init_from, else ImageNet's."
    )
    drop_path_rate: float = option(0.1, "Stochastic depth rate of the last block.")
    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2, ... None: the default of transformers."
    )

    def config(self, **labels: Any) -> DeiTLTConfig:
        """Configuration of a student that starts from scratch. `labels` are label fields such as `num_labels`."""
        return DeiTLTConfig(
            **self.sizes(),
            image_mean=self.image_mean,
            image_std=self.image_std,
            drop_path_rate=self.drop_path_rate,
            **labels,
        )


@dataclass
class PretrainingModelArguments(ArchitectureArguments):
    """The fields of masked pre-training: the student's sizes, the decoder, the mask and additional images."""

    unlabelled: list[str] | None = option(
        None, "Folders with further images, without labels, that pre-training also uses."
    )
    mask_ratio: float = option(0.75, "Share of the patches that are hidden. MAE uses 0.75.")
    decoder_layers: int = option(2, "Blocks of the decoder, as wide as the encoder is. MAE uses 8 of width 512.")

    def config(self, **labels: Any) -> ViTMAEConfig:
        """Configuration of the masked autoencoder, with the layer norm of a student. `labels` are label fields.

        Raises:
            ValueError: If a value is not possible.
        """
        DeiTLTConfig(**self.sizes())  # refuses sizes that no student can have
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio:g}.")
        if self.decoder_layers < 1:
            raise ValueError(f"decoder_layers must be 1 or more, got {self.decoder_layers}.")
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 4, which the fixed position embeddings of "
                "pre-training need."
            )
        sizes = self.sizes()
        return ViTMAEConfig(
            **sizes,
            **{f"decoder_{name}": sizes[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")},
            decoder_num_hidden_layers=self.decoder_layers,
            mask_ratio=self.mask_ratio,
            norm_pix_loss=True,
            layer_norm_eps=1e-6,
            **labels,
        )


@dataclass
class TeacherArguments:
    """The teacher fields of a recipe: its architecture."""

    backbone: str = option(
        "resnet32",
        "resnet20/32/44/56 (CIFAR) or timm/NAME, trained from scratch. With tune heads: folder or Hub id "
        "of a trained image model of transformers or timm.",
    )
    tune: str = option(
        "full",
        "full: the whole teacher is trained. heads: the backbone is a trained model that stays as it is, "
        "and a balanced logistic regression becomes its classifier.",
    )
    classifier: str | None = option(None, "linear or cosine. None: as teacher_loss requires.")
    projection_size: int | None = option(
        None,
        "Size of the features that PaCo compares. None: as teacher_loss requires: 32 up to 64 pixels, else "
        "128; 0 for losses that compare none.",
    )
    image_size: int = option(32, "Side of the images, in pixels.")

    def __post_init__(self) -> None:
        is_named = self.backbone in CIFAR_RESNETS or self.backbone.startswith("timm/")
        if self.tune not in ("full", "heads"):
            raise ValueError(f"tune must be full or heads for a teacher, got {self.tune!r}.")
        if self.tune == "full" and not is_named:
            raise ValueError(
                f"unknown backbone {self.backbone!r}; choose one of {', '.join(CIFAR_RESNETS)}, or timm/NAME for a "
                "backbone of timm; a trained model (folder or Hub id) needs --tune heads."
            )
        if self.tune == "heads" and self.backbone in CIFAR_RESNETS:
            raise ValueError(
                f"tune heads needs a trained backbone, the folder or Hub id of an image model, and {self.backbone!r} "
                "has no trained weights; leave out tune, or give another backbone."
            )

    def config(self, teacher_loss: str, **labels: Any) -> FlatTeacherConfig:
        """Configuration of a teacher for training with a loss. `labels` are label fields such as `num_labels`.

        Raises:
            ValueError: If the backbone is frozen, so that nothing is trained with a loss, or a value is not possible.
        """
        if self.tune == "heads":
            raise ValueError(
                f"the recipe's teacher is a frozen backbone (tune heads of {self.backbone}), which is not trained in "
                "steps; make it first with deitlt train-teacher, and give its folder as --teacher."
            )
        loss, projection_size = find(TEACHER_LOSSES, teacher_loss, "teacher_loss"), self.projection_size
        if projection_size is None:
            projection_size = (32 if self.image_size <= 64 else 128) if loss.contrast else 0
        return FlatTeacherConfig(
            backbone=self.backbone,
            classifier=self.classifier or loss.classifier,
            projection_size=projection_size,
            image_size=self.image_size,
            **labels,
        )


def without_folders(text: str) -> str:
    """Reduces a path on this machine to its last part, since records may be published. Other text stays unchanged."""
    path = Path(text).expanduser()
    return path.name if path.is_absolute() or ".." in path.parts or (len(path.parts) > 1 and path.exists()) else text
