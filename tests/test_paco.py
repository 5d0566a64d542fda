"""Tests of PaCo teachers: the momentum encoder, its queue, and complete runs."""

import copy
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import TrainerCallback

from deitlt_hf import (
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
    FlatTeacherTrainer,
    FlatTeacherTrainingArguments,
)
from deitlt_hf.losses import PaCoLoss
from deitlt_hf.training.momentum_encoder import MomentumContrast
from deitlt_hf.training.teacher import CONTRAST_FILE


def paco_model(seed=0, **config):
    torch.manual_seed(seed)
    values = {"backbone": "resnet20", "image_size": 8, "num_labels": 10, "projection_size": 4}
    return FlatTeacherForImageClassification(FlatTeacherConfig(**{**values, **config}))


def paco_trainer(folder, digits, model=None, **values):
    defaults = {
        "output_dir": str(folder),
        "teacher_loss": "paco",
        "paco_queue": 50,
        "num_train_epochs": 1,
        "warmup_epochs": 0,
        "per_device_train_batch_size": 32,
        "learning_rate": 0.05,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    return FlatTeacherTrainer(
        model=model or paco_model(),
        args=FlatTeacherTrainingArguments(**{**defaults, **values}),
        train_dataset=digits["train"],
        eval_dataset=digits["test"],
    )


@given(size=st.integers(1, 12), batches=st.lists(st.integers(0, 30), max_size=8))
@settings(deadline=None, max_examples=60)
def test_queue_keeps_the_latest_keys_of_batches_of_any_size(size, batches):
    """The queue keeps the latest keys for batches of any size.

    The original requires that the batch divides the queue.
    """
    contrast = MomentumContrast(MODEL, size)
    expected = deque(maxlen=size)
    value = 0
    for batch in batches:
        keys = torch.arange(value, value + batch, dtype=torch.float32)[:, None].expand(-1, 4)
        value += batch
        contrast.enqueue(keys, keys[:, 0].long())
        expected.extend(keys[:, 0].tolist())
        found, labels = contrast.queue()
        assert sorted(found[:, 0].tolist()) == sorted(expected)
        assert torch.equal(found[:, 0].long(), labels)


MODEL = paco_model()


def test_momentum_encoder_is_a_moving_average():
    model, contrast = paco_model(0), MomentumContrast(paco_model(1), 8, momentum=0.9)
    before = {name: value.clone() for name, value in contrast.encoder.named_parameters()}
    contrast.follow(model)
    for name, value in model.named_parameters():
        expected = 0.9 * before[name] + 0.1 * value
        torch.testing.assert_close(contrast.encoder.get_parameter(name), expected)
    keys = contrast.encode(torch.randn(5, 3, 8, 8))
    assert not keys.requires_grad
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(5))
    assert not any(parameter.requires_grad for parameter in contrast.encoder.parameters())


