"""Measures the time of a run in a trial of a few steps, before the run."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..data.images import ImageDataset
from ..data.transforms import image_processor, train_transform
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..recipes import StudentArguments, TeacherArguments
from .arguments import DeiTLTTrainingArguments, FlatTeacherTrainingArguments
from .inputs import as_images
from .optimizers import MUON, muon

STEPS = 2
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
        num_images: int,
        test_images: int,
        batch_size: int,
        teacher_epochs: float,
        student_epochs: float,
        evaluations: int,
        workers: int,
    ) -> tuple[float, float]:
        """Estimates the time of the teacher's and of the student's run.

        The times of reading and of training are added, as if they did not overlap.

        Args:
            num_images: Training images.
            test_images: Test images.
            batch_size: Images of a measured step.
            teacher_epochs: Epochs of the teacher.
            student_epochs: Epochs of the student.
            evaluations: Evaluations in each run.
            workers: Processes that read images.

        Returns:
            Seconds of the teacher, and of the student.
        """
        steps, readers = num_images // batch_size, max(workers, 1)
        epoch, evaluation = num_images * self.read / readers, test_images * self.read / readers
        # Reduced copies of all images are made in the first run.
        first = (num_images + test_images) * max(self.first_read - self.read, 0) / readers
        teacher = first + teacher_epochs * (steps * self.teacher_step + epoch)
        teacher += evaluations * (test_images * self.teacher_forward + evaluation)
        student = student_epochs * (steps * self.student_step + epoch)
        student += evaluations * (test_images * self.student_forward + evaluation)
        student += test_images * self.teacher_forward + evaluation  # the check of the teacher
        return teacher + START_SECONDS, student + START_SECONDS


def measure_steps(
    teacher_model: TeacherArguments,
    teacher_args: FlatTeacherTrainingArguments,
    student_model: StudentArguments,
    student_args: DeiTLTTrainingArguments,
    data: Mapping,
    compare_bfloat16: bool = False,
) -> StepTimes:
    """Runs a few steps of teacher and student on random images, and reads a few images of the data.

    The models are new and are dropped afterwards; the random state is restored.

    Args:
        teacher_model: Architecture of the teacher.
        teacher_args: Training arguments of the teacher.
        student_model: Architecture of the student.
        student_args: Training arguments of the student.
        data: The split `train`, a `datasets.Dataset`.
        compare_bfloat16: Whether to measure a step of the student in bfloat16 too.
    """
    device = student_args.device
    num_labels = data["train"].features["label"].num_classes
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        teacher: nn.Module = FlatTeacherForImageClassification(
            teacher_model.config(teacher_args.teacher_loss, num_labels=num_labels)
        )
        student = DeiTLTForImageClassification(student_model.config(num_labels=num_labels))
        for model in (teacher, student):
            nn.Module.to(model, device)
        sgd = torch.optim.SGD(teacher.parameters(), lr=1e-4, momentum=0.9)
        is_matrix = {name for name, parameter in student.named_parameters() if parameter.ndim > 1}
        own = (
            muon(student, student_args, is_matrix)
            if student_args.optim == MUON
            else torch.optim.AdamW(student.parameters(), lr=1e-4)
        )
        batch = student_args.per_device_train_batch_size
        side = {"teacher": teacher_model.image_size, "student": student_model.image_size}
        images = {name: torch.randn(batch, 3, size, size, device=device) for name, size in side.items()}
        labels = torch.randint(num_labels, (batch,), device=device)
        # SAM takes two gradients in a step.
        passes, student_passes = (2 if max(args.sam_rho) > 0 else 1 for args in (teacher_args, student_args))

        def teacher_step() -> None:
            for _ in range(passes):
                F.cross_entropy(teacher(images["teacher"]).logits, labels).backward()
            sgd.step()
            sgd.zero_grad()

        def student_step(bfloat16: bool = student_args.mixed_precision == "bf16") -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                if student_args.needs_teacher:
                    with torch.inference_mode():
                        teacher.eval()(images["teacher"])
                for _ in range(student_passes):
                    outputs = student(pixel_values=images["student"])
                    cls_loss = F.cross_entropy(outputs.cls_logits, labels)
                    (cls_loss + F.cross_entropy(outputs.distillation_logits, labels)).backward()
            own.step()
            own.zero_grad()

        def forward(model: nn.Module, name: str) -> Callable[[], None]:
            def evaluate() -> None:
                with torch.inference_mode():
                    model.eval()(pixel_values=images[name])

            return evaluate

        first_read, read = _reading(student_args, student_model, data)
        return StepTimes(
            _seconds(teacher_step, device),
            _seconds(student_step, device),
            _seconds(forward(teacher, "teacher"), device) / batch,
            _seconds(forward(student, "student"), device) / batch,
            first_read,
            read,
            _seconds(lambda: student_step(bfloat16=True), device) if compare_bfloat16 else None,
        )


def _reading(args: DeiTLTTrainingArguments, model: StudentArguments, data: Mapping) -> tuple[float, float]:
    """Seconds to read and transform an image for the first time, and later."""
    processor = image_processor(model.image_size, args.image_resize)
    view = train_transform(processor, args.train_crop, args.auto_augment, args.hflip, args.random_erasing)
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
    """Median time of a few calls, after one that is not counted."""

    def timed() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    timed()
    return statistics.median(timed() for _ in range(STEPS))
