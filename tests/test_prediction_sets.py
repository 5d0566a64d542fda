"""Tests of prediction sets: their coverage in every group, and the way from `calibrate` to the answers."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from deitlt_hf import DeiTLTConfig
from deitlt_hf.cli.calibrate import main as calibrate
from deitlt_hf.cli.predict import main as predict
from deitlt_hf.data import image_processor
from deitlt_hf.evaluation.fusion import RULES, fit_fusion, fold
from deitlt_hf.evaluation.prediction_sets import fit_prediction_sets, needed_images
from deitlt_hf.hub.cards import write_card
from deitlt_hf.serving.classifiers import load_model
from deitlt_hf.serving.prediction import load_handler
from deitlt_hf.serving.web_demo import Explanation
from helpers import make_student, save_image

GROUPS = {"head": [0, 1, 2], "mid": [3, 4, 5], "tail": [6, 7, 8, 9]}
COUNTS = [200, 160, 120, 60, 50, 40, 20, 20, 16, 14]  # images of each class


def long_tailed_scores(seed=0):
    """Scores of a classifier that prefers frequent classes, and the labels."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(10), COUNTS)
    logits = random.normal(size=(len(labels), 10)) + 0.5 * np.log(COUNTS)
    logits[np.arange(len(labels)), labels] += 2
    return torch.from_numpy(logits).softmax(dim=1).numpy(), labels


def covered(sets, scores, labels, groups):
    """Share of the images of each group whose set holds the true class, and the share by the threshold alone."""
    of_truth = np.arange(len(labels)), labels
    is_covered = sets.members(scores, groups)[of_truth]
    shares = {}
    for name, classes in GROUPS.items():
        chosen = np.isin(labels, classes)
        reaches = scores[of_truth] >= sets.thresholds[name if groups else "all"]
        shares[name] = (is_covered[chosen].mean(), reaches[chosen].mean())
    return shares


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_sets_hold_their_coverage_in_every_group_over_random_splits(coverage):
    """The mean over splits is at least the wanted share, in every group; one threshold for all fails the tail.

    The best class, which is always in the set, can only add to it. Without it, the mean is at most 1 / (n + 1) above.
    """
    scores, labels = long_tailed_scores()
    random = np.random.default_rng(1)
    found, of_one = [], []
    for _ in range(400):
        first, second = np.array_split(random.permutation(len(labels)), 2)
        for groups, kept in ((GROUPS, found), ({}, of_one)):
            sets = fit_prediction_sets(scores[first], labels[first], groups, coverage)
            kept.append(covered(sets, scores[second], labels[second], groups))
    for name, classes in GROUPS.items():
        shares = np.array([row[name] for row in found])
        whole, by_threshold = shares.mean(axis=0)
        error = shares[:, 1].std() / np.sqrt(len(shares))
        number = sum(COUNTS[label] for label in classes) // 2
        assert coverage - 4 * error < by_threshold < coverage + 2 / number + 4 * error
        assert whole >= by_threshold
    assert np.mean([row["tail"][0] for row in of_one]) < coverage - 0.1


def test_a_threshold_is_a_score_of_a_true_class_or_zero():
    scores = np.full((9, 2), 0.5)
    scores[:, 0] = np.arange(1, 10) / 10
    labels = np.zeros(9, int)
    assert fit_prediction_sets(scores, labels, {}, 0.9).thresholds == {"all": 0.1}
    assert fit_prediction_sets(scores, labels, {}, 0.5).thresholds == {"all": 0.5}
    few = fit_prediction_sets(scores[:8], labels[:8], {"one": [0], "none": [1]}, 0.9)
    assert few.thresholds == {"one": 0.0, "none": 0.0}
    assert few.images == {"one": 8, "none": 0}
    assert [needed_images(coverage) for coverage in (0.5, 0.9, 0.95)] == [1, 9, 19]


