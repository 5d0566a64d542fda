"""Tests of properties of losses and class weights, in addition to their reference values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from deitlt_hf.losses import (
    CLS_LOSSES,
    DISTILLATION_TARGETS,
    DistillationLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    PaCoLoss,
    effective_number_weights,
)
from deitlt_hf.losses.class_weights import named_weights, read_class_weights

BATCH, CLASSES = 12, 5
GENERATOR = torch.Generator().manual_seed(0)
CLS, DIST, TEACHER = (torch.randn(BATCH, CLASSES, generator=GENERATOR) for _ in range(3))
LABELS = torch.randint(0, CLASSES, (BATCH,), generator=GENERATOR)
SOFT_LABELS = torch.softmax(torch.randn(BATCH, CLASSES, generator=GENERATOR), dim=1)
COUNTS = [100, 50, 20, 5, 2]
WEIGHTS = effective_number_weights(COUNTS)


@given(counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=50), beta=st.sampled_from([0.0, 0.9, 0.999, 0.9999]))
def test_weights_fall_with_the_count_and_have_mean_one(counts, beta):
    weights = effective_number_weights(sorted(counts), beta)
    assert weights.dtype == torch.float32
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.all(weights.diff() <= 1e-6)
    assert torch.all(weights > 0)


@pytest.mark.parametrize(
    ("counts", "beta", "message"),
    [
        ([5, 0, 3], 0.9, r"classes without one: \[1\]"),
        ([], 0.9, "at least one"),
        ([5], 1.0, r"beta must be in \[0, 1\)"),
    ],
)
def test_invalid_weights_are_refused(counts, beta, message):
    with pytest.raises(ValueError, match=message):
        effective_number_weights(counts, beta)


@pytest.mark.parametrize("loss", [LDAMLoss, LogitAdjustedLoss, PaCoLoss])
def test_losses_refuse_a_class_without_training_images(loss):
    """Losses refuse a class without images, whose margin or logarithm would be infinite and spoil the other classes."""
    with pytest.raises(ValueError, match=r"classes without one: \[1\]"):
        loss([10, 0])


@pytest.mark.parametrize("values", [{"beta": 0.0}, {"gamma": 0.0}])
def test_invalid_paco_arguments_are_refused(values):
    with pytest.raises(ValueError, match="beta and gamma must be above 0"):
        PaCoLoss([10, 5], **values)


@pytest.mark.parametrize("distillation", DISTILLATION_TARGETS)
@pytest.mark.parametrize("cls_loss", CLS_LOSSES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("labels", [LABELS, SOFT_LABELS])
def test_losses_add_up_over_micro_batches(distillation, cls_loss, weights, labels):
    """Losses of micro-batches add up to the loss of the batch.

    `F.cross_entropy(weight=...)` divides by the weight sum of each micro-batch, which gives another loss.
    """
    criterion = DistillationLoss(0.3, distillation, 2.0, cls_loss, weights, cls_loss == "ce", class_counts=COUNTS)
    whole = criterion(CLS, DIST, labels, TEACHER)
    slices = [slice(0, 5), slice(5, 12)]
    total = sum(criterion.denominators(labels[part], TEACHER[part]) for part in slices)
    summed = [criterion(CLS[part], DIST[part], labels[part], TEACHER[part], total) for part in slices]
    for name in ("loss", "cls_loss", "distillation_loss"):
        torch.testing.assert_close(getattr(whole, name), sum(getattr(part, name) for part in summed))
    torch.testing.assert_close(whole.loss, whole.cls_loss + whole.distillation_loss)


def test_variants_match_their_names():
    alone = DistillationLoss(1.0, "none")(CLS, DIST, LABELS)
    torch.testing.assert_close(alone.loss, F.cross_entropy(DIST, LABELS))
    assert alone.cls_loss == 0
    weighted = DistillationLoss(1.0, "none", class_weights=WEIGHTS)(CLS, DIST, LABELS)
    torch.testing.assert_close(weighted.loss, F.cross_entropy(DIST, LABELS, weight=WEIGHTS))
    bce = DistillationLoss(0.0, "hard", cls_loss="bce")(CLS, DIST, SOFT_LABELS, TEACHER)
    torch.testing.assert_close(bce.loss, F.binary_cross_entropy_with_logits(CLS, SOFT_LABELS))
    reweighted = DistillationLoss(0.0, "hard", class_weights=WEIGHTS, reweight_cls=True)(CLS, DIST, LABELS, TEACHER)
    torch.testing.assert_close(reweighted.loss, F.cross_entropy(CLS, LABELS, weight=WEIGHTS))
    given = torch.arange(1.0, 6.0)
    both = DistillationLoss(0.5, "hard", class_weights=WEIGHTS, cls_weights=given)(CLS, DIST, LABELS, TEACHER)
    torch.testing.assert_close(2 * both.cls_loss, F.cross_entropy(CLS, LABELS, weight=given))
    torch.testing.assert_close(2 * both.distillation_loss, F.cross_entropy(DIST, TEACHER.argmax(1), weight=WEIGHTS))


@pytest.mark.parametrize("cls_loss", CLS_LOSSES)
@pytest.mark.parametrize("labels", [LABELS, SOFT_LABELS])
def test_a_class_of_twice_the_weight_counts_as_if_its_images_were_there_twice(cls_loss, labels):
    """Any loss of CLS takes class weights; labels of several classes have the weights of their shares."""
    weights = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])
    loss = DistillationLoss(0.0, "none", cls_loss=cls_loss, class_counts=COUNTS, cls_weights=weights)
    alone = DistillationLoss(0.0, "none", cls_loss=cls_loss, class_counts=COUNTS)
    if labels is LABELS:
        twice = torch.cat([torch.arange(BATCH), torch.nonzero(labels == 0).flatten()])
        torch.testing.assert_close(loss(CLS, DIST, labels).loss, alone(CLS[twice], DIST[twice], labels[twice]).loss)
    weights[:] = 3.0  # equal weights change nothing
    loss = DistillationLoss(0.0, "none", cls_loss=cls_loss, class_counts=COUNTS, cls_weights=weights)
    torch.testing.assert_close(loss(CLS, DIST, labels).loss, alone(CLS, DIST, labels).loss)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ({}, None),
        ("none", None),
        ("melanoma=5,nevus=1", {"melanoma": 5, "nevus": 1}),
        (" a, b = 0.5 , x=y=2", {"a, b": 0.5, "x=y": 2}),
        ({3: "1e1"}, {"3": 10}),
    ],
)
def test_class_weights_are_read_from_texts_and_mappings(given, expected):
    assert read_class_weights(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("melanoma", "must be NAME=WEIGHT,NAME=WEIGHT, got 'melanoma'"),
        ("a=1,b", "must be NAME=WEIGHT,NAME=WEIGHT, got 'a=1,b'"),
        ("a=1,a=2", "has 'a' twice"),
        *(
            (f"a={value}", f"class_weights of 'a' must be a number above 0, got {value}")
            for value in ("-1", "0", "nan")
        ),
        ({"a": None}, "class_weights of 'a' must be a number above 0, got None"),
    ],
)
def test_invalid_class_weights_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_class_weights(given)


def test_class_weights_are_matched_by_name_and_have_mean_one():
    weights = named_weights({"nevus": 4.0}, ["melanoma", "nevus", "naevus"])
    assert weights.tolist() == [0.5, 2.0, 0.5]
    with pytest.raises(
        ValueError, match="the class 'nevis', which the data do not have; the most similar one is 'nevus'"
    ):
        named_weights({"nevis": 4.0}, ["melanoma", "nevus"])


@pytest.mark.parametrize("weights", [{"a": 1e308}, {"a": 1e308, "b": 1e308}, {"a": 1e-320}])
def test_class_weights_that_would_become_zero_are_refused(weights):
    with pytest.raises(ValueError, match="class_weights differ by too much"):
        named_weights(weights, ["a", "b", "c"])


def test_summed_soft_labels_give_gradients_as_large_as_labels():
    """Soft labels summed over classes give gradients as large as those of hard labels.

    The gradient is that of cross entropy with the teacher's probabilities, five times that of the authors' mean.
    """
    gradients = {}
    for distillation in ("soft", "soft_sum"):
        student = DIST.clone().requires_grad_()
        DistillationLoss(1.0, distillation)(CLS, student, LABELS, TEACHER).loss.backward()
        gradients[distillation] = student.grad
    student = DIST.clone().requires_grad_()
    F.cross_entropy(student, TEACHER.softmax(dim=1)).backward()
    torch.testing.assert_close(gradients["soft_sum"], student.grad)
    torch.testing.assert_close(gradients["soft_sum"], gradients["soft"] * DIST.shape[1])


@pytest.mark.parametrize("labels", [LABELS, SOFT_LABELS])
def test_logit_adjusted_cls_loss_is_balanced_softmax(labels):
    """The logit-adjusted CLS loss is balanced softmax (Ren et al., equation 4).

    The test computes it by hand, with shares of `n_c * exp(logit)`.
    """
    weighted = CLS.exp() * torch.tensor(COUNTS)
    targets = labels if labels.dim() == 2 else F.one_hot(labels, CLS.shape[1])
    expected = -(targets * (weighted / weighted.sum(dim=1, keepdim=True)).log()).sum(dim=1).mean()
    criterion = DistillationLoss(0.0, "none", cls_loss="logit_adjusted", class_counts=COUNTS)
    torch.testing.assert_close(criterion(CLS, DIST, labels).loss, expected)


def test_soft_distillation_has_its_minimum_at_the_weighted_teacher():
    criterion = DistillationLoss(1.0, "soft", 3.0, class_weights=WEIGHTS)
    target = TEACHER + 3.0 * WEIGHTS.log()
    assert criterion(CLS, target, LABELS, TEACHER).loss.item() == pytest.approx(0.0, abs=1e-6)
    assert criterion(CLS, TEACHER, LABELS, TEACHER).loss > 1e-3


def test_no_gradient_reaches_the_teacher():
    teacher = TEACHER.clone().requires_grad_()
    student = DIST.clone().requires_grad_()
    for distillation in ("hard", "soft", "soft_sum"):
        DistillationLoss(0.5, distillation)(CLS, student, LABELS, teacher.detach()).loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"distillation": "both"}, "distillation must be one of hard, soft, soft_sum, none, got 'both'"),
        ({"cls_loss": "mse"}, "cls_loss must be one of ce, bce, logit_adjusted, got 'mse'"),
        ({"cls_loss": "logit_adjusted"}, "cls_loss='logit_adjusted' needs class_counts; got None"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_invalid_distillation_arguments_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**values)


def test_teacher_logits_are_checked():
    with pytest.raises(ValueError, match="distillation='hard' needs teacher_logits; got None"):
        DistillationLoss()(CLS, DIST, LABELS)
    for distillation in ("hard", "soft", "soft_sum"):
        with pytest.raises(ValueError, match=r"teacher_logits have shape \(12, 4\), the student's \(12, 5\)"):
            DistillationLoss(distillation=distillation)(CLS, DIST, LABELS, TEACHER[:, :4])


def test_ldam_margins_are_largest_for_the_rarest_class():
    loss = LDAMLoss([100, 10, 1], max_margin=0.5, reduction="none")
    assert loss.margins.argmax() == 2
    assert loss.margins.max().item() == pytest.approx(0.5)
    cosines = torch.zeros(3, 3)
    losses = loss(cosines, torch.tensor([0, 1, 2]))
    assert losses[0] < losses[1] < losses[2]


# ---- PaCo and logit adjustment ----


def paco_by_hand(logits, queries, labels, keys, key_labels, counts, alpha, beta, gamma, temperature):
    """PaCo computed by hand: equations 4 to 6 of the paper, one image and one term at a time."""
    others, other_labels = torch.cat([queries, keys]), torch.cat([labels, key_labels])
    losses = []
    for image, label in enumerate(labels.tolist()):
        centres = [math.exp(logits[image, c] + math.log(counts[c] / sum(counts))) for c in range(len(counts))]
        similar = {
            other: math.exp(queries[image] @ others[other] / temperature)
            for other in range(len(others))
            if other != image
        }
        total = sum(centres) + gamma * sum(similar.values())
        terms = [(beta, math.log(centres[label] / total))]
        terms += [(alpha, math.log(similar[other] / total)) for other in similar if other_labels[other] == label]
        losses.append(-sum(weight * term for weight, term in terms) / sum(weight for weight, _ in terms))
    return torch.tensor(losses)


@given(seed=st.integers(0, 1000), alpha=st.floats(0, 1), gamma=st.floats(0.1, 2), num_keys=st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_paco_matches_its_definition(seed, alpha, gamma, num_keys):
    random = torch.Generator().manual_seed(seed)
    counts = [40, 9, 3]
    logits = torch.randn(5, 3, generator=random, dtype=torch.float64)
    queries, keys = (
        F.normalize(torch.randn(n, 4, generator=random, dtype=torch.float64), dim=1) for n in (5, num_keys)
    )
    labels, key_labels = (torch.randint(0, 3, (n,), generator=random) for n in (5, num_keys))
    expected = paco_by_hand(logits, queries, labels, keys, key_labels, counts, alpha, 1.0, gamma, 0.2)
    given = (logits, queries, labels, keys, key_labels)
    options = {"alpha": alpha, "gamma": gamma, "temperature": 0.2}
    losses = PaCoLoss(counts, **options, reduction="none")(*given)
    torch.testing.assert_close(losses.double(), expected.double(), atol=1e-4, rtol=1e-4)
    weights = torch.tensor([0.5, 1.0, 1.5])
    weighted = PaCoLoss(counts, **options, class_weights=weights)(*given)
    torch.testing.assert_close(weighted, (losses * weights[labels]).sum() / weights[labels].sum())
    total = PaCoLoss(counts, **options, class_weights=weights, reduction="sum")(*given)
    torch.testing.assert_close(total, (losses * weights[labels]).sum())


def test_paco_gives_a_finite_gradient_without_keys():
    logits, queries = torch.randn(2, 3, requires_grad=True), torch.eye(2, requires_grad=True)
    nothing = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)
    PaCoLoss([5, 2, 1], temperature=0.05)(logits, queries, torch.tensor([0, 0]), *nothing).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(queries.grad).all()


def test_logit_adjustment():
    """With tau 1 the loss is balanced softmax, whose shares are n_c exp(logit_c); with tau 0 it is cross entropy."""
    counts, logits, labels = torch.tensor([90.0, 9.0, 1.0]), torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    shares = counts * logits.exp()
    expected = -(shares / shares.sum(dim=1, keepdim=True)).gather(1, labels[:, None]).log().mean()
    torch.testing.assert_close(LogitAdjustedLoss(counts)(logits, labels), expected)
    torch.testing.assert_close(LogitAdjustedLoss(counts, tau=0)(logits, labels), F.cross_entropy(logits, labels))
    weights = torch.tensor([0.1, 1.0, 1.9])
    torch.testing.assert_close(
        LogitAdjustedLoss(counts, class_weights=weights)(logits, labels),
        F.cross_entropy(logits + counts.log(), labels, weights),
    )
