"""The comparisons of `run.py`: a peer's way and ours, each a function that takes turns."""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from input_pipeline import BATCH, encoded, our_batches, photograph, timms, timms_batches
from sam_step import trainer_step
from series import ROOT, run
from torch.nn import functional as F

from deitlt_hf import (
    DeiTLTConfig,
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
)
from deitlt_hf.data import image_processor
from deitlt_hf.losses import effective_number_weights
from deitlt_hf.training.memory import keep_freed_memory

Way = Callable  # takes a run.Turns


@dataclass(frozen=True)
class Peak:
    """Products of two square matrices, whose rate is the peak that shares refer to.

    Args:
        side: Rows and columns.
        products: Products of a turn.
        device: Device of the matrices.
        dtype: Their type.
    """

    side: int = 2048
    products: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def flops(self) -> int:
        """Operations of a turn."""
        return 2 * self.side**3 * self.products

    def multiply(self, turns) -> None:
        left, right = torch.randn(2, self.side, self.side, device=self.device, dtype=self.dtype)
        torch.mm(left, right)
        while turns.next():
            for _ in range(self.products):
                torch.mm(left, right)
            wait_for(self.device)


def wait_for(device: str) -> None:
    """Waits until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Comparison:
    """Several ways of doing the same work.

    Args:
        title: The work of one turn.
        contenders: The ways, by name.
        peers: Names of the ways that are not ours.
        targets: Targets for our ways, by name.
        turns: Measured turns of each contender.
        warm_up: Turns before the measured ones.
        flops: Returns the operations of a turn of the plain model, for the share of the machine's peak.
        unit: Unit of the measured value: s, ms or MiB.
        peak: The matrix product that shares refer to.
        images: Images of a turn, where their rate matters.
        starts_together: The contenders prepare (and compile) in their first turn, all at the same time.
    """

    title: str
    contenders: Mapping[str, Way]
    peers: Sequence[str] = ()
    targets: Mapping[str, str] = field(default_factory=dict)
    turns: int = 9
    warm_up: int = 2
    flops: Callable[[], float] | None = None
    unit: str = "ms"
    peak: Peak = Peak()
    images: int | None = None
    starts_together: bool = False

    def shown(self, value: float) -> str:
        """A measured value with its unit."""
        value *= 1000 if self.unit == "ms" else 1
        return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {self.unit}"


# ---- Training steps ----


@dataclass(frozen=True)
class Student:
    """The size of a student and its batch."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    batch: int

    def config(self) -> DeiTLTConfig:
        values = {name: value for name, value in vars(self).items() if name != "batch"}
        return DeiTLTConfig(intermediate_size=4 * self.hidden_size, num_labels=10, **values)

    def ours(self) -> DeiTLTForImageClassification:
        torch.manual_seed(0)
        return DeiTLTForImageClassification(self.config()).train()

    def transformers(self) -> torch.nn.Module:
        from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

        return DeiTForImageClassificationWithTeacher(DeiTConfig(**self.config().to_diff_dict())).train()

    def timm(self, fused_attention: bool = True) -> torch.nn.Module:
        from timm.layers import set_fused_attn
        from timm.models.deit import VisionTransformerDistilled

        set_fused_attn(fused_attention)
        model = VisionTransformerDistilled(
            img_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.hidden_size,
            depth=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_classes=10,
            drop_path_rate=0.1,
        )
        model.set_distilled_training(True)
        return model.train()

    @cache  # noqa: B019 - only two students exist
    def flops(self) -> float:
        """FLOP of a training step of the plain model: three times the forward pass."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            self.transformers().eval()(torch.empty(1, 3, self.image_size, self.image_size))
        return 3.0 * self.batch * counter.get_total_flops()


VIT_B = Student(224, 16, 768, 12, 12, batch=8)
SMALL = Student(32, 4, 192, 9, 3, batch=128)


def two_heads(model: torch.nn.Module, images: torch.Tensor, **kwargs) -> Sequence[torch.Tensor]:
    """Logits of both heads, for any of the student implementations."""
    outputs = model(images, **kwargs)
    return outputs if isinstance(outputs, tuple) else (outputs.cls_logits, outputs.distillation_logits)


def train_steps(
    turns,
    make: Callable,
    student: Student,
    keep: bool = False,
    half: bool = False,
    device: str = "cpu",
    compiled: str | None = None,
    steps: int = 1,
    **kwargs,
) -> None:
    """Training steps: forward pass, cross entropy of both heads, backward pass, AdamW.

    Args:
        turns: The turns.
        make: Returns the model.
        student: Sizes of model and batch.
        keep: Keep freed memory.
        half: Autocast to bfloat16.
        device: Device of model and images.
        compiled: Mode of torch.compile; None for the eager model.
        steps: Steps of a turn.
        **kwargs: Arguments of the model's forward pass.
    """
    model = make().to(device)
    if keep:
        keep_freed_memory()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    images = torch.randn(student.batch, 3, student.image_size, student.image_size, device=device)
    labels = torch.arange(student.batch, device=device) % 10
    model = model if compiled is None else torch.compile(model, mode=compiled)
    while turns.next():
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=half):
                loss = sum(F.cross_entropy(logits, labels) for logits in two_heads(model, images, **kwargs)) / 2
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        wait_for(device)


def train_step(title: str, student: Student, target: str, turns: int) -> Comparison:
    ours = student.ours
    return Comparison(
        title,
        {
            "timm": lambda turns: train_steps(turns, student.timm, student),
            "timm, eager attention (the original's)": lambda turns: train_steps(
                turns, partial(student.timm, False), student
            ),
            "transformers": lambda turns: train_steps(turns, student.transformers, student),
            "deitlt-hf": lambda turns: train_steps(turns, ours, student),
            "... with all tokens of the last block": lambda turns: train_steps(
                turns, ours, student, class_tokens_only=False
            ),
            "... keeping freed memory, as the trainers do": lambda turns: train_steps(turns, ours, student, keep=True),
            "... in bfloat16": lambda turns: train_steps(turns, ours, student, half=True),
        },
        peers=("timm", "timm, eager attention (the original's)", "transformers"),
        targets={"deitlt-hf": target},
        turns=turns,
        flops=student.flops,
    )


# ---- The whole distillation step ----

IMAGES_PER_CLASS = [400 * 20 ** (-label / 9) for label in range(10)]


def long_tailed_images() -> tuple[list, list[int]]:
    """Images of 32 x 32 and their labels, at ratio 20."""
    labels = [label for label, number in enumerate(IMAGES_PER_CLASS) for _ in range(int(number))]
    return [photograph(32, 32, seed) for seed in range(len(labels))], labels


def resnet32() -> FlatTeacherForImageClassification:
    """A teacher whose batch norms have statistics to fold."""
    torch.manual_seed(0)
    teacher = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet32", image_size=32, num_labels=10))
    teacher.train()(torch.randn(64, 3, 32, 32))
    return teacher.eval()


def bare_distillation(turns, student: Student, crop: str) -> None:
    """The distillation step in a plain loop.

    It uses timm's transform, Mixup and student, and torch's loader, loss and optimiser.
    """
    from timm.data.mixup import Mixup

    pictures, labels = long_tailed_images()
    transform = timms(student.image_size, crop)

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return transform(pictures[index]), labels[index]

    loader = torch.utils.data.DataLoader(Images(), student.batch, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)
    model, teacher = student.timm(), resnet32()
    weights = effective_number_weights(np.bincount(labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    while turns.next():
        images, targets = mixup(*next(batches))
        with torch.no_grad():
            seen = images if student.image_size == 32 else F.interpolate(images, size=(32, 32), mode="bicubic")
            taught = teacher(seen).logits.argmax(dim=1)
        cls_logits, distillation_logits = model(images)
        loss = F.cross_entropy(cls_logits, targets) + F.cross_entropy(distillation_logits, taught, weights)
        (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def our_distillation(turns, student: Student, crop: str) -> None:
    """The step of the trainer, with everything else that the trainer does."""
    import datasets
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turns.next()

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = not turns.next()

    pictures, labels = long_tailed_images()
    names = [str(label) for label in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    with tempfile.TemporaryDirectory() as folder:
        args = DeiTLTTrainingArguments(
            output_dir=folder,
            max_steps=10_000,
            drw_start_epoch=0,
            mixing_in_drw=True,
            train_crop=crop,
            per_device_train_batch_size=student.batch,
            learning_rate=1e-4,
            repeated_augmentation=1,
            eval_strategy="no",
            save_strategy="no",
            logging_steps=20,
            disable_tqdm=True,
        )
        trainer = DeiTLTTrainer(
            model=student.ours(),
            args=args,
            teacher=resnet32(),
            train_dataset=datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features),
        )
        trainer.add_callback(TakeTurns())
        trainer.train()


def distillation(title: str, student: Student, crop: str, target: str, turns: int) -> Comparison:
    return Comparison(
        title,
        {
            "a bare loop of timm's parts": lambda turns: bare_distillation(turns, student, crop),
            "DeiTLTTrainer": lambda turns: our_distillation(turns, student, crop),
        },
        peers=("a bare loop of timm's parts",),
        targets={"DeiTLTTrainer": target},
        turns=turns,
    )


# ---- Teachers ----


def label(turns, prepare: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """The teacher's labels for a batch."""
    teacher, images = prepare(resnet32()), torch.randn(128, 3, 32, 32)
    while turns.next():
        with torch.inference_mode():
            teacher(images).logits.argmax(dim=1)


