"""Base class of the student's trainer: the teachers, what they predict for the images of a step, and their checks."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import TrainOutput

from ..data.long_tail import Integers, class_counts
from ..data.transforms import ImageFormat, model_processor, resize_and_renormalize
from ..evaluation import group_accuracies
from ..losses import DISTILLATION_TARGETS
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..out_of_memory import advice_if_out_of_memory
from .inputs import label_names, outputs_of
from .processes import of_first_process
from .provenance import results_of, teacher_record
from .student_arguments import DeiTLTTrainingArguments
from .teacher_cache import TeacherCache, cache_of, cache_plan, evaluation_digest, model_digest
from .trainer import LongTailTrainer

# Difference between a teacher's accuracies with its own preprocessing and with the student's that causes a warning.
FAR_BELOW = 0.05


class TeacherAtChanceError(ValueError):
    """A teacher that classifies the test images no better than chance, so that a student cannot learn from it."""


class TaughtTrainer(LongTailTrainer):
    """A [`LongTailTrainer`] with one or two frozen teachers; see [`DeiTLTTrainer`] for its parameters.

    Attributes:
        formats: Sizes and normalisations of the teachers' images, by attribute.
        tail_classes: Classes whose images the tail teacher teaches.
        cache: Store of what the teachers predict, while training with `teacher_cache`.
    """

    args: DeiTLTTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: DeiTLTTrainingArguments | None = None,
        teacher: PreTrainedModel | None = None,
        teacher_processor: BaseImageProcessor | None = None,
        tail_teacher: PreTrainedModel | None = None,
        tail_processor: BaseImageProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        if tail_teacher is not None and (teacher is None or tail_teacher is teacher):
            raise ValueError("tail_teacher is a second teacher: pass another model as teacher, too.")
        # Set before the parent's constructor, which calls `check_model`.
        self.teacher, self.tail_teacher = teacher, tail_teacher
        self._processors = {"teacher": teacher_processor, "tail_teacher": tail_processor}
        self.formats: dict[str, ImageFormat] = {}
        self._orders: dict[str, torch.Tensor] = {}  # positions of the student's classes among the teacher's
        self.tail_classes: list[int] = []
        self.cache: TeacherCache | None = None  # while training
        self._teacher_digests: list[str] = []
        self._are_prepared = False
        super().__init__(model=model, args=args, **kwargs)
        # With the batch statistics of training mode, the label of an image would depend on the rest of its batch. The
        # teachers are no submodules of the student: `train()`, the optimiser and checkpoints do not reach them.
        for model in self._teachers().values():
            model.requires_grad_(False).eval().float()
        if self.args.teacher_cache is None:
            self._prepare_teachers()
        else:
            # Before any folding, which depends on the device: the same teacher has one digest everywhere.
            self._teacher_digests = [model_digest(model) for model in self._teachers().values()]

    def _teachers(self) -> dict[str, PreTrainedModel]:
        """The teachers that were given, by attribute."""
        both = {"teacher": self.teacher, "tail_teacher": self.tail_teacher}
        return {name: model for name, model in both.items() if model is not None}

    def _prepare_teachers(self) -> None:
        """Moves the teachers to the device, and folds their batch norms on a CPU.

        With a cache that has all labels, this is never done: the teachers need no memory of the device.
        """
        plain = self.args.device.type == "cpu" and self.accelerator.mixed_precision == "no"
        for name, model in self._teachers().items():
            model.to(self.args.device)  # type: ignore[arg-type]
            if self.args.fold_teacher and plain and isinstance(model, FlatTeacherForImageClassification):
                setattr(self, name, model.folded())
        self._are_prepared = True

    def check_model(self, model: PreTrainedModel) -> None:
        super().check_model(model)
        for name, teacher in self._teachers().items():
            self.student_format = ImageFormat.of(self.processing_class)
            processor = self._processors[name]
            if processor is None and isinstance(teacher.config, FlatTeacherConfig):
                processor = model_processor(teacher.config)
            self.formats[name] = ImageFormat.of(processor or self.processing_class)
            order = label_order(self.class_names, teacher.config, name.replace("_", " "))
            self._orders[name] = order.to(self.args.device)

    def _count_images(self, config: PreTrainedConfig, groups: Mapping[str, Integers] | None) -> None:
        super()._count_images(config, groups)
        if self.given_train is not None and self.tail_teacher is not None:
            self.tail_classes = tail_classes(self.groups, self.class_counts, self.args.tail_below)

    def taught_logits(self, views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Reads the logits of the current micro-batch from the cache, or computes them and stores them there."""
        if self.cache is None:
            return self.routed_logits(views, labels)
        epoch, step = divmod(self.state.global_step, self._steps_per_epoch)
        index = step * self.args.gradient_accumulation_steps + self.prepared_micro_batch
        logits = self.cache.get(epoch, index, views)
        if logits is None:
            logits = self.routed_logits(views, labels)
            self.cache.put(index, views, logits)
        return logits

    def routed_logits(self, views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the logits of the teacher of each image: for an image of a class of the tail, the tail teacher.

        The class of a mixed image is the one with the largest share in the mix; of two equal shares, the first. Labels
        are class indices (batch,), or probabilities (batch, classes) after mixing.
        """
        if self.tail_teacher is None:
            return self.teacher_logits(views)
        dominating = labels if labels.dim() == 1 else labels.argmax(dim=1)
        is_tail = torch.isin(dominating, torch.tensor(self.tail_classes, device=dominating.device))
        rows = [(~is_tail).nonzero().flatten(), is_tail.nonzero().flatten()]
        parts = [
            self.teacher_logits(views[mine], name) for name, mine in zip(self.formats, rows, strict=True) if len(mine)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]  # in the order of the batch again

    def teacher_logits(self, pixel_values: torch.Tensor, name: str = "teacher") -> torch.Tensor:
        """Computes the logits of `teacher` or `tail_teacher`, in the student's label order.

        Images, (batch, 3, height, width), are normalised for the student, and resized and re-normalised as needed.
        """
        if not self._are_prepared:  # with a cache, they may never be needed
            self._prepare_teachers()
        with torch.inference_mode(), self.accelerator.autocast():
            antialias = bool(self.args.teacher_antialias)
            images = resize_and_renormalize(pixel_values, self.student_format, self.formats[name], antialias)
            logits = self._teachers()[name](images).logits[:, self._orders[name]]
        return logits.clone()  # autograd cannot save an inference tensor for the backward pass of the soft loss

    # ---- Before the first step ----

    def prepare_training(self) -> None:
        """Opens the cache, checks the teachers on the images of the evaluations, and records their accuracies."""
        if not self.args.needs_teacher:
            return
        self._check_given_teachers()
        if self.args.teacher_cache is not None:
            self.cache = cache_of(self, self._teacher_digests)
            self._steps_per_epoch = self.steps_per_epoch()
        accuracies = self._accuracies_of_teachers()
        for name, teacher in self._teachers().items():
            self.results.teachers[name] = teacher_record(teacher, accuracies.get(name))
        if self.tail_teacher is not None:
            self.results.teachers["tail_teacher"]["classes"] = [self.class_names[label] for label in self.tail_classes]

    def _check_given_teachers(self) -> None:
        """Raises `ValueError` if a teacher is missing that the arguments need."""
        if self.teacher is None:
            alone = " or ".join(repr(name) for name, target in DISTILLATION_TARGETS.items() if not target.needs_teacher)
            raise ValueError(
                f"distillation={self.args.distillation!r} needs a teacher; pass one, or set distillation={alone} to "
                "train both tokens on the labels."
            )
        if self.args.tail_below is not None and self.tail_teacher is None:
            raise ValueError("tail_below has no effect without a tail teacher; pass one, or leave tail_below out.")

    def _accuracies_of_teachers(self) -> dict[str, dict[str, float]]:
        """Accuracies of the teachers on the images of the evaluations, which the cache keeps; empty without images."""
        if self.eval_dataset is None:
            return {}
        cache = self.cache
        if cache is None:
            return {name: self.check_teacher(name) for name in self._teachers()}
        key = evaluation_digest(self)
        # Read by one process: `check_teacher` gathers, so all must run it or none.
        found = of_first_process(lambda: cache.accuracies(key))
        if found is None:
            found = {name: self.check_teacher(name) for name in self._teachers()}
            if self.is_world_process_zero():
                cache.put_accuracies(key, found)
        return found

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as the parent class does. What the teachers predicted is stored also if the run is interrupted."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.cache is not None:
                self.cache.flush()
                self.cache = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.cache is not None:
            # Before the checkpoint: a run that resumes from it never sees the earlier views again.
            self.cache.flush()
        super()._save_checkpoint(model, trial)

    def plan_of_teachers(self) -> dict[str, str]:
        """Lines of the printed plan: the teachers with their accuracies, and the cache."""
        lines: dict[str, str] = {}
        if not self.args.needs_teacher:
            return {"teacher": "none: both tokens learn from the labels"}
        kind = self.evaluated_on
        found = self.results.teachers  # empty before the teachers were checked
        accuracies = {name: found.get(name, {}).get("accuracies") or {} for name in ("teacher", "tail_teacher")}
        untaught = [name for name in self.groups if accuracies["teacher"].get(name) == 0]
        if untaught:
            lines["note"] = (
                f"the teacher predicts no {' and no '.join(untaught)} {kind} image correctly; DIST can hardly learn "
                "these classes from it. Train the teacher longer, or with another teacher_loss."
            )
        if warning := self._loss_by_format(accuracies["teacher"]):
            lines["warning"] = warning
        for name, teacher in self._teachers().items():
            known = [f"{group} {100 * value:.1f}" for group, value in accuracies[name].items() if not math.isnan(value)]
            lines[name.replace("_", " ")] = (
                f"{type(teacher).__name__}, {self.formats[name]}, sees the {self.args.teacher_view} view"
                + (f"; {kind} accuracy in %: {', '.join(known)}" if known else "")
            )
        if self.tail_teacher is not None:
            lines["tail teacher"] += f"; teaches {len(self.tail_classes)} of {len(self.class_names)} classes"
        if self.cache is not None:
            lines["teacher cache"] = cache_plan(self.cache, self)
        return lines

    def _loss_by_format(self, accuracies: Mapping[str, float]) -> str | None:
        """Warning of a teacher that is much less accurate on the student's images than on those of its own processor.

        Its record has its accuracy on the latter, if it was trained and evaluated on the same images.
        """
        own = results_of(getattr(self.teacher, "name_or_path", None))
        data: Mapping[str, Any] = own.get("data", {})
        experts: Mapping[str, Any] = own.get("last", {}).get("accuracies", {})
        before = (experts.get("teacher") or experts.get("mean") or {}).get("overall")
        known: dict[str, Any] = {"subset_sha256": self.subset_sha256, **self.images_of_evaluation}
        is_same = self.subset_sha256 is not None and {name: data.get(name) for name in known} == known
        if not is_same or before is None or before - accuracies.get("overall", before) < FAR_BELOW:
            return None
        return (
            f"the teacher classifies {100 * before:.1f} % of the {self.evaluated_on} images correctly with its "
            f"own preprocessing, but only {100 * accuracies['overall']:.1f} % with the student's, which distillation "
            f"uses. Choose an image_size near the teacher's ({self.formats['teacher']})."
        )

    @torch.no_grad()
    def check_teacher(self, name: str = "teacher") -> dict[str, float]:
        """Measures a teacher's accuracies on the images of the evaluations, preprocessed by the student's pipeline.

        Raises:
            TeacherAtChanceError: If its balanced accuracy is below chance plus two standard errors.
        """
        first = next(iter(self.eval_dataset)) if isinstance(self.eval_dataset, dict) else None
        found = outputs_of(
            lambda images: self.teacher_logits(images, name).argmax(dim=1), self.get_eval_dataloader(first), self
        )
        with advice_if_out_of_memory(self.smaller_evaluations):
            parts = [(predicted.cpu(), true.cpu()) for predicted, true in found]
        predictions, labels = (torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))
        accuracies = group_accuracies(predictions, labels, self.groups)
        tested = class_counts(labels).nonzero()[0]
        balanced = group_accuracies(predictions, labels, {"tested": tested})["tested"]
        num_labels = len(label_names(self.model.config))
        chance = 1 / num_labels
        # Balanced, because a teacher that predicts a frequent class for everything can be accurate overall.
        if balanced < chance + 2 * math.sqrt(chance * (1 - chance) / len(labels)):
            raise TeacherAtChanceError(
                f"the {name.replace('_', ' ')} is no better than chance: {100 * balanced:.1f} % balanced accuracy on "
                f"{len(labels)} {self.evaluated_on} images of {num_labels} classes. Check that it is trained, and that "
                "its class order, image size and normalisation are correct."
            )
        return accuracies


def tail_classes(groups: Mapping[str, Integers], counts: Sequence[int] | None, below: int | None) -> list[int]:
    """Classes whose images are taught by the tail teacher: the group tail, or those with fewer images than `below`.

    Raises `ValueError` if these are no classes, or all of them.
    """
    assert counts is not None  # known whenever training images are given
    if below is None:
        found = sorted(map(int, groups.get("tail", ())))
        what = "the group tail has"
    else:
        found = [label for label, count in enumerate(counts) if count < below]
        what = f"fewer than {below} training images have"
    if len(found) in (0, len(counts)):
        raise ValueError(
            f"{what} {len(found)} of the {len(counts)} classes, so one of the two teachers would teach nothing; set "
            f"tail_below between {min(counts) + 1} and {max(counts)}, or leave out the tail teacher."
        )
    return found


def label_order(names: Sequence[str], config: PreTrainedConfig, who: str = "teacher") -> torch.Tensor:
    """Finds the positions, (classes,), of classes among those of a model, by name if the model's classes have names.

    Error messages call the model `who`.

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
    """Raises `ValueError` if a model does not have exactly the classes of the data, in the same order."""
    if label_order(names, config, who).tolist() != list(range(len(label_names(config)))):
        raise ValueError(f"the {who} has the classes of the data in another order, or has additional classes.")
