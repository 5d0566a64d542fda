"""Measures the time of a run in a trial of a few steps, before the run."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ..data.images import ImageDataset
from ..data.transforms import image_processor, resize, train_transform
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..recipes import StudentArguments
from .arguments import LongTailTrainingArguments
from .inputs import as_images
from .optimizers import MUON, muon
from .recipe import StudentRun, TeacherRun
from .student_arguments import DeiTLTTrainingArguments

STEPS = 2  # that are timed; a step of a large student takes seconds on a CPU
DECODED = 32  # images
START_SECONDS = 5.0  # imports, checks and saving of a run, on a CPU


@dataclass(frozen=True)
class StepTimes:
    """Measured times of training.

    Args:
        teacher_step: Seconds of a training step of the teacher.
        student_step: Seconds of a training step of the student, with the teacher's outputs.
        teacher_forward: Seconds in which the teacher evaluates one image.
        student_forward: Seconds in which the student evaluates one image.
        first_read: Seconds in which one process reads and transforms one image for the first time.
        read: Seconds in which it does so later, from the reduced copy if there is one.
        student_step_bfloat16: Seconds of a training step of the student in bfloat16; None if it was not measured.
    """

    teacher_step: float
    student_step: float
    teacher_forward: float
    student_forward: float
    first_read: float
    read: float
    student_step_bfloat16: float | None = None

    def seconds(
        self,
        teacher: TeacherRun,
        student: StudentRun,
        num_images: int,
        test_images: int,
        epochs: tuple[float, float] | None = None,
        more_evaluations: int = 0,
    ) -> tuple[float, float]:
        """Estimates the seconds of the teacher's and of the student's run.

        The times of reading and of training are added, as if they did not overlap.

        Args:
            teacher: The run of the teacher that was measured.
            student: The run of the student that was measured.
            num_images: Training images.
            test_images: Images of an evaluation.
            epochs: Epochs of teacher and student, instead of those of the runs.
            more_evaluations: Evaluations of each model after its run.
        """
        teacher_epochs, student_epochs = epochs or (teacher.args.num_train_epochs, student.args.num_train_epochs)
        # The measured steps have one micro-batch of the student's size.
        steps = num_images // student.args.per_device_train_batch_size
        readers = max(student.args.dataloader_num_workers, 1)
        epoch, evaluation = num_images * self.read / readers, test_images * self.read / readers
        # Reduced copies of all images are made in the first run.
        first = (num_images + test_images) * max(self.first_read - self.read, 0) / readers
        tested = [test_images * forward + evaluation for forward in (self.teacher_forward, self.student_forward)]
        of_teacher = first + teacher_epochs * (steps * self.teacher_step + epoch)
        of_teacher += (evaluations(teacher.args) + more_evaluations) * tested[0]
        of_student = student_epochs * (steps * self.student_step + epoch)
        of_student += (evaluations(student.args) + more_evaluations) * tested[1]
        of_student += tested[0]  # the check of the teacher
        return of_teacher + START_SECONDS, of_student + START_SECONDS


def evaluations(args: LongTailTrainingArguments) -> int:
    """Number of evaluations of a run, of which the last is made at the end in any case."""
    strategy, steps = getattr(args.eval_strategy, "value", args.eval_strategy), args.eval_steps
    if strategy == "epoch":
        return math.ceil(args.num_train_epochs)
    if strategy == "steps" and steps is not None and steps < 1:
        return math.ceil(1 / steps)
    return 1


def measure_steps(teacher: TeacherRun, student: StudentRun, data: Mapping, compare_bfloat16: bool = False) -> StepTimes:
    """Runs a few steps of teacher and student on random images, and reads a few images of the data.

    The models are new and are dropped afterwards; the random state is restored. `compare_bfloat16` also measures a step
    of the student in bfloat16.

    Raises:
        ValueError: If the teacher or the student cannot be trained on so few images.
    """
    for args in (student.args, teacher.args):
        args.check_data(len(data["train"]))
    device = student.args.device
    num_labels = data["train"].features["label"].num_classes
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        steps = _Steps(teacher, student, num_labels)

        def student_step(bfloat16: bool) -> float:
            shares = student.args.size_shares(student.model.image_size)
            return sum(
                share * _seconds(partial(steps.of_student, bfloat16, size), device) for size, share in shares.items()
            )

        first_read, read = _reading(student.args, student.model, data)
        batch = student.args.per_device_train_batch_size
        return StepTimes(
            _seconds(steps.of_teacher, device),
            student_step(student.args.mixed_precision == "bf16"),
            _seconds(lambda: steps.forward(steps.teacher, steps.teacher_images), device) / batch,
            _seconds(lambda: steps.forward(steps.student, steps.student_images), device) / batch,
            first_read,
            read,
            student_step(bfloat16=True) if compare_bfloat16 else None,
        )


class _Steps:
    """Steps of a new teacher and a new student on random images."""

    def __init__(self, teacher: TeacherRun, student: StudentRun, num_labels: int):
        self.device = device = student.args.device
        self.needs_teacher = student.args.needs_teacher
        self.teacher: nn.Module = FlatTeacherForImageClassification(
            teacher.model.config(teacher.args.teacher_loss, num_labels=num_labels)
        )
        self.student: nn.Module = DeiTLTForImageClassification(student.model.config(num_labels=num_labels))
        for model in (self.teacher, self.student):
            nn.Module.to(model, device)
        self.sgd = torch.optim.SGD(self.teacher.parameters(), lr=1e-4, momentum=0.9)
        is_matrix = {name for name, parameter in self.student.named_parameters() if parameter.ndim > 1}
        self.optimizer: torch.optim.Optimizer = (
            muon(self.student, student.args, is_matrix)
            if student.args.optim == MUON
            else torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        )
        batch = student.args.per_device_train_batch_size
        self.teacher_images, self.student_images = (
            torch.randn(batch, 3, run.model.image_size, run.model.image_size, device=device)
            for run in (teacher, student)
        )
        self.labels = torch.randint(num_labels, (batch,), device=device)
        # SAM takes two gradients in a step.
        self.teacher_passes, self.student_passes = (2 if max(run.args.sam_rho) > 0 else 1 for run in (teacher, student))

    def of_teacher(self) -> None:
        """A training step of the teacher."""
        for _ in range(self.teacher_passes):
            F.cross_entropy(self.teacher(self.teacher_images).logits, self.labels).backward()
        self.sgd.step()
        self.sgd.zero_grad()

    def of_student(self, bfloat16: bool, size: int) -> None:
        """A training step of the student on images of a size, with the teacher's outputs for the full size."""
        self.student.train()
        images = resize(self.student_images, (size, size))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            if self.needs_teacher:
                self.forward(self.teacher, self.teacher_images)
            for _ in range(self.student_passes):
                outputs = self.student(pixel_values=images, interpolate_pos_encoding=True)
                cls_loss = F.cross_entropy(outputs.cls_logits, self.labels)
                (cls_loss + F.cross_entropy(outputs.distillation_logits, self.labels)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @staticmethod
    @torch.inference_mode()
    def forward(model: nn.Module, images: torch.Tensor) -> None:
        """An evaluation of images; the model stays in evaluation mode."""
        model.eval()(pixel_values=images)


def _reading(args: DeiTLTTrainingArguments, model: StudentArguments, data: Mapping) -> tuple[float, float]:
    """Seconds to read and transform an image for the first time, and later."""
    processor = image_processor(model.image_size, args.image_resize)
    view = train_transform(
        processor, args.train_crop, args.auto_augment, args.hflip, args.random_erasing, args.color_jitter
    )
    rows = data["train"].select(range(0, len(data["train"]), max(len(data["train"]) // DECODED, 1)))
    images = as_images(rows, processor, args, {"pixel_values": view})
    assert isinstance(images, ImageDataset)
    found = []
    for _ in range(2):
        started = time.perf_counter()
        for index in range(len(images)):
            images[index]
        found.append((time.perf_counter() - started) / len(images))
    return found[0], found[1]


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Mean time of `STEPS` calls, after one that is not counted."""

    def timed() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    # The first step also creates the optimiser's state.
    timed()
    return statistics.fmean(timed() for _ in range(STEPS))
