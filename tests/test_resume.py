"""A run that is interrupted ends with the weights of one that was not, bit for bit."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import StopAt, student_trainer, teacher_trainer
from transformers import TrainerCallback

from conftest import make_student
from deitlt_hf import FlatTeacherConfig, FlatTeacherForImageClassification
from deitlt_hf.io import weights_digest

STUDENT = {
    "num_train_epochs": 4,
    "drw_start_epoch": 2,
    "random_erasing": 0.5,
    "hflip": 0.5,
    "eval_strategy": "steps",
    "eval_steps": 8,
    "save_strategy": "steps",
}


class DrawNumbers(TrainerCallback):
    """A user's callback that uses up random numbers, here as many as there were steps in this process."""

    def on_step_end(self, args, state, control, **kwargs):
        torch.rand(int(torch.randint(1, 50, (1,))))


def make_trainer(kind, folder, digits, teacher, **values):
    if kind == "student":
        student = make_student(drop_path_rate=0.2)
        return student_trainer(folder, digits, teacher, student, **{**STUDENT, **values})
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


@pytest.mark.parametrize(
    ("kind", "save_steps", "stop"),
    [("student", 5, 17), ("student", 7, 15), ("paco", 5, 8), ("ldam", 3, 8)],
    ids=["student, in an epoch", "student, between epochs", "paco", "ldam"],
)
def test_interrupted_and_undisturbed_runs_end_alike(tmp_path, digits, teacher, kind, save_steps, stop):
    """Whatever was cut off, another number of workers, and whoever else draws random numbers."""
    undisturbed = make_trainer(kind, tmp_path / "undisturbed", digits, teacher, save_strategy="no")
    undisturbed.train()
    values = {"save_steps": save_steps}
    trainer = make_trainer(kind, tmp_path / "cut", digits, teacher, **values)
    trainer.add_callback(StopAt(stop))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    torch.manual_seed(123)
    trainer = make_trainer(kind, tmp_path / "cut", digits, teacher, dataloader_num_workers=2, **values)
    trainer.add_callback(DrawNumbers())
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer), weights(undisturbed))
    if kind == "paco":
        assert_same(trainer.contrast.state_dict(), undisturbed.contrast.state_dict())


def test_other_seeds_end_otherwise(tmp_path, digits, teacher):
    """The test above would also pass if nothing were random."""
    ends = []
    for seed in (0, 1):
        trainer = make_trainer("student", tmp_path / str(seed), digits, teacher, seed=seed, num_train_epochs=1,
                               drw_start_epoch=None, save_strategy="no")  # fmt: skip
        trainer.train()
        ends.append(weights(trainer)["cls_classifier.weight"])
    assert not torch.equal(*ends)


def test_accumulation_in_an_interrupted_run(tmp_path, digits, teacher):
    values = {"per_device_train_batch_size": 8, "global_batch_size": 32, "save_steps": 5}
    undisturbed = make_trainer("student", tmp_path / "undisturbed", digits, teacher, **values)
    undisturbed.train()
    trainer = make_trainer("student", tmp_path / "cut", digits, teacher, **values)
    trainer.add_callback(StopAt(9))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = make_trainer("student", tmp_path / "cut", digits, teacher, **values)
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer), weights(undisturbed))
    last = sorted((tmp_path / "cut").glob("checkpoint-*"))[-1]
    assert_same(
        load_file(last / "model.safetensors"), load_file(tmp_path / "undisturbed" / last.name / "model.safetensors")
    )


def test_a_resumed_student_has_the_weights_of_its_checkpoint(tmp_path, digits):
    """transformers' own resumption drops the blocks' weights, whose names in files are others, and only warns."""
    values = {"distillation": "none", "save_strategy": "epoch", "num_train_epochs": 1}
    undisturbed = student_trainer(tmp_path, digits, **values)
    undisturbed.train()
    trainer = student_trainer(tmp_path, digits, model=make_student(seed=1), **values)
    trainer.train(resume_from_checkpoint=True)  # the run is at its end already
    assert_same(weights(trainer), weights(undisturbed))


