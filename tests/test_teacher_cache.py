"""The cache of a teacher's labels: a run with it ends with the same weights, and other views never read it."""

import copy
import warnings

import pytest
import torch
from safetensors.numpy import load_file

from deitlt_hf import FlatTeacherForImageClassification
from deitlt_hf.data import class_counts
from deitlt_hf.data.streaming import StreamedSplit
from deitlt_hf.records import read_record
from deitlt_hf.training.teacher_cache import TeacherCache, cache_of
from helpers import StopAt, assert_same, make_student, student_trainer, weights

RUN = {"num_train_epochs": 3, "drw_start_epoch": 2, "random_erasing": 0.5, "gradient_accumulation_steps": 2}
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def no_teacher(monkeypatch):
    """A function after which every forward pass of a teacher fails."""

    def forward(self, *args, **kwargs):
        raise AssertionError("the teacher was asked")

    return lambda: monkeypatch.setattr(FlatTeacherForImageClassification, "forward", forward)


def trained(folder, digits, teacher, callbacks=None, **values):
    trainer = student_trainer(folder, digits, copy.deepcopy(teacher), callbacks=callbacks, **{**RUN, **values})
    trainer.train(resume_from_checkpoint=None if callbacks else "auto")
    return trainer


def files(folder):
    return sorted(folder.glob("*/epoch-*.safetensors"))


@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_the_weights_are_those_of_a_run_without_cache(tmp_path, digits, teacher, no_teacher, distillation):
    values = {"distillation": distillation, "eval_strategy": "epoch"}
    expected = weights(trained(tmp_path / "without", digits, teacher, **values))
    values["teacher_cache"] = str(tmp_path / "cache")
    cold = trained(tmp_path / "cold", digits, teacher, **values)
    assert_same(weights(cold), expected)
    no_teacher()
    warm = trained(tmp_path / "warm", digits, teacher, **values)
    assert_same(weights(warm), expected)
    assert warm.results.teachers["teacher"]["accuracies"] == cold.results.teachers["teacher"]["accuracies"]
    agreement = [[entry.get("teacher_agreement") for entry in run.state.log_history] for run in (cold, warm)]
    assert agreement[0] == agreement[1]
    # An ablation of the student has the same views.
    trained(tmp_path / "other", digits, teacher, optim="muon", cls_loss="logit_adjusted", **values)
    assert len(files(tmp_path / "cache")) == 3
    stored = load_file(files(tmp_path / "cache")[0])["values"]
    assert stored.dtype == ("uint8" if distillation == "hard" else "float32")


@pytest.fixture
def tf32():
    """TF32 as transformers sets it for `--tf32` and `--torch_compile`."""
    if not hasattr(torch.backends, "fp32_precision"):  # torch before 2.9
        torch.backends.cuda.matmul.allow_tf32 = True
        yield
        torch.backends.cuda.matmul.allow_tf32 = False
        return
    torch.backends.fp32_precision = "tf32"
    yield
    torch.backends.fp32_precision = "none"


def test_tf32_is_recorded_and_makes_another_cache(tmp_path, digits, teacher, request):
    values = {"teacher_cache": str(tmp_path / "cache"), "max_steps": 1}
    trained(tmp_path / "float32", digits, teacher, **values).save_model()
    request.getfixturevalue("tf32")
    trained(tmp_path / "tf32", digits, teacher, **values).save_model()
    assert [read_record(tmp_path / name)["ran"]["tf32"] for name in ("float32", "tf32")] == [False, True]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_interrupted_run_and_its_rest_store_every_epoch(tmp_path, digits, teacher, no_teacher):
    expected = weights(trained(tmp_path / "whole", digits, teacher))
    values = {"teacher_cache": str(tmp_path / "cache"), "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", digits, teacher, [StopAt(5)], **values)
    assert_same(weights(trained(tmp_path / "parts", digits, teacher, **values)), expected)
    no_teacher()
    assert_same(weights(trained(tmp_path / "again", digits, teacher, **values)), expected)


def test_damaged_files_are_computed_again_with_one_warning(tmp_path, digits, teacher, no_teacher):
    values = {"teacher_cache": str(tmp_path / "cache")}
    expected = weights(trained(tmp_path / "a", digits, teacher, **values))
    first, second, _ = files(tmp_path / "cache")
    first.write_bytes(first.read_bytes()[:-5])
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    with pytest.warns(UserWarning, match="computed again") as caught:
        assert_same(weights(trained(tmp_path / "b", digits, teacher, **values)), expected)
    assert sum("computed again" in str(warning.message) for warning in caught) == 1
    no_teacher()
    assert_same(weights(trained(tmp_path / "c", digits, teacher, **values)), expected)


