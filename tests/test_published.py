"""Tests of `as_published` against figures from the authors' training loop."""

import json

import numpy as np
import pytest
import timm.data.mixup
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch.utils.data import Dataset as RowsOfTensors

from deitlt_hf import DeiTLTTrainer, DeiTLTTrainingArguments
from deitlt_hf.data.sampling import TrainBatches
from deitlt_hf.hub import load_original_student, load_original_teacher
from deitlt_hf.original.layouts import student_to_original
from deitlt_hf.training import FlatTeacherTrainingArguments
from deitlt_hf.training.schedule import published_epoch
from helpers import FIXTURES, StopAt, filled_state_dict

FIGURES = json.loads((FIXTURES / "published_loop.json").read_text())


class Rows(RowsOfTensors):
    """The images and labels of the authors' run."""

    def __init__(self):
        values = FIGURES["settings"]
        shape = (values["images"], 3, values["image_size"], values["image_size"])
        self.images = torch.from_numpy(np.random.RandomState(500).standard_normal(shape).astype(np.float32))
        shares = 0.6 ** np.arange(values["classes"])
        self.labels = np.random.RandomState(501).choice(values["classes"], len(self.images), p=shares / shares.sum())

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


class WatchedTrainer(DeiTLTTrainer):
    """Records losses and learning rates, and seeds mixing by the micro-batch's number, as the reference run did."""

    micro_batches, losses, rates = 0, (), ()

    def seed_micro_batch(self, index, purpose=0):
        super().seed_micro_batch(index, purpose)
        if purpose == 1:
            np.random.seed(self.micro_batches)
            self.micro_batches += 1

    def training_step(self, *args):
        loss = super().training_step(*args)
        self.losses = (*self.losses, loss.item() * len(self._window))
        if self.accelerator.sync_gradients:
            self.rates = (*self.rates, self.optimizer.param_groups[0]["lr"])
        return loss


def published_trainer(folder, **values):
    settings, rows = FIGURES["settings"], Rows()
    args = DeiTLTTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings["epochs"],
        drw_start_epoch=settings["drw_start_epoch"],
        warmup_epochs=settings["warmup_epochs"],
        learning_rate_per_512=settings["lr_per_512"],
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["micro_batches"],
        ema_decay=settings["ema_decay"],
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        use_cpu=True,
        **values,
    )
    student = load_original_student(
        filled_state_dict(FIGURES["student_keys"]), num_attention_heads=2, drop_path_rate=0.0
    )
    weights = filled_state_dict(FIGURES["teacher_keys"], seed=5)
    # Twice as large; the teacher's answer then depends on the image.
    weights = {name: 2 * tensor if tensor.dim() == 4 else tensor for name, tensor in weights.items()}
    teacher = load_original_teacher(weights)
    teacher.config.image_size = settings["teacher_size"]
    features = Features(image=Image(), label=ClassLabel(settings["classes"]))
    columns = {"image": [np.zeros((1, 1, 3), np.uint8)] * len(rows), "label": rows.labels}
    data = Dataset.from_dict(columns, features=features)
    trainer = WatchedTrainer(model=student, args=args, teacher=teacher, train_dataset=data)
    assert trainer.class_counts == FIGURES["counts"]
    trainer.train_dataset = rows
    return trainer


