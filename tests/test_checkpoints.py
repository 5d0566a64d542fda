"""Tests that checkpoints are complete or absent, whatever happens while they are written."""

import errno
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainerState

from deitlt_hf import DeiTLTTrainer, DeiTLTTrainingArguments
from deitlt_hf.model_folder import STAGING
from deitlt_hf.training.checkpoints import (
    MANIFEST,
    begin_checkpoint,
    checkpoints_in,
    find_corruption,
    finish_checkpoint,
    newest_checkpoint,
    remove_old_checkpoints,
    replace_model,
    whole_checkpoint,
)
from helpers import Harm, make_student


def write_checkpoint(output_dir, step, weight=0.0, left_out=()):
    """Writes small files with the layout of a transformers checkpoint."""
    staged = begin_checkpoint(output_dir) / f"checkpoint-{step}"
    (staged / "deeper").mkdir(parents=True)
    save_file({"weight": torch.full((2,), weight)}, staged / "model.safetensors")
    (staged / "deeper" / "state.bin").write_bytes(b"state")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"python": random.getstate(), "numpy": np.random.get_state()}, staged / name)
    TrainerState(global_step=step, train_batch_size=8).save_to_json(str(staged / "trainer_state.json"))
    for name in left_out:
        (staged / name).unlink()
    finish_checkpoint(staged, output_dir)
    return output_dir / staged.name


