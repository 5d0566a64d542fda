"""Tests that an interrupted and resumed run ends with the same weights as an uninterrupted one, bit for bit."""

import json
import logging
import multiprocessing
import shutil
import sys
import types
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from deitlt_hf.data import load_long_tailed
from deitlt_hf.data.loading import images_hash
from deitlt_hf.io import file_sha256
from deitlt_hf.model_folder import weights_digest
from deitlt_hf.records import read_record
from deitlt_hf.training import resuming
from deitlt_hf.training.run_log import read_log
from deitlt_hf.training.whole_checkpoints import with_master_weights
from helpers import (
    StopAt,
    assert_same,
    make_student,
    student_arguments,
    student_trainer,
    teacher_trainer,
    trainer_of,
    weights,
)


class DrawNumbers(TrainerCallback):
    """A callback that draws random numbers, as many as this process has taken steps."""

    def on_step_end(self, args, state, control, **kwargs):
        torch.rand(int(torch.randint(1, 50, (1,))))


@pytest.mark.parametrize(
    ("kind", "save_steps", "stop"),
    [("student", 5, 17), ("student", 7, 15), ("muon", 5, 17), ("paco", 5, 8), ("ldam", 3, 8)],
    ids=["student, in an epoch", "student, between epochs", "student with Muon", "paco", "ldam"],
)
def test_interrupted_and_undisturbed_runs_end_alike(tmp_path, digits, teacher, kind, save_steps, stop):
    """A resumed run equals an undisturbed one, wherever it was interrupted.

    The number of workers may change, and other code may draw random numbers.
    """
    undisturbed = trainer_of(kind, tmp_path / "undisturbed", digits, teacher, save_strategy="no")
    undisturbed.train()
    values = {"save_steps": save_steps}
    trainer = trainer_of(kind, tmp_path / "cut", digits, teacher, **values)
    trainer.add_callback(StopAt(stop))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    torch.manual_seed(123)
    trainer = trainer_of(kind, tmp_path / "cut", digits, teacher, dataloader_num_workers=2, **values)
    trainer.add_callback(DrawNumbers())
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer), weights(undisturbed))
    if kind == "paco":
        assert_same(trainer.contrast.state_dict(), undisturbed.contrast.state_dict())


def test_a_run_with_balanced_classes_resumes_exactly(tmp_path, digits):
    values = {"sampling": "class_balanced", "distillation": "none", "num_train_epochs": 1, "save_steps": 3}

    def trainer(name):
        return student_trainer(tmp_path / name, digits, save_strategy="steps", **values)

    undisturbed = trainer("undisturbed")
    labels = np.asarray(digits["train"]["label"])
    draws = [index for batch in undisturbed.get_train_dataloader().batch_sampler for index, _ in batch]
    assert np.bincount(labels[draws]).min() > 0.7 * len(draws) / 10  # the rarest class has 6 images
    undisturbed.train()
    cut = trainer("cut")
    cut.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed), weights(undisturbed))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sampling": "fair"}, "sampling must be one of uniform, class_balanced"),
        ({"sampling": "class_balanced", "repeated_augmentation": 3}, "repeated_augmentation must be 1 with sampling"),
    ],
)
def test_a_sampling_that_cannot_be_used_is_refused(tmp_path, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        student_arguments(tmp_path, **values)


def test_other_seeds_give_other_weights(tmp_path, digits, teacher):
    """Other seeds give other weights; otherwise the test above would also pass if nothing were random."""
    ends = []
    for seed in (0, 1):
        trainer = trainer_of("student", tmp_path / str(seed), digits, teacher, seed=seed, num_train_epochs=1,
                               drw_start_epoch=None, save_strategy="no")  # fmt: skip
        trainer.train()
        ends.append(weights(trainer)["cls_classifier.weight"])
    assert not torch.equal(*ends)


def test_gradient_accumulation_in_an_interrupted_run(tmp_path, digits, teacher):
    values = {"per_device_train_batch_size": 8, "global_batch_size": 32, "save_steps": 5}
    undisturbed = trainer_of("student", tmp_path / "undisturbed", digits, teacher, **values)
    undisturbed.train()
    trainer = trainer_of("student", tmp_path / "cut", digits, teacher, **values)
    trainer.add_callback(StopAt(9))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = trainer_of("student", tmp_path / "cut", digits, teacher, **values)
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer), weights(undisturbed))
    last = sorted((tmp_path / "cut").glob("checkpoint-*"))[-1]
    assert_same(
        load_file(last / "model.safetensors"), load_file(tmp_path / "undisturbed" / last.name / "model.safetensors")
    )


