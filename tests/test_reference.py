"""Tests of numerical parity with the original implementations."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deitlt_hf.data import (
    class_counts,
    decreasing_count_map,
    indices_hash,
    long_tailed_indices,
)
from deitlt_hf.data.sampling import TrainBatches
from deitlt_hf.losses import DistillationLoss, LDAMLoss, PaCoLoss, effective_number_weights
from deitlt_hf.training import SAM
from deitlt_hf.training.schedule import warmup_cosine
from helpers import FIXTURES

PACO_WEIGHTS = ("alpha", "beta", "gamma", "temperature")


@pytest.mark.parametrize("case", range(6))
def test_distillation_loss(reference, case):
    values = reference["distillation_loss"]
    case = values["cases"][case]
    weights = effective_number_weights(values["class_counts"]) if case["drw_weighted"] else None
    criterion = DistillationLoss(case["alpha"], case["type"], case["tau"], class_weights=weights)
    labels = torch.tensor(values["soft_labels" if case["base"] == "soft_target_ce" else "hard_labels"])
    logits = (torch.tensor(values[f"{name}_logits"]) for name in ("cls", "dist"))
    output = criterion(*logits, labels, torch.tensor(values["teacher_logits"]))
    expected = [case["loss"], case["cls_part"], case["dist_part"]]
    torch.testing.assert_close(torch.stack(list(output)), torch.tensor(expected), atol=1e-5, rtol=0)


def test_class_weights(reference):
    for case in reference["drw_weights"]:
        weights = effective_number_weights(case["counts"], case["beta"])
        torch.testing.assert_close(weights, torch.tensor(case["weights"]), atol=1e-6, rtol=0)


def test_ldam_loss(reference):
    values = reference["ldam_loss"]
    # The original takes cosines and scales them; ours takes logits that the classifier has scaled.
    logits, labels = values["s"] * torch.tensor(values["logits"]), torch.tensor(values["labels"])
    for name, weights in (("loss", None), ("loss_drw", effective_number_weights(values["counts"]))):
        loss = LDAMLoss(values["counts"], values["max_m"], values["s"], weights)(logits, labels)
        assert loss.item() == pytest.approx(values[name], abs=1e-5)


def test_paco_loss(reference):
    values = reference["paco_loss"]
    labels, features = torch.tensor(values["labels"]), torch.tensor(values["features"])
    options = {name: values[name] for name in ("alpha", "beta", "gamma", "temperature")}
    queries, keys = features.split([len(labels), len(features) - len(labels)])
    key_labels = torch.cat([labels, torch.tensor(values["queue_labels"])])
    loss = PaCoLoss(values["counts"], **options)(torch.tensor(values["logits"]), queries, labels, keys, key_labels)
    assert loss.item() == pytest.approx(values["loss"], abs=1e-5)


PACO = json.loads((FIXTURES / "paco_values.json").read_text())


@pytest.mark.parametrize("case", PACO["cases"], ids=lambda case: "-".join(str(case[name]) for name in PACO_WEIGHTS))
def test_paco_weights_the_terms_of_the_original(case):
    """PaCo weights the terms as the original does.

    The original's gamma weights the images in the denominator; with values other than 1, the weights of the centres
    differ.
    """
    batch, queue, features, classes = PACO["batch"], PACO["queue"], PACO["features"], len(PACO["counts"])
    logits, queries, keys = (
        torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
        for seed, shape in enumerate([(batch, classes), (batch, features), (batch + queue, features)])
    )
    labels, queued = (
        torch.from_numpy(np.random.RandomState(seed).randint(0, classes, n)) for seed, n in ((3, batch), (4, queue))
    )
    logits.requires_grad_()
    queries.requires_grad_()
    criterion = PaCoLoss(PACO["counts"], **{name: case[name] for name in PACO_WEIGHTS})
    pair = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    loss = criterion(logits, pair[0], labels, pair[1], torch.cat([labels, queued]))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    torch.testing.assert_close(logits.grad, torch.tensor(case["logits_gradient"]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(queries.grad, torch.tensor(case["queries_gradient"]), atol=1e-6, rtol=1e-5)


def test_long_tailed_subsets(reference):
    for case in reference["long_tail_subset"]:
        classes = case["classes"]
        labels = np.random.RandomState(7).permutation(np.repeat(np.arange(classes), 50_000 // classes))
        indices = long_tailed_indices(labels, classes, 1 / case["imb_factor"], case["imb_type"])
        assert class_counts(labels[indices]).tolist() == case["counts"]
        assert indices[:12].tolist() == case["first"]
        assert indices_hash(indices) == case["sha256_int64"]


@pytest.mark.parametrize(
    ("largest", "smallest", "classes", "exponent", "sha256"),
    [
        (1280, 5, 1000, 0.7, "72f382342ddf5cf44f2c0c159972307a839125cb12d03c7e031d05b600b31aa7"),
        (1000, 2, 8142, 0.45, "689f0a3ef7bd18169349eae75cd063b23517e014431aec4df631532fdcb006c9"),
    ],
    ids=["imagenet_lt", "inat18"],
)
def test_class_map_has_the_ties_of_numpy_1_24(largest, smallest, classes, exponent, sha256):
    """The class map orders ties as numpy 1.24 does. The authors used 1.24.3 (environment.yml); later versions differ.

    The expected values are SHA-256 of `np.argsort(-counts)` in numpy 1.24.3, int64, for counts with many ties.
    """
    counts = np.clip(np.round(largest * np.arange(1, classes + 1) ** -exponent), smallest, largest).astype(np.int64)
    counts = np.random.RandomState(0).permutation(counts)
    class_map = decreasing_count_map(counts)
    order = np.argsort(class_map)
    assert np.all(np.diff(counts[order]) <= 0)
    assert len(np.unique(counts)) < len(counts) // 2
    assert indices_hash(order) == sha256


def test_learning_rate(reference):
    values = reference["lr_schedule"]
    args = SimpleNamespace(
        peak_learning_rate=values["base_lr_after_scaling"],
        min_learning_rate=values["min_lr"],
        warmup_epochs=values["warmup_epochs"],
        warmup_learning_rate=values["warmup_lr"],
    )
    rates = [warmup_cosine(epoch, values["epochs"], args) for epoch in values["at_epoch"]]
    assert rates == pytest.approx(values["lr"], rel=1e-9)


def test_repeated_augmentation_order(reference):
    """Each process receives the images in the original's order."""
    for case in reference["repeated_aug_sampler"]:
        batches = TrainBatches(
            case["dataset_len"], 1, case["rank"], case["num_replicas"], num_repeats=case["num_repeats"]
        )
        batches.set_epoch(case["epoch"])
        mine = [index for batch in batches for index, _ in batch]
        assert len(mine) == case["len"]
        assert mine[:12] == case["first"]
        assert hashlib.sha256(np.asarray(mine, dtype=np.int64).tobytes()).hexdigest() == case["sha256_int64"]


def test_sam_steps(reference):
    values = reference["sam"]
    layer = torch.nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(values["weight0"]))
        layer.bias.copy_(torch.tensor(values["bias0"]))
    sgd = torch.optim.SGD(
        layer.parameters(), values["lr"], momentum=values["momentum"], weight_decay=values["weight_decay"]
    )
    optimizer = SAM(sgd, values["rho"])
    images, labels = torch.tensor(values["x"]), torch.tensor(values["y"])
    for _ in range(values["steps"]):
        F.cross_entropy(layer(images), labels).backward()
        optimizer.ascend()
        F.cross_entropy(layer(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(layer.weight.detach(), torch.tensor(values["weight"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.bias.detach(), torch.tensor(values["bias"]), atol=1e-6, rtol=0)
