"""Tests that records and model folders are validated: wrong types give one clear message."""

import json
from pathlib import Path

import pytest
import torch

from deitlt_hf.hub.cards import make_card
from deitlt_hf.records import find_record, is_of_run, read_record
from deitlt_hf.serving.classifiers import load_classifier, load_model, load_processor, loading
from helpers import ROOT, Harm, make_student

RECORD = {"settings": {"num_train_epochs": 2}, "data": {"class_counts": [3, 2]}, "finished": True}


def test_records_of_earlier_versions_are_read():
    folders = ("model_cards/results", "research/results", "benchmarks/results")
    paths = [path for folder in folders for path in sorted((ROOT / folder).glob("*.json"))]
    records = [path for path in paths if is_of_run(json.loads(path.read_text()))]
    assert len(records) > 100
    for path in records:
        assert read_record(path)["settings"]


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"data": {"class_counts": "many"}}, r"data\.class_counts is 'many', not a list"),
        ({"data": {"class_counts": [1, True]}}, r"data\.class_counts\[1\] is True, not a whole number"),
        ({"settings": {"sam_rho": 0.1}}, r"settings\.sam_rho is 0\.1, not a list"),
        ({"settings": {"learning_rate": float("nan")}}, r"settings\.learning_rate is nan, not a number"),
        ({"train_seconds": 1e300}, "train_seconds is 1e\\+300, not a number"),
        ({"parameters": 10**400}, "parameters is 1000.*, not a whole number"),
        ({"last": {"epoch": 1, "step": 2}}, r"last\.accuracies is missing"),
        ({"best": {"epoch": 1, "step": 2, "accuracies": {}}}, r"best\.accuracies has no overall accuracy"),
        ({"teacher": {"backbone": None}}, r"teacher\.backbone is None, not a text"),
        ({"versions": []}, r"versions is \[\], not an object"),
        ({"finished": "yes"}, "finished is 'yes', not true or false"),
        ({"schema": 99}, "a newer version of deitlt-hf wrote it"),
    ],
)
def test_wrong_types_are_named(tmp_path, values, place):
    make_student().save_pretrained(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(RECORD | values))
    for read in (read_record, find_record, make_card):
        with pytest.raises(ValueError, match=place):
            read(tmp_path)


def cut_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def hostile_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Harm()}, folder / "pytorch_model.bin")


def list_for_config(folder):
    (folder / "config.json").write_text("[1]")


def binary_config(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def list_for_processor(folder):
    (folder / "preprocessor_config.json").write_text("[1]")


def odd_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (cut_weights, "model.safetensors cannot be loaded"),
        (hostile_weights, "pytorch_model.bin cannot be loaded"),
        (list_for_config, "config.json cannot be read"),
        (binary_config, "config.json is not text"),
        (list_for_processor, "preprocessor_config.json cannot be read"),
        (odd_size, "hidden_size"),
    ],
)
def test_a_damaged_model_folder_gives_one_message(tmp_path, monkeypatch, harm, name):
    monkeypatch.chdir(tmp_path)
    make_student().save_pretrained(tmp_path)
    harm(tmp_path)
    for load in (load_model, load_classifier, load_processor)[: 2 if harm is odd_size else 3]:
        with pytest.raises(ValueError, match=name) as raised:
            load(str(tmp_path))
        assert "weights_only" not in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not Path("harm").exists()


def test_a_full_gpu_is_not_reported_as_a_damaged_model():
    with pytest.raises(torch.OutOfMemoryError), loading("outputs/model"):
        raise torch.OutOfMemoryError("CUDA out of memory")
