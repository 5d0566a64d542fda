"""Trainer of the DeiT-LT student, a dual-token transformer that learns from labels and a frozen flat teacher."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.mixup import Mixup, mixup_target
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import DeiTForImageClassificationWithTeacher, PreTrainedConfig, PreTrainedModel

from ..data.long_tail import class_counts
from ..data.streaming import StreamedSplit
from ..data.transforms import ImageFormat, model_processor, resize_and_renormalize, weak_transform
from ..evaluation import group_accuracies
from ..losses import DISTILLATION_TARGETS, DistillationLoss
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..models.trunks import student_with_weights_of
from .arguments import DeiTLTTrainingArguments
from .inputs import check_streaming, label_names
from .optimizers import MUON, muon
from .plan_lines import drw_start
from .provenance import teacher_record
from .trainer import LongTailTrainer
from .tuning import FULL, begin_heads, check_means, check_tunable, features_of, freeze, parameter_groups


class TeacherAtChanceError(ValueError):
    """A teacher that classifies the test images no better than chance, so that a student cannot learn from it."""


class DeiTLTTrainer(LongTailTrainer):
    """Trains a [`DeiTLTForImageClassification`] with labels and a frozen flat teacher (DeiT-LT, section 4).

    The CLS head learns from the labels. The DIST head learns from the teacher's predictions on the augmented and mixed
    images of the student, with class weights from `drw_start_epoch` on. In addition to the loss, the trainer logs

    - `cls_loss`, `distillation_loss`: the two parts of the loss, which add up to it;
    - `teacher_agreement`: share of the DIST head's predictions that equal the teacher's, on training images;
    - `token_similarity`: cosine of the final CLS and DIST tokens.

    Args:
        model: The student. A `DeiTForImageClassificationWithTeacher` of transformers is converted to a student with the
            same weights.
        args: A [`DeiTLTTrainingArguments`].
        teacher: Image classifier whose class names include those of the student, in any order. If its classes have no
            names, it must have the same number of classes in the same order. Required for training unless
            `args.distillation` is `none`. It is frozen, in float32, and never saved with the student. With
            `args.fold_teacher`, a faster copy with its current weights is used.
        teacher_processor: Image processor with the image size and normalisation of the teacher. None: a
            [`FlatTeacherForImageClassification`] has them in its config; other teachers get the student's.
        **kwargs: Parameters of [`LongTailTrainer`].

    Raises:
        ValueError: If the teacher does not have the student's classes, or if at the start of training it is no better
            than chance on the images of the evaluations.
    """

    arguments_class = DeiTLTTrainingArguments
    experts = {"mean": "logits", "cls": "cls_logits", "distillation": "distillation_logits"}
    args: DeiTLTTrainingArguments
    criterion: DistillationLoss
    drw_criterion: DistillationLoss

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: DeiTLTTrainingArguments | None = None,
        teacher: PreTrainedModel | None = None,
        teacher_processor=None,
        **kwargs,
    ):
        self.teacher, self._teacher_processor = teacher, teacher_processor
        given = (kwargs.get("optimizers") or (None,))[0] is not None
        if isinstance(args, DeiTLTTrainingArguments) and given and (args.tune != FULL or args.layer_decay != 1):
            raise ValueError("tune and layer_decay define the groups of the optimizer; leave out these or optimizers.")
        super().__init__(model=model, args=args, **kwargs)
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False).eval().to(self.args.device, torch.float32)
            plain = self.args.device.type == "cpu" and self.accelerator.mixed_precision == "no"
            if self.args.fold_teacher and plain and isinstance(teacher, FlatTeacherForImageClassification):
                self.teacher = teacher.folded()

    def convert_model(self, model):
        return as_student(model)

    def check_model(self, model):
        """Checks the model as the parent class does, and that the teacher has its classes."""
        super().check_model(model)
        if self._datasets[0] is not None:
            check_student(model, self.args, self._datasets[0])
        if self.teacher is not None:
            config, processor = self.teacher.config, self._teacher_processor
            if processor is None and isinstance(config, FlatTeacherConfig):
                processor = model_processor(config)
            self.student_format = ImageFormat.of(self.processing_class)
            self.teacher_format = ImageFormat.of(processor or self.processing_class)
            self._label_order = label_order(self.class_names, config).to(self.args.device)

    def check_accelerator(self):
        super().check_accelerator()
        shards = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if shards and (self.args.tune != FULL or self.args.begins_heads):
            raise ValueError("tune and heads_from_means need unsharded weights; leave out DeepSpeed and FSDP.")
        if self.args.optim == MUON and (
            self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2)
        ):
            raise ValueError(
                "optim 'muon' needs whole matrices, which DeepSpeed and the first version of FSDP flatten; use FSDP 2 "
                "(scripts/accelerate/fsdp2.yaml) or another optim."
            )

    def set_up_model(self, model):
        super().set_up_model(model)
        if self._datasets[0] is not None:
            freeze(model, self.args.tune, self.args.lora_rank)

    def begin_record(self):
        super().begin_record()
        if self.args.begins_heads and self.beginning.checkpoint is None:
            begin_heads(self.model, features_of(self, self._datasets[0]))

    def make_losses(self):
        super().make_losses()
        args = self.args
        self.mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_probability,
            switch_prob=args.mixup_switch,
            label_smoothing=args.label_smoothing_factor,
            num_classes=self.model.config.num_labels,
        )

    def make_criterion(self, class_weights: torch.Tensor | None) -> DistillationLoss:
        args = self.args
        criterion = DistillationLoss(
            args.alpha,
            args.distillation,
            args.temperature,
            args.cls_loss,
            class_weights,
            args.reweight_cls,
            self.class_counts,
            self.given_weights,
        )
        return criterion.to(args.device)

    def train_views(self, args, processor):
        views = super().train_views(args, processor)
        if args.teacher_view == "weak" and args.needs_teacher:
            views["teacher_pixel_values"] = weak_transform(processor, args.hflip)
        return views

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Excludes tokens and position embeddings from weight decay, as DeiT does."""
        free = ("cls_token", "distillation_token", "position_embeddings")
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(free)]

    def make_optimizer(self, model: PreTrainedModel) -> Optimizer:
        """Creates the optimiser as the parent class does, with `layer_decay`, or Muon, which transformers lacks."""
        args, of_user = self.args, self.optimizer_cls_and_kwargs
        if of_user is None and args.optim == MUON:
            return muon(model, args, set(self.get_decay_parameter_names(model)))
        if args.layer_decay == 1:
            return super().make_optimizer(model)
        kind, settings = of_user or self.get_optimizer_cls_and_kwargs(args, model)
        rate, decayed = settings.get("lr", args.peak_learning_rate), self.get_decay_parameter_names(model)
        return kind(parameter_groups(model, decayed, args.weight_decay, rate, args.layer_decay), **settings)

    # ---- Loss ----

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Mixes the images and labels, then computes the teacher's logits for the mixed images."""
        pixel_values, labels = batch["pixel_values"], batch["labels"]
        if not self.in_drw or self.args.mixing_in_drw:
            if self.args.mixes:
                pixel_values, labels = self.mixup(pixel_values, labels)
            elif self.args.label_smoothing_factor > 0:
                labels = mixup_target(labels, self.model.config.num_labels, 1.0, self.args.label_smoothing_factor)
        prepared = {"pixel_values": pixel_values, "labels": labels}
        if self.args.needs_teacher:
            prepared["teacher_logits"] = self.teacher_logits(batch.get("teacher_pixel_values", pixel_values))
        return prepared

    def teacher_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes the teacher's logits, in the student's label order, for images normalised for the student.

        The images are resized and re-normalised if the teacher's size or normalisation differs.
        """
        with torch.inference_mode(), self.accelerator.autocast():
            assert self.teacher is not None  # `train` requires one
            antialias = bool(self.args.teacher_antialias)
            images = resize_and_renormalize(pixel_values, self.student_format, self.teacher_format, antialias)
            logits = self.teacher(images).logits[:, self._label_order]
        return logits.clone()  # autograd cannot save an inference tensor for the backward pass of the soft loss

    def loss_denominators(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        criterion = self.drw_criterion if self.in_drw else self.criterion
        return criterion.denominators(batch["labels"], batch.get("teacher_logits"))

    def compute_training_loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        outputs = model(pixel_values=batch["pixel_values"])
        teacher_logits = batch.get("teacher_logits")
        parts = self.active_criterion(
            outputs.cls_logits, outputs.distillation_logits, batch["labels"], teacher_logits, batch["denominators"]
        )
        self.log_sum("cls_loss", parts.cls_loss)
        self.log_sum("distillation_loss", parts.distillation_loss)
        if teacher_logits is not None:
            agreement = outputs.distillation_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)
            self.log_mean("teacher_agreement", agreement.float().mean())
        tokens = outputs.token_features.detach().float()
        self.log_mean("token_similarity", F.cosine_similarity(tokens[:, 0], tokens[:, 1]).mean())
        return parts.loss

    # ---- Before the first step ----

    def check_before_training(self) -> None:
        """Checks the teacher on the images of the evaluations, and records its accuracies.

        Raises:
            ValueError: If `distillation` needs a teacher and none was given, or the teacher is no better than chance.
        """
        if not self.args.needs_teacher:
            return
        if self.teacher is None:
            alone = " or ".join(repr(name) for name, target in DISTILLATION_TARGETS.items() if not target.needs_teacher)
            raise ValueError(
                f"distillation={self.args.distillation!r} needs a teacher; pass one, or set distillation={alone} to "
                "train both tokens on the labels."
            )
        accuracies = None if self.eval_dataset is None else self.check_teacher()
        self.results.teacher = teacher_record(self.teacher, accuracies)

    def plan(self) -> dict[str, str]:
        """Lines of the printed plan: the phases of training, and the teacher with its accuracies."""
        args = self.args
        mixing = "Mixup / CutMix" if args.mixes else "no mixing"
        if args.drw_start_epoch is None:
            phases = f"one, {mixing}, no re-weighting"
        else:
            after = mixing if args.mixing_in_drw else "no mixing"
            phases = f"to epoch {drw_start(self)}: {mixing}; from there: re-weighted, {after}"
        lines = {"phases": phases}
        if not args.needs_teacher:
            return lines | {"teacher": "none: both tokens learn from the labels"}
        text = f"{type(self.teacher).__name__}, {self.teacher_format}, sees the {args.teacher_view} view"
        kind = self.evaluated_on
        accuracies = (self.results.teacher or {}).get("accuracies") or {}
        untaught = [name for name in self.groups if accuracies.get(name) == 0]
        if untaught:
            lines["note"] = (
                f"the teacher predicts no {' and no '.join(untaught)} {kind} image correctly; DIST can hardly learn "
                "these classes from it. Train the teacher longer, or with another teacher_loss."
            )
        known = [f"{name} {100 * value:.1f}" for name, value in accuracies.items() if not math.isnan(value)]
        return lines | {"teacher": f"{text}; {kind} accuracy in %: {', '.join(known)}" if known else text}

    @torch.no_grad()
    def check_teacher(self) -> dict[str, float]:
        """Measures the teacher's accuracies on the images of the evaluations, preprocessed by the student's pipeline.

        Raises:
            TeacherAtChanceError: If its balanced accuracy is below chance plus two standard errors.
        """
        predicted_parts, label_parts = [], []
        first = next(iter(self.eval_dataset)) if isinstance(self.eval_dataset, dict) else None
        for batch in self.get_eval_dataloader(first):
            predicted = self.teacher_logits(batch["pixel_values"].to(self.args.device)).argmax(dim=1)
            gathered = self.accelerator.gather_for_metrics((predicted, batch["labels"].to(self.args.device)))
            predicted_parts.append(gathered[0].cpu())
            label_parts.append(gathered[1].cpu())
        predictions, labels = torch.cat(predicted_parts).numpy(), torch.cat(label_parts).numpy()
        accuracies = group_accuracies(predictions, labels, self.groups)
        tested = class_counts(labels).nonzero()[0]
        balanced = group_accuracies(predictions, labels, {"tested": tested})["tested"]
        num_labels = len(label_names(self.model.config))
        chance = 1 / num_labels
        if balanced < chance + 2 * math.sqrt(chance * (1 - chance) / len(labels)):
            raise TeacherAtChanceError(
                f"the teacher is no better than chance: {100 * balanced:.1f} % balanced accuracy on {len(labels)} "
                f"{self.evaluated_on} images of {num_labels} classes. Check that it is trained, and that its class "
                "order, image size and normalisation are correct."
            )
        return accuracies


def check_student(student: PreTrainedModel, args: DeiTLTTrainingArguments, images: Any) -> None:
    """Checks that a student can be trained on images as the arguments ask for; it is not changed.

    Raises:
        ValueError: If it cannot.
    """
    check_tunable(student, args.tune)
    if args.begins_heads:
        check_means(images)
    if isinstance(images, StreamedSplit):
        check_streaming(args)


def as_student(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model as a trainable student. A DeiT of transformers is converted and keeps its parameter objects.

    Raises:
        ValueError: If the model does not have the two heads of a student.
    """
    base_of = getattr(model, "get_base_model", None)  # a method of PEFT models
    base = model if base_of is None else base_of()
    # Compared by name: a class loaded from the code in a model folder is another object.
    if any(cls.__name__ == DeiTLTForImageClassification.__name__ for cls in type(base).__mro__):
        return model
    if base is not model or not isinstance(model, DeiTForImageClassificationWithTeacher):
        raise ValueError(
            f"a student has two heads, but a {type(base).__name__} was given; pass a DeiTLTForImageClassification, or "
            "a DeiTForImageClassificationWithTeacher of transformers, which is converted."
        )
    student = student_with_weights_of(model)
    warnings.warn(
        f"the {type(model).__name__} is converted to a DeiTLTForImageClassification with the same weights and "
        f"stochastic depth {student.config.drop_path_rate:g}; use the model of the trainer instead of the one passed "
        "in.",
        stacklevel=2,
    )
    return student


