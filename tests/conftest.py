"""Shared fixtures: reference values, and a data set and models small enough for two cores."""

import json
import os

import pytest
import torch

from deitlt_hf import FlatTeacherForImageClassification
from deitlt_hf.data import load_long_tailed
from helpers import FIXTURES, make_student, teacher_trainer

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


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