def test_the_best_model_has_the_weights_of_its_checkpoint(tmp_path, digits):
    values = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3, "save_total_limit": None}
    trainer = student_trainer(
        tmp_path, digits, distillation="none", load_best_model_at_end=True, metric_for_best_model="loss", **values
    )
    trainer.train()
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(weights(trainer), best.state_dict())


def test_the_best_model_has_the_average_of_its_checkpoint(tmp_path, digits):
    """Without the optimiser's state in it too, which only going on needs."""
    values = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3, "save_total_limit": None}
    values |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = student_trainer(tmp_path, digits, distillation="none", ema_decay=0.5, save_only_model=True, **values)
    trainer.train()
    trainer.save_model()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{trainer.state.global_step}"
    expected = load_file(best / "ema.safetensors")
    assert_same({name: trainer.averaged_model.state_dict()[name] for name in expected}, expected)


def test_what_was_measured_after_the_checkpoint_is_forgotten(tmp_path, digits, teacher):
    """The record says what the saved weights do, also if a run goes on in another way from an early checkpoint."""
    values = {"eval_strategy": "no", "save_steps": 8, "save_total_limit": 9}
    trainer = make_trainer("student", tmp_path, digits, teacher, **values)
    trainer.train()
    trainer.save_model()
    first = json.loads((tmp_path / "results.json").read_text())
    assert first["weights_sha256"] == weights_digest(tmp_path)

    again = make_trainer("student", tmp_path, digits, teacher, **values, alpha=0.0, learning_rate=8e-3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.lr_scheduler.base_lrs == [8e-3] * len(again.optimizer.param_groups)
    record = json.loads((tmp_path / "results.json").read_text())
    assert "weights_sha256" not in record
    again.save_model()
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["weights_sha256"] == weights_digest(tmp_path) != first["weights_sha256"]
    metrics = again.evaluate()
    for expert, row in record["last"]["accuracies"].items():
        assert row["overall"] == pytest.approx(metrics[f"eval_{expert}_overall"])
    assert record["resumed"] is True


def test_resuming_what_has_ended_leaves_its_record(tmp_path, digits, teacher):
    values = {"num_train_epochs": 1, "drw_start_epoch": None, "save_strategy": "epoch"}
    make_trainer("student", tmp_path, digits, teacher, **values).train()
    first = json.loads((tmp_path / "results.json").read_text())
    make_trainer("student", tmp_path, digits, teacher, **values).train(resume_from_checkpoint="auto")
    again = json.loads((tmp_path / "results.json").read_text())
    assert again == first


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 4}, r"it has no .* \(and 15 other weights\)"),
        ({"num_hidden_layers": 2}, r"it also has .* \(and 15 other weights\)"),
        ({"hidden_size": 32}, r"it has another size of .* \(and \d+ other weights\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, digits, config, message):
    student_trainer(tmp_path, digits, distillation="none", save_strategy="epoch", num_train_epochs=1).train()
    trainer = student_trainer(tmp_path, digits, model=make_student(**config), distillation="none")
    with pytest.raises(ValueError, match=rf"checkpoint-7 is not of this model: {message}"):
        trainer.train(resume_from_checkpoint=True)


def test_epochs_follow_from_the_step_with_another_batch_too(tmp_path, digits):
    """Else a run that goes on with half the batch sees an order twice."""
    values = {"distillation": "none", "save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2}
    student_trainer(tmp_path, digits, max_steps=5, **values).train()
    trainer = student_trainer(tmp_path, digits, per_device_train_batch_size=8, **values)  # 30 steps an epoch
    epochs = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
            epochs.append(train_dataloader.batch_sampler.epoch)

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=True)
    assert epochs == [0] * 25 + [1] * 30


def test_workers_end_with_training(tmp_path, digits):
    """Collected as garbage later, each would be waited for."""
    student_trainer(tmp_path, digits, distillation="none", num_train_epochs=1, dataloader_num_workers=2).train()
    assert multiprocessing.active_children() == []