def label_order(names: Sequence[str], config: PreTrainedConfig, who: str = "teacher") -> torch.Tensor:
    """Finds the positions of classes among the classes of a model, by name if the model's classes have names.

    Args:
        names: Names of the classes to find.
        config: Configuration of the model that should have these classes.
        who: Name of the model in error messages.

    Returns:
        Positions of the classes among those of the model, (classes,).

    Raises:
        ValueError: If the model lacks a class, or has no class names and another number of classes.
    """
    known = label_names(config)
    if known == [f"LABEL_{label}" for label in range(len(known))]:
        if len(known) == len(names):
            return torch.arange(len(names))
        raise ValueError(f"the {who} has {len(known)} classes without names, but the data have {len(names)}.")
    positions: dict[str, list[int]] = {}
    for label, name in enumerate(known):
        positions.setdefault(name, []).append(label)
    unknown = [name for name, count in Counter(names).items() if len(positions.get(name, [])) < count]
    if unknown:
        raise ValueError(
            f"the {who} does not know the classes {', '.join(map(repr, unknown[:5]))} ({len(unknown)} of "
            f"{len(names)}); its own {len(known)} begin with {', '.join(map(repr, known[:5]))}."
        )
    # Classes with the same name, such as the two cranes of ImageNet, are matched in order.
    return torch.tensor([positions[name].pop(0) for name in names])


def check_class_order(names: Sequence[str], config: PreTrainedConfig, who: str = "model") -> None:
    """Checks that a model has exactly the classes of the data, in the same order. Parameters as in [`label_order`].

    Raises:
        ValueError: If it does not.
    """
    if label_order(names, config, who).tolist() != list(range(len(label_names(config)))):
        raise ValueError(f"the {who} has the classes of the data in another order, or has additional classes.")
