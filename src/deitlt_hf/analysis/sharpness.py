"""How flat the loss is around a classifier's weights."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..data.images import ImageDataset

BATCH = 128
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Sharpness:
    """Flatness of the mean cross entropy over some images; less is flatter.

    Args:
        loss: The loss itself.
        loss_rise: By how much it rises at the worst point within `rho` to first order, as SAM sees it.
        eigenvalue: Largest eigenvalue of the Hessian.
        trace: Trace of the Hessian.
        num_images: Number of images.
    """

    loss: float
    loss_rise: float
    eigenvalue: float
    trace: float
    num_images: int


def sharpness(
    model: nn.Module,
    batches: Batches,
    rho: float = 0.05,
    num_vectors: int = 32,
    seed: int = 0,
    logit_scale: float | None = None,
) -> Sharpness:
    """Measures the flatness of the loss with regard to all weights, in evaluation mode.

    The eigenvalue is Lanczos' (scipy), the trace Hutchinson's estimate (curvlinops), whose error falls with the root of
    `num_vectors`. Both need products of the Hessian with vectors only.

    Args:
        model: An image classifier; its output has `logits`.
        batches: Normalised images (batch, channels, height, width) and class indices (batch,).
        rho: Radius of the loss rise, in weight space; 0.05 in the paper of SAM.
        num_vectors: Random vectors for the trace.
        seed: Of those vectors and of Lanczos' first.
        logit_scale: What logits are multiplied by; by default as the loss did in training, such as by 30 for LDAM.

    Raises:
        ValueError: If curvlinops is not installed, there are no images or no vectors, or the loss is not finite.
    """
    if num_vectors < 1:
        raise ValueError(f"num_vectors must be 1 or more, got {num_vectors}.")
    try:
        with _without_warning():
            from curvlinops import HessianLinearOperator, hutchinson_trace
    except ImportError as error:
        raise ValueError("sharpness needs curvlinops: pip install 'deitlt-hf[analysis]'.") from error
    from scipy.sparse.linalg import eigsh

    num_images = sum(len(labels) for _, labels in batches)
    if num_images == 0:
        raise ValueError("there are no images to measure the sharpness on.")
    if logit_scale is None:
        logit_scale = getattr(model.config, "loss_scale", 1.0)
    classifier = _Logits(model, logit_scale)
    was_training, flags = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(True)
    try:
        loss, loss_rise, used = _loss_rise(classifier, batches, num_images, rho)
        if not math.isfinite(loss + loss_rise):
            raise ValueError(f"the loss of the model is {loss:g}, and {loss_rise:g} more at rho {rho:g}: not finite.")
        hessian = HessianLinearOperator(classifier, nn.CrossEntropyLoss(), used, batches, check_deterministic=False)
        with torch.random.fork_rng(), _without_warning():
            torch.manual_seed(seed)
            first = torch.randn(hessian.shape[1]).numpy()
            trace = float(hutchinson_trace(hessian, min(num_vectors, hessian.shape[1] - 1)))
        eigenvalue = float(eigsh(hessian.to_scipy(), k=1, which="LA", v0=first, tol=1e-3, return_eigenvectors=False)[0])
    finally:
        model.train(was_training)
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    return Sharpness(loss, loss_rise, eigenvalue, trace, num_images)


def sharpness_of_groups(
    model: nn.Module,
    dataset: ImageDataset,
    collate,
    groups: Mapping[str, Sequence[int]],
    num_images: int,
    label_order: torch.Tensor | None = None,
    **options,
) -> dict[str, Sharpness]:
    """Measures the flatness over random images of a data set, and over images of each group of classes.

    Args:
        model: An image classifier.
        dataset: Decoded images and labels.
        collate: Makes a batch of rows.
        groups: Class indices of each group; one without images is left out.
        num_images: Images overall, and of each group, at most.
        label_order: Positions of the data set's classes among the model's, (classes,); by default the same.
        **options: As for [`sharpness`]. The seed chooses the images too.

    Raises:
        ValueError: If no image is asked for, or as [`sharpness`] does.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be 1 or more, got {num_images}.")
    order = np.random.RandomState(options.get("seed", 0)).permutation(len(dataset))
    device = next(model.parameters()).device
    measured = {}
    for name, members in {"overall": None, **groups}.items():
        inside = order if members is None else order[np.isin(dataset.labels[order], members)]
        batches = []
        for start in range(0, min(len(inside), num_images), BATCH):
            batch = collate([dataset[row] for row in inside[start : min(start + BATCH, num_images)]])
            labels = batch["labels"] if label_order is None else label_order[batch["labels"]]
            batches.append((batch["pixel_values"].to(device), labels.to(device)))
        if batches:
            measured[name] = sharpness(model, batches, **options)
    return measured


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """Keeps quiet what curvlinops 3.0 sets off on import, and torch 2.14 itself with forward-mode derivatives."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        yield


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, scale: float):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.scale * self.model(pixel_values=pixel_values).logits.float()


def _loss_rise(
    classifier: nn.Module, batches: Batches, num_images: int, rho: float
) -> tuple[float, float, list[nn.Parameter]]:
    """The loss, its rise along the gradient, and the weights that it depends on."""

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
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)) + 1e-12
    with torch.no_grad():
        originals = [parameter.clone() for parameter in parameters]
        try:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=rho / norm)
            after = sum(loss_of(images, labels).item() for images, labels in batches)
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)
    return before, after - before, [parameter for parameter, is_used in zip(parameters, used, strict=True) if is_used]
