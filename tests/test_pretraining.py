"""Tests of masked pre-training, which uses no labels."""

import json

import pytest
import torch
from PIL import Image
from transformers import ViTMAEModel

from deitlt_hf import DeiTLTForImageClassification
from deitlt_hf.cli import main
from deitlt_hf.data import load_long_tailed
from deitlt_hf.data.unlabelled import unlabelled_images
from deitlt_hf.recipes import DataArguments, PretrainingModelArguments, fill_arguments
from deitlt_hf.training.pretraining import MaskedPretrainer, PretrainingArguments, pretrain
from helpers import StopAt, assert_same, weights

CLASSES = (DataArguments, PretrainingModelArguments, PretrainingArguments)
SHORT = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_train_epochs": 2,
    "warmup_epochs": 0,
    "learning_rate": 5e-3,
    "save_strategy": "steps",
    "save_steps": 5,
    "dataloader_num_workers": 0,
    "report_to": ["none"],
}


def pretrained(folder, **values):
    return pretrain(*fill_arguments("pretraining", CLASSES, "digits_lt", SHORT | values | {"output_dir": str(folder)}))


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures without labels, in subfolders, with a file that is not an image."""
    folder = tmp_path / "pictures"
    for index in range(3):
        path = folder / f"part{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (40 * index, 90, 200)).save(path)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = pretrained(tmp_path / "whole")
    log = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert log[-1] < 0.95 < log[0]  # about 1 is the loss of the mean of each patch

    # Interrupted after step 7, with a checkpoint of step 5.
    original = MaskedPretrainer.__init__
    monkeypatch.setattr(
        MaskedPretrainer, "__init__", lambda self, **values: original(self, **values, callbacks=[StopAt(7)])
    )
    with pytest.raises(KeyboardInterrupt):
        pretrained(tmp_path / "parts")
    monkeypatch.undo()
    resumed = pretrained(tmp_path / "parts", resume_from_checkpoint="auto")
    assert_same(weights(resumed), weights(whole))

    # A student starts from it, with its weights.
    start = ["--init_from", str(tmp_path / "whole"), "--distillation", "none", "--max_steps", "1"]
    brief = ["--save_strategy", "no", "--eval_strategy", "no", "--dataloader_num_workers", "0"]
    output = ["--learning_rate", "1e-9", "--output_dir", str(tmp_path / "student")]
    main(["distill", "--recipe", "digits_lt", *start, *brief, *output])
    student = DeiTLTForImageClassification.from_pretrained(tmp_path / "student")
    trunk = ViTMAEModel.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(student.deit.layernorm.weight, trunk.layernorm.weight, atol=1e-5, rtol=0)
    assert student.config.hidden_size == 16

    # Plain transformers loads the trunk, and a finished run is not repeated.
    assert ViTMAEModel.from_pretrained(tmp_path / "whole").config.hidden_size == 16
    assert pretrained(tmp_path / "whole", resume_from_checkpoint="auto").beginning.is_finished


def test_command_uses_unlabelled_folders(tmp_path, pictures, capsys):
    arguments = {**SHORT, "report_to": "none", "max_steps": 1, "save_strategy": "no", "unlabelled": pictures}
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    main(["pretrain", "--recipe", "digits_lt", "--output_dir", str(tmp_path / "out"), *words])
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["settings"]["weight_decay"] == 0.05  # also the fields that only pre-training has
    digits = DataArguments(imbalance_ratio=20).load()["train"]
    assert record["data"]["train_images"] == len(digits) + 3
    assert "deitlt distill --recipe digits_lt --init_from" in capsys.readouterr().out


def test_labels_are_dropped_and_images_kept(pictures):
    train = load_long_tailed("digits", imbalance_ratio=20)["train"]
    images = unlabelled_images(train, [pictures])
    assert set(images["label"]) == {0}
    assert images.features["label"].names == ["image"]
    assert images[0]["image"].tobytes() == train[0]["image"].tobytes()
    assert [images[len(train) + index]["image"].size for index in range(3)] == [(20, 16)] * 3


def test_bad_images_of_a_folder_are_left_out_on_request(pictures):
    (pictures / "broken.png").write_bytes(b"not an image")
    train = load_long_tailed("digits", imbalance_ratio=20)["train"]
    assert len(unlabelled_images(train, [pictures], skip_bad_images=True)) == len(train) + 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio must be between 0 and 1, got 1"),
        ({"decoder_layers": 0}, "decoder_layers must be 1 or more"),
        ({"patch_size": 5}, "patch_size 5 does not divide"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of 4"),
        ({"optim": "muon"}, "optim 'muon' is for students"),
        ({"eval_strategy": "epoch"}, "eval_strategy 'epoch' has no effect"),
        ({"drw_start_epoch": 1.0}, "drw_start_epoch 1.0 has no effect"),
        ({"streaming": True, "imbalance_ratio": None}, "does not read streams"),
        ({"unlabelled": ["missing"]}, "missing is not a folder"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, values, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pretrained(tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"has no images.*\.mp4"):
        pretrained(tmp_path / "out", unlabelled=[str(tmp_path / "clips")])
