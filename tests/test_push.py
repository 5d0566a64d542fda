"""Tests of pushing to a local Hub with huggingface_hub, and of loading from it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub import metadata_load

from deitlt_hf import DeiTLTForImageClassification, DeiTLTTrainer, DeiTLTTrainingArguments
from deitlt_hf.cli.push import main as push
from deitlt_hf.data import image_processor
from deitlt_hf.hub.pushing import EVAL_FILE, prepare_repository, push_folder
from deitlt_hf.model_folder import weights_digest
from helpers import IMAGES, ROOT, TINY, make_student
from hub_server import READER, WRITER, Entry, Hub, HubError, Repository, once

MODEL = {
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "configuration_deitlt.py",
    "modeling_deitlt.py",
}
RUN = {"README.md", "results.json", "log.jsonl", "training_curves.png"}


def make_trainer(folder, digits, **args):
    batch = {"per_device_train_batch_size": 32, "repeated_augmentation": 1}
    args = {"num_train_epochs": 1, "warmup_epochs": 0, "learning_rate": 1e-3} | batch | args
    return DeiTLTTrainer(
        model=make_student(),
        args=DeiTLTTrainingArguments(output_dir=str(folder), distillation="none", train_crop="padded", **args),
        train_dataset=digits["train"],
        eval_dataset=digits["test"].select(range(60)),
        processing_class=image_processor(8),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """The folder of a run with checkpoints and moving average, and with files that must not be pushed."""
    folder = tmp_path_factory.mktemp("trained") / "student"
    trainer = make_trainer(folder, digits, ema_decay=0.9, save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    (folder / ".lock").touch()
    (folder / ".env").write_text("SECRET=1")
    (folder / "notes.txt").write_text("private")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"onnx" + weights_digest(folder).encode())
    (folder / "onnx" / ".cache.json").write_text("{}")
    assert list(folder.glob("checkpoint-*/optimizer.pt"))
    assert (folder / "training_args.bin").is_file()
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "student"))


def environment(hub: Hub, home: Path, token: str | None = None) -> dict[str, str]:
    """Environment of a process that uses the tests' Hub, without the token of the user who runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    added = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return kept | added | ({} if token is None else {"HF_TOKEN": token})


def start(hub, home, *command, token=None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(hub, home, token),
    )


