"""Shared fixtures: reference values, and a data set and models small enough for two cores."""

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def reference():
    """Outputs of the original implementations; `tests/fixtures/README.md` describes how they were computed."""
    return json.loads((FIXTURES / "reference_values.json").read_text())


def filled_state_dict(keys, seed=0):
    """The reference weights: each tensor comes from a generator seeded by the tensor's name."""
    state = {}
    for name, spec in keys.items():
        shape, dtype = (spec[0], spec[1]) if spec and isinstance(spec[0], list) else (spec, "float32")
        if dtype.startswith("int") or spec == [[], "int64"]:
            state[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        random = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0x7FFFFFFF)
        values = random.standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            values = 1 + 0.1 * np.abs(values)
        elif name.endswith("weight") and len(shape) == 1:
            values = 1 + 0.1 * values
        else:
            values = 0.05 * values
        state[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return state


@pytest.fixture(scope="session")
def digits():
    """A long-tailed subset of the embedded digits: 60 to 6 training images a class."""
    from deitlt_hf.data import load_long_tailed

    return load_long_tailed("digits", imbalance_ratio=10, max_per_class=60)


@pytest.fixture
def student():
    """A student for 8-pixel images, with random weights."""
    return make_student()


def make_student(seed=0, **config):
    from deitlt_hf import DeiTLTConfig, DeiTLTForImageClassification

    torch.manual_seed(seed)
    values = {
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 10,
    }
    return DeiTLTForImageClassification(DeiTLTConfig(**{**values, **config}))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, digits):
    """A teacher trained well enough to pass the check before distillation."""
    from deitlt_hf import (
        FlatTeacherConfig,
        FlatTeacherForImageClassification,
        FlatTeacherTrainer,
        FlatTeacherTrainingArguments,
    )

    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    trainer = FlatTeacherTrainer(
        model=FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10)),
        args=FlatTeacherTrainingArguments(
            output_dir=str(folder),
            num_train_epochs=12,
            warmup_epochs=1,
            per_device_train_batch_size=32,
            learning_rate=0.05,
            hflip=0,
            sam_rho=[0.05],
            eval_strategy="no",
            save_strategy="no",
        ),
        train_dataset=digits["train"],
        eval_dataset=digits["test"],
    )
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def teacher(teacher_folder):
    from deitlt_hf import FlatTeacherForImageClassification

    return FlatTeacherForImageClassification.from_pretrained(teacher_folder)
