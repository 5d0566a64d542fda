"""Constants and functions that several test modules use: tiny models, trainers and runs, and files with images."""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from deitlt_hf import (
    DeiTLTConfig,
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
    FlatTeacherTrainer,
    FlatTeacherTrainingArguments,
)

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
TINY = str(FIXTURES / "tiny.yaml")  # a recipe that trains for seconds
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
RANDOM = np.random.RandomState(0)

# ---- Models ----


def filled_state_dict(keys, seed=0):
    """The reference weights: each tensor comes from a generator seeded by the tensor's name."""
    state = {}
    for name, spec in keys.items():
        shape, dtype = (spec[0], spec[1]) if spec and isinstance(spec[0], list) else (spec, "float32")
        if dtype.startswith("int") or spec == [[], "int64"]:
            state[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        random = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0x7FFFFFFF)
        values = random.standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            values = 1 + 0.1 * np.abs(values)
        elif name.endswith("weight") and len(shape) == 1:
            values = 1 + 0.1 * values
        else:
            values = 0.05 * values
        state[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return state


def make_student(seed=0, **config):
    """A student for 8-pixel images of 10 classes, with random weights."""
    torch.manual_seed(seed)
    values = {
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 10,
    }
    return DeiTLTForImageClassification(DeiTLTConfig(**{**values, **config}))


# ---- Trainers ----


def student_arguments(folder, **values):
    defaults = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "warmup_epochs": 0,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 200,
        "learning_rate": 1e-3,
        "train_crop": "padded",
        "repeated_augmentation": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return DeiTLTTrainingArguments(**{**defaults, **values})


def student_trainer(folder, digits, teacher=None, model=None, callbacks=None, groups=None, **values):
    return DeiTLTTrainer(
        model=model or make_student(),
        teacher=teacher,
        args=student_arguments(folder, **values),
        train_dataset=digits["train"],
        eval_dataset=digits["test"],
        callbacks=callbacks,
        groups=groups,
    )


def teacher_trainer(folder, digits, model=None, **values):
    defaults = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "warmup_epochs": 0,
        "per_device_train_batch_size": 32,
        "learning_rate": 0.05,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    if model is None:
        torch.manual_seed(0)
        model = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10))
    return FlatTeacherTrainer(
        model=model,
        args=FlatTeacherTrainingArguments(**{**defaults, **values}),
        train_dataset=digits["train"],
        eval_dataset=digits["test"],
    )


class StopAt(TrainerCallback):
    """A callback that interrupts the run after a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def fixed_batch(digits, size=64, image_size=8):
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor(digits["train"]["label"])[torch.randperm(len(digits["train"]), generator=generator)[:size]]
    return {"pixel_values": torch.randn(size, 3, image_size, image_size, generator=generator), "labels": labels}


def gradients(trainer, batch, micro_batches):
    """Gradients of one optimiser step, with the batch divided into micro-batches of equal size."""
    size = len(batch["labels"]) // micro_batches
    parts = [{name: value[i * size : (i + 1) * size] for name, value in batch.items()} for i in range(micro_batches)]
    batches, _ = trainer.get_batch_samples(iter(parts), micro_batches, trainer.args.device)
    trainer.model.zero_grad()
    loss = sum(trainer.training_step(trainer.model, part) for part in batches)
    return loss, {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


RANDOM_STUDENT = {
    "num_train_epochs": 4,
    "drw_start_epoch": 2,
    "train_sizes": [4, 8],
    "train_size_epochs": [0, 0.4],
    "random_erasing": 0.5,
    "hflip": 0.5,
    "eval_strategy": "steps",
    "eval_steps": 8,
    "save_strategy": "steps",
}


def trainer_of(kind, folder, digits, teacher, **values):
    """A trainer whose run draws random numbers for everything that its kind can draw them for."""
    if kind in ("student", "muon"):
        student = make_student(drop_path_rate=0.2)
        if kind == "muon":  # with SAM in the last epochs
            values = {"optim": "muon", "sam_rho": [0.0, 0.1], "sam_rho_epochs": [0, 2.5], **values}
        return student_trainer(folder, digits, teacher, student, **{**RANDOM_STUDENT, **values})
    heads = {"paco": {"projection_size": 4}, "ldam": {"classifier": "cosine"}}[kind]
    torch.manual_seed(0)
    config = FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10, **heads)
    model = FlatTeacherForImageClassification(config)
    values = {
        "teacher_loss": kind,
        "paco_queue": 70,
        "sam_rho": [0.1, 0.4],
        "sam_rho_epochs": [0, 0.6],
        "num_train_epochs": 2,
        "auto_augment": "rand-m9-mstd0.5-inc1" if kind == "paco" else None,
        "drw_start_epoch": 1,
        "save_strategy": "steps",
        **values,
    }
    return teacher_trainer(folder, digits, model, **values)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def results(folder):
    return json.loads((folder / "results.json").read_text())


class Harm:
    """An object whose pickle runs a command when it is loaded: it leaves a file `harm` in the working folder."""

    def __reduce__(self):
        return (os.system, ("touch harm",))


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---- Images and data sets ----


def picture(width=64, height=48):
    small = Image.fromarray(RANDOM.randint(0, 256, (6, 8, 3)).astype(np.uint8))
    return small.resize((width, height), Image.BICUBIC)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb(side=20_000):
    """A decompression bomb: a PNG of a few kilobytes that would take 1.2 GB of memory."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj()
    content = b"".join(rows.compress(bytes(1 + 3 * side)) for _ in range(200)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def cut(kind):
    """The first half of an encoded image."""
    data = encoded(picture(200, 150), kind)
    return data[: len(data) // 2]


def save_image(path, shade=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), shade, np.uint8)).save(path)
    return path


