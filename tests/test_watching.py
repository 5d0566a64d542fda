"""Tests of features during a run: moving averages, checks of numbers, the log, and stopping on request."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from deitlt_hf import DeiTLTForImageClassification, FlatTeacherTrainer, FlatTeacherTrainingArguments
from deitlt_hf.data.images import ImageDataset
from deitlt_hf.recipes import DataArguments, TeacherArguments, parse_arguments
from deitlt_hf.training import run_log
from deitlt_hf.training.checkpoints import find_corruption
from deitlt_hf.training.guards import SaveByMinutes
from deitlt_hf.training.run_log import draw_curves, read_log
from deitlt_hf.training.runs import train_teacher
from helpers import (
    ROOT,
    StopAt,
    assert_same,
    fixed_batch,
    gradients,
    make_student,
    student_arguments,
    student_trainer,
    teacher_trainer,
    trainer_of,
    weights,
)

# ---- Moving average ----


class Weights(TrainerCallback):
    """A callback that keeps the weights after every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: value.clone() for name, value in model.state_dict().items()})


def test_moving_average_matches_its_definition_and_is_evaluated_and_saved(tmp_path, digits, capsys):
    kept = Weights()
    trainer = student_trainer(
        tmp_path, digits, distillation="none", num_train_epochs=1, ema_decay=0.9, callbacks=[kept]
    )
    expected = weights(trainer)
    trainer.train()
    for step in kept.seen:
        expected = {name: 0.9 * value + 0.1 * step[name] for name, value in expected.items()}
    trainer.save_model()
    averaged = DeiTLTForImageClassification.from_pretrained(tmp_path / "ema")
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert_same(DeiTLTForImageClassification.from_pretrained(tmp_path).state_dict(), kept.seen[-1])
    student_trainer(tmp_path, digits, distillation="none", num_train_epochs=1, overwrite=True).train()
    assert not (tmp_path / "ema").exists()
    assert len(read_log(tmp_path / "log.jsonl")) == 9  # 7 steps, the end of training, and its evaluation
    accuracies = trainer.results.content["last"]["accuracies"]
    assert list(accuracies) == ["mean", "cls", "distillation", "ema_mean", "ema_cls", "ema_distillation"]
    alone = student_trainer(tmp_path / "alone", digits, model=averaged, distillation="none")
    assert alone.evaluate()["eval_accuracy"] == accuracies["ema_mean"]["overall"]


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_moving_average_resumes(tmp_path, digits, kind):
    make = student_trainer if kind == "student" else teacher_trainer
    values = {"save_strategy": "steps", "save_steps": 4, "ema_decay": 0.9, "num_train_epochs": 2}
    values |= {"distillation": "none"} if kind == "student" else {"bf16": True, "use_cpu": True}
    undisturbed = make(tmp_path / "undisturbed", digits, **values)
    undisturbed.train()
    cut = make(tmp_path / "cut", digits, **values)
    cut.add_callback(StopAt(7))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = make(tmp_path / "cut", digits, **values)
    again.train(resume_from_checkpoint=True)
    assert_same(again.averaged_model.state_dict(), undisturbed.averaged_model.state_dict())
    assert not torch.equal(
        *(model.state_dict()[next(iter(weights(again)))] for model in (again.model, again.ema.model))
    )


# ---- Loss normalisation ----


def test_normalisation_of_the_authors(tmp_path, digits):
    """The authors' normalisation is the mean of the micro-batches' means, each divided by its own sum of weights."""
    batch, model = fixed_batch(digits), make_student(drop_path_rate=0.0)
    values = {"distillation": "none", "drw_start_epoch": 0, "mixing_in_drw": False, "per_device_train_batch_size": 16}
    values["gradient_accumulation_steps"] = 4
    trainer = student_trainer(tmp_path, digits, model=model, loss_normalization="per_process", **values)
    loss, found = gradients(trainer, batch, 4)
    model.zero_grad()
    expected = 0
    for part in range(4):
        images, labels = (value[16 * part : 16 * (part + 1)] for value in batch.values())
        outputs = model(images)
        cls_loss = torch.nn.functional.cross_entropy(outputs.cls_logits, labels)
        distillation_loss = torch.nn.functional.cross_entropy(outputs.distillation_logits, labels, trainer.drw_weights)
        expected = expected + (cls_loss + distillation_loss) / 2 / 4
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-7, rtol=1e-4)
    whole, _ = gradients(student_trainer(tmp_path, digits, model=model, **values), batch, 4)
    assert abs(whole - loss) > 1e-4


