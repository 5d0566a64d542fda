"""Measures of token features: singular values, effective rank and similarity of two tokens. All take arrays."""

import numpy as np


def singular_values(features: np.ndarray) -> np.ndarray:
    """Singular values of centred features, in descending order; float64 of shape (min(images, size),).

    Args:
        features: Features of one token in one layer; (images, size).

    Raises:
        ValueError: If there are fewer than two images.
    """
    features = np.asarray(features, dtype=np.float64)
    if len(features) < 2:
        raise ValueError(f"the rank of features needs two images or more, got {len(features)}.")
    return np.linalg.svd(features - features.mean(axis=0), compute_uv=False)


def effective_rank(features: np.ndarray) -> float:
    """Effective rank of centred features: the exponential of the entropy of their singular values.

    It is between 1 and the rank; it is k for a matrix with k equal singular values (Roy and Vetterli, EUSIPCO 2007).

    Args:
        features: Features of one token in one layer; (images, size).

    Raises:
        ValueError: If there are fewer than two images.
    """
    values = singular_values(features)
    if values[0] == 0:
        return 0.0  # all images have the same features
    # Rounding leaves tiny values in place of zeros, whose logarithm the entropy would need.
    shares = values[values > 1e-12 * values[0]]
    shares = shares / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def token_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine similarity of two tokens for each image; float64 of shape (images,).

    Args:
        first: Features of one token; (images, size).
        second: Features of the other token; (images, size).
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.divide((first * second).sum(axis=1), lengths, out=np.zeros(len(first)), where=lengths > 0)
