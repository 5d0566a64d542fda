"""Numerical parity with the original implementations."""

import argparse
import hashlib
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import filled_state_dict
from deitlt_hf import FlatTeacherConfig, FlatTeacherForImageClassification
from deitlt_hf.data import RepeatedAugmentationSampler, class_counts, indices_hash, long_tailed_indices
from deitlt_hf.hub import load_original_student
from deitlt_hf.losses import DistillationLoss, LDAMLoss, effective_number_weights
from deitlt_hf.training import SAM
from deitlt_hf.training.schedule import warmup_cosine


def normal(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def test_student_logits(reference, tmp_path):
    """A wrong layer-norm epsilon, token order or qkv split would show here only."""
    values = reference["student_base"]
    file = {"model": filled_state_dict(values["keys"]), "epoch": 1199, "args": argparse.Namespace(lr=5e-4)}
    torch.save(file, tmp_path / "checkpoint.pth")
    model = load_original_student(tmp_path / "checkpoint.pth")
    with torch.no_grad():
        outputs = model(normal(100, (2, 3, 224, 224)))
    cls_logits, dist_logits = torch.tensor(values["cls_logits"]), torch.tensor(values["dist_logits"])
    assert (outputs.cls_logits - cls_logits).abs().max() < 2e-5
    assert (outputs.distillation_logits - dist_logits).abs().max() < 2e-5
    assert (outputs.logits - (cls_logits + dist_logits) / 2).abs().max() < 2e-5


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_files_that_are_no_student(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"model": Bomb(str(marker))}))
    with pytest.raises(ValueError, match=r"bomb\.pth is not a checkpoint that can be read safely"):
        load_original_student(tmp_path / "bomb.pth")
    assert not marker.exists()
    for content, message in (
        ({"weights": {}}, "has no weights under 'model'"),
        ({"model": {"conv1.weight": torch.zeros(3)}}, "'conv1.weight' is not a parameter of a DeiT-LT student"),
        ({"model": {"cls_token": torch.zeros(1, 1, 8)}}, "the student's weights lack 'deit.embeddings.patch"),
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            load_original_student(tmp_path / "other.pth")


def test_ldam_teacher_logits(reference):
    values = reference["teacher_ldam_cifar"]
    state = {f"backbone.{name}": tensor for name, tensor in filled_state_dict(values["keys"]).items()}
    state["classifier.weight"] = state.pop("backbone.linear.weight").T
    model = FlatTeacherForImageClassification(
        FlatTeacherConfig(backbone="resnet32", classifier="cosine", num_labels=10)
    ).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(normal(200, (4, 3, 32, 32))).logits
    assert (logits - torch.tensor(values["logits"])).abs().max() < 2e-5


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
    logits, labels = torch.tensor(values["logits"]), torch.tensor(values["labels"])
    for name, weights in (("loss", None), ("loss_drw", effective_number_weights(values["counts"]))):
        loss = LDAMLoss(values["counts"], values["max_m"], values["s"], weights)(logits, labels)
        assert loss.item() == pytest.approx(values[name], abs=1e-5)


def test_long_tailed_subsets(reference):
    for case in reference["long_tail_subset"]:
        classes = case["classes"]
        labels = np.random.RandomState(7).permutation(np.repeat(np.arange(classes), 50_000 // classes))
        indices = long_tailed_indices(labels, classes, 1 / case["imb_factor"], case["imb_type"])
        assert class_counts(labels[indices]).tolist() == case["counts"]
        assert indices[:12].tolist() == case["first"]
        assert indices_hash(indices) == case["sha256_int64"]


def test_learning_rate(reference):
    values = reference["lr_schedule"]
    rates = [
        warmup_cosine(
            epoch,
            epochs=values["epochs"],
            peak=values["base_lr_after_scaling"],
            minimum=values["min_lr"],
            warmup_epochs=values["warmup_epochs"],
            warmup_start=values["warmup_lr"],
        )
        for epoch in values["at_epoch"]
    ]
    assert rates == pytest.approx(values["lr"], rel=1e-9)


def test_repeated_augmentation_order(reference):
    """Accelerate hands out whole batches process after process; what one process gets is the original's order."""
    batch_size = 64
    for case in reference["repeated_aug_sampler"]:
        sampler = RepeatedAugmentationSampler(
            range(case["dataset_len"]), batch_size, case["num_replicas"], case["num_repeats"]
        )
        sampler.set_epoch(case["epoch"])
        draws = list(sampler)
        blocks = [draws[start : start + batch_size] for start in range(0, len(draws), batch_size)]
        mine = [index for block in blocks[case["rank"] :: case["num_replicas"]] for index in block]
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