@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_paco_teacher_trains_and_is_saved_completely(tmp_path, digits, rho, accumulation):
    """A PaCo teacher trains and is saved completely.

    Every parameter changes, the queue has the keys of all micro-batches, and the saved teacher loads like any other.
    """
    trainer = paco_trainer(
        tmp_path,
        digits,
        sam_rho=[rho],
        per_device_train_batch_size=32 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert not torch.equal(value, before[name]), name
    assert int(trainer.contrast.added) == 240 // 32 * 32  # 240 images, in complete steps only
    keys, labels = trainer.contrast.queue()
    assert len(keys) == 50
    assert labels.min() >= 0
    assert any(not torch.equal(value, before[name]) for name, value in trainer.contrast.encoder.named_parameters())
    trainer.save_model()
    loaded = FlatTeacherForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(loaded(images).logits, trainer.model.eval()(images).logits)
    assert not any("contrast" in name or "encoder" in name for name in loaded.state_dict())


def test_a_step_compares_with_own_keys_and_those_of_earlier_batches(tmp_path, digits):
    trainer = paco_trainer(tmp_path, digits, sam_rho=[0.0], paco_queue=40, paco_alpha=0.07, paco_temperature=0.3)
    own = {name: value.clone() for name, value in trainer.contrast.encoder.named_parameters()}
    with torch.no_grad():
        for value in trainer.model.parameters():
            value.add_(1.0)
    loader = iter(trainer.get_train_dataloader())
    batches = [next(loader), next(loader)]
    assert not torch.equal(batches[0]["pixel_values"], batches[0]["key_pixel_values"])
    seen = []
    for batch in batches:
        views = trainer.views["key_pixel_values"].finish(batch["key_pixel_values"].clone())
        trainer._window = [batch]
        trainer._prepare_window()
        assert "key_pixel_values" not in batch
        seen.append((batch["keys"], batch["key_labels"]))
        encoder = copy.deepcopy(trainer.contrast.encoder).train()  # a separate batch with its own batch-norm statistics
        keys = F.normalize(encoder(pixel_values=views).projections, dim=1)
        torch.testing.assert_close(batch["keys"][:32], keys, atol=1e-4, rtol=1e-3)
    for name, value in trainer.contrast.encoder.named_parameters():
        torch.testing.assert_close(value, own[name] + 1 - 0.999**2, atol=1e-5, rtol=1e-5)
    assert [len(keys) for keys, _ in seen] == [32, 32 + 32]
    assert torch.equal(seen[1][0][32:], seen[0][0])
    assert torch.equal(seen[1][1][:32], batches[1]["labels"])
    model = trainer.model.train()
    loss = trainer.compute_training_loss(model, {**batches[1], "denominators": torch.tensor([32.0])})
    outputs = model(pixel_values=batches[1]["pixel_values"])
    queries = torch.nn.functional.normalize(outputs.projections, dim=1)
    expected = PaCoLoss(trainer.class_counts, 0.07, temperature=0.3)(
        outputs.logits, queries, batches[1]["labels"], *seen[1]
    )
    torch.testing.assert_close(loss, expected)


def test_a_resumed_run_restores_its_queue(tmp_path, digits):
    run = {"save_strategy": "epoch", "num_train_epochs": 2, "save_total_limit": None}
    whole = paco_trainer(tmp_path, digits, **run)
    whole.train()
    checkpoint = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert (checkpoint / CONTRAST_FILE).is_file()
    resumed = paco_trainer(tmp_path, digits, paco_model(seed=5), **run)
    at_first = {}

    class Look(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if not at_first:
                at_first.update({name: value.clone() for name, value in resumed.contrast.state_dict().items()})

    resumed.add_callback(Look())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in load_file(checkpoint / CONTRAST_FILE).items():
        assert torch.equal(at_first[name], value), name
    # The resumed run adds the keys of one epoch; the others are from the first epoch.
    assert int(resumed.contrast.added) == int(whole.contrast.added)


@pytest.mark.parametrize(
    ("loss", "projection_size"),
    [("paco", 0), ("ce", 4), ("logit_adjusted", 4)],
)
def test_loss_and_projection_belong_together(tmp_path, digits, loss, projection_size):
    with pytest.raises(ValueError, match=f"teacher_loss '{loss}' with projection_size {projection_size}"):
        paco_trainer(tmp_path, digits, paco_model(projection_size=projection_size), teacher_loss=loss)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"paco_temperature": 0}, "paco_temperature must be above 0, got 0"),
        ({"paco_momentum": 2}, r"paco_momentum must be in \[0, 1\], got 2"),
        ({"paco_queue": 0}, "paco_queue must be 1 or more, got 0"),
        ({"paco_alpha": -1}, "paco_alpha must be 0 or more, got -1"),
        ({"teacher_loss": "focal"}, "teacher_loss must be one of ce, .* got 'focal'"),
    ],
)
def test_values_outside_their_range_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        FlatTeacherTrainingArguments(output_dir=str(tmp_path), **values)


def test_logit_adjusted_teacher_trains(tmp_path, digits):
    trainer = paco_trainer(tmp_path, digits, paco_model(projection_size=0), teacher_loss="logit_adjusted")
    trainer.train()
    assert trainer.contrast is None
    assert trainer.results.content["finished"]
