"""What recipes say about data and models; the training arguments say the rest."""

from dataclasses import asdict, dataclass, field

from datasets import DatasetDict

from ..data.loading import load_long_tailed


@dataclass
class DataArguments:
    """The data of a recipe; see [`load_long_tailed`] for what the fields mean."""

    dataset: str = field(default="digits", metadata={"help": "'digits' (embedded) or the id of a Hub data set."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Read images from this folder: IDX files, class folders, or a saved data set."}
    )
    imbalance_ratio: float | None = field(
        default=None, metadata={"help": "Subsample the training images to this n_max / n_min. None: keep all."}
    )
    imbalance_type: str = field(default="exp", metadata={"help": "Shape of the long tail: exp or step."})
    max_per_class: int | None = field(default=None, metadata={"help": "Training images of the largest class."})
    subset_seed: int = field(default=0, metadata={"help": "Seed of the long-tailed subset."})
    test_split: str | None = field(default=None, metadata={"help": "Name of the test split."})
    image_column: str | None = field(default=None, metadata={"help": "Column with the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column with the labels."})
    class_names: list[str] | None = field(default=None, metadata={"help": "Names of the classes."})
    skip_bad_images: bool = field(default=False, metadata={"help": "Leave out images that cannot be read."})
    group_boundaries: list[int] | None = field(
        default=None,
        metadata={
            "help": "Ends of head and mid group among the classes sorted by count. None: more than 100 images, 20 to "
            "100, fewer than 20."
        },
    )

    def load(self) -> DatasetDict:
        """Loads the data."""
        values = asdict(self)
        del values["group_boundaries"]
        return load_long_tailed(**values)


@dataclass
class StudentArguments:
    """The student of a recipe, and where it and its teacher come from."""

    teacher: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a trained teacher. None: train the recipe's teacher."}
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Start from this DeiT checkpoint (any number of classes) instead of scratch: folder, Hub id, or a "
            "file of timm's or the authors'."
        },
    )
    image_size: int = field(default=224, metadata={"help": "Side of the images, in pixels."})
    patch_size: int = field(default=16, metadata={"help": "Side of a patch, in pixels."})
    hidden_size: int = field(default=768, metadata={"help": "Width of the transformer."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Number of blocks."})
    num_attention_heads: int = field(default=12, metadata={"help": "Number of attention heads."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the MLP. None: 4 x hidden_size."})
    drop_path_rate: float = field(default=0.1, metadata={"help": "Stochastic depth of the last block."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, ... None: transformers' choice."}
    )


@dataclass
class TeacherArguments:
    """The teacher of a recipe."""

    backbone: str = field(default="resnet32", metadata={"help": "resnet20/32/44/56 (CIFAR) or timm/NAME."})
    classifier: str = field(default="linear", metadata={"help": "linear or cosine."})
    image_size: int = field(default=32, metadata={"help": "Side of the images, in pixels."})