def finish(process: subprocess.Popen, returncode: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == returncode, output[-3000:] + errors[-3000:]
    return output, errors


def put_by_hand(hub: Hub, name: str, files: dict[str, bytes]) -> Repository:
    """Makes a commit that did not come from this package."""
    repository = hub.repositories.setdefault(name, Repository())
    before = repository.commits[repository.branches["main"]] if repository.commits else {}
    added = {path: Entry(content, False) for path, content in files.items()}
    repository.commit("main", "by hand", before | added)
    return repository


def check_no_token(hub: Hub, *places: Path | str) -> None:
    texts = [place.encode() for place in places if isinstance(place, str)]
    for place in places:
        if isinstance(place, Path):
            texts += [path.read_bytes() for path in place.rglob("*") if path.is_file()]
    for repository in hub.repositories.values():
        texts += [entry.content for files in repository.commits.values() for entry in files.values()]
    for token in (WRITER, READER):
        assert not any(token.encode() in text for text in texts)


# ---- Pushing and loading ----

LOAD = {
    "plain transformers": "AutoModelForImageClassification.from_pretrained('zoo/digits'{place})",
    "the package": "DeiTLTForImageClassification.from_pretrained('zoo/digits'{place})",
    "trust_remote_code": "AutoModelForImageClassification.from_pretrained('zoo/digits'{place}, trust_remote_code=True)",
}
USE = """
import json, sys
{imports}
import torch
import yaml
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
images = torch.load({images!r}, weights_only=True)
models = [{load}, {load_average}]
logits = [model.eval()(images).logits.tolist() for model in models]
size = AutoImageProcessor.from_pretrained("zoo/digits").crop_size["height"]
print(json.dumps([type(models[0]).__name__, size, logits]))
"""


def test_command_pushes_what_loads_in_three_ways(hub, folder, tmp_path):
    """A pushed repository loads by name in three ways, in separate processes; two cannot import the package."""
    output, errors = finish(start(hub, tmp_path / "home", "scripts/push.py", folder, "zoo/digits", token=WRITER))
    assert f"{hub.url}/zoo/digits" in output
    repository = hub.repositories["zoo/digits"]
    expected = MODEL | RUN | {f"ema/{name}" for name in MODEL} | {"onnx/model.onnx", ".gitattributes"}
    assert set(repository.files()) == expected
    assert repository.messages == ["initial commit", "Upload model"]
    assert not repository.private
    for name, content in repository.files().items():
        if name != ".gitattributes":
            assert content == (folder / name).read_bytes()
    assert "it/s" not in errors, "no progress bars in a log"
    check_no_token(hub, output, errors, folder, tmp_path)

    torch.save(IMAGES, tmp_path / "images.pt")
    processes = {}
    for way, load in LOAD.items():
        package = way == "the package"
        code = USE.format(
            imports="from deitlt_hf import *" if package else "sys.modules['deitlt_hf'] = None",
            images=str(tmp_path / "images.pt"),
            load=load.format(place=""),
            load_average=load.format(place=", subfolder='ema'"),
        )
        processes[way] = start(hub, tmp_path / way, "-c", code)
    students = [DeiTLTForImageClassification.from_pretrained(path).eval() for path in (folder, folder / "ema")]
    for way, process in processes.items():
        name, size, logits = json.loads(finish(process)[0])
        native = way == "plain transformers"
        assert name == ("DeiTForImageClassificationWithTeacher" if native else "DeiTLTForImageClassification")
        assert size == 8
        for found, student in zip(logits, students, strict=True):
            torch.testing.assert_close(torch.tensor(found), student(IMAGES).logits, atol=1e-6, rtol=0)


def test_two_processes_train_and_push_once(hub, tmp_path):
    """Two processes train and push once.

    The token is on the command line, and transformers saves such arguments with every checkpoint.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    recipe = ("scripts/distill.py", "--recipe", TINY, "--distillation", "none", "--output_dir", tmp_path / "student")
    place = ("--hub_private_repo", "true", "--hub_revision", "first")
    options = ("--use_cpu", "--push_to_hub", "--hub_model_id", "digits", "--hub_token", WRITER)
    output, errors = finish(start(hub, tmp_path / "home", *launcher, *recipe, *options, *place))
    repository = hub.repositories["ann/digits"]
    assert repository.private
    assert repository.messages == ["initial commit", "End of training"]
    assert set(repository.files()) == {".gitattributes"}
    assert set(repository.files("first")) == MODEL | RUN | {".gitattributes"}
    results = json.loads(repository.files("first")["results.json"])
    assert results["finished"]
    assert (
        f"{100 * results['last']['accuracies']['mean']['overall']:.1f}"
        in repository.files("first")["README.md"].decode()
    )
    assert output.count("The model is on the Hub") == 1
    assert list((tmp_path / "student").glob("checkpoint-*/training_args.bin"))
    check_no_token(hub, output, errors, tmp_path)


# ---- Repeated pushes ----


def test_a_push_that_changes_nothing_makes_no_commit(hub, folder):
    first = push_folder(folder, "zoo/digits")
    second = push_folder(folder, "zoo/digits")
    assert second.oid == first.oid
    assert len(hub.repositories["zoo/digits"].commits) == 2


def test_a_killed_push_can_be_repeated(hub, folder, tmp_path):
    """A push that was killed and repeated sends only what the Hub lacks.

    The repository does not change until all files have arrived.
    """
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    others = len([folder / "ema", *folder.glob("*.png"), *folder.glob("onnx/*.onnx")])
    reached, killed = threading.Event(), threading.Event()

    def hold(method, path):
        if method == "PUT" and path == f"/lfs/{weights}/2":
            while len(hub.stored) < others:
                time.sleep(0.01)
            reached.set()
            killed.wait()
            raise ConnectionAbortedError

    hub.disturb = hold
    process = start(hub, tmp_path / "home", "scripts/push.py", folder, "zoo/digits", token=WRITER)
    assert reached.wait(120)
    process.kill()
    killed.set()
    process.communicate()
    repository = hub.repositories["zoo/digits"]
    assert repository.messages == ["initial commit"]
    assert weights not in hub.stored

    hub.disturb = lambda method, path: None
    push_folder(folder, "zoo/digits")
    assert hub.stored[-1] == weights
    assert len(hub.stored) == len(set(hub.stored)) == others + 1, "no object is uploaded twice"
    assert repository.files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("path", "error", "recovers"),
    [
        ("/commit/", HubError(500, "Internal Error"), False),
        ("/commit/", ConnectionAbortedError(), False),
        ("/lfs/", HubError(503, "SlowDown"), True),
        ("/lfs/", ConnectionAbortedError(), True),
    ],
    ids=["commit refused", "commit dropped", "upload refused", "upload dropped"],
)
def test_errors_of_the_hub(hub, folder, path, error, recovers):
    hub.disturb = once(lambda method, called: path in called and method in ("PUT", "POST"), error)
    if not recovers:
        with pytest.raises(OSError, match=r"zoo/digits was not pushed: the Hub .* if you repeat the push\.") as caught:
            push_folder(folder, "zoo/digits")
        assert "\n" not in str(caught.value)
        assert len(hub.repositories["zoo/digits"].commits) == 1
    push_folder(folder, "zoo/digits")
    assert set(hub.repositories["zoo/digits"].files()) >= MODEL | RUN
    assert len(hub.stored) == len(set(hub.stored))


def test_files_of_an_earlier_model_are_removed(hub, folder, tmp_path):
    """Files of an earlier model are removed: its shards, average and results belong to no model.

    Files of others stay.
    """
    sharded = tmp_path / "sharded"
    model = DeiTLTForImageClassification.from_pretrained(folder)
    model.save_pretrained(sharded, max_shard_size="10KB")
    image_processor(8).save_pretrained(sharded)
    shutil.copytree(folder / "ema", sharded / "ema")
    record = json.loads((folder / "results.json").read_text()) | {"weights_sha256": weights_digest(sharded)}
    (sharded / "results.json").write_text(json.dumps(record))
    push_folder(sharded, "zoo/digits")
    repository = hub.repositories["zoo/digits"]
    assert len([name for name in repository.files() if name.startswith("model-")]) > 2
    assert "model.safetensors" not in repository.files()
    licence = next(iter(repository.commits.values()))[".gitattributes"]
    repository.commits[repository.branches["main"]]["LICENSE"] = licence

    again = tmp_path / "again"
    model.save_pretrained(again)
    image_processor(8).save_pretrained(again)
    push_folder(again, "zoo/digits")
    assert set(repository.files()) == MODEL | {"README.md", "LICENSE", ".gitattributes"}


@pytest.fixture
def retrained(folder):
    """The folder with new weights; the other files belong to the previous weights."""
    model = DeiTLTForImageClassification.from_pretrained(folder)
    torch.nn.init.normal_(model.cls_classifier.weight)
    model.save_pretrained(folder)
    return folder


def test_files_of_other_weights_are_left_out(hub, folder, retrained):
    """Files of other weights are not pushed. The repository's copies, of the earlier model, are removed."""
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("report")
    (folder / "report" / "report.json").write_text(json.dumps({"models": [{"weights_sha256": "0" * 64}]}))
    put_by_hand(hub, "zoo/digits", {"onnx/model.onnx": b"old", "results.json": b"{}"})
    left_out = "log.jsonl, onnx/model.onnx, report/, results.json, training_curves.png"
    with pytest.warns(UserWarning, match=f"they may belong to other weights .*: {left_out};"):
        push_folder(folder, "zoo/digits")
    files = hub.repositories["zoo/digits"].files()
    assert set(files) == MODEL | {f"ema/{name}" for name in MODEL} | {"README.md"}
    assert b"model-index" not in files["README.md"]


def test_files_of_the_weights_are_pushed(hub, folder):
    """Files that belong to the weights are pushed, also a report on two models if one is this model."""
    (folder / "report").mkdir()
    models = [{"weights_sha256": digest} for digest in ("0" * 64, weights_digest(folder))]
    (folder / "report" / "report.json").write_text(json.dumps({"models": models}))
    (folder / "report" / "index.html").write_text("report")
    push_folder(folder, "zoo/digits")
    files = hub.repositories["zoo/digits"].files()
    assert {"report/index.html", "report/report.json", "onnx/model.onnx"} | RUN <= set(files)
    assert b"model-index" in files["README.md"]


def test_the_accuracy_is_pushed_in_the_hubs_format_if_it_is_of_the_weights(hub, folder):
    record = json.loads((folder / "results.json").read_text())
    data = record["data"] | {"dataset": "zoo/photos", "local_files": False}
    (folder / "results.json").write_text(json.dumps(record | {"data": data}))
    push_folder(folder, "zoo/digits")
    (entry,) = yaml.safe_load(hub.repositories["zoo/digits"].files()[EVAL_FILE])
    assert entry["dataset"]["id"] == "zoo/photos"
    assert entry["value"] == pytest.approx(100 * record["last"]["accuracies"]["mean"]["overall"], abs=0.01)
    (folder / "results.json").write_text(json.dumps(record))
    push_folder(folder, "zoo/digits")
    assert EVAL_FILE not in hub.repositories["zoo/digits"].files()


def test_stars_do_not_match_deeper_folders(hub, folder):
    digest = weights_digest(folder)
    for name in ("onnx/private/deep/model.onnx", "report/faces/anna.png", "report/report.json", "ema/old/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(digest)
    push_folder(folder, "zoo/digits")
    expected = MODEL | RUN | {f"ema/{name}" for name in MODEL}
    expected |= {"onnx/model.onnx", "report/report.json", ".gitattributes"}
    assert set(hub.repositories["zoo/digits"].files()) == expected


def test_files_added_on_the_hub_by_hand_stay(hub, folder):
    push_folder(folder, "zoo/digits")
    card = b"---\nlicense: cc-by-nc-4.0\n---\n# edited on the Hub\n"
    others = dict.fromkeys(("handler.py", "onnx/model_q4.onnx", "modeling_mine.py", "report/x/y.png"), b"mine")
    repository = put_by_hand(hub, "zoo/digits", {"README.md": card, **others})
    before = repository.files()
    with pytest.warns(UserWarning, match="the card of zoo/digits was written or edited there, so it is kept"):
        push_folder(folder, "zoo/digits")
    assert repository.files() == before
    push([str(folder), "zoo/digits", "--overwrite_card"])
    assert repository.files() == before | {"README.md": (folder / "README.md").read_bytes()}


def test_a_licence_is_kept_by_later_pushes(hub, folder, tmp_path, digits):
    """Later pushes keep a licence: of the same folder, of another folder to the same repository, and of a new run."""

    def metadata():
        (tmp_path / "card.md").write_bytes(hub.repositories["zoo/digits"].files()["README.md"])
        return {"license": None} | metadata_load(tmp_path / "card.md")

    another = shutil.copytree(folder, tmp_path / "another")
    push_folder(folder, "zoo/digits")
    assert metadata()["license"] is None
    push([str(folder), "zoo/digits", "--license", "cc-by-nc-4.0", "--tags", "mine", "too"])
    assert metadata()["license"] == "cc-by-nc-4.0"
    push_folder(folder, "zoo/digits")
    push_folder(another, "zoo/digits")
    assert metadata()["license"] == "cc-by-nc-4.0"
    assert metadata()["tags"][-2:] == ["mine", "too"]
    push_folder(folder, "zoo/digits", license="mit")
    push_folder(folder, "zoo/digits")
    assert metadata()["license"] == "mit"
    trainer = make_trainer(tmp_path / "new", digits, push_to_hub=True, hub_model_id="zoo/digits")
    trainer.push_to_hub(model_name="A name", tags="later")
    assert metadata()["license"] == "mit"
    assert sorted(metadata()["tags"][-3:]) == ["later", "mine", "too"]
    assert "# A name\n" in (tmp_path / "card.md").read_text()
    with pytest.raises(ValueError, match=r"^card=False writes no card, so leave license out.$"):
        push_folder(folder, "zoo/digits", card=False, license="mit")


@pytest.mark.parametrize("revision", [None, "second"])
def test_a_repository_of_another_kind_of_model_is_refused(hub, folder, digits, tmp_path, revision):
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"}
    repository = put_by_hand(hub, "zoo/llama", files)
    message = "^zoo/llama has a model of type 'llama', but this is a 'deit'"
    with pytest.raises(ValueError, match=message):
        push_folder(folder, "zoo/llama", revision=revision, handler=True)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "new", digits, push_to_hub=True, hub_model_id="zoo/llama", hub_revision=revision)
    assert (len(repository.commits), set(repository.branches)) == (1, {"main"})
    assert not hub.stored
    assert not (folder / "handler.py").exists()


def test_handler_is_written_after_all_checks(hub, folder):
    (folder / "preprocessor_config.json").rename(folder / "kept.json")
    command = [str(folder), "zoo/digits", "--handler"]
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json is missing"):
        push(command)
    assert not (folder / "handler.py").exists()
    (folder / "kept.json").rename(folder / "preprocessor_config.json")
    push(command)
    assert hub.repositories["zoo/digits"].files()["handler.py"] == (folder / "handler.py").read_bytes()


def test_a_foreign_handler_is_reported_before_any_request(hub, folder):
    (folder / "handler.py").write_text("class EndpointHandler: ...")
    with pytest.raises(FileExistsError, match=r"handler.py' is another handler; move it away"):
        push_folder(folder, "zoo/digits", handler=True)
    assert hub.requests == []


@pytest.mark.parametrize("text", ["[1]", '"text"', "null", '{"finished": 1}'])
def test_a_foreign_results_file_is_left_out(hub, folder, text):
    (folder / "results.json").write_text(text)
    with pytest.warns(UserWarning, match=r"left out, .*results\.json"):
        push_folder(folder, "zoo/digits")
    assert not {"results.json", "log.jsonl"} & set(hub.repositories["zoo/digits"].files())


def test_a_card_written_by_the_user_is_pushed_unchanged(hub, folder):
    (folder / "README.md").write_text("# Mine\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        push_folder(folder, "zoo/digits")
    assert hub.repositories["zoo/digits"].files()["README.md"] == b"# Mine\n"


def test_private_repository_and_branch(hub, folder):
    push_folder(folder, "zoo/digits", private=True, revision="second", commit_message="Try again")
    repository = hub.repositories["zoo/digits"]
    assert repository.private
    assert repository.messages[-1] == "Try again"
    assert "model.safetensors" in repository.files("second")
    assert "model.safetensors" not in repository.files()
    push_folder(folder, "zoo/digits", revision="second")
    assert len(repository.commits) == 2


# ---- Refused with one clear message ----


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_unknown", "ann/digits", "the token is not valid"),
        (READER, "ann/digits", "the token has no write access"),
        (WRITER, "bob/digits", "the token has no write access"),
        (WRITER, "bob/theirs", "the token has no write access"),
        (WRITER, "bob/hidden", "the token has no write access"),
        (WRITER, "zoo/my model", "'zoo/my model' is not a valid repository name; give it as ORG/NAME"),
        (WRITER, "zoo/a/b", "'zoo/a/b' is not a valid repository name"),
        (WRITER, None, "no repository is given"),
    ],
)
def test_a_push_without_permission_is_refused(hub, folder, token, repo_id, message):
    """A push without write permission is refused.

    Everybody can read `theirs`; only its owner can read `hidden`.
    """
    for name, private in (("bob/theirs", False), ("bob/hidden", True)):
        hub.repositories[name] = Repository(private)
        hub.repositories[name].commit("main", "initial commit", {})
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises((OSError, ValueError), match=message) as caught:
        push_folder(folder, repo_id, token=token)
    assert "\n" not in str(caught.value)
    assert token not in str(caught.value)
    assert not hub.stored
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_public_repository_is_refused_for_a_private_push(hub, folder):
    prepare_repository("zoo/digits")
    with pytest.raises(ValueError, match="zoo/digits is public"):
        push_folder(folder, "zoo/digits", private=True)
    assert not hub.stored