def test_only_what_decides_views_and_labels_makes_another_cache(tmp_path, digits, teacher):
    def folder(teacher=teacher, images=digits, **values):
        values = {**RUN, "teacher_cache": str(tmp_path), **values}
        trainer = student_trainer(tmp_path / "out", images, copy.deepcopy(teacher), values.pop("model", None), **values)
        return cache_of(trainer, trainer._teacher_digests).folder

    same = [
        {"learning_rate": 0.1, "optim": "muon", "alpha": 0.3, "temperature": 2.0, "cls_loss": "bce", "drw_beta": 0.9},
        {"label_smoothing_factor": 0.0, "num_train_epochs": 9, "model": make_student(seed=1, num_hidden_layers=1)},
    ]
    other = [
        *({"seed": 1}, {"data_seed": 1}, {"mixup": 0.5}, {"cutmix": 0.0}, {"mixing_in_drw": True}, {"hflip": 0.1}),
        *({"drw_start_epoch": 1}, {"auto_augment": "none"}, {"random_erasing": 0.0}, {"teacher_view": "weak"}),
        *({"per_device_train_batch_size": 16}, {"gradient_accumulation_steps": 1}, {"sampling": "class_balanced"}),
        *({"distillation": "soft"}, {"train_crop": "random_resized"}, {"fold_teacher": False}),
        {"model": make_student(image_size=16)},
        {"images": {**digits, "train": digits["train"].select(range(1, len(digits["train"])))}},
    ]
    changed = copy.deepcopy(teacher)
    changed.classifier.bias.data[0] += 1e-6
    other.append({"teacher": changed})
    assert {folder(**values) for values in same} == {folder()}
    assert len({folder(), *(folder(**values) for values in other)}) == len(other) + 1


def test_labels_of_other_images_are_not_used(tmp_path):
    """The digest of the data covers part of the pixels; each micro-batch has one of its own."""
    cache, logits = TeacherCache(tmp_path, {}, 0, 300, True), torch.eye(4, 300)
    assert cache.get(0, 0, IMAGES) is None
    cache.put(0, IMAGES, logits)
    cache.flush()
    again = TeacherCache(tmp_path, {}, 0, 300, True)
    assert torch.equal(again.get(0, 0, IMAGES), logits)
    assert again.bytes_per_image == 2
    assert again.get(0, 1, IMAGES) is None
    with pytest.warns(UserWarning, match="of other images"):
        assert again.get(0, 0, IMAGES + 1e-6) is None


def test_runs_at_the_same_time_keep_what_each_other_stores(tmp_path):
    caches, logits = [TeacherCache(tmp_path, {}, 0, 10, False) for _ in range(2)], torch.randn(4, 10)
    for index, cache in enumerate(caches):
        assert cache.get(3, index, IMAGES) is None
        cache.put(index, IMAGES, logits + index)
    for cache in caches:
        cache.flush()
    assert all(torch.equal(TeacherCache(tmp_path, {}, 0, 10, False).get(3, i, IMAGES), logits + i) for i in range(2))
    assert TeacherCache(tmp_path, {}, 1, 10, False).get(3, 0, IMAGES) is None  # of another process


def test_a_folder_that_cannot_be_written_to_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    cache = TeacherCache(tmp_path / "file", {}, 0, 10, True)
    for index in range(2):
        assert cache.get(index, 0, IMAGES) is None
        cache.put(0, IMAGES, torch.eye(4, 10))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache.flush()
        assert len(caught) == 1 - index


def test_what_has_no_known_views_is_refused(tmp_path, digits, teacher):
    with pytest.raises(ValueError, match="has no effect with distillation 'none'"):
        student_trainer(tmp_path, digits, distillation="none", teacher_cache=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        student_trainer(tmp_path, digits, teacher, teacher_cache=str(tmp_path / "file"))
    counts = dict(enumerate(class_counts(digits["train"]["label"][:]).tolist()))
    stream = StreamedSplit(digits["train"].to_iterable_dataset(), "image", "label", counts)
    with pytest.raises(ValueError, match="does not work with --streaming"):
        student_trainer(tmp_path, {**digits, "train": stream}, teacher, teacher_cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
