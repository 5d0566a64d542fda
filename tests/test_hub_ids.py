"""Hub ids instead of folders, on a local Hub: public, private, gated and missing repositories, and no network."""

import itertools
import json

import datasets
import huggingface_hub.constants
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from deitlt_hf.cli import main
from deitlt_hf.data import image_processor
from deitlt_hf.quickstart import fitting
from deitlt_hf.training.trial import StepTimes
from helpers import TINY, picture, save_image
from hub_server import WRITER, Entry, HubError, Repository

SIZES = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def put(hub, name, folder, private=False):
    """Puts the files of a folder into a repository."""
    files = {str(path.relative_to(folder)): Entry(path.read_bytes(), False) for path in folder.rglob("*.*")}
    hub.repositories.setdefault(name, Repository(private=private)).commit("main", "files", files)


@pytest.fixture
def repositories(hub, tmp_path, monkeypatch):
    """The same ViT under three ids, one of which is private and one gated, and an empty cache; no token."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "vit"
    torch.manual_seed(0)  # the same commit in all tests
    ViTForImageClassification(ViTConfig(**SIZES)).save_pretrained(folder)
    image_processor(8).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA ViT.")
    for name in ("public", "private", "gated"):
        put(hub, f"ann/{name}", folder, name == "private")

    def gate(method, path):
        if path.startswith("/ann/gated/"):
            raise HubError(403, "Access to model ann/gated is restricted.", "GatedRepo")

    hub.disturb = gate
    return hub


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Makes each command that takes the Hub id of a model, with a new output folder."""
    monkeypatch.setattr(fitting, "measure_steps", lambda *_: StepTimes(1.0, 2.0, 0, 0, 0, 0))
    for row in range(24):
        save_image(tmp_path / "images" / ("train", "test")[row // 16] / "ab"[row % 2] / f"{row}.png", row)
    recipe, brief = ["--recipe", TINY], ["--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    runs = itertools.count()

    def make(model):
        teacher, student = (
            ["--output_dir", str(tmp_path / "out" / f"{kind} {next(runs)}")] for kind in ("teacher", "student")
        )
        return {
            "probe": ["probe", *recipe, "--model", model, "--resamples", "2"],
            "train-teacher": ["train-teacher", *recipe, "--backbone", model, "--tune", "heads", *teacher],
            "distill": ["distill", *recipe, "--init_from", model, "--distillation", "none", *brief, *student],
            "compare": ["compare", str(tmp_path / "images"), "--init_from", model, "--dry_run"],
            "predict": ["predict", "--data_dir", str(tmp_path / "images"), "--model", model, "--top_k", "1"],
        }

    return make


def error_of(command, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(command)
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.slow
def test_a_model_of_the_hub_is_used_like_a_folder_and_then_without_a_network(
    repositories, commands, tmp_path, monkeypatch, capsys
):
    for command in commands("ann/public").values():
        main(command)
    record = json.loads((tmp_path / "out" / "student 1" / "results.json").read_text())
    assert (record["started_from"], record["started_from_license"]) == ("ann/public", {"license": "mit"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repositories.requests.clear()
    online = capsys.readouterr().out
    for command in commands("ann/public").values():
        main(command)
    assert repositories.requests == []
    assert "as ann/public" in (offline := capsys.readouterr().out)
    assert [line for line in offline.splitlines() if "test/a" in line] == [
        line for line in online.splitlines() if "test/a" in line
    ]
    for command in commands("ann/other").values():
        assert "ann/other is not in the Hub's cache on this machine, and HF_HUB_OFFLINE" in error_of(command, capsys)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ann/missing", "there is no model 'ann/missing' on the Hub, or it is private"),
        ("ann/private", "there is no model 'ann/private' on the Hub, or it is private"),
        ("ann/gated", "access to ann/gated on the Hub is restricted"),
        ("ann/public@v2", "there is no model folder 'ann/public@v2'; give the folder of 'hf download ann/public"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused_in_a_sentence(repositories, commands, model, message, tmp_path, capsys):
    for command in commands(model).values():
        assert error_of(command, capsys).startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_token_opens_a_private_model(repositories, commands, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    main(commands("ann/private")["probe"])
    assert "linear probe of ann/private" in capsys.readouterr().out


def test_a_model_without_its_weights_or_processor_is_refused_in_a_sentence(repositories, commands, tmp_path, capsys):
    config = (tmp_path / "vit" / "config.json").read_bytes()
    repositories.repositories["ann/empty"] = empty = Repository()
    empty.commit("main", "files", {"config.json": Entry(config, False)})
    for command in commands("ann/empty").values():
        if "--dry_run" not in command:
            assert "ann/empty" in error_of(command, capsys)


def test_a_data_set_of_the_hub_is_predicted(repositories, commands, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pictures"
    rows = {"image": [picture(9, 8 + row) for row in range(3)], "label": [0, 1, 0]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    split = datasets.Dataset.from_dict(rows, features)
    folder.mkdir()
    split.to_parquet(folder / "test-00000-of-00001.parquet")
    put(repositories, "datasets/ann/pictures", folder)
    put(repositories, "datasets/ann/secret", folder, private=True)

    def command(name, *options):
        return ["predict", "--model", "ann/public", "--top_k", "1", "--dataset", name, *options]

    main(command("ann/pictures"))
    online = capsys.readouterr().out
    assert [line for line in online.splitlines() if "/" in line] == ["test/0", "test/1", "test/2"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    main(command("ann/pictures"))
    assert capsys.readouterr().out == online
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("ann/secret", "ann/nothing"):
        assert name in error_of(command(name), capsys)
    assert "no split 'train'; the splits are test" in error_of(command("ann/pictures", "--split", "train"), capsys)
