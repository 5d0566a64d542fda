"""Shared fixtures: reference values, and a data set and models small enough for two cores."""

import gc

gc.disable()  # imports take a fifth longer with it; the start of the session enables it

import functools
import inspect
import json
import os

# The expected values are those of a CPU, also in processes that a test starts; benchmarks/device_checks.py checks GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from transformers import Trainer

from deitlt_hf import FlatTeacherForImageClassification
from deitlt_hf.data import load_long_tailed
from deitlt_hf.training import run_log
from helpers import FIXTURES, ROOT, make_student, teacher_trainer
from hub_server import READER, WRITER, Account, running_hub

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_sessionstart():
    """Takes the million objects of the imported libraries out of every later garbage collection."""
    gc.freeze()
    gc.enable()


pytest_collection_finish = pytest_sessionstart  # also after the imports of the test modules


@pytest.fixture(scope="session", autouse=True)
def quick_runs():
    """Leaves out of this process what takes as long as a short training, and what few tests look at.

    Training curves are a blank picture, and files need not survive a power failure.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "draw_curves", lambda entries, file, *_: Image.new("L", (1, 1)).save(file, "PNG"))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def reference():
    """Outputs of the original implementations; `tests/fixtures/README.md` describes how they were computed."""
    return json.loads((FIXTURES / "reference_values.json").read_text())


@pytest.fixture(scope="session")
def digits():
    """A long-tailed subset of the embedded digits: 60 to 6 training images a class."""
    return load_long_tailed("digits", imbalance_ratio=10, max_per_class=60)


@pytest.fixture
def student():
    """A student for 8-pixel images, with random weights."""
    return make_student()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, digits):
    """A teacher trained well enough to pass the check before distillation."""
    folder = tmp_path_factory.mktemp("teacher")
    trainer = teacher_trainer(folder, digits, num_train_epochs=12, warmup_epochs=1, hflip=0, sam_rho=[0.05])
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def teacher(teacher_folder):
    return FlatTeacherForImageClassification.from_pretrained(teacher_folder)


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one user, who has a write token and a read token; huggingface_hub of this process uses it."""
    with running_hub() as hub:
        hub.accounts = {WRITER: Account("ann", organisations=("zoo",)), READER: Account("ann", role="read")}
        monkeypatch.setenv("HF_TOKEN", WRITER)
        # huggingface_hub reads HF_ENDPOINT and similar variables when it is imported.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        place = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        template = "".join((hub.url, *place[1:]))
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield hub


# ---- Slow tests ----

SLOW_NAMES = {"subprocess", "Popen", "train", "train_teacher", "distill", "pretrain", "compare"}
SLOW_COMMANDS = {"train", "train-teacher", "distill", "pretrain", "compare", "train_teacher.py", "distill.py"}


def pytest_collection_modifyitems(items):
    """Marks the tests that train or start a process, also in a fixture or helper function."""
    for item in items:
        fixtures = [fixture.func for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
        if any(map(is_slow, [item.function, *fixtures])):
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Lets only marked tests train, which keeps `make test-fast` fast."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("slow") is None:
            patch.setattr(Trainer, "train", refuse_to_train)
        return (yield)


@functools.wraps(Trainer.train)
def refuse_to_train(*_, **__):
    raise AssertionError("a test that trains needs the mark `slow`: add what it calls to SLOW_NAMES")


@functools.cache
def is_slow(function) -> bool:
    """Whether a function uses a slow name or runs a slow command, itself or through functions of the tests."""
    functions = [inspect.unwrap(function)]
    for function in functions:  # grows by the functions that it uses
        codes, names, texts = [function.__code__], set(), set()
        for code in codes:  # grows by the functions inside
            names.update(code.co_names)
            texts.update(constant for constant in code.co_consts if isinstance(constant, str))
            codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
        runs_command = "main" in names or "script" in function.__code__.co_varnames
        if names & SLOW_NAMES or (runs_command and texts & SLOW_COMMANDS):
            return True
        used = (function.__globals__.get(name) for name in names)
        functions += [value for value in used if is_of_tests(value) and value not in functions]
    return False


def is_of_tests(value) -> bool:
    return inspect.isfunction(value) and Path(value.__code__.co_filename).parent == ROOT / "tests"
