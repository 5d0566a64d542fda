"""Measures how flat the loss is around a classifier's weights: rise of the loss, Hessian eigenvalue and trace."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..data.images import ImageCollator, ImageDataset
from ..data.long_tail import Groups
from .attention import eager_attention
from .observe import BATCH

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Sharpness:
    """Sharpness of the mean cross entropy over some images; lower values are flatter."""

    loss: float  # at the weights
    loss_rise: float  # at the worst point within `rho`, to first order as in SAM
    eigenvalue: float  # the largest of the Hessian
    trace: float  # of the Hessian
    num_images: int


def sharpness(
    model: nn.Module,
    batches: Batches,
    rho: float = 0.05,
    num_vectors: int = 32,
    seed: int = 0,
) -> Sharpness:
    """Measures the sharpness of the loss with respect to all weights, in evaluation mode.

    The eigenvalue is computed by Lanczos iteration (scipy). The trace is Hutchinson's estimate (curvlinops); its error
    falls with the square root of `num_vectors`. Both need only Hessian-vector products.

    Args:
        model: An image classifier; its output has `logits`.
        batches: Normalised images (batch, channels, height, width) and class indices (batch,).
        rho: Radius of the loss rise, in weight space; 0.05 in the paper of SAM.
        num_vectors: Number of random vectors for the trace.
        seed: Seed of these vectors and of the start vector of the Lanczos iteration.

    Raises:
        ValueError: If curvlinops is missing, there are no images or vectors, or loss or weights cannot be measured.
    """
    if num_vectors < 1:
        raise ValueError(f"num_vectors must be 1 or more, got {num_vectors}.")
    try:
        with _without_warning():
            from curvlinops import HessianLinearOperator, hutchinson_trace
    except ImportError as error:
        raise ValueError("sharpness needs curvlinops: pip install 'deitlt-hf[analysis]'.") from error
    from scipy.sparse.linalg import eigsh

    num_images = _count(batches)
    with _measurable(model) as classifier:
        loss, (loss_rise,), used = _loss_rises(classifier, batches, num_images, [rho])
        # Only parameters on which the loss depends: others, such as a projection for PaCo, have no curvature.
        # The check would run the model several times more, and a model in evaluation mode is deterministic.
        hessian = HessianLinearOperator(classifier, nn.CrossEntropyLoss(), used, batches, check_deterministic=False)
        with torch.random.fork_rng(), _without_warning():
            torch.manual_seed(seed)
            first = torch.randn(hessian.shape[1]).numpy()
            # curvlinops takes fewer vectors than there are weights.
            trace = float(hutchinson_trace(hessian, min(num_vectors, hessian.shape[1] - 1)))
        # LA: the largest, not that of the largest magnitude. Flatness is about the steepest rise (positive curvature).
        eigenvalue = float(eigsh(hessian.to_scipy(), k=1, which="LA", v0=first, tol=1e-3, return_eigenvectors=False)[0])
    return Sharpness(loss, loss_rise, eigenvalue, trace, num_images)


def loss_rises(model: nn.Module, batches: Batches, rhos: Sequence[float]) -> list[float]:
    """Measures the rise of the mean cross entropy at the worst points within several radii, in weight space.

    The worst points are to first order, as in SAM (Foret et al., ICLR 2021, equation 2). This needs one gradient and
    the loss at each radius, but no second derivatives. Parameters and errors are those of [`sharpness`].
    """
    with _measurable(model) as classifier:
        return _loss_rises(classifier, batches, _count(batches), rhos)[1]


def images_of_groups(
    model: nn.Module,
    dataset: ImageDataset,
    collate: ImageCollator,
    groups: Groups,
    num_images: int,
    label_order: torch.Tensor | None = None,
    seed: int = 0,
) -> Iterator[tuple[str, Batches]]:
    """Yields batches of at most `num_images` random images, named `overall`, and of each group of classes that has any.

    The batches are on the device of the model. `label_order` has the positions of the data set's classes among the
    model's, (classes,); None for the same.
    """
    order = np.random.RandomState(seed).permutation(len(dataset))
    device = next(model.parameters()).device
    for name, members in {"overall": None, **groups}.items():
        inside = order if members is None else order[np.isin(dataset.labels[order], members)]
        batches = []
        for start in range(0, min(len(inside), num_images), BATCH):
            batch = collate([dataset[row] for row in inside[start : min(start + BATCH, num_images)]])
            labels = batch["labels"] if label_order is None else label_order[batch["labels"]]
            batches.append((batch["pixel_values"].to(device), labels.to(device)))
        if batches:
            yield name, batches


def _count(batches: Batches) -> int:
    num_images = sum(len(labels) for _, labels in batches)
    if num_images == 0:
        raise ValueError("there are no images to measure the sharpness on.")
    return num_images


@contextlib.contextmanager
def _measurable(model: nn.Module) -> Iterator[nn.Module]:
    """Yields a module that returns the logits of a model in evaluation mode, with gradients for all weights.

    The mode and the `requires_grad` flags of the model are restored afterwards.
    """
    few_bits = {str(parameter.dtype) for parameter in model.parameters() if parameter.dtype.itemsize < 4}
    if few_bits:
        raise ValueError(f"small steps are lost in weights of {', '.join(sorted(few_bits))}; load them as float32.")
    was_training, flags = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(True)
    try:
        # On a CPU, torch's fast attention has no second derivatives.
        with eager_attention(model):
            yield _Logits(model)
    finally:
        model.train(was_training)
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """Suppresses a warning of torch 2.14 on the import of curvlinops 3.0 and in forward-mode derivatives."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        yield


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits.float()


def _loss_rises(
    classifier: nn.Module, batches: Batches, num_images: int, rhos: Sequence[float]
) -> tuple[float, list[float], list[nn.Parameter]]:
    """Returns the loss, its rises along the gradient, and the parameters on which the loss depends."""
    for rho in rhos:
        if not rho > 0:
            raise ValueError(f"rho must be above 0, got {rho:g}.")

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(classifier(images), labels, reduction="sum") / num_images

    parameters = list(classifier.parameters())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    before, used = 0.0, [False] * len(parameters)
    for images, labels in batches:
        loss = loss_of(images, labels)
        before += loss.item()
        for index, part in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
            if part is not None:
                gradients[index] += part
                used[index] = True
    # SAM's epsilon = rho g / |g|; the constant, as in SAM's code, is for a loss without a gradient.
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)) + 1e-12
    rises = []
    with torch.no_grad():
        originals = [parameter.clone() for parameter in parameters]  # to subtract a step again would round
        try:
            for rho in rhos:
                for parameter, original, gradient in zip(parameters, originals, gradients, strict=True):
                    parameter.copy_(original).add_(gradient, alpha=rho / norm)
                rises.append(sum(loss_of(images, labels).item() for images, labels in batches) - before)
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)
    for rho, rise in zip(rhos, rises, strict=True):
        if not math.isfinite(before + rise):
            raise ValueError(f"the loss of the model is {before:g}, and rises by {rise:g} at rho {rho:g}: not finite.")
    return before, rises, [parameter for parameter, is_used in zip(parameters, used, strict=True) if is_used]
