"""Configuration of the DeiT-LT student.

This file travels into every saved folder and Hub repository, so it imports transformers only.
"""

from transformers import DeiTConfig


class DeiTLTConfig(DeiTConfig):
    """Configuration of a DeiT-LT student: a DeiT with two tokens (CLS and DIST) trained on long-tailed images.

    Everything of [`~transformers.DeiTConfig`] is kept, `model_type` included, so that plain transformers loads a saved
    folder as its own `DeiTForImageClassificationWithTeacher`. Differences from `DeiTConfig`:

    Args:
        layer_norm_eps: Epsilon of the layer norms, 1e-6 as in the authors' code (transformers' DeiT has 1e-12).
        drop_path_rate: Stochastic depth of the last block, in [0, 1); it rises linearly from 0 over the blocks.
            0.1 in the paper.
        class_counts: Training images of each class, in label order, when known. It does not change the model; it
            tells users of a saved model which classes are head and which are tail.
        class_map: For a model converted from the authors' checkpoint, the row of its heads there for each class, if
            they differ: their ImageNet-LT and iNaturalist heads are ordered by decreasing training count.

    Raises:
        ValueError: If the patch size does not divide the image size, the number of heads does not divide the hidden
            size, `drop_path_rate` is outside [0, 1), or `class_counts` has another length than the labels.
    """

    layer_norm_eps: float = 1e-6
    drop_path_rate: float | int = 0.1
    class_counts: list[int] | None = None
    class_map: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for side, patch in zip(_pair(self.image_size), _pair(self.patch_size), strict=True):
            if patch < 1 or side % patch:
                raise ValueError(
                    f"patch_size {self.patch_size} does not divide image_size {self.image_size}; "
                    "choose an image size that is a multiple of the patch size."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}."
            )
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}.")
        if self.class_counts is not None and len(self.class_counts) != self.num_labels:
            raise ValueError(
                f"class_counts has {len(self.class_counts)} entries but the model has {self.num_labels} labels."
            )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Makes a configuration; what it says of its classes is left out where `kwargs` ask for other classes."""
        names, stored = kwargs.get("id2label"), config_dict.get("id2label") or {}
        num_labels = kwargs.get("num_labels", len(stored)) if names is None else len(names)
        if num_labels != len(stored) or (names is not None and list(names.values()) != list(stored.values())):
            config_dict = {key: config_dict[key] for key in config_dict.keys() - {"class_counts", "class_map"}}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self):
        """Serializes under the native architecture name, with which plain transformers picks the two-headed DeiT."""
        output = super().to_dict()
        if output.get("architectures") == ["DeiTLTForImageClassification"]:
            output["architectures"] = ["DeiTForImageClassificationWithTeacher"]
        # transformers writes an entry for the saved class alone, with which `AutoModel` finds no class of this model.
        auto_map = output.get("auto_map") or {}
        if "AutoModelForImageClassification" in auto_map:
            reference = auto_map["AutoModelForImageClassification"]
            model = reference.replace("DeiTLTForImageClassification", "DeiTLTModel")
            output["auto_map"] = {**auto_map, "AutoModel": model}
        return output


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


DeiTLTConfig.register_for_auto_class()
