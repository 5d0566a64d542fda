"""Checkpoints are whole or not there, whatever happens while they are written."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from conftest import make_student
from deitlt_hf import DeiTLTTrainer, DeiTLTTrainingArguments
from deitlt_hf.training.checkpoints import (
    MANIFEST,
    STAGING,
    begin_checkpoint,
    damage,
    finish_checkpoint,
    newest_checkpoint,
    whole_checkpoint,
)


def write_checkpoint(output_dir, step, content=b"weights"):
    staged = begin_checkpoint(output_dir) / f"checkpoint-{step}"
    (staged / "deeper").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(content)
    (staged / "deeper" / "state.pt").write_bytes(b"state")
    return finish_checkpoint(staged, output_dir)


def test_a_finished_checkpoint_is_whole_and_replaces_another(tmp_path):
    first = write_checkpoint(tmp_path, 3)
    assert damage(first) is None
    assert set(json.loads((first / MANIFEST).read_text())) == {"model.safetensors", "deeper/state.pt"}
    assert write_checkpoint(tmp_path, 3, b"others") == first
    assert (first / "model.safetensors").read_bytes() == b"others"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def truncate(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"weight")


def change(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"weightS")


def remove(checkpoint):
    (checkpoint / "deeper" / "state.pt").unlink()


def remove_manifest(checkpoint):
    (checkpoint / MANIFEST).unlink()


def tear_manifest(checkpoint):
    (checkpoint / MANIFEST).write_text('{"model.sa')


DAMAGES = {
    truncate: "model.safetensors has 6 bytes instead of 7",
    change: "model.safetensors has changed since it was written",
    remove: "deeper/state.pt is missing",
    remove_manifest: "it has no manifest.json",
    tear_manifest: "its manifest.json is not valid JSON",
}


@pytest.mark.parametrize("harm", DAMAGES)
def test_a_damaged_checkpoint_is_left_out_and_named(tmp_path, harm):
    whole, torn = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == str(torn)
    harm(torn)
    with pytest.warns(UserWarning, match=rf"{torn} is left out: {DAMAGES[harm]}"):
        assert newest_checkpoint(tmp_path) == str(whole)
    harm(whole)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="no whole checkpoint to go on"):
        newest_checkpoint(tmp_path)
    if harm is remove_manifest:
        assert whole_checkpoint(str(torn)) == str(torn)
    else:
        with pytest.raises(ValueError, match=f"cannot go on from the checkpoint {torn}: {DAMAGES[harm]}"):
            whole_checkpoint(str(torn))


def test_a_run_without_a_checkpoint_begins_and_a_finished_model_is_kept(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    (tmp_path / "results.json").write_text("{}")
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"finished")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        newest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        whole_checkpoint(str(tmp_path / "checkpoint-1"))


def make_trainer(folder, digits, **values):
    args = DeiTLTTrainingArguments(
        output_dir=str(folder),
        distillation="none",
        per_device_train_batch_size=32,
        repeated_augmentation=1,
        train_crop="padded",
        num_train_epochs=1,
        warmup_epochs=0,
        **{"eval_strategy": "no", "save_steps": 2, "save_total_limit": 2, "save_strategy": "steps", **values},
    )
    return DeiTLTTrainer(model=make_student(), args=args, train_dataset=digits["train"], eval_dataset=digits["test"])


def checkpoints(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("checkpoint", STAGING)))


class Steps(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def fail_at(monkeypatch, step, error):
    """Makes the last but one file of a step's checkpoint fail, when the weights are written already."""
    save = Trainer._save_rng_state

    def failing(self, output_dir):
        if self.state.global_step == step:
            raise error
        return save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_rng_state", failing)


def test_a_run_that_dies_while_saving_goes_on_from_the_checkpoint_before(tmp_path, digits, monkeypatch):
    with monkeypatch.context() as patched:
        fail_at(patched, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, digits).train()
    assert checkpoints(tmp_path) == [STAGING, "checkpoint-2", "checkpoint-4"]
    trainer, counter = make_trainer(tmp_path, digits), Steps()
    trainer.add_callback(counter)
    trainer.train(resume_from_checkpoint="auto")
    assert counter.steps == [5, 6, 7]
    assert checkpoints(tmp_path) == ["checkpoint-6", "checkpoint-7"]


def test_two_runs_do_not_share_a_folder(tmp_path, digits):
    """The other one is a process of its own; when it is gone, however it ended, the folder is free again."""
    code = f"""
import time
from deitlt_hf.training.report import only_run
with only_run({str(tmp_path)!r}):
    print("locked", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(FileExistsError, match="another run is writing to"):
            make_trainer(tmp_path, digits).train()
        assert checkpoints(tmp_path) == []
    finally:
        other.kill()
        other.wait()
    make_trainer(tmp_path, digits, max_steps=1).train()
    assert not (tmp_path / ".lock").exists()


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_checkpoint_before(tmp_path, digits, monkeypatch):
    fail_at(monkeypatch, 4, OSError(errno.ENOSPC, "No space left on device"))
    sentence = r"the checkpoint of step 4 cannot be written to .*: \[Errno 28\] No space left on device; those before"
    with pytest.raises(OSError, match=sentence):
        make_trainer(tmp_path, digits).train()
    assert damage(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / "checkpoint-4").exists()


def test_the_last_whole_checkpoint_is_kept(tmp_path, digits):
    make_trainer(tmp_path, digits, save_total_limit=1).train()
    last = checkpoints(tmp_path)
    assert last == ["checkpoint-7"]
    assert damage(tmp_path / last[0]) is None


def test_the_best_checkpoint_is_found_where_it_is(tmp_path, digits):
    trainer = make_trainer(
        tmp_path,
        digits,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        save_total_limit=1,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert damage(best) is None
    state = json.loads((tmp_path / checkpoints(tmp_path)[-1] / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    saved = torch.load(tmp_path / checkpoints(tmp_path)[-1] / "scheduler.pt", weights_only=True)
    assert saved["last_epoch"] > 0


def test_a_model_that_cannot_be_written_leaves_the_one_before(tmp_path, digits, monkeypatch):
    trainer = make_trainer(tmp_path, digits, max_steps=1)
    trainer.train()
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(self, folder, **kwargs):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(trainer.model), "save_pretrained", fail)
    with pytest.raises(OSError, match=r"the model cannot be written to .*No space left on device; make room there"):
        trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