def test_an_unreachable_hub_is_reported(monkeypatch, folder, hub):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"^zoo/digits was not pushed: the Hub was not reached \(.*refused"):
        push_folder(folder, "zoo/digits")


@pytest.mark.parametrize("name", [*sorted(MODEL), ""])
def test_a_missing_file_is_reported(hub, folder, name):
    shutil.rmtree(folder / name) if name == "" else (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing" if name else "there is no model folder"):
        push_folder(folder, "zoo/digits")
    assert hub.requests == []


def test_damaged_or_unfinished_models_are_refused(hub, folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        push_folder(folder, "zoo/digits")
    (folder / "model.safetensors").write_bytes(weights)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"finished": False}))
    with pytest.raises(ValueError, match=r"the run in .* is not finished"):
        push_folder(folder, "zoo/digits")
    assert hub.requests == []


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a'])
def test_a_damaged_index_of_the_weights_is_named(hub, folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"safetensors\.index\.json (does not name the files|cannot be read)"):
        push_folder(folder, "zoo/digits")
    assert hub.requests == []


LINKS = {  # each link in a folder, and its target
    "modeling_x.py": "outside/private.key",
    "modeling_deitlt.py": "outside/private.key",
    "config.json": "outside/config.json",
    "model.safetensors": "outside/model.safetensors",
    "README.md": "student/.env",
    "handler.py": "student/training_args.bin",
    "results.json": "outside/results.json",
    "onnx": "outside",
    "ema": "student2/ema",
    "report": "outside",
    "ema/config.json": "outside/config.json",
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_link_out_of_the_folder_is_not_followed(hub, folder, tmp_path, name, is_absolute):
    """A link to a file outside the folder is not followed: `modeling_x.py -> private.key` would publish the key."""
    shutil.copytree(folder, tmp_path / "student2")
    outside = Path(shutil.copytree(folder, tmp_path / "outside"))
    for extra in ("private.key", "model.onnx", "report.json", "a.png"):
        (outside / extra).write_bytes(b"private " + weights_digest(folder).encode())
    place = folder / name
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    target = tmp_path / LINKS[name]
    place.symlink_to(target if is_absolute else os.path.relpath(target, place.parent))
    before = weights_digest(folder) if name != "model.safetensors" else None
    with pytest.raises(ValueError, match=rf"{name.split('.')[0]}\S* is a link to "):
        push_folder(folder, "zoo/digits", handler=name == "README.md")
    assert hub.requests == []
    assert before is None or weights_digest(folder) == before


def test_a_snapshot_of_the_hubs_cache_and_a_linked_folder_are_pushed(hub, folder, tmp_path):
    """A snapshot of the Hub's cache and a linked folder can be pushed; all files of a snapshot are links to blobs."""
    repository = tmp_path / "models--zoo--digits"
    (repository / "blobs").mkdir(parents=True)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "checkpoint" not in str(path)):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = repository / "snapshots" / "abc" / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (tmp_path / "link").symlink_to(repository / "snapshots" / "abc")
    push_folder(tmp_path / "link", "zoo/digits")
    files = hub.repositories["zoo/digits"].files()
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert f"ema/{sorted(MODEL)[0]}" in files