def test_no_set_is_empty():
    sets = fit_prediction_sets(np.full((40, 4), 0.99), np.zeros(40, int), {}, 0.5)
    assert sets.members(np.array([[0.1, 0.4, 0.3, 0.2]]), {}).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    ("groups", "coverage", "sentence"),
    [({}, 1.0, "coverage must be between 0 and 1"), ({"head": [0]}, 0.9, "class 1 is in none of the groups head")],
)
def test_wrong_arguments_are_refused(groups, coverage, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit_prediction_sets(np.full((4, 3), 0.3), [0, 1, 2, 0], groups, coverage)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A student of the digits with prediction sets, and its card."""
    folder = tmp_path_factory.mktemp("student")
    names = {label: str(label) for label in range(10)}
    student = make_student(class_counts=COUNTS, class_groups=GROUPS, id2label=names)
    torch.nn.init.normal_(student.cls_classifier.weight)
    student.save_pretrained(folder)
    image_processor(8).save_pretrained(folder)
    write_card(folder)
    calibrate(["--recipe", "digits_lt", "--model", str(folder), "--coverage", "0.805"])
    return folder


def test_calibrate_stores_a_rule_that_all_answers_use(calibrated, tmp_path, capsys):
    stored = json.loads((calibrated / "config.json").read_text())["prediction_sets"]
    assert stored["coverage"] == 0.805
    assert sum(stored["images"].values()) == 300  # half of the test images
    assert AutoConfig.from_pretrained(calibrated).prediction_sets == stored
    classifier = load_handler(calibrated)
    path = save_image(tmp_path / "a.png", 90)
    (answer,) = classifier({"inputs": path.read_bytes(), "parameters": {"top_k": 10}})
    expected = [
        prediction["label"]
        for rank, prediction in enumerate(answer["predictions"])
        if rank == 0 or prediction["score"] >= stored["thresholds"][prediction["group"]]
    ]
    assert answer["prediction_set"] == {"coverage": 0.805, "labels": expected}
    predict(["--model", str(calibrated), str(path), "--top_k", "1", "--jsonl"])
    assert json.loads(capsys.readouterr().out)["prediction_set"] == answer["prediction_set"]
    predict(["--model", str(calibrated), str(path), "--top_k", "1"])
    assert f"80.5% set: {', '.join(expected)}" in capsys.readouterr().out
    predict(["--model", str(calibrated), str(path), "--csv"])
    assert json.dumps(expected).replace('"', '""') in capsys.readouterr().out
    page = Explanation(calibrated)(path.read_bytes())
    assert re.search(rf"<h2>Prediction set</h2>\s*<p>{', '.join(expected)}</p>", page)
    assert "holds the true class with a probability of 80.5 %" in (calibrated / "README.md").read_text()


def test_sets_end_with_the_weights_or_classes_that_they_were_fitted_for(calibrated, tmp_path):
    assert DeiTLTConfig.from_pretrained(calibrated).prediction_sets is not None
    assert DeiTLTConfig.from_pretrained(calibrated, num_labels=3).prediction_sets is None
    other = AutoModelForImageClassification.from_pretrained(calibrated, num_labels=12, ignore_mismatched_sizes=True)
    other.save_pretrained(tmp_path)
    shutil.copy(calibrated / "preprocessor_config.json", tmp_path)
    assert "prediction_sets" in json.loads((tmp_path / "config.json").read_text())
    assert load_handler(tmp_path).coverage is None
    student = load_model(str(calibrated))
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    fusion = fit_fusion(next(iter(RULES)), logits, logits, torch.arange(50) % 10, COUNTS, GROUPS)
    assert fold(student, fusion).config.prediction_sets is None


@pytest.mark.parametrize("value", [3, {"thresholds": 1}, {"coverage": 0.9, "thresholds": {"all": "x"}, "images": {}}])
def test_a_damaged_rule_is_refused_in_one_sentence(calibrated, tmp_path, value):
    folder = shutil.copytree(calibrated, tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"prediction_sets": value}))
    with pytest.raises(ValueError, match="has a prediction_sets that is not valid"):
        load_handler(folder)


def test_calibrate_refuses_what_it_cannot_change(calibrated, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        calibrate(["--recipe", "digits_lt", "--model", "ORG/NAME"])
    with pytest.raises(ValueError, match="coverage must be between 0 and 1"):
        calibrate(["--recipe", "digits_lt", "--model", str(calibrated), "--coverage", "90"])
    assert not list(Path(tmp_path).iterdir())
