"""Trainer of the DeiT-LT student, a dual-token transformer that learns from labels and a frozen flat teacher."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from timm.data.mixup import Mixup, mixup_target
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import BaseImageProcessor, DeiTForImageClassificationWithTeacher, PreTrainedModel

from ..data.streaming import StreamedSplit
from ..data.transforms import TrainTransform, resize, weak_transform
from ..hub.card_facts import in_phases
from ..losses import DistillationLoss
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.trunks import student_with_weights_of
from .adapters import inside_wrapper
from .arguments import LongTailTrainingArguments
from .inputs import check_streaming
from .optimizers import MUON, muon
from .plan_lines import drw_start_text
from .schedule import value_in_phase
from .student_arguments import DeiTLTTrainingArguments
from .taught import TaughtTrainer
from .tuning import FULL, begin_heads, check_tunable, features_of, freeze, parameter_groups


class DeiTLTTrainer(TaughtTrainer):
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
        tail_teacher: A second teacher, from which the DIST head learns images of rare classes; see `routed_logits`.
        tail_processor: Image processor of the second teacher, as `teacher_processor`.
        **kwargs: Parameters of [`LongTailTrainer`].

    Raises:
        ValueError: If a teacher does not have the student's classes, or if at the start of training it is no better
            than chance on the images of the evaluations.
    """

    arguments_class = DeiTLTTrainingArguments
    experts = {"mean": "logits", "cls": "cls_logits", "distillation": "distillation_logits"}
    args: DeiTLTTrainingArguments
    criterion: DistillationLoss
    drw_criterion: DistillationLoss

    def convert_model(self, model: PreTrainedModel) -> PreTrainedModel:
        return as_student(model)

    def check_model(self, model: PreTrainedModel) -> None:
        super().check_model(model)
        if self.given_train is not None:
            check_student(model, self.args, self.given_train)

    def check_accelerator(self) -> None:
        super().check_accelerator()
        if self.is_sharded and (self.args.tune != FULL or self.args.starts_heads_at_means):
            raise ValueError("tune and heads_from_means need unsharded weights; leave out DeepSpeed and FSDP.")
        if self.args.optim == MUON and self.is_sharded and not self.accelerator.is_fsdp2:
            raise ValueError(
                "optim 'muon' needs whole matrices, which DeepSpeed and the first version of FSDP flatten; use FSDP 2 "
                "(scripts/accelerate/fsdp2.yaml) or another optim."
            )

    def set_up_model(self, model: PreTrainedModel) -> None:
        super().set_up_model(model)
        if self.given_train is not None:
            # Both: the parent has set them to the model before LoRA wrapped it.
            self.model = self.model_wrapped = freeze(model, self.args.tune, self.args.lora_rank)  # type: ignore[assignment]

    def begin_record(self) -> None:
        super().begin_record()
        # Not in a resumed run, whose heads are trained already.
        if self.args.starts_heads_at_means and self.beginning.checkpoint is None:
            begin_heads(self.model, features_of(self, self.given_train))

    def make_losses(self) -> None:
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

    def train_views(self, args: LongTailTrainingArguments, processor: BaseImageProcessor) -> dict[str, TrainTransform]:
        views = super().train_views(args, processor)
        if self.args.teacher_view == "weak" and self.args.needs_teacher:
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
        """Mixes the images and labels, then computes the teacher's logits for the mixed images, or reads them."""
        pixel_values, labels = batch["pixel_values"], batch["labels"]
        # On CIFAR, the authors stop mixing and label smoothing where DRW starts.
        if not self.in_drw or self.args.mixing_in_drw:
            if self.args.mixes:  # in place: image i with image n - 1 - i of the micro-batch
                pixel_values, labels = self.mixup(pixel_values, labels)
            elif self.args.label_smoothing_factor > 0:
                labels = mixup_target(labels, self.model.config.num_labels, 1.0, self.args.label_smoothing_factor)
        prepared = {"pixel_values": pixel_values, "labels": labels}
        if self.args.needs_teacher:
            # The teacher sees the student's mixed image, which is out of its distribution: this is what differs from
            # DeiT. The ablation `teacher_view weak` shows it a weakly augmented image of the same row instead.
            views = batch.get("teacher_pixel_values", pixel_values)
            prepared["teacher_logits"] = self.taught_logits(views, labels)
        # Last: mixing and the teacher see the full size, and a cache of its labels serves every `train_sizes`.
        if self.args.train_sizes:
            size = value_in_phase(self.args.train_sizes, self.args.train_size_epochs, self.state.epoch or 0.0)
            prepared["pixel_values"] = resize(pixel_values, (size, size))
        return prepared

    def loss_denominators(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        criterion = self.drw_criterion if self.in_drw else self.criterion
        return criterion.denominators(batch["labels"], batch.get("teacher_logits"))

    def compute_training_loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        outputs = model(pixel_values=batch["pixel_values"], interpolate_pos_encoding=bool(self.args.train_sizes))
        teacher_logits = batch.get("teacher_logits")
        parts = self.active_criterion(
            outputs.cls_logits, outputs.distillation_logits, batch["labels"], teacher_logits, batch["denominators"]
        )
        self.log_sum("cls_loss", parts.cls_loss)
        self.log_sum("distillation_loss", parts.distillation_loss)
        if teacher_logits is not None:
            agreement = outputs.distillation_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)
            self.log_mean("teacher_agreement", agreement.float().mean())
        tokens = outputs.token_features.detach().float()  # a log needs no graph
        self.log_mean("token_similarity", F.cosine_similarity(tokens[:, 0], tokens[:, 1]).mean())
        return parts.loss

    def plan(self) -> dict[str, str]:
        """Lines of the printed plan: the phases of training, and the teachers."""
        args = self.args
        mixing = "Mixup / CutMix" if args.mixes else "no mixing"
        if args.drw_start_epoch is None:
            phases = f"one, {mixing}, no re-weighting"
        else:
            after = mixing if args.mixing_in_drw else "no mixing"
            phases = f"to epoch {drw_start_text(self)}: {mixing}; from there: re-weighted, {after}"
        lines = {"phases": phases}
        if args.train_sizes:
            lines["image sizes"] = f"{in_phases(args.train_sizes, args.train_size_epochs)} (px, training only)"
        return lines | self.plan_of_teachers()


def check_student(student: PreTrainedModel, args: DeiTLTTrainingArguments, images: Any) -> None:
    """Raises `ValueError` if a student cannot be trained on images as the arguments ask for."""
    check_tunable(student, args.tune)
    args.check_sizes(student.config.image_size, student.config.patch_size)
    if isinstance(images, StreamedSplit):
        if args.starts_heads_at_means:
            raise ValueError("heads_from_means reads all training images first, as a stream cannot; set it to false.")
        check_streaming(args)


def as_student(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model as a trainable student. A DeiT of transformers is converted and keeps its parameter objects.

    Raises:
        ValueError: If the model does not have the two heads of a student.
    """
    base = inside_wrapper(model)
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