def test_a_resumed_student_has_the_weights_of_its_checkpoint(tmp_path, digits):
    """A resumed student has the weights of its checkpoint.

    The blocks' weights have other names in files; transformers' own resumption drops them and only warns.
    """
    values = {"distillation": "none", "save_strategy": "epoch", "num_train_epochs": 1}
    undisturbed = student_trainer(tmp_path, digits, **values)
    undisturbed.train()
    trainer = student_trainer(tmp_path, digits, model=make_student(seed=1), **values)
    trainer.train(resume_from_checkpoint=True)  # the run has already ended
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
    """The best model has its checkpoint's moving average.

    The checkpoint has no optimiser state, which only resuming needs.
    """
    values = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3, "save_total_limit": None}
    values |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = student_trainer(tmp_path, digits, distillation="none", ema_decay=0.5, save_only_model=True, **values)
    trainer.train()
    trainer.save_model()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{trainer.state.global_step}"
    expected = load_file(best / "ema.safetensors")
    assert_same({name: trainer.averaged_model.state_dict()[name] for name in expected}, expected)


def test_measurements_after_the_checkpoint_are_removed(tmp_path, digits, teacher):
    """Measurements after the checkpoint are removed from the record.

    The record describes the saved weights, also if a run continues differently from an early checkpoint.
    """
    values = {"eval_strategy": "no", "save_steps": 8, "save_total_limit": 9}
    trainer = trainer_of("student", tmp_path, digits, teacher, **values)
    trainer.train()
    trainer.save_model()
    first = json.loads((tmp_path / "results.json").read_text())
    assert first["weights_sha256"] == weights_digest(tmp_path)

    again = trainer_of("student", tmp_path, digits, teacher, **values, alpha=0.0, learning_rate=8e-3)
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


def test_resuming_a_finished_run_keeps_its_record(tmp_path, digits, teacher):
    values = {"num_train_epochs": 1, "drw_start_epoch": None, "save_strategy": "epoch"}
    trainer_of("student", tmp_path, digits, teacher, **values).train()
    first = json.loads((tmp_path / "results.json").read_text())
    trainer_of("student", tmp_path, digits, teacher, **values).train(resume_from_checkpoint="auto")
    again = json.loads((tmp_path / "results.json").read_text())
    assert again == first


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 4}, "its num_hidden_layers is 3, not 4"),
        ({"num_hidden_layers": 2}, "its num_hidden_layers is 3, not 2"),
        ({"hidden_size": 32}, "its hidden_size is 16, not 32"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, digits, config, message):
    student_trainer(tmp_path, digits, distillation="none", save_strategy="epoch", num_train_epochs=1).train()
    trainer = student_trainer(tmp_path, digits, model=make_student(**config), distillation="none")
    with pytest.raises(ValueError, match=rf"checkpoint-7 belongs to another run: {message}"):
        trainer.train(resume_from_checkpoint=True)


def test_epochs_follow_from_the_step_with_another_batch_size(tmp_path, digits):
    """Epochs follow from the step, also with another batch size.

    Otherwise a run that resumes with half the batch would use the order of one epoch twice.
    """
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
    """Workers end with training; if they ended at garbage collection, the process would wait for each."""
    before = multiprocessing.active_children()  # a test that failed may have left some
    student_trainer(tmp_path, digits, distillation="none", num_train_epochs=1, dataloader_num_workers=2).train()
    assert not set(multiprocessing.active_children()) - set(before)


# ---- The end of a run ----

SHORT = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "drw_start_epoch": None}


def short(kind, folder, data, **values):
    """A run that ends in the middle of an epoch of seven steps, where no checkpoint would be due."""
    values = {"max_steps": 9, **SHORT, **values}
    if kind == "student":
        return student_trainer(folder, data, distillation="none", **values)
    return teacher_trainer(folder, data, **values)


