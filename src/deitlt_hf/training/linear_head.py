"""A balanced logistic regression on frozen features, and its conversion to a linear layer."""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from ..data.long_tail import class_counts, validation_split

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # inverse regularisation, C of scikit-learn
HELD_OUT = 0.2  # share of each class on which the regularisation is chosen
ITERATIONS = 1000

Seen = tuple[np.ndarray, np.ndarray]  # features of images, (images, size), and their classes, (images,)


def fit_balanced(train: Seen, validation: Seen | None = None) -> tuple[Pipeline, float, int]:
    """Fits a logistic regression in which every class has the same weight.

    The regularisation is chosen on validation images, or without them on a part of the training images. The regression
    is then fitted to all training images.

    Returns:
        The regression on standardised features, its inverse regularisation, and the number of images that chose it.
    """
    features, labels = train
    if validation is not None:
        fitted, held_out = train, validation
    elif class_counts(labels).max() > 1:
        fit_rows, held_rows = validation_split(labels, HELD_OUT)
        fitted, held_out = (features[fit_rows], labels[fit_rows]), (features[held_rows], labels[held_rows])
    else:  # nothing to choose on
        fitted, held_out = train, (features[:0], labels[:0])
    strength = choose_strength(*fitted, *held_out) if len(held_out[1]) else 1.0
    return _regression(strength, features, labels), strength, len(held_out[1])


def choose_strength(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, held_labels: np.ndarray) -> float:
    """The inverse regularisation with the lowest cross entropy on held-out images, with equal weight for every class.

    Features have shape (images, size). All classes of the held-out images are also in `labels`.
    """
    weights = compute_sample_weight("balanced", held_labels)
    losses = []
    for strength in STRENGTHS:
        regression = _regression(strength, features, labels)
        scores = regression.predict_proba(held_out)
        losses.append(log_loss(held_labels, scores, sample_weight=weights, labels=regression.classes_))
    return STRENGTHS[int(np.argmin(losses))]


def _regression(strength: float, features: np.ndarray, labels: np.ndarray) -> Pipeline:
    regression = LogisticRegression(C=strength, class_weight="balanced", max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # with weak regularisation, which is rarely chosen
        return make_pipeline(StandardScaler(), regression).fit(features, labels)


@torch.no_grad()
def fold(regression: Pipeline, head: torch.nn.Linear) -> None:
    """Sets a linear layer to a regression of [`fit_balanced`], so that its logits give the same probabilities.

    The layer reads the features as they are: the standardisation is folded into weights and biases.
    """
    scaler, classifier = regression.named_steps["standardscaler"], regression.named_steps["logisticregression"]
    weight, bias = classifier.coef_.astype(np.float64), classifier.intercept_.astype(np.float64)
    if len(classifier.classes_) == 2:  # scikit-learn has one logit for two classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    head.weight.copy_(torch.from_numpy(weight))
    head.bias.copy_(torch.from_numpy(bias - weight @ scaler.mean_))
