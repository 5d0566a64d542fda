"""Measures of attention: mean distances, spread of the tokens, and rollout. All take arrays of attention weights.

Attention weights are the `attentions` of transformers: for each layer (images, heads, tokens, tokens). Rows sum to 1.
The special tokens (CLS and DIST of DeiT-LT, CLS of ViT) come before the patches.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from torch import nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Context in which a transformer uses eager attention.

    The other implementations return no attention weights, and on a CPU they have no second derivatives.
    """
    before = getattr(model.config, "_attn_implementation", None)
    if not isinstance(model, PreTrainedModel) or before in (None, "eager"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def patch_distances(grid: tuple[int, int], patch_size: float | Sequence[float] = 1.0) -> np.ndarray:
    """Distances between the centres of all patches, in row-major order; float64 of shape (patches, patches), in pixels.

    Args:
        grid: Number of rows and columns of patches.
        patch_size: Side of a patch, or its height and width, in pixels.
    """
    rows, columns = np.indices(grid).reshape(2, -1) * np.broadcast_to(patch_size, 2)[:, None]
    return np.hypot(rows[:, None] - rows, columns[:, None] - columns)


def attention_distances(
    attentions: np.ndarray, grid: tuple[int, int], patch_size: float | Sequence[float] = 1.0, num_tokens: int = 2
) -> np.ndarray:
    """Mean attention distance of each head (Dosovitskiy et al., ICLR 2021, D.7; Raghu et al., NeurIPS 2021).

    The distance from a patch to the other patches, weighted by its attention to them, averaged over patches and images.
    Attention to the special tokens is left out, and the rest is normalised to sum to 1.

    Args:
        attentions: Attention weights of one layer; (images, heads, tokens, tokens).
        grid: Number of rows and columns of patches.
        patch_size: Side of a patch, or its height and width, in pixels.
        num_tokens: Number of special tokens before the patches.

    Returns:
        Distances in pixels; float64 of shape (heads,).

    Raises:
        ValueError: If the attention does not have this number of patches.
    """
    # Without the special tokens, which have no position. With their share, a head that attends to CLS would look local.
    weights = _to_patches(attentions, grid, num_tokens)[:, :, num_tokens:]
    return np.einsum("ihqk,qk->h", weights, patch_distances(grid, patch_size)) / (weights.shape[0] * weights.shape[2])


def token_spreads(
    attentions: np.ndarray, grid: tuple[int, int], patch_size: float | Sequence[float] = 1.0, num_tokens: int = 2
) -> np.ndarray:
    """Spatial spread of the attention of each special token, for each head.

    A special token has no position in the image. Its spread is therefore the mean distance of two patches that are
    drawn independently with its attention as probabilities: 0 if it attends to one patch only, and the mean pairwise
    distance if its attention is uniform. The arguments are those of [`attention_distances`].

    Returns:
        Distances in pixels; float64 of shape (num_tokens, heads).

    Raises:
        ValueError: If the attention does not have this number of patches.
    """
    weights = _to_patches(attentions, grid, num_tokens)[:, :, :num_tokens]
    distances = patch_distances(grid, patch_size)
    return np.einsum("ihtk,kl,ihtl->th", weights, distances, weights, optimize=True) / len(weights)


def attention_rollout(attentions: Sequence[np.ndarray]) -> np.ndarray:
    """Attention rollout: the share of each input token in each token of the last layer (Abnar and Zuidema, ACL 2020).

    Heads are averaged, and the residual connection counts as half of each layer's attention.

    Args:
        attentions: Attention weights of all layers, from first to last; (images, heads, tokens, tokens) each.

    Returns:
        float64 of shape (images, tokens, tokens); rows sum to 1.
    """
    images, _, tokens, _ = attentions[0].shape
    rollout = np.broadcast_to(np.eye(tokens), (images, tokens, tokens))
    for layer in attentions:
        # Abnar and Zuidema's 0.5 W + 0.5 I: a block adds to its input, so a token also keeps itself.
        mixed = (np.asarray(layer, dtype=np.float64).mean(axis=1) + np.eye(tokens)) / 2
        rollout = mixed / mixed.sum(axis=-1, keepdims=True) @ rollout
    return rollout


def _to_patches(attentions: np.ndarray, grid: tuple[int, int], num_tokens: int) -> np.ndarray:
    """Attention to patches only, normalised to sum to 1; (images, heads, tokens, patches)."""
    attentions = np.asarray(attentions, dtype=np.float64)
    patches = grid[0] * grid[1]
    if attentions.ndim != 4 or attentions.shape[-1] != num_tokens + patches:
        raise ValueError(
            f"attention of shape {attentions.shape} does not fit {num_tokens} tokens and {grid[0]} x {grid[1]} patches."
        )
    weights = attentions[..., num_tokens:]
    totals = weights.sum(axis=-1, keepdims=True)
    # If a token has no attention to patches at all, it gets uniform attention.
    return np.divide(weights, totals, out=np.full_like(weights, 1 / patches), where=totals > 0)
