"""A teacher that is a frozen image model of transformers or timm with a linear head, fitted in one pass."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModel,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.trainer_utils import TrainOutput

from ..data.images import decoder_versions
from ..data.transforms import ImageFormat, TrainTransform
from ..losses.class_weights import positive_counts
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.trunks import TIMM_TYPE
from ..recipes import DataArguments, TeacherArguments
from ..recipes.sections import without_folders
from ..serving.classifiers import check_weights, load_processor, loading, read_model_config
from ..serving.handler import native_config
from .arguments import LongTailTrainingArguments
from .inputs import name_classes, outputs_of
from .linear_head import Seen, fit_balanced, fold
from .provenance import dtype_of
from .starting import without_report
from .teacher import FlatTeacherTrainer
from .teacher_arguments import FlatTeacherTrainingArguments
from .tuning import HEADS

LOSS = "logistic_regression"  # `teacher_loss` in the record
# Options of a teacher's training that also have an effect here.
_USED = (
    *("output_dir", "overwrite", "resume_from_checkpoint", "per_device_eval_batch_size", "use_cpu", "image_cache"),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "report_to", "run_name", "disable_tqdm", "log_level"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision"),
)


def check_frozen(
    data_args: DataArguments, model_args: TeacherArguments, args: FlatTeacherTrainingArguments
) -> PreTrainedConfig:
    """Checks that a head can be fitted on a frozen backbone, before images or weights are loaded.

    Returns:
        The configuration of the backbone.

    Raises:
        FileNotFoundError: If the backbone is a local path without a model.
        ValueError: If it is no image classifier of transformers or timm, its images are made in an unusual way, or an
            option of the command line has no effect.
    """
    used = {*vars(data_args), "backbone", "tune"}
    changed = [name for name in (args.recipe or {}).get("overrides", {}) if name not in used]
    changed += ["image_resize"] * (args.image_resize is not None)
    if changed:
        raise ValueError(
            f"{changed[0]} has no effect with tune heads: the backbone keeps its weights and its image size, and a "
            "balanced logistic regression fits the head; leave it out."
        )
    if data_args.streaming:
        raise ValueError("tune heads reads the features of all training images first; leave out --streaming.")
    path = model_args.backbone
    if read_model_config(path)["model_type"] == FlatTeacherConfig.model_type:
        raise ValueError(f"{path} is a CNN teacher of this package, which needs no new head: pass it as --teacher.")
    with loading(path):
        config = native_config(path)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{path} cannot become a teacher: transformers has no image classifier for models of type "
            f"{config.model_type!r}; choose another backbone."
        )
    ImageFormat.of(load_processor(path))
    return config


def load_frozen(path: str, config: PreTrainedConfig, names: Sequence[str]) -> tuple[PreTrainedModel, nn.Linear]:
    """Loads an image model as a classifier of other classes. Returns it and its new linear head.

    Raises:
        ValueError: If weights of the backbone are missing, or the classifier does not end in one linear layer.
    """
    name_classes(config, names)
    config.problem_type = None
    kinds: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds  # the others have two heads, as a distilled DeiT
    with loading(path), without_report():
        options = {
            "config": config,
            "dtype": "float32",
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
        }
        model, info = kind.from_pretrained(path, **options)
        # transformers 5.9 does not find the weights of a ViT without a head in a class with a head.
        lacks_backbone = any(name.startswith(f"{model.base_model_prefix}.") for name in info["missing_keys"])
        if lacks_backbone and type(model.base_model).__name__ in (config.architectures or ()):
            base, info = AutoModel.from_pretrained(path, **options)
            model.base_model.load_state_dict({name: base.state_dict()[name] for name in model.base_model.state_dict()})
            info["missing_keys"] = [name for name in info["missing_keys"] if name in model.base_model.state_dict()]
    found = _heads(model)
    if len(found) != 1 or found[0][1].bias is None or found[0][1].out_features != len(names):
        raise ValueError(
            f"{path} cannot become a teacher: a {type(model).__name__} does not end in one linear layer; choose "
            "another backbone."
        )
    prefix, head = found[0]
    check_weights(path, info, type(model).__name__, (f"{prefix}.",))
    return model.eval().requires_grad_(False), head


def _heads(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """The linear layers of a classifier that are not in its backbone, by name."""
    if model.config.model_type == TIMM_TYPE:
        timm_model: Any = model.timm_model
        last = timm_model.get_classifier()
        named = [(name, module) for name, module in model.named_modules() if module is last]
    else:
        named = [*model.named_modules()]
        named = [(name, module) for name, module in named if name.split(".")[0] != model.base_model_prefix]
    return [(name, module) for name, module in named if isinstance(module, nn.Linear)]


class FrozenTeacherTrainer(FlatTeacherTrainer):
    """Fits the linear head of a frozen classifier: a balanced logistic regression on all training images.

    The images are those of an evaluation, without augmentation. The result is exact and needs no checkpoints: a run
    that was interrupted is repeated. Of the arguments, only those of evaluation and output have an effect; `backbone`
    is the folder or Hub id of the model, for the record.

    Raises:
        ValueError: If a class has no training image.
    """

    def __init__(
        self, model: PreTrainedModel, args: FlatTeacherTrainingArguments, head: nn.Linear, backbone: str, **kw: Any
    ) -> None:
        self.head, self.backbone = head, backbone
        super().__init__(model=model, args=args, **kw)
        positive_counts(self.class_counts or [])

    def train_views(self, args: LongTailTrainingArguments, processor: BaseImageProcessor) -> dict[str, TrainTransform]:
        return {}  # the images of an evaluation

    def settings(self) -> dict[str, Any]:
        return {"tune": HEADS, "backbone": without_folders(self.backbone), "teacher_loss": LOSS}

    def total_steps(self) -> int:
        return 0

    def optimizer_plan(self) -> str:
        return "balanced logistic regression on the frozen features"

    def plan(self) -> dict[str, str]:
        return {"backbone": f"{self.backbone}, {self.head.in_features} features"}

    def _train_and_evaluate(
        self, checkpoint: str | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        started = time.perf_counter()
        self.begin_record()
        self._recording = True
        try:
            self._fit()
            self.evaluate()
            if self.test_dataset is not None:
                self._test()
        finally:
            self._recording = False
            self.end_workers()
        if self.is_world_process_zero():
            self.results.finish(time.perf_counter() - started, 0, 0)
        return TrainOutput(0, 0.0, {})

    def _fit(self) -> None:
        """Fits the head, and records how."""
        validation = None if self.test_dataset is None else self._features(self.given_eval)
        regression, strength, held_out = fit_balanced(self._features(self.given_train), validation)
        fold(regression, self.head)
        self.results.content["ran"] = {
            "dtype": dtype_of(self.model),
            "optimizer": {
                "class": "sklearn.linear_model.LogisticRegression",
                "settings": {"C": strength, "class_weight": "balanced", "images_that_chose_C": held_out},
                "sam": None,
            },
            "given": [],
            "image_decoders": decoder_versions(),
        }

    @torch.no_grad()
    def _features(self, images: Dataset) -> Seen:
        """What the head reads for the images of a split, in every process; and the classes."""
        read: list[torch.Tensor] = []
        # By a hook: classifiers return what the head makes of its input, not the input.
        hook = self.head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        model = self.model.eval()

        def of_head(pixel_values: torch.Tensor) -> torch.Tensor:
            model(pixel_values=pixel_values)
            if read[-1].ndim != 2:
                raise ValueError(f"the head of {self.backbone} reads several features of an image; choose another.")
            return read.pop()

        try:
            found = outputs_of(of_head, self.get_test_dataloader(images), self)
            parts = [(features.cpu().numpy(), labels.cpu().numpy()) for features, labels in found]
        finally:
            hook.remove()
        features, labels = map(np.concatenate, zip(*parts, strict=True))
        return features, labels


def frozen_trainer(
    config: PreTrainedConfig,
    data: Mapping,
    data_args: DataArguments,
    model_args: TeacherArguments,
    args: FlatTeacherTrainingArguments,
) -> tuple[PreTrainedModel, FlatTeacherTrainingArguments, dict[str, Any]]:
    """Loads the backbone that [`check_frozen`] has checked.

    Returns:
        The classifier, the training arguments, and further parameters of [`FrozenTeacherTrainer`].
    """
    path = model_args.backbone
    model, head = load_frozen(path, config, data["train"].features["label"].names)
    # One epoch, of batches of one image: checks of the schedule have no meaning here.
    given = {name: getattr(args, name) for name in _USED}
    own = FlatTeacherTrainingArguments(
        **given, num_train_epochs=1, warmup_epochs=0, per_device_train_batch_size=1, save_strategy="no"
    )
    own.recipe = args.recipe
    processor = load_processor(path)
    if data_args.background is not None:
        vars(processor)["background"] = data_args.background
    return model, own, {"head": head, "backbone": path, "processing_class": processor}