def shade(row):
    """The grey value of a row's image, which identifies its file."""
    return int(np.asarray(row["image"])[0, 0, 0])


def write_lists(folder, stem="ImageNet_LT", counts=(5, 3, 2), test="test", names=("n03", "n01", "n02")):
    """List files and their images; the labels are not in the order of the folder names."""
    lines = {"train": [], test: []}
    for label, (count, name) in enumerate(zip(counts, names, strict=True)):
        for index in range(count):
            lines["train"].append(f"train/{name}/{index}.png {label}")
            save_image(folder / f"train/{name}/{index}.png", 40 * label + index)
        lines[test].append(f"val/{name}/{label}.png {label}")
        save_image(folder / f"val/{name}/{label}.png", 40 * label + 20)
    for split, rows in lines.items():
        (folder / f"{stem}_{split}.txt").write_text("\n".join(rows) + "\n")
    return folder


def write_cifar(folder, kind=10, images=5):
    """Writes the layout and pickle protocol of the archives, with some images a class."""
    name = "cifar-10-batches-py" if kind == 10 else "cifar-100-python"
    files = [f"data_batch_{batch}" for batch in range(1, 6)] if kind == 10 else ["train"]
    labels = RANDOM.permutation(np.repeat(np.arange(kind), images))
    written = {}
    (folder / name).mkdir()
    for file, part in zip(
        [*files, "test_batch" if kind == 10 else "test"], np.array_split(labels, len(files)) + [labels], strict=True
    ):
        pixels = RANDOM.randint(0, 256, (len(part), 3072)).astype(np.uint8)
        content = {b"data": pixels, b"labels" if kind == 10 else b"fine_labels": part.tolist(), b"filenames": [b"x"]}
        (folder / name / file).write_bytes(pickle.dumps(content, protocol=2))
        written[file] = pixels
    names = [f"class {label}".encode() for label in range(kind)]
    meta = {b"label_names" if kind == 10 else b"fine_label_names": names}
    (folder / name / ("batches.meta" if kind == 10 else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return labels, written


def write_shards(folder, shards=2, per_class=3, classes=("train", "test")):
    for split in classes:
        for shard in range(shards if split == "train" else 1):
            with tarfile.open(folder / f"data-{split}-{shard:06d}.tar", "w") as tar:
                for index in range(3 * per_class):
                    label = index % 3
                    stream = io.BytesIO()
                    Image.new("RGB", (5, 4), (40 * label + index,) * 3).save(stream, "PNG")
                    for suffix, content in (("png", stream.getvalue()), ("cls", str(label).encode())):
                        info = tarfile.TarInfo(f"{split}{shard}{index:05d}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return folder


def write_idx(folder, compress, images=30, classes=3):
    opener = gzip.open if compress else open
    for stem in ("train", "t10k"):
        pixels = RANDOM.randint(0, 256, (images, 7, 7)).astype(np.uint8)
        labels = (np.arange(images) % classes).astype(np.uint8)
        for name, values in ((f"{stem}-images-idx3-ubyte", pixels), (f"{stem}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, values.ndim]) + np.asarray(values.shape, ">u4").tobytes()
            with opener(folder / (name + ".gz" * compress), "wb") as file:
                file.write(header + values.tobytes())
    return folder
