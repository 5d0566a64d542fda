"""Where tokens look: arrays of attention weights in, arrays out.

Attention weights are transformers' `attentions`: for each layer (images, heads, tokens, tokens), rows sum to 1, the
tokens before the patches (CLS and DIST of DeiT-LT, CLS of ViT) come first.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from torch import nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Has a transformer compute attention step by step: others give no weights, and on a CPU no second derivatives."""
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
    """Distances between the centres of patches, row by row; float64 of shape (patches, patches), in pixels.

    Args:
        grid: Patches down and across.
        patch_size: Side of a patch, or its height and width, in pixels.
    """
    rows, columns = np.indices(grid).reshape(2, -1) * np.broadcast_to(patch_size, 2)[:, None]
    return np.hypot(rows[:, None] - rows, columns[:, None] - columns)


def attention_distances(
    attentions: np.ndarray, grid: tuple[int, int], patch_size: float | Sequence[float] = 1.0, num_tokens: int = 2
) -> np.ndarray:
    """Mean attention distance of each head (Dosovitskiy et al., ICLR 2021, D.7; Raghu et al., NeurIPS 2021).

    How far away a patch looks: the distance to other patches, weighted by its attention to them, in the mean over
    patches and images. Attention to the tokens before the patches is left out, and the rest made to sum to 1.

    Args:
        attentions: Weights of one layer; (images, heads, tokens, tokens).
        grid: Patches down and across.
        patch_size: Side of a patch, or its height and width, in pixels.
        num_tokens: Tokens before the patches.

    Returns:
        Pixels; float64 of shape (heads,).

    Raises:
        ValueError: If the attention is not of as many patches.
    """
    weights = _to_patches(attentions, grid, num_tokens)[:, :, num_tokens:]
    return np.einsum("ihqk,qk->h", weights, patch_distances(grid, patch_size)) / (weights.shape[0] * weights.shape[2])


def token_spreads(
    attentions: np.ndarray, grid: tuple[int, int], patch_size: float | Sequence[float] = 1.0, num_tokens: int = 2
) -> np.ndarray:
    """How spread out over the image each token before the patches looks, for each head.

    Such a token has no place to measure from, so it is the mean distance of two patches that are drawn independently by
    its attention: 0 if it looks at one patch, and the mean pairwise distance if it looks everywhere alike.

    Args:
        attentions: As for [`attention_distances`].
        grid: As for [`attention_distances`].
        patch_size: As for [`attention_distances`].
        num_tokens: As for [`attention_distances`].

    Returns:
        Pixels; float64 of shape (num_tokens, heads).

    Raises:
        ValueError: If the attention is not of as many patches.
    """
    weights = _to_patches(attentions, grid, num_tokens)[:, :, :num_tokens]
    distances = patch_distances(grid, patch_size)
    return np.einsum("ihtk,kl,ihtl->th", weights, distances, weights, optimize=True) / len(weights)


def attention_rollout(attentions: Sequence[np.ndarray]) -> np.ndarray:
    """How much each token of the last layer holds of each input token (Abnar and Zuidema, ACL 2020).

    Heads are averaged, and half of each layer's attention is the residual connection.

    Args:
        attentions: Weights of all layers, the first one first; (images, heads, tokens, tokens) each.

    Returns:
        float64 of shape (images, tokens, tokens); rows sum to 1.
    """
    images, _, tokens, _ = attentions[0].shape
    rollout = np.broadcast_to(np.eye(tokens), (images, tokens, tokens))
    for layer in attentions:
        mixed = (np.asarray(layer, dtype=np.float64).mean(axis=1) + np.eye(tokens)) / 2
        rollout = mixed / mixed.sum(axis=-1, keepdims=True) @ rollout
    return rollout


def _to_patches(attentions: np.ndarray, grid: tuple[int, int], num_tokens: int) -> np.ndarray:
    """Attention to patches only, which sums to 1; (images, heads, tokens, patches)."""
    attentions = np.asarray(attentions, dtype=np.float64)
    patches = grid[0] * grid[1]
    if attentions.ndim != 4 or attentions.shape[-1] != num_tokens + patches:
        raise ValueError(
            f"attention of shape {attentions.shape} does not fit {num_tokens} tokens and {grid[0]} x {grid[1]} patches."
        )
    weights = attentions[..., num_tokens:]
    totals = weights.sum(axis=-1, keepdims=True)
    # A token that looks at no patch at all looks at all alike.
    return np.divide(weights, totals, out=np.full_like(weights, 1 / patches), where=totals > 0)