# ---- Numbers that are not finite ----


class PoisonGradient(TrainerCallback):
    def __init__(self, *steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            next(model.parameters()).grad.view(-1)[0] = float("nan")


@pytest.mark.parametrize("make", [student_trainer, teacher_trainer])
def test_an_update_that_is_not_finite_can_be_skipped(tmp_path, digits, make):
    values = {"distillation": "none"} if make is student_trainer else {"sam_rho": [0.1]}
    trainer = make(tmp_path, digits, on_nonfinite="skip", num_train_epochs=1, logging_steps=1, **values)
    kept = Weights()
    for callback in (PoisonGradient(2, 4), kept):
        trainer.callback_handler.callbacks.insert(0, callback)
    trainer.train()
    learned = {name for name, _ in trainer.model.named_parameters()}
    for step in (2, 4):
        assert_same(*({name: kept.seen[at][name] for name in learned} for at in (step, step - 1)))
    assert not torch.equal(*(kept.seen[at][next(iter(learned))] for at in (3, 2)))
    counted = [entry.get("skipped_steps") for entry in trainer.state.log_history if "loss" in entry]
    assert counted[:5] == [None, None, 1, 1, 2]


def test_a_limit_ends_a_run_that_skips_all_its_updates(tmp_path, digits):
    trainer = student_trainer(
        tmp_path, digits, distillation="none", on_nonfinite="skip", nonfinite_limit=2, logging_steps=100,
        callbacks=[PoisonGradient(*range(3, 100))],
    )  # fmt: skip
    sentence = r"not finite in 3 steps in a row \(nonfinite_limit\), the last at step 6 .*cls_loss 1"
    with pytest.raises(FloatingPointError, match=sentence):
        trainer.train()


class PoisonWeight(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            next(model.parameters()).data.view(-1)[0] = float("nan")


@pytest.mark.parametrize("step", [7, 14])
@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_a_model_that_is_not_finite_is_neither_saved_nor_evaluated(tmp_path, digits, step, strategy):
    """A model with non-finite weights is neither saved nor evaluated, in the last step of an epoch or of the run."""
    values = {"distillation": "none", "save_strategy": strategy, "eval_strategy": strategy, "logging_steps": 100}
    trainer = student_trainer(tmp_path, digits, **values, callbacks=[PoisonWeight(step)])
    with pytest.raises(FloatingPointError, match="loss or a weight is not finite at step"):
        trainer.train()
    saved = ["checkpoint-7"] if step == 14 and strategy == "epoch" else []
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == saved
    assert json.loads((tmp_path / "results.json").read_text())["finished"] is False
    trainer.model.load_state_dict(make_student().state_dict())
    trainer.optimizer = None
    trainer.remove_callback(PoisonWeight)
    trainer.args.overwrite = True
    trainer.train()  # with other values, as a user does in a notebook
    assert trainer.state.global_step == 14


def test_one_loss_that_is_not_finite_does_not_spoil_the_log(tmp_path, digits):
    class Bad(type(student_trainer(tmp_path, digits, distillation="none"))):
        def compute_training_loss(self, model, batch):
            loss = super().compute_training_loss(model, batch)
            return loss * float("nan") if self.state.global_step == 3 else loss

    args = student_arguments(tmp_path, distillation="none", num_train_epochs=1, on_nonfinite="skip")
    trainer = Bad(model=make_student(), args=args, train_dataset=digits["train"], eval_dataset=digits["test"])
    trainer.train()
    losses = [entry["loss"] for entry in read_log(tmp_path / "log.jsonl") if "loss" in entry]
    assert len(losses) == 7
    assert losses[3] == 0.0
    assert min(losses[4:]) > 1
    trainer.run_file.is_open = True
    trainer.log({"odd": np.float32(0.5), "bad": float("inf")})
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert entry["odd"] == 0.5
    assert entry["bad"] is None


# ---- Waiting for the device ----


class Readings(TorchDispatchMode):
    """Counts where the code reads values from a device, or where shapes depend on values."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            frames = [Path(frame.filename).name for frame in traceback.extract_stack() if "src" in frame.filename]
            self.places[frames[-1] if frames else "elsewhere"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    # Allowed: these files read values that are always on the CPU.
    ("kind", "allowed"),
    [("student", {"modeling_deitlt.py"}), ("paco", {"momentum_encoder.py"}), ("ldam", {"ldam.py"})],
)
def test_a_step_does_not_wait_for_the_device(tmp_path, digits, teacher, kind, allowed):
    trainer = trainer_of(kind, tmp_path, digits, teacher, drw_start_epoch=0, save_strategy="no", eval_strategy="no")
    trainer.create_optimizer()
    batches = [next(iter(trainer.get_train_dataloader()))]
    with Readings() as readings:
        trainer.training_step(trainer.model, trainer.get_batch_samples(iter(batches), 1, trainer.args.device)[0][0])
    assert set(readings.places) == allowed
    if kind == "paco":
        assert trainer.contrast.added.device.type == "cpu"


# ---- The log ----


def without_times(entry):
    return {name: value for name, value in entry.items() if not name.endswith(("runtime", "_per_second"))}


def test_every_log_is_a_line_and_a_resumed_run_appends(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(run_log, "draw_curves", draw_curves)
    values = {"distillation": "none", "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 4}
    values |= {"num_train_epochs": 3, "drw_start_epoch": 2}
    undisturbed = student_trainer(tmp_path / "undisturbed", digits, **values)
    undisturbed.train()
    cut = student_trainer(tmp_path / "cut", digits, **values, callbacks=[StopAt(14)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    with (tmp_path / "cut" / "log.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')  # incomplete line
    student_trainer(tmp_path / "cut", digits, **values).train(resume_from_checkpoint=True)
    expected, found = (
        [without_times(entry) for entry in read_log(tmp_path / name / "log.jsonl")] for name in ("undisturbed", "cut")
    )
    assert [entry["step"] for entry in expected if "loss" in entry] == list(range(1, 22))
    assert [entry["step"] for entry in expected if "eval_cls_head" in entry] == [7, 14, 21]
    assert found[:-1] == expected[:-1]  # the last entry has means over the steps of its own process
    picture = Image.open(tmp_path / "cut" / "training_curves.png").convert("L")
    assert picture.size[0] > 600
    assert len(picture.getcolors(256)) > 50


def test_curves_leave_out_values_that_are_no_numbers(tmp_path):
    entries = [
        {"epoch": 1, "loss": 2.0},
        {"epoch": 2, "loss": "2"},
        {"epoch": "3", "loss": 1.0},
        {"epoch": 4, "loss": 1.0},
    ]
    draw_curves(entries, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 400


@pytest.mark.parametrize(("pause", "pictures"), [(0, 3), (1000, 1)])
def test_quick_evaluations_share_a_picture(tmp_path, monkeypatch, pause, pictures):
    """Evaluations within half a minute share a picture, and the last one is in it, wherever the run ends."""
    drawn = []
    monkeypatch.setattr(run_log, "draw_curves", lambda entries, *_: drawn.append(len(entries)))
    monkeypatch.setattr(run_log, "SECONDS_BETWEEN_PICTURES", pause)
    log, state = run_log.RunFile(tmp_path), SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=9)
    log.on_train_begin(None, state, None)
    for state.global_step in (2, 4, 6):
        log.on_log(None, state, None, {"eval_accuracy": 0.5})
        log.on_evaluate(None, state, None)
    log.on_train_end(None, state, None)
    assert len(drawn) == pictures
    assert drawn[-1] == 3


def test_evaluation_alone_writes_no_log(tmp_path, digits):
    student_trainer(tmp_path, digits, distillation="none").evaluate()
    assert list(tmp_path.iterdir()) == []


def test_lines_show_the_remaining_time(tmp_path, digits, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 5))  # about two looks at it in a step
    watch = SimpleNamespace(perf_counter=lambda: next(clock), monotonic=time.monotonic)
    monkeypatch.setattr(run_log, "time", watch)
    student_trainer(tmp_path, digits, distillation="none", num_train_epochs=2).train()
    lines = capsys.readouterr().out.splitlines()
    estimate = next(line for line in lines if "s per step" in line)
    assert estimate.endswith("left without evaluations")
    assert any(line.startswith("epoch 2.00  step 14/14") and line.endswith("  0:00:00 left") for line in lines)
    assert any(line.startswith("epoch 1.00  step 7/14") and "0:01:" in line for line in lines)


# ---- Saving by the clock ----


def test_a_run_saves_by_the_clock_and_ends_as_without(tmp_path, digits, monkeypatch):
    """A checkpoint of an epoch also counts, and those of the clock do not change a run."""
    values = {"distillation": "none", "save_strategy": "epoch", "save_total_limit": None}
    plain = student_trainer(tmp_path / "plain", digits, **values)
    plain.train()
    trainer = student_trainer(tmp_path / "run", digits, **values, save_minutes=0.05)
    clock = SimpleNamespace(monotonic=lambda: trainer.state.global_step)  # a second for each step
    monkeypatch.setattr("deitlt_hf.training.guards.time", clock)
    trainer.train()
    steps = sorted(int(path.name.partition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert steps == [3, 6, 7, 10, 13, 14]
    assert_same(weights(trainer), weights(plain))
    assert trainer.settings() == plain.settings()


def test_all_processes_save_after_the_same_step(monkeypatch):
    """The vote of the first process decides, one step late; a save in between makes earlier votes void."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr("deitlt_hf.training.guards.time", clock)
    args = SimpleNamespace(save_minutes=1, world_size=2)
    voters = {rank: SaveByMinutes() for rank in range(2)}
    states = {rank: SimpleNamespace(is_world_process_zero=rank == 0) for rank in voters}
    saved = {rank: [] for rank in voters}
    for rank, voter in voters.items():
        voter.on_train_begin(args, states[rank], None)
    for step in range(8):
        clock.now = 40.0 * step
        total = sum(voter.vote(torch.device("cpu")) for voter in voters.values())
        for rank, voter in voters.items():
            clock.now += 100.0 * rank  # the clock of the other process does not matter
            control = SimpleNamespace(should_save=step == 2)
            voter.count(total[0])
            voter.on_step_end(args, states[rank], control)
            if control.should_save:
                saved[rank].append(step)
                voter.on_save(args, states[rank], control)
            clock.now = 40.0 * step
    assert saved[0] == saved[1] == [2, 5]


# ---- Stopping on request ----


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read()[-3000:])


SLOW_TO_STOP = """
import builtins, sys, time
from deitlt_hf.cli import main

def slow_print(*values, print=print, **options):
    time.sleep(3 * str(values[0]).startswith("Stopped by"))
    print(*values, **options)

builtins.print = slow_print
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)], ids=str
)
def test_a_signal_ends_a_run_with_a_checkpoint_to_resume_from(tmp_path, processes, number):
    """A signal ends a run with a checkpoint to resume from, in real processes.

    Either all processes of a group receive it twice, including data loaders, or only one rank does. The launcher kills
    rank 0, which is slow to print, if the other one ends before it.
    """
    command = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    ]  # fmt: skip
    script = tmp_path.with_suffix(".py")
    script.write_text(SLOW_TO_STOP)
    command += [
        str(script),
        "train-teacher",
        "--recipe",
        "digits_lt",
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
    ]
    command += ["--logging_steps", "1", "--save_strategy", "no", "--num_train_epochs", "2000"]
    command += ["--eval_strategy", "steps", "--eval_steps", "2", "--dataloader_num_workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        wait_for(process, "step 5/")
        if processes == 1:
            os.killpg(process.pid, number)
            os.killpg(process.pid, number)
        else:
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
            os.kill(int(children.stdout.split()[0]), signal.SIGTERM)
        asked = time.monotonic()
        wait_for(process, f"Stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'} after step")
        assert time.monotonic() - asked < 20
        process.communicate(timeout=60)
    assert process.returncode == (128 + number if processes == 1 else 1)  # 1 is torchrun's exit code
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert find_corruption(checkpoint) is None
    assert json.loads((tmp_path / "results.json").read_text())["finished"] is False
    assert not (tmp_path / "model.safetensors").exists()


def test_signal_handlers_are_restored(tmp_path, digits):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    student_trainer(tmp_path, digits, distillation="none", max_steps=1).train()
    assert [signal.getsignal(number) for number in numbers] == before


class AskToStop(TrainerCallback):
    def __init__(self, step, number=signal.SIGTERM, times=1):
        self.step, self.number, self.times = step, number, times

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def test_ctrl_c_leaves_a_checkpoint_and_a_second_one_ends_at_once(tmp_path, digits, capfd, monkeypatch):
    values = {"distillation": "none", "eval_strategy": "no"}
    with pytest.raises(KeyboardInterrupt):
        student_trainer(tmp_path / "one", digits, **values, callbacks=[AskToStop(3, signal.SIGINT)]).train()
    assert find_corruption(tmp_path / "one" / "checkpoint-3") is None
    output = capfd.readouterr()
    assert "Stopped by Ctrl-C after step 3" in output.out
    assert "press it again to end at once" in output.err
    monkeypatch.setattr("deitlt_hf.training.guards.SAME_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        student_trainer(tmp_path / "two", digits, **values, callbacks=[AskToStop(3, signal.SIGINT, times=2)]).train()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["log.jsonl", "results.json"]
    assert "Stopped" not in capfd.readouterr().out


@pytest.mark.parametrize("step", [7, 9])
def test_a_run_stopped_on_request_resumes_to_the_same_end(tmp_path, digits, step):
    """A run that was stopped on request ends as an undisturbed one.

    An evaluation due at step 7, which may be the best, is made, too.
    """
    values = {"distillation": "none", "eval_strategy": "epoch"}
    undisturbed = student_trainer(tmp_path / "undisturbed", digits, **values)
    undisturbed.train()
    with pytest.raises(SystemExit) as stopped:
        student_trainer(tmp_path / "cut", digits, **values, callbacks=[AskToStop(step)]).train()
    assert stopped.value.code == 143
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    trainer = student_trainer(tmp_path / "cut", digits, **values)
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer), weights(undisturbed))
    found, expected = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("cut", "undisturbed"))
    assert (found["last"], found["best"]) == (expected["last"], expected["best"])
    evaluated = [entry["step"] for entry in read_log(tmp_path / "cut" / "log.jsonl") if "eval_accuracy" in entry]
    assert evaluated == [7, 14]


def test_the_best_checkpoint_can_be_one_whose_evaluation_was_skipped(tmp_path, digits):
    values = {"distillation": "none", "eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3}
    values |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "ema_decay": 0.5}
    undisturbed = student_trainer(tmp_path / "undisturbed", digits, **values)
    undisturbed.train()
    with pytest.raises(SystemExit):
        student_trainer(tmp_path / "cut", digits, **values, callbacks=[AskToStop(7)]).train()
    trainer = student_trainer(tmp_path / "cut", digits, **values)
    trainer.train(resume_from_checkpoint=True)
    for run in (trainer, undisturbed):
        assert Path(run.state.best_model_checkpoint).name == "checkpoint-7"
        best = load_file(Path(run.state.best_model_checkpoint) / "ema.safetensors")
        assert_same(run.averaged_model.state_dict(), best)
    assert_same(weights(trainer), weights(undisturbed))


def test_a_late_stop_request_finishes_the_run_and_starts_nothing_else(tmp_path, monkeypatch):
    """A signal near the end finishes the run and starts nothing else.

    distill.py trains a teacher first; a signal in its last moments must not start the student.
    """
    evaluate = FlatTeacherTrainer.evaluate

    def slow(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(FlatTeacherTrainer, "evaluate", slow)
    command_line = ["--recipe", "digits_lt", "--output_dir", str(tmp_path), "--max_steps", "2", "--eval_strategy", "no"]
    classes = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)
    _, *arguments = parse_arguments("teacher", classes, [*command_line, "--save_strategy", "no"])
    with pytest.raises(SystemExit) as stopped:
        train_teacher(*arguments)
    assert stopped.value.code == 143
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "results.json").read_text())["finished"]


# ---- Waiting for images ----


@pytest.mark.parametrize(("waiting", "notes"), [(6.0, 1), (4.0, 0)])
def test_a_run_that_waits_for_images_says_so_once(monkeypatch, capsys, waiting, notes):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(run_log, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer = SimpleNamespace(waited=0.0)
    args = SimpleNamespace(dataloader_num_workers=0, image_cache=None)
    note = run_log.WaitingNote(trainer)
    note.on_train_begin(args, None, None)
    for step in range(1, 200):  # 10 seconds each
        trainer.waited += waiting
        note.on_step_end(args, SimpleNamespace(global_step=step, is_world_process_zero=True), None)
    assert capsys.readouterr().out.count("training waits for images during 60% of the time") == notes


def test_waiting_is_measured_in_a_run(tmp_path, digits, monkeypatch):
    get = ImageDataset.__getitem__

    def slowly(images, index):
        time.sleep(0.01 if images.views else 0)  # in training
        return get(images, index)

    monkeypatch.setattr(ImageDataset, "__getitem__", slowly)
    trainer = student_trainer(tmp_path, digits, distillation="none", max_steps=3)
    trainer.train()
    assert trainer.waited >= 3 * 32 * 0.01
    assert any(isinstance(callback, run_log.WaitingNote) for callback in trainer.callback_handler.callbacks)


def test_advice_fits_the_run():
    args = SimpleNamespace(dataloader_num_workers=0, image_cache=None)
    assert "raise dataloader_num_workers (now 0" in run_log.waiting_advice(args, 0.8)
    assert "80% of the time" in run_log.waiting_advice(args, 0.8)
    args = SimpleNamespace(dataloader_num_workers=64, image_cache="copies")
    assert "smaller image files" in run_log.waiting_advice(args, 0.8)