def teacher_steps(turns, rho: float, steps: int) -> None:
    """Steps of the teacher's trainer, with SAM or, for rho 0, plain SGD."""
    config = FlatTeacherConfig(backbone="resnet20", image_size=32, num_labels=10)
    batch = {"pixel_values": torch.randn(128, 3, 32, 32), "labels": torch.arange(128) % 10}
    with tempfile.TemporaryDirectory() as folder:
        step = trainer_step(config, batch, rho, folder)
        while turns.next():
            for _ in range(steps):
                step()


# ---- Evaluation and inference ----

EVALUATED = Student(28, 4, 128, 6, 4, batch=1)


def test_images(number: int):
    """Images of 28 x 28, of which 500 are real.

    The others repeat them, which keeps the data out of the memory measured.
    """
    import datasets

    names = [str(label) for label in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [photograph(28, 28, seed) for seed in range(500)], "label": [seed % 10 for seed in range(500)]}
    return datasets.Dataset.from_dict(rows, features=features).select(np.arange(number) % 500)


def evaluate_with_pipeline(turns, number: int = 10_000) -> None:
    """The most probable class of each image, as in transformers' documentation; one expert."""
    from transformers import pipeline
    from transformers.pipelines.pt_utils import KeyDataset

    classifier = pipeline(
        "image-classification", model=EVALUATED.transformers().eval(), image_processor=image_processor(28), device=-1
    )
    images = test_images(number)
    labels = images["label"]
    while turns.next():
        results = classifier(KeyDataset(images, "image"), batch_size=100, top_k=1)
        predictions = [int(result[0]["label"].removeprefix("LABEL_")) for result in results]
        np.mean(np.equal(predictions, labels))