def test_a_finished_checkpoint_is_complete_and_replaces_another(tmp_path):
    first = write_checkpoint(tmp_path, 3)
    assert find_corruption(first) is None
    assert {"model.safetensors", "deeper/state.bin"} < set(json.loads((first / MANIFEST).read_text()))
    before = (first / "model.safetensors").read_bytes()
    assert write_checkpoint(tmp_path, 3, 1.0) == first
    assert (first / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_model_that_cannot_be_moved_into_place_is_kept(tmp_path, monkeypatch):
    """The staged weights can be the only copy of a finished training."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    def save(folder):
        Path(folder).mkdir()
        save_file({"weight": torch.ones(2)}, Path(folder) / "model.safetensors")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"the model cannot be written to .*Input/output error"):
        replace_model(tmp_path, save)
    assert (tmp_path / STAGING / "model" / "model.safetensors").is_file()


def truncate(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"weight")


def change(checkpoint):
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(content[:-1] + b"S")


def remove(checkpoint):
    (checkpoint / "deeper" / "state.bin").unlink()


def remove_manifest(checkpoint):
    (checkpoint / MANIFEST).unlink()


def tear_manifest(checkpoint):
    (checkpoint / MANIFEST).write_text('{"model.sa')


DAMAGES = {
    truncate: "model.safetensors has 6 bytes instead of",
    change: "model.safetensors has changed since it was written",
    remove: "deeper/state.bin is missing",
    remove_manifest: "it has no manifest.json",
    tear_manifest: "its manifest.json is not a JSON object",
}


@pytest.mark.parametrize("harm", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, harm):
    whole, torn = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == str(torn)
    harm(torn)
    with pytest.warns(UserWarning, match=rf"{torn} is skipped: {DAMAGES[harm]}"):
        assert newest_checkpoint(tmp_path) == str(whole)
    harm(whole)
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(ValueError, match="no complete checkpoint to resume"),
    ):
        newest_checkpoint(tmp_path)
    if harm is remove_manifest:
        assert whole_checkpoint(str(torn)) == str(torn)
    else:
        with pytest.raises(ValueError, match=f"cannot resume from the checkpoint {torn}: {DAMAGES[harm]}"):
            whole_checkpoint(str(torn))


@pytest.mark.parametrize(
    ("manifest", "what"),
    [
        ({}, "does not list trainer_state.json"),
        ([], "is not a JSON object"),
        ({"../other": {"size": 1, "sha256": ""}}, r"names a file outside of it, \.\./other"),
        ({"/etc/passwd": {"size": 1, "sha256": ""}}, "names a file outside of it, /etc/passwd"),
        ({"model.safetensors": 7}, "does not say what model.safetensors should be"),
        ({"model.safetensors": {"size": "x" * 9999, "sha256": 1}}, r"instead of x+\.\.\.$"),
    ],
)
def test_an_incomplete_manifest_counts_as_damaged(tmp_path, manifest, what):
    checkpoint = write_checkpoint(tmp_path, 3)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert re.search(what, find_corruption(checkpoint))


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_files_needed_to_resume_must_exist(tmp_path, name):
    """Files needed to resume must exist, even if the manifest does not list them.

    Otherwise a run resumes without its optimiser state, silently, and gives other results.
    """
    what = "weights" if name.startswith("model") else name
    checkpoint = write_checkpoint(tmp_path, 3, left_out=[name])
    assert f"does not list {what}" in find_corruption(checkpoint)
    (checkpoint / MANIFEST).unlink()  # plain transformers writes no manifest
    if name in ("trainer_state.json", "model.safetensors"):
        with pytest.raises(ValueError, match=f"it has no {what}"):
            whole_checkpoint(str(checkpoint))
    else:
        with pytest.warns(UserWarning, match=f"has no {name}: these start from scratch"):
            whole_checkpoint(str(checkpoint))


def hostile(path):
    torch.save({"state": Harm()}, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def of_something_else(path):
    torch.save([1, 2], path)


@pytest.mark.parametrize("harm", [hostile, cut, empty, of_something_else])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_malicious_or_damaged_files_run_no_code(tmp_path, monkeypatch, name, harm):
    """Damaged or malicious files run no code and give one message that names the file.

    The message leaves out torch's advice to switch off its protection.
    """
    monkeypatch.chdir(tmp_path)
    checkpoint = write_checkpoint(tmp_path, 3)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
        torch.save({"weight": torch.zeros(2)}, checkpoint / name)
    harm(checkpoint / name)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(ValueError, match=name) as raised:
        whole_checkpoint(str(checkpoint))
    assert "weights_only" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"\xff\x00", b'{"global_step": "3"}', b'{"global_step": 3, "from_the_future": 1}',
                b'{"global_step": 3, "train_batch_size": 8, "log_history": [1]}']
)  # fmt: skip
def test_a_damaged_state_of_the_trainer_is_named(tmp_path, content):
    checkpoint = write_checkpoint(tmp_path, 3)
    (checkpoint / "trainer_state.json").write_bytes(content)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"trainer_state\.json"):
        whole_checkpoint(str(checkpoint))


def test_checkpoints_are_ordered_by_step_not_by_time(tmp_path):
    """Checkpoints are ordered by step, not by time. Otherwise a wrong clock would have each new checkpoint removed."""
    for step in (9, 10, 2):
        write_checkpoint(tmp_path, step)
    for step, days in ((9, 2), (10, 0), (2, 1)):
        os.utime(tmp_path / f"checkpoint-{step}", (time.time() + 86400 * days,) * 2)
    (tmp_path / "checkpoint-99-by-hand").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    remove_old_checkpoints(tmp_path, 2, None)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    write_checkpoint(tmp_path, 11)
    remove_old_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-9"))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-11"]
    remove_old_checkpoints(tmp_path, None, None, step=9)  # the run continues from an earlier step
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9"]
    assert (tmp_path / "checkpoint-99-by-hand").is_dir()


def test_a_run_without_a_checkpoint_starts_and_keeps_a_finished_model(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    (tmp_path / "results.json").write_text("{}")
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"finished")
    with pytest.raises(ValueError, match="no complete checkpoint"):
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
    """Makes the second-to-last file of a step's checkpoint fail, after the weights have been written."""
    save = Trainer._save_rng_state

    def failing(self, output_dir):
        if self.state.global_step == step:
            raise error
        return save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_rng_state", failing)


def test_a_run_killed_while_saving_resumes_from_the_previous_checkpoint(tmp_path, digits, monkeypatch):
    with monkeypatch.context() as patched:
        fail_at(patched, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, digits).train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    (tmp_path / STAGING).mkdir()  # a killed process leaves this folder
    trainer, counter = make_trainer(tmp_path, digits), Steps()
    trainer.add_callback(counter)
    trainer.train(resume_from_checkpoint="auto")
    assert counter.steps == [5, 6, 7]
    assert checkpoints(tmp_path) == ["checkpoint-6", "checkpoint-7"]


def test_two_runs_cannot_use_one_folder(tmp_path, digits):
    """A second run in a used folder is refused; when the first process ends, in any way, the folder is free."""
    code = f"""
import time
from deitlt_hf.training.output_folder import run_lock
with run_lock({str(tmp_path)!r}):
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


def test_a_full_disk_gives_one_message_and_keeps_the_previous_checkpoint(tmp_path, digits, monkeypatch):
    fail_at(monkeypatch, 4, OSError(errno.ENOSPC, "No space left on device"))
    sentence = r"the checkpoint of step 4 cannot be written .* No space left"
    with pytest.raises(OSError, match=sentence):
        make_trainer(tmp_path, digits).train()
    assert find_corruption(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / "checkpoint-4").exists()


def test_the_last_complete_checkpoint_is_kept(tmp_path, digits):
    make_trainer(tmp_path, digits, save_total_limit=1).train()
    last = checkpoints(tmp_path)
    assert last == ["checkpoint-7"]
    assert find_corruption(tmp_path / last[0]) is None


def test_the_recorded_best_checkpoint_exists(tmp_path, digits):
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
    assert find_corruption(best) is None
    state = json.loads((tmp_path / checkpoints(tmp_path)[-1] / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    saved = torch.load(tmp_path / checkpoints(tmp_path)[-1] / "scheduler.pt", weights_only=True)
    assert saved["last_epoch"] > 0


def test_a_failed_save_keeps_the_previous_model(tmp_path, digits, monkeypatch):
    trainer = make_trainer(tmp_path, digits, max_steps=1)
    trainer.train()
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(self, folder, **kwargs):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(trainer.model), "save_pretrained", fail)
    with pytest.raises(OSError, match=r"the model cannot be written to .*No space left"):
        trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