def run(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def content_of(folder):
    return {path.relative_to(folder): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


LENGTHS = {"max_steps": {}, "epochs": {"max_steps": -1, "num_train_epochs": 1.25}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    """Folders of finished runs, which tests must not change."""
    folders = {}
    for kind in ("student", "teacher"):
        for length, values in LENGTHS.items():
            folders[kind, length] = folder = tmp_path_factory.mktemp(f"{kind}-{length}")
            run(short(kind, folder, digits, **values, ema_decay=0.9 if kind == "student" else None))
    return folders


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_resuming_a_finished_run_does_nothing(finished, digits, capsys, kind, length):
    """Resuming a finished run does nothing.

    transformers would start the epoch of the last step again and take one more step, which changes the model.
    """
    folder = finished[kind, length]
    before, ema = content_of(folder), 0.9 if kind == "student" else None
    for resume in ("auto", True, str(folder / "checkpoint-9")):
        trainer = short(kind, folder, digits, **LENGTHS[length], ema_decay=ema)
        assert trainer.train(resume_from_checkpoint=resume).global_step == 9
        assert content_of(folder) == before
        assert capsys.readouterr().out.count("is finished, with 9 steps: nothing is left to train.") == 1
        assert_same(weights(trainer), type(trainer.model).from_pretrained(folder).state_dict())
    if ema is not None:
        assert_same(
            trainer.averaged_model.state_dict(), type(trainer.model).from_pretrained(folder / "ema").state_dict()
        )


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_run_that_was_killed_before_its_model_was_saved_saves_it_once(finished, tmp_path, digits, kind):
    folder = tmp_path / "run"
    shutil.copytree(finished[kind, "epochs"], folder)
    (folder / "model.safetensors").unlink()
    record = read_record(folder)
    del record["weights_sha256"]
    (folder / "results.json").write_text(json.dumps(record | {"finished": False}))
    checkpoint = (folder / "checkpoint-9" / "manifest.json").read_bytes()
    trainer = run(
        short(kind, folder, digits, **LENGTHS["epochs"], ema_decay=0.9 if kind == "student" else None), "auto"
    )
    assert trainer.state.global_step == 9
    assert (folder / "checkpoint-9" / "manifest.json").read_bytes() == checkpoint
    assert weights_digest(folder) == weights_digest(finished[kind, "epochs"])
    assert read_record(folder)["weights_sha256"] == weights_digest(folder)


def test_a_finished_run_without_checkpoints_has_nothing_to_do(finished, tmp_path, digits):
    shutil.copytree(finished["student", "max_steps"], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    before = content_of(tmp_path / "run")
    short("student", tmp_path / "run", digits).train(resume_from_checkpoint="auto")
    assert content_of(tmp_path / "run") == before
    with pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        short("student", tmp_path / "run", digits, max_steps=11).train(resume_from_checkpoint="auto")


def test_a_run_can_be_made_longer_but_not_shorter(finished, tmp_path, digits):
    shutil.copytree(finished["student", "max_steps"], tmp_path / "run")
    before = content_of(tmp_path / "run")
    with pytest.raises(ValueError, match="has taken 9 steps, more than the 5 of this run"):
        short("student", tmp_path / "run", digits, max_steps=5).train(resume_from_checkpoint="auto")
    with pytest.warns(UserWarning, match=r"weight_decay 0\.3 has no effect: the run is finished, with"):
        short("student", tmp_path / "run", digits, weight_decay=0.3).train(resume_from_checkpoint="auto")
    assert content_of(tmp_path / "run") == before
    trainer = short("student", tmp_path / "run", digits, max_steps=11)
    with pytest.warns(UserWarning, match="resumes with max_steps 11; it began with 9"):
        trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 11


def test_resume_true_needs_a_checkpoint_and_auto_does_not(tmp_path, digits):
    with pytest.raises(ValueError, match=r"there is no checkpoint in .* 'auto' begins without one"):
        short("student", tmp_path, digits).train(resume_from_checkpoint=True)
    assert list(tmp_path.iterdir()) == []
    assert short("student", tmp_path, digits, max_steps=1).train(resume_from_checkpoint="auto").global_step == 1


def test_resuming_from_an_early_checkpoint_removes_later_ones(finished, tmp_path, digits):
    """A run that continues differently from an early checkpoint removes the later checkpoints.

    Otherwise the next `auto` would resume the previous run at its later step.
    """
    shutil.copytree(finished["student", "max_steps"], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-8"
    trainer = short("student", tmp_path / "run", digits, max_steps=9, save_strategy="no", callbacks=None)
    trainer.add_callback(AtEnd())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-8", "checkpoint-9"]


class AtEnd(TrainerCallback):
    """Requests a checkpoint after every step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = True


def test_a_resume_with_unchanged_arguments_gives_no_warning(tmp_path, digits):
    """A resume with unchanged arguments gives no warning; changed arguments take effect.

    Step counts given as a fraction of the run are those of the checkpoint.
    """
    values = {"eval_strategy": "steps", "eval_steps": 0.5, "save_steps": 0.25, "logging_steps": 0.1}
    trainer = short("student", tmp_path, digits, **values)
    trainer.add_callback(StopAt(7))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = short("student", tmp_path, digits, **values)
            again.add_callback(StopAt(8))
            with pytest.raises(KeyboardInterrupt):
                again.train(resume_from_checkpoint="auto")
    finally:
        logger.removeHandler(handler)
    assert not [message for message in messages if "do not match" in message]
    assert not [warning for warning in caught if "run resumes" in str(warning.message)]
    other = short("student", tmp_path, digits, **{**values, "save_steps": 7, "save_total_limit": None})
    other.train(resume_from_checkpoint="auto")
    assert (other.state.eval_steps, other.state.save_steps, other.args.eval_steps) == (5, 7, 0.5)


def test_other_decoders_of_images_are_reported(finished, tmp_path, digits, monkeypatch):
    folder = shutil.copytree(finished["student", "epochs"], tmp_path / "student")
    monkeypatch.setattr(resuming, "decoder_versions", lambda: {"pillow": "99"})
    with pytest.warns(UserWarning, match=r"decoded by pillow 99; it began with pillow"):
        short("student", folder, digits, **LENGTHS["epochs"], ema_decay=0.9).train(resume_from_checkpoint="auto")


# ---- Identity of a run ----


@pytest.fixture(scope="module")
def folder_data(tmp_path_factory):
    """Class folders with images of noise."""
    place = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    for split, number in (("train", 8), ("test", 2)):
        for name in ("ant", "bee", "cat"):
            (place / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = random.randint(0, 255, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(place / split / name / f"{index}.bmp")
    return place


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory, folder_data):
    folder = tmp_path_factory.mktemp("cut")
    trainer = make_small(folder, folder_data)
    trainer.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return folder


def make_small(folder, data_dir, options=None, **values):
    data = load_long_tailed("imagefolder", str(data_dir), **(options or {}))
    values = {"per_device_train_batch_size": 4, "max_steps": 4, **SHORT, **values}
    return student_trainer(folder, data, model=make_student(num_labels=3), distillation="none", **values)


def rename_class(place):
    """Renames a class, which shifts the labels: the trained heads would then belong to other classes."""
    for split in ("train", "test"):
        (place / split / "ant").rename(place / split / "zebra")


def replace_image(place):
    """Replaces an image with another of the same name and size in bytes."""
    path = place / "train" / "bee" / "3.bmp"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + bytes(255 - byte for byte in content[-4:]))


def rename_image(place):
    (place / "train" / "bee" / "3.bmp").rename(place / "train" / "bee" / "99.bmp")


def remove_image(place):
    (place / "train" / "bee" / "3.bmp").unlink()


@pytest.mark.parametrize(
    ("change", "options", "values", "what"),
    [
        (rename_class, {}, {}, "trained on other classes (label 0 was 'ant' and is 'bee')"),
        (remove_image, {}, {}, "trained on other images (class 'bee' had 8, and has 7)"),
        (replace_image, {}, {}, "trained on other images (files, names or labels differ)"),
        (rename_image, {}, {}, "trained on other images (files, names or labels differ)"),
        (None, {"imbalance_ratio": 2}, {}, "trained on other images (class 'bee' had 8, and has 5)"),
        (None, {}, {"cls_loss": "bce"}, "began with cls_loss ce, not bce"),
        (None, {}, {"class_weights": "bee=2"}, "began with class_weights None, not {'bee': 2.0}"),
    ],
)
def test_another_run_is_refused_before_anything_is_written(
    folder_data, cut_run, tmp_path, change, options, values, what
):
    shutil.copytree(folder_data, tmp_path / "data")
    shutil.copytree(cut_run, tmp_path / "run")
    if change is not None:
        change(tmp_path / "data")
    before = content_of(tmp_path / "run")
    trainer = make_small(tmp_path / "run", tmp_path / "data", options, **values)
    with pytest.raises(ValueError, match="belongs to another run") as raised:
        trainer.train(resume_from_checkpoint="auto")
    assert what in str(raised.value)
    assert content_of(tmp_path / "run") == before
    elsewhere = make_small(tmp_path / "other", tmp_path / "data", options, **values)
    with pytest.raises(ValueError, match="belongs to another run"):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert list((tmp_path / "other").iterdir()) == []


def test_the_same_images_elsewhere_are_the_same_run(folder_data, cut_run, tmp_path):
    shutil.copytree(folder_data, tmp_path / "moved")
    shutil.copytree(cut_run, tmp_path / "run")
    assert make_small(tmp_path / "run", tmp_path / "moved").train(resume_from_checkpoint="auto").global_step == 4


def test_hash_of_images_in_tables(digits):
    train = digits["train"]
    assert images_hash(train) == images_hash(train.select(range(len(train))))
    swapped = [1, 0, *range(2, len(train))]
    assert len({images_hash(data) for data in (train, train.select(swapped), train.select(range(9)))}) == 3
    labels = train.remove_columns("label").add_column("label", [0] * len(train))
    assert images_hash(labels.cast_column("label", datasets.ClassLabel(num_classes=10))) != images_hash(train)


@pytest.mark.parametrize("labels", [None, ["ant"], {"0": "ant", "2": "bee"}])
def test_class_names_of_a_damaged_configuration_are_unknown(labels):
    assert resuming.class_names({"id2label": labels}) == []


@pytest.mark.parametrize(
    "text", [b"", b'{"finished": fal', b"[1]", b"\xff\x00", b'{"settings": {"sam_rho": 1}, "data": {}}'],
    ids=["empty", "cut", "list", "binary", "odd"],
)  # fmt: skip
def test_a_damaged_record_gives_a_warning_and_the_run_resumes(folder_data, cut_run, tmp_path, text):
    """A damaged record gives a warning, and the run still resumes.

    A power loss can damage the record; the checkpoints have a copy.
    """
    shutil.copytree(cut_run, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_bytes(text)
    (tmp_path / "run" / "log.jsonl").write_bytes(b'{"step": 1, "loss": 1.0, "epoch": 0.1}\n[1]\n\xff\n{"step": 2, "lo')
    with pytest.warns(UserWarning, match="damaged|without this record") as raised:
        make_small(tmp_path / "run", folder_data).train(resume_from_checkpoint="auto")
    sentences = [str(warning.message) for warning in raised]
    assert any("results.json" in sentence for sentence in sentences)
    assert any("log.jsonl has 3 damaged line(s)" in sentence for sentence in sentences)
    record = read_record(tmp_path / "run")
    assert record["finished"]
    assert record["resumed"]
    assert [entry["step"] for entry in read_log(tmp_path / "run" / "log.jsonl") if "loss" in entry] == [1, 3, 4]


def test_a_state_that_does_not_fit_is_refused_before_anything_is_written(folder_data, cut_run, tmp_path):
    """An optimiser state that does not fit is refused before anything is written.

    A foreign checkpoint can contain one.
    """
    shutil.copytree(cut_run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "manifest.json").unlink()
    torch.save({"state": {}, "param_groups": []}, checkpoint / "optimizer.pt")
    before = content_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"the state of the optimiser .*checkpoint-2 is not of this"):
        make_small(tmp_path / "run", folder_data).train(resume_from_checkpoint=str(checkpoint))
    assert content_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("then", "now", "sentence"),
    [
        (["global_step2/x_optim_states.pt"], {}, "with DeepSpeed; resume it with DeepSpeed, or start with --init_from"),
        (["pytorch_model_fsdp_0/x", "optimizer_0/x"], {}, "with FSDP; resume it with FSDP"),
        (["pytorch_model_fsdp.bin", "optimizer.bin"], {}, None),
        (["optimizer.pt"], {"is_deepspeed_enabled": True}, "without DeepSpeed; resume it without DeepSpeed"),
        (["optimizer.pt"], {"is_fsdp_enabled": True}, "without FSDP; resume it without FSDP"),
        (["global_step2/x_optim_states.pt"], {"is_deepspeed_enabled": True}, None),
        (
            ["global_step2/0_optim_states.pt", "global_step2/1_optim_states.pt"],
            {"is_deepspeed_enabled": True},
            "among 2 processes, and cannot divide them among 1; start 2 processes",
        ),
    ],
)
def test_divided_states_resume_only_as_they_were_divided(folder_data, cut_run, tmp_path, then, now, sentence):
    """transformers would continue without a state whose files it does not find."""
    shutil.copytree(cut_run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    for name in ("manifest.json", "optimizer.pt"):
        (checkpoint / name).unlink()
    for name in then:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).touch()
    trainer = make_small(tmp_path / "run", folder_data)
    for name, value in now.items():
        setattr(trainer, name, value)
    if sentence is None:
        resuming.check_division(str(checkpoint), trainer)
        return
    with pytest.raises(ValueError, match=sentence):
        resuming.check_division(str(checkpoint), trainer)


def test_a_run_without_deepspeed_does_not_resume_one_with_it(folder_data, cut_run, tmp_path):
    shutil.copytree(cut_run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "global_step2").mkdir()
    (checkpoint / "optimizer.pt").rename(checkpoint / "global_step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    before = content_of(tmp_path / "run")
    with pytest.raises(ValueError, match="checkpoint-2 is of a run with DeepSpeed; resume it with DeepSpeed, or start"):
        make_small(tmp_path / "run", folder_data).train(resume_from_checkpoint=str(checkpoint))
    assert content_of(tmp_path / "run") == before


def test_weights_that_deepspeed_rounded_are_saved_as_its_optimiser_has_them(monkeypatch):
    """The stand-in knows the exact value of one weight, as for a frozen other one."""
    exact = torch.full((2, 3), 1.001)
    stand_in = types.ModuleType("deepspeed.utils")
    stand_in.safe_get_full_fp32_param = lambda parameter: exact if parameter.dim() == 2 else None
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", stand_in)
    model = torch.nn.Linear(3, 2).bfloat16()
    rounded = [parameter.data for parameter in model.parameters()]
    with with_master_weights(model):
        assert torch.equal(model.state_dict()["weight"], exact)
        assert torch.equal(model.state_dict()["bias"], rounded[1].float())
    assert [parameter.data.data_ptr() for parameter in model.parameters()] == [value.data_ptr() for value in rounded]


def test_an_interrupted_run_without_weights_is_replaced(folder_data, tmp_path, capsys):
    """Files of a run that was interrupted before its first checkpoint are replaced.

    A finished run is not, because its record may be all that was kept.
    """
    trainer = make_small(tmp_path, folder_data)
    trainer.add_callback(StopAt(1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not any(tmp_path.glob("checkpoint-*"))
    make_small(tmp_path, folder_data, max_steps=1, alpha=0.3, save_strategy="no").train()
    assert "ended before its first checkpoint; it is replaced" in capsys.readouterr().out
    assert read_record(tmp_path)["settings"]["alpha"] == 0.3
    with pytest.raises(FileExistsError, match=r"holds another run \(results.json\)"):
        make_small(tmp_path, folder_data).train()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("optimizer.pt", {}),
        ("optimizer.pt", {"param_groups": 3, "state": {}}),
        ("optimizer.pt", {"param_groups": [{"params": []}], "state": 5}),
        ("scheduler.pt", {"lr_lambdas": 3}),
    ],
)
def test_states_of_other_content_are_refused_in_one_sentence(tmp_path, digits, file, content):
    """States whose files are intact, but hold something else, as of another program: no stack trace."""
    trainer = student_trainer(tmp_path / "run", digits, distillation="none")
    trainer.create_optimizer_and_scheduler(10)
    states = {"optimizer.pt": trainer.optimizer.state_dict(), "scheduler.pt": trainer.lr_scheduler.state_dict()}
    for name, state in (states | {file: content}).items():
        torch.save(state, tmp_path / name)
    with pytest.raises(ValueError, match=r"the state of the optimiser or of the schedule in .* is not of this run: "):
        trainer._load_optimizer_and_scheduler(str(tmp_path))