def evaluate_with_trainer(turns, number: int = 10_000) -> None:
    """The tables of three experts."""
    groups = {"head": [0, 1, 2], "mid": [3, 4, 5, 6], "tail": [7, 8, 9]}
    with tempfile.TemporaryDirectory() as folder:
        args = DeiTLTTrainingArguments(output_dir=folder, per_device_eval_batch_size=100, disable_tqdm=True)
        images = test_images(number)
        trainer = DeiTLTTrainer(model=EVALUATED.ours().eval(), args=args, eval_dataset=images, groups=groups)
        while turns.next():
            trainer.evaluate(images)  # the trainer decodes them again, like the pipeline


def infer(turns, way: str, number: int) -> None:
    """Forward passes of one ViT-B/16."""
    from transformers import DeiTForImageClassificationWithTeacher

    from deitlt_hf.serving.onnx import OnnxClassifier, export_onnx, quantize

    images = torch.randn(number, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        model = VIT_B.ours().eval()
        if way == "transformers":
            model.save_pretrained(folder)
            model = DeiTForImageClassificationWithTeacher.from_pretrained(folder).eval()
        elif way != "deitlt-hf":
            exported = export_onnx(model, folder)
            model = OnnxClassifier(exported if way == "ONNX float32" else quantize(exported))
        with torch.inference_mode():
            while turns.next():
                model(pixel_values=images)


def inference(number: int, turns: int) -> Comparison:
    ways = ("transformers", "deitlt-hf", "ONNX float32", "ONNX int8")
    return Comparison(
        f"inference, ViT-B/16, 224 px, {number} image{'s' * (number > 1)}",
        {way: partial(infer, way=way, number=number) for way in ways},
        peers=("transformers",),
        targets={"deitlt-hf": ">= 0.98", "ONNX float32": ">= 1.2", "ONNX int8": ">= 2"},
        turns=turns,
    )


# ---- Complete processes ----


def processes(turns, command: Sequence[str]) -> None:
    """Runs one process in each turn."""
    while turns.next():
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def first_step(turns) -> None:
    """The beginning of `make demo`, up to the end of its first step."""
    options = ["--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--overwrite"]
    with tempfile.TemporaryDirectory() as folder:
        script = ["scripts/train_teacher.py", "--recipe", "digits_lt", "--output_dir", folder]
        processes(turns, [*script, *options])


def memory(turns, way: str) -> None:
    """The peak memory of a process that runs one of the functions in `MEMORY`."""
    value = None
    while turns.next(value):
        value = run(__file__, "memory", way).ru_maxrss / 1024


class InARow:
    """Turns without other contenders, for a separate process."""

    def __init__(self, number: int):
        self.left = number

    def next(self, value: float | None = None) -> bool:
        self.left -= 1
        return self.left >= 0


def checkpointed(make: Callable) -> torch.nn.Module:
    """A model with activation checkpointing."""
    model = make()
    model.activation_checkpointing_enable()
    return model


def optimizer_steps(make: Callable) -> None:
    """AdamW's steps with gradients of zero: the memory that every way of training all weights needs."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()


MEMORY = {
    "libraries, weights, gradients and AdamW's moments alone": lambda: optimizer_steps(VIT_B.ours),
    "transformers": lambda: train_steps(InARow(3), VIT_B.transformers, VIT_B),
    "deitlt-hf": lambda: train_steps(InARow(3), VIT_B.ours, VIT_B),
    "deitlt-hf, keeping freed memory": lambda: train_steps(InARow(3), VIT_B.ours, VIT_B, keep=True),
    "transformers, gradient checkpointing": lambda: train_steps(
        InARow(3), partial(checkpointed, VIT_B.transformers), VIT_B
    ),
    "deitlt-hf, gradient checkpointing": lambda: train_steps(InARow(3), partial(checkpointed, VIT_B.ours), VIT_B),
}
EVALUATION_MEMORY = {
    f"{number:,} images": partial(evaluate_with_trainer, InARow(1), number) for number in (500, 5_000, 20_000)
}


def input_pipeline(title: str, size: int, crop: str, target: str, photographs: bool = False) -> Comparison:
    @cache
    def sources() -> list:
        if photographs:
            return [encoded(500, 375, seed) for seed in range(128)]
        return [photograph(32, 32, seed) for seed in range(512)]

    def take(turns, batches: Callable) -> None:
        torch.set_num_threads(1)
        made = batches(sources(), size, crop)
        while turns.next():
            for _ in range(256 // BATCH):
                next(made)

    return Comparison(
        title,
        {"timm": partial(take, batches=timms_batches), "deitlt-hf": partial(take, batches=our_batches)},
        peers=("timm",),
        targets={"deitlt-hf": target},
        turns=15,
    )


COMPARISONS = {
    "vit_b_step": train_step("training step, ViT-B/16, 224 px, batch 8", VIT_B, ">= 1.05", turns=7),
    "small_step": train_step("training step, 192 wide, 9 blocks, 32 px, batch 128", SMALL, ">= 1.25", turns=15),
    "small_distillation": distillation(
        "whole distillation step, 192 wide, 32 px, batch 128", SMALL, "padded", ">= 1.3", turns=15
    ),
    "vit_b_distillation": distillation(
        "whole distillation step, ViT-B/16, 32 px enlarged to 224, batch 8", VIT_B, "random_resized", ">= 1.0", turns=7
    ),
    "teacher_labels": Comparison(
        "a teacher's labels, ResNet-32, 32 px, batch 128",
        {
            "eager, evaluation mode": partial(label, prepare=lambda teacher: teacher),
            "folded": partial(label, prepare=lambda teacher: teacher.folded()),
        },
        peers=("eager, evaluation mode",),
        targets={"folded": ">= 1.4"},
        turns=25,
    ),
    "sam_step": Comparison(
        "SAM, ResNet-20, 32 px, batch 128",
        {
            "two plain steps": partial(teacher_steps, rho=0.0, steps=2),
            "one step of SAM": partial(teacher_steps, rho=0.05, steps=1),
        },
        peers=("two plain steps",),
        targets={"one step of SAM": ">= 0.976"},
        turns=15,
    ),
    "evaluation": Comparison(
        "evaluation of 10,000 images, 128 wide, 6 blocks, 28 px",
        {"transformers' pipeline, one expert": evaluate_with_pipeline, "DeiTLTTrainer, three": evaluate_with_trainer},
        peers=("transformers' pipeline, one expert",),
        targets={"DeiTLTTrainer, three": ">= 1.5"},
        turns=3,
        warm_up=1,
    ),
    "evaluation_memory": Comparison(
        "peak memory of that evaluation",
        {name: partial(memory, way=name) for name in EVALUATION_MEMORY},
        targets=dict.fromkeys(EVALUATION_MEMORY, "all alike"),
        turns=1,
        warm_up=0,
        unit="MiB",
    ),
    "inference_1": inference(1, turns=25),
    "inference_16": inference(16, turns=7),
    "input_32_to_224": input_pipeline("256 training images, 32 px to 224", 224, "random_resized", ">= 2"),
    "input_32": input_pipeline("256 training images, 32 px", 32, "padded", ">= 2"),
    "input_jpeg": input_pipeline(
        "256 training images, JPEG of 500 x 375 to 224", 224, "random_resized", ">= 2", photographs=True
    ),
    "start": Comparison(
        "from the start of a process",
        {
            "import of transformers' Trainer": partial(processes, command=("-c", "from transformers import Trainer")),
            "import deitlt_hf": partial(processes, command=("-c", "import deitlt_hf")),
            "deitlt --help": partial(processes, command=("-m", "deitlt_hf.cli", "--help")),
            "to the end of digits_lt's first step": first_step,
        },
        peers=("import of transformers' Trainer",),
        targets={
            "import deitlt_hf": "<= 0.1 s",
            "deitlt --help": "<= 0.3 s",
            "to the end of digits_lt's first step": "<= 4 s",
        },
        turns=5,
        warm_up=1,
        unit="s",
    ),
    "memory": Comparison(
        "peak memory, three training steps of ViT-B/16, batch 8",
        {name: partial(memory, way=name) for name in MEMORY},
        peers=("transformers",),
        targets={"deitlt-hf": ">= 0.98", "deitlt-hf, gradient checkpointing": ">= 1.67"},
        turns=3,
        warm_up=0,
        unit="MiB",
    ),
}

# ---- Training steps on a GPU, for gpu_first.py ----

# SMALL=1 tries the same programs in tiny sizes, without a GPU too; the figures then mean nothing.
IS_TRIAL = os.environ.get("SMALL") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# torch.compile's modes, None without it, in titles.
COMPILED = {None: "", "default": ", compiled", "reduce-overhead": ", compiled with CUDA graphs"}


def gpu_step(title: str, student: Student, steps: int, target: str, compiled: str | None = None) -> Comparison:
    """Training steps of timm's student and ours in bfloat16.

    Args:
        title: Model and batch.
        student: Sizes of model and batch.
        steps: Steps of a turn, which hide the start of the first.
        target: Target for ours.
        compiled: Mode of torch.compile; None is eager.
    """
    if IS_TRIAL:
        student, steps = replace(student, image_size=32, num_hidden_layers=2, hidden_size=48, batch=4), 1
    common = {"student": student, "half": True, "device": DEVICE, "steps": steps, "compiled": compiled}
    return Comparison(
        f"{steps} training steps, {title}{COMPILED[compiled]}",
        {
            "timm": partial(train_steps, make=student.timm, **common),
            "deitlt-hf": partial(train_steps, make=student.ours, **common),
        },
        peers=("timm",),
        targets={"deitlt-hf": target},
        turns=2 if IS_TRIAL else 7,
        warm_up=1 if IS_TRIAL else 2,
        flops=lambda: steps * student.flops(),
        peak=Peak(256, 1, DEVICE, torch.bfloat16) if IS_TRIAL else Peak(8192, 20, DEVICE, torch.bfloat16),
        images=steps * student.batch,
        starts_together=True,
    )


LARGE_ON_GPU = ("ViT-B/16, 224 px, batch 128, bfloat16", replace(VIT_B, batch=128), 5, ">= 1.05")
SMALL_ON_GPU = ("192 wide, 9 blocks, 32 px, batch 1,024, bfloat16", replace(SMALL, batch=1024), 10, ">= 1.25")
# To compile takes a minute or more, and may fail: each mode is a comparison of its own, and the eager ones come first.
EAGER_ON_GPU = {"gpu_vit_b_step": gpu_step(*LARGE_ON_GPU), "gpu_small_step": gpu_step(*SMALL_ON_GPU)}
COMPILED_ON_GPU = {
    "gpu_vit_b_compiled": gpu_step(*LARGE_ON_GPU, "default"),
    "gpu_small_compiled": gpu_step(*SMALL_ON_GPU, "default"),
    "gpu_small_graphs": gpu_step(*SMALL_ON_GPU, "reduce-overhead"),
}
GPU_COMPARISONS = EAGER_ON_GPU | COMPILED_ON_GPU

if __name__ == "__main__":
    {**MEMORY, **EVALUATION_MEMORY}[sys.argv[2]]()
