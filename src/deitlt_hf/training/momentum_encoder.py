"""Momentum encoder and key queue of PaCo (momentum contrast)."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel


class MomentumContrast(nn.Module):
    """Momentum encoder of a model and a queue of its latest features (He et al., CVPR 2020; PaCo, ICCV 2021).

    The queue starts empty. Any number of keys can be added at a time.

    Args:
        model: A model whose output has `projections` of size `config.projection_size`. The encoder is a copy of it.
        queue_size: Number of keys in the queue; 1,024 for CIFAR, 8,192 for ImageNet-LT and iNaturalist.
        momentum: Share of the old weights in an update; 0.999 for all of these data sets.
    """

    keys: torch.Tensor
    labels: torch.Tensor
    added: torch.Tensor

    def __init__(self, model: PreTrainedModel, queue_size: int = 1024, momentum: float = 0.999) -> None:
        super().__init__()
        self.momentum = momentum
        # In training mode, as in MoCo: keys are normalised by the statistics of their own batch, like queries.
        self.encoder = copy.deepcopy(model).requires_grad_(False).train()
        device = next(model.parameters()).device
        self.register_buffer("keys", torch.zeros(queue_size, model.config.projection_size, device=device))
        self.register_buffer("labels", torch.full((queue_size,), -1, device=device))
        # On the CPU: reading a counter on an accelerator would synchronise the device in every step.
        self.register_buffer("added", torch.zeros((), dtype=torch.int64, device="cpu"))

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Moves the parameters of the encoder towards those of the model.

        Batch-norm statistics are not copied: in training mode the encoder does not use them.
        """
        for own, other in zip(self.encoder.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 1 - self.momentum)

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """L2-normalised projections of the encoder; (batch, projection_size)."""
        # In float32: under autocast, projections have half precision.
        return F.normalize(self.encoder(pixel_values=pixel_values).projections.float(), dim=1)

    def queue(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys in the queue and their labels: (keys, projection_size) and (keys,)."""
        filled = min(int(self.added), len(self.keys))
        return self.keys[:filled].clone(), self.labels[:filled].clone()  # `enqueue` changes the buffers in place

    def enqueue(self, keys: torch.Tensor, labels: torch.Tensor) -> None:
        """Replaces the oldest keys with new ones. Of more than `queue_size` new keys, only the last ones are kept."""
        size = len(self.keys)
        # Cut to the size first: with repeated places, an indexed assignment has no defined winner.
        places = (int(self.added) + torch.arange(len(keys), device=keys.device))[-size:] % size
        self.keys[places] = keys[-size:]
        self.labels[places] = labels[-size:]
        self.added += len(keys)