def sharded(folder, rename=lambda name: name):
    """The folder with its weights in shards of other names."""
    model = DeiTLTForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for path in sorted(folder.glob("model-*-of-*.safetensors")):
        path.rename(folder / rename(path.name))
    content["weight_map"] = {tensor: rename(name) for tensor, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return model, content


def test_the_weights_that_an_index_names_are_pushed(hub, folder, tmp_path):
    """All weight files that an index names are pushed, under any name; weight files that it lacks are left out."""
    model, content = sharded(folder, lambda name: name.replace("model-", "part."))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the record is of the same weights in one file
        push_folder(folder, "zoo/digits")
    files = hub.repositories["zoo/digits"].files()
    assert {name for name in files if name.endswith("safetensors") and "/" not in name} == {
        *content["weight_map"].values()
    }
    for name, data in files.items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(data)
    got = DeiTLTForImageClassification.from_pretrained(tmp_path / "got").eval()
    assert torch.equal(got(IMAGES).logits, model.eval()(IMAGES).logits)


def test_an_index_next_to_complete_weights_stays(hub, folder):
    """An index next to complete weights stays, because transformers ignores it."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    push_folder(folder, "zoo/digits")
    assert "model.safetensors.index.json" not in hub.repositories["zoo/digits"].files()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "is missing"),
        ("cut", "not a whole safetensors file"),
        ("lacks", "lacks 'another.weight'"),
        ("../outside.safetensors", "'../outside.safetensors', which is not a weight file"),
        ("/tmp/outside.safetensors", "which is not a weight file in its folder"),
        ("training_args.bin", "which is not a weight file in its folder"),
        (7, "which is not a weight file in its folder"),
    ],
)
def test_an_invalid_index_of_the_weights_is_refused(hub, folder, change, message):
    _, content = sharded(folder)
    tensor, shard = next(iter(content["weight_map"].items()))
    if change == "missing":
        (folder / shard).unlink()
    elif change == "cut":
        (folder / shard).write_bytes(b"cut")
    else:
        content["weight_map"] |= {"another.weight": shard} if change == "lacks" else {tensor: change}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        push_folder(folder, "zoo/digits")
    assert hub.requests == []


def test_pickled_weights_are_refused(hub, folder):
    torch.save(DeiTLTForImageClassification.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    before = weights_digest(folder)
    (folder / "model.safetensors").unlink()
    assert weights_digest(folder) not in (None, before)  # records of the old weights must not count for the new ones
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        push_folder(folder, "zoo/digits")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, r"names 3 classes, but .*classifier\.weight has 10"),
        ({"id2label": None}, "names 2 classes"),
        ({"model_type": None}, "has a model_type that is not valid"),
        ({"auto_map": ["x"]}, "auto_map in .* is not a JSON object"),
    ],
)
def test_a_configuration_of_other_weights_is_refused(hub, folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        push_folder(folder, "zoo/digits")
    assert hub.requests == []


@pytest.mark.parametrize("place", ["", "ema"])
def test_a_folder_that_is_being_written_is_refused(hub, folder, place):
    (folder / place / ".saving" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a model is being saved in .*, or its saving was interrupted"):
        push_folder(folder, "zoo/digits")
    assert hub.requests == []


def test_a_missing_token_is_reported(hub, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(PermissionError, match=r"^there is no token for a push to zoo/digits; run 'hf auth login'"):
        push_folder(folder, "zoo/digits")
    assert hub.requests == []


# ---- Training ----


def test_training_that_may_not_push_does_not_start(hub, tmp_path):
    """Training that may not push does not start, nor does the training of its teacher, which comes first."""
    recipe = ("scripts/distill.py", "--recipe", TINY, "--output_dir", tmp_path / "run" / "student")
    process = start(hub, tmp_path, *recipe, "--push_to_hub", "--hub_model_id", "zoo/digits", token=READER)
    output, errors = finish(process, returncode=1)
    assert errors.startswith("error: zoo/digits was not pushed: the token has no write access")
    assert errors.count("\n") == 1
    assert "This will run" not in output
    assert not (tmp_path / "run" / "teacher").exists()
    check_no_token(hub, output, errors, tmp_path)


def test_trainer_checks_before_training(hub, tmp_path, digits):
    with pytest.raises(ValueError, match="--hub_model_id"):
        make_trainer(tmp_path, digits, push_to_hub=True)
    with pytest.raises(OSError, match="no write access"):
        make_trainer(tmp_path, digits, push_to_hub=True, hub_model_id="zoo/digits", hub_token=READER)
    with pytest.raises(ValueError, match="hub_strategy must be one of end"):
        make_trainer(tmp_path, digits, push_to_hub=True, hub_model_id="zoo/digits", hub_strategy="every_save")


def test_a_push_that_fails_loses_nothing(hub, tmp_path, digits):
    trainer = make_trainer(tmp_path, digits, push_to_hub=True, hub_model_id="zoo/digits", save_strategy="epoch")
    trainer.train()
    hub.disturb = once(lambda method, path: "/commit/" in path, HubError(500, "Internal Error"))
    with pytest.raises(OSError, match=f"to push it later: deitlt push {tmp_path} zoo/digits"):
        trainer.save_model()
    expected = trainer.model.eval()(IMAGES).logits
    saved = DeiTLTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(saved(IMAGES).logits, expected)
    assert len(hub.repositories["zoo/digits"].commits) == 1, "checkpoints are not pushed"
    trainer.push_to_hub("At last", license="mit")
    assert hub.repositories["zoo/digits"].messages == ["initial commit", "At last"]
    assert b"license: mit" in hub.repositories["zoo/digits"].files()["README.md"]


def test_nothing_is_pushed_if_the_run_was_asked_to_stop(hub, tmp_path, digits):
    trainer = make_trainer(tmp_path, digits, push_to_hub=True, hub_model_id="zoo/digits", save_strategy="no")
    trainer.train()
    trainer.stop_signal.requested = True
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()
    assert len(hub.repositories["zoo/digits"].commits) == 1


def test_an_untrained_trainer_does_not_replace_a_model(hub, folder, digits, tmp_path):
    folder = folder.rename(folder.with_name("my student"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    trainer = make_trainer(folder, digits, push_to_hub=True, hub_model_id="zoo/digits")
    for options, shown in (
        ({}, ""),
        ({"private": True, "revision": "second"}, " --private --revision second"),
    ):
        expected = f"push the existing model with: deitlt push '{folder}' zoo/digits{shown}"
        with pytest.raises(FileExistsError, match=f"{re.escape(expected)}$"):
            trainer.push_to_hub(**options)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert len(hub.repositories["zoo/digits"].commits) == 1
    make_trainer(tmp_path / "new", digits, push_to_hub=True, hub_model_id="zoo/digits").push_to_hub()
    assert b"model-index" not in hub.repositories["zoo/digits"].files()["README.md"]
