"""Honest choosing: validation images apart from the test images, which are used once, at the end of a run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deitlt_hf.cli import main
from deitlt_hf.data import load_long_tailed, validation_split
from deitlt_hf.recipes import DataArguments, TeacherArguments, fill_arguments
from deitlt_hf.records import read_record
from deitlt_hf.training import DeiTLTTrainingArguments, FlatTeacherTrainingArguments, experts
from deitlt_hf.training.runs import evaluate, train_teacher
from helpers import TINY, results, student_trainer

TEACHER = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=8).filter(lambda counts: max(counts) > 1),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_every_class_keeps_training_images_and_gives_validation_images(counts, fraction, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    train, validation = validation_split(labels, fraction, seed)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    kept, given_away = (np.bincount(labels[rows], minlength=len(counts)) for rows in (train, validation))
    assert (kept >= 1).all()
    for count, number in zip(counts, given_away, strict=True):
        assert number == (0 if count == 1 else np.clip(round(fraction * count), 1, count - 1))
    again = validation_split(labels, fraction, seed)
    assert np.array_equal(train, again[0])


def test_the_seed_chooses_other_images():
    labels = np.repeat([0, 1], 50)
    assert not np.array_equal(validation_split(labels, 0.2, 0)[1], validation_split(labels, 0.2, 1)[1])


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([0, 0, 1], 1.0, r"validation_fraction must be in \(0, 1\), got 1.0"),
        ([0, 0, 1], float("nan"), "validation_fraction must be in"),
        ([0, 1, 2], 0.5, "every class has a single image"),
    ],
)
def test_an_impossible_split_is_refused(labels, fraction, message):
    with pytest.raises(ValueError, match=message):
        validation_split(labels, fraction)


def test_validation_images_come_from_the_long_tailed_subset():
    options = {"imbalance_ratio": 10, "max_per_class": 60}
    whole = load_long_tailed("digits", **options)
    split = load_long_tailed("digits", **options, validation_fraction=0.2)
    rows = {name: set(images["source_index"]) for name, images in split.items()}
    assert rows["train"] | rows["validation"] == set(whole["train"]["source_index"])
    assert not rows["train"] & rows["validation"]
    assert split["test"]["source_index"][:] == whole["test"]["source_index"][:]
    assert np.bincount(split["validation"]["label"]).min() == 1  # of the six images of the rarest class


def test_a_stream_cannot_be_split():
    with pytest.raises(ValueError, match="validation_fraction needs the whole data set"):
        DataArguments(streaming=True, validation_fraction=0.1).load()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A teacher whose best epoch is chosen on validation images, with the numbers of images of its evaluations."""
    folder, seen = tmp_path_factory.mktemp("run") / "teacher", []
    overrides = {
        "output_dir": str(folder),
        "validation_fraction": 0.2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "balanced_accuracy",
        "num_train_epochs": 3,
    }
    arguments = fill_arguments("teacher", TEACHER, TINY, overrides)
    measured = experts.expert_table

    def counted(columns, labels, *others):
        seen.append(len(labels))
        return measured(columns, labels, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "expert_table", counted)
        train_teacher(*arguments)
    return folder, arguments[0], seen


def test_test_images_are_used_once_at_the_end(run):
    folder, _, seen = run
    data = results(folder)["data"]
    assert (data["validation_images"], data["test_images"], data["validation_fraction"]) == (seen[0], 600, 0.2)
    assert seen == [seen[0]] * (len(seen) - 1) + [600]
    assert len(seen) == 4


def test_the_record_has_the_accuracy_of_the_saved_weights_on_test_images(run, tmp_path):
    folder, data_args, _ = run
    record = read_record(folder)
    assert record["saved_step"] == record["test"]["step"]
    again = evaluate(str(folder), data_args, DeiTLTTrainingArguments(output_dir=str(tmp_path)))
    assert again.last_table.accuracies["teacher"] == pytest.approx(record["test"]["accuracies"]["teacher"], abs=2e-3)
    chosen = max((record["last"], record["best"]), key=lambda entry: entry["step"] == record["saved_step"])
    assert chosen["accuracies"] != record["test"]["accuracies"]


def test_the_card_has_the_test_accuracy_and_names_the_validation_images(run):
    folder, _, _ = run
    text, record = (folder / "README.md").read_text(), results(folder)
    assert f"{100 * record['test']['accuracies']['teacher']['overall']:.1f}" in text
    assert "on 600 test images" in text
    assert "The best epoch on the same test images" not in text
    is_last = record["saved_step"] == record["last"]["step"]
    assert is_last or f"on {record['data']['validation_images']} validation images" in text


def test_without_validation_images_nothing_changes(tmp_path, digits):
    trainer = student_trainer(tmp_path, digits, num_train_epochs=1, distillation="none")
    trainer.train()
    assert "test" not in trainer.results.content
    assert "validation_images" not in trainer.results.content["data"]


def test_test_images_of_other_classes_are_refused(tmp_path, digits):
    from deitlt_hf import DeiTLTTrainer
    from helpers import make_student, student_arguments

    other = load_long_tailed("digits", class_names=[f"digit {label}" for label in range(10)])["test"]
    parts = {"train_dataset": digits["train"], "eval_dataset": digits["test"], "test_dataset": other}
    with pytest.raises(ValueError, match="label 0 is '0' but the data's is 'digit 0'"):
        DeiTLTTrainer(make_student(), student_arguments(tmp_path, distillation="none"), **parts)


def test_a_fusion_is_fitted_on_validation_images(tmp_path, digits, monkeypatch, capsys):
    from deitlt_hf.cli import evaluate as command

    trainer = student_trainer(tmp_path / "student", digits, num_train_epochs=1, distillation="none")
    trainer.train()
    trainer.save_model()
    seen, fit = [], command.fit_fusion
    monkeypatch.setattr(
        command,
        "fit_fusion",
        lambda rule, cls, dist, labels, *rest: seen.append(len(labels)) or fit(rule, cls, dist, labels, *rest),
    )
    options = ["--recipe", TINY, "--model", str(tmp_path / "student"), "--fusion", "all"]
    main(["evaluate", *options, "--validation_fraction", "0.2"])
    assert "fusions, fitted on the validation images" in capsys.readouterr().out
    main(["evaluate", *options])
    assert "fusions, fitted on the training images" in capsys.readouterr().out
    assert seen[0] < seen[-1] == len(digits["train"])