def older_box(shape, lam, count=None):
    """The CutMix box of timm 0.8.15, the authors' version; for an odd side, timm 1.0 takes one more pixel."""
    height, width = shape[-2:]
    halves = [int(side * np.sqrt(1 - lam)) // 2 for side in (height, width)]
    centre = [np.random.randint(0, side, size=count) for side in (height, width)]
    ends = zip(centre, halves, (height, width), strict=True)
    top, bottom, left, right = (np.clip(place, 0, side) for at, half, side in ends for place in (at - half, at + half))
    return top, bottom, left, right


def furthest(model, expected):
    """Largest difference from the figures of each tensor: its norm and its first three values."""
    weights = student_to_original(model.state_dict())
    assert weights.keys() == expected.keys()
    found = {name: [tensor.double().norm().item(), *tensor.flatten()[:3].tolist()] for name, tensor in weights.items()}
    return max(abs(a - b) for name, values in expected.items() for a, b in zip(found[name], values, strict=True))


def test_as_published_takes_the_authors_steps(tmp_path, capsys, monkeypatch):
    """`as_published` takes the 36 updates of the authors' loop.

    They include warm-up, cosine, mixing, DRW without mixing, incomplete steps and batches, and EMA.
    """
    monkeypatch.setattr(timm.data.mixup, "rand_bbox", older_box)
    trainer = published_trainer(tmp_path, as_published=True)
    trainer.train()
    assert len(trainer.rates) == FIGURES["updates"]
    np.testing.assert_allclose(trainer.rates, FIGURES["learning_rates"], rtol=0, atol=4e-16)
    np.testing.assert_allclose(trainer.losses, FIGURES["losses"], rtol=0, atol=4e-6)
    # Weights moved by 1e-2. Where a gradient is nearly 0, as of the keys' biases, AdamW amplifies rounding to full
    # steps.
    assert furthest(trainer.model, FIGURES["weights"]) < 1e-4
    assert furthest(trainer.averaged_model, FIGURES["ema"]) < 1e-4
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "partial_steps True" in text
    assert "teacher_antialias False, fp16 False, full precision" in text
    settings = trainer.results.content["settings"]
    assert settings["as_published"]
    assert (settings["loss_normalization"], settings["ema_every_micro_batch"]) == ("per_process", True)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    windows = np.split(np.array(trainer.losses), np.flatnonzero(np.arange(len(trainer.losses)) % 22 % 4 == 0)[1:])
    np.testing.assert_allclose(logged, [window.mean() for window in windows], atol=1e-4)


@pytest.mark.parametrize("name", ["teacher_antialias", "loss_normalization", "partial_steps"])
def test_each_setting_of_as_published_matters(tmp_path, name, monkeypatch):
    """Each setting of `as_published` has an effect, within an epoch, that the test above would detect."""
    monkeypatch.setattr(timm.data.mixup, "rand_bbox", older_box)
    trainer = published_trainer(tmp_path, as_published=True)
    monkeypatch.setattr(DeiTLTTrainingArguments, "_set_published_values", lambda args: None)  # refuses the value
    setattr(trainer.args, name, trainer.args.published_values()[name][False])
    trainer.add_callback(StopAt(6))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    expected = FIGURES["losses"][: len(trainer.losses)]
    assert np.abs(np.subtract(trainer.losses, expected)).max() > 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss_normalization": "global"}, "'global' is not as published, which is 'per_process'"),
        ({"partial_steps": False}, "partial_steps False is not as published"),
        ({"ema_every_micro_batch": False}, "ema_every_micro_batch False is not as published"),
        ({"teacher_antialias": True}, "teacher_antialias True is not as published"),
        ({"fp16": True}, "fp16 True is not as published, which is False"),
        ({"bf16": True}, "as_published trains in full precision on this device, not in bf16"),
    ],
)
def test_settings_that_contradict_as_published_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        DeiTLTTrainingArguments(output_dir=str(tmp_path), as_published=True, use_cpu=True, **values)


def test_as_published_uses_half_precision_on_a_gpu(tmp_path, monkeypatch):
    """`as_published` uses half precision only when the run uses a GPU; the default is full precision there, too."""
    args = DeiTLTTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert args.published_values()["fp16"] == (False, False)
    args.use_cpu = False
    assert args.published_values()["fp16"] == (False, True)


def test_the_default_settings(tmp_path):
    args = DeiTLTTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.loss_normalization, args.partial_steps, args.ema_every_micro_batch) == ("global", False, False)
    assert (args.teacher_antialias, args.fp16) == (True, False)


@pytest.mark.parametrize(("loss", "partial"), [("paco", False), ("ldam", True), ("ce", True)])
def test_teachers_use_incomplete_batches_as_their_authors_do(tmp_path, loss, partial):
    args = FlatTeacherTrainingArguments(output_dir=str(tmp_path), teacher_loss=loss, as_published=True)
    assert (args.partial_steps, args.loss_normalization) == (partial, "per_process")


@pytest.mark.parametrize(
    ("images", "processes", "repeats", "batches", "last"),
    [
        (12_406, 2, 3, 48, 128),  # CIFAR-10-LT, ratio 100
        (10_847, 2, 3, 42, 128),  # CIFAR-100-LT, ratio 100: 11 steps of 4 micro-batches instead of 10
        (115_846, 4, 3, 226, 128),  # ImageNet-LT
        (437_513, 4, 3, 855, 64),  # iNaturalist: half a batch at the end
        (1_001, 2, 1, 4, 116),  # without repeats, all processes have the same number of images
    ],
)
def test_batches_of_the_published_epochs(images, processes, repeats, batches, last):
    sampler = TrainBatches(images, 128, 1, processes, 4, repeats, partial=True)
    assert len(sampler) == batches
    assert sampler.sizes == [128] * (batches - 1) + [last]
    whole = batches - (last < 128)
    assert len(TrainBatches(images, 128, 1, processes, 4, repeats)) == (whole - whole % 4 if whole >= 4 else whole)
    if images < 20_000:  # the longest cases take a second each
        found = [index for batch in sampler for index, _ in batch]
        assert len(found) == sum(sampler.sizes)
        other = TrainBatches(images, 128, 0, processes, 4, repeats, partial=True)
        assert repeats > 1 or not {index for batch in other for index, _ in batch} & set(found)


def test_the_authors_scheduler_is_reproduced():
    """The authors' scheduler is reproduced for two epochs of 5 batches in steps of 2.

    It advances with the first micro-batch of a step, and with the last batch of an epoch.
    """
    assert [published_epoch(step, 5, 2) for step in range(6)] == [0.0, 0.4, 0.8, 1.0, 1.4, 1.8]
    assert [published_epoch(step, 4, 2) for step in range(4)] == [0.0, 0.75, 1.0, 1.75]
    assert [published_epoch(step, 2, 1) for step in range(6)] == [0, 0, 0, 0, 1, 1]
