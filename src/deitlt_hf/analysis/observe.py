"""Runs a model over a data set and keeps its logits, features and attention measures as arrays for the analyses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from ..data.images import ImageCollator, ImageDataset
from ..serving.onnx import OnnxClassifier
from ..training import DeiTLTTrainer
from .attention import attention_distances, eager_attention, token_spreads

HEADS = DeiTLTTrainer.experts
BATCH = 128  # images in one forward pass; half as many if it returns attention


@dataclass
class Observed:
    """Outputs of a model on a data set."""

    labels: np.ndarray  # true class of each image; (images,)
    # of each expert: `mean`, `cls` and `distillation`, or `mean` alone; (images, classes)
    logits: dict[str, np.ndarray]
    features: np.ndarray  # of each special token after each block; (blocks, chosen images, tokens, size)
    chosen: np.ndarray  # indices of the images for features and attention
    distances: np.ndarray  # mean attention distance, in pixels; (layers, heads)
    spreads: np.ndarray  # of the attention of each special token, in pixels; (layers, tokens, heads)
    tokens: Sequence[str]  # names of the special tokens
    grid: tuple[int, int]  # rows and columns of patches

    def predictions(self, expert: str) -> np.ndarray:
        """Predicted class of each image."""
        return self.logits[expert].argmax(axis=1)

    def confidences(self, expert: str) -> np.ndarray:
        """Probability of each predicted class."""
        logits = torch.from_numpy(self.logits[expert]).double()
        return torch.softmax(logits, dim=1).amax(dim=1).numpy()


def spread_rows(number: int, wanted: int) -> list[int]:
    """Returns at most `wanted` row indices, evenly spread: in data sorted by class, they then cover all classes."""
    return np.unique(np.linspace(0, number - 1, min(wanted, number)).astype(int)).tolist()


@torch.no_grad()
def predict(
    model: PreTrainedModel | OnnxClassifier,
    dataset: ImageDataset,
    collate: ImageCollator,
    label_order: torch.Tensor | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Computes the logits of each expert of a model on a data set; a DeiT has three experts, other models have one.

    Args:
        model: An image classifier.
        dataset: The images.
        collate: Prepares the images for the model.
        label_order: Positions of the data set's classes among the model's classes, (classes,); by default the same.

    Returns:
        True classes, (images,), and the logits of each expert, (images, classes).
    """
    labels: list[np.ndarray] = []
    logits: dict[str, list[np.ndarray]] = {}
    for batch in DataLoader(dataset, BATCH, collate_fn=collate):
        outputs = model.eval()(pixel_values=batch["pixel_values"].to(model.device))
        labels.append(batch["labels"].numpy())
        for expert, name in HEADS.items():
            if outputs.get(name) is not None:
                found = outputs[name].float().cpu()
                logits.setdefault(expert, []).append((found if label_order is None else found[:, label_order]).numpy())
    return np.concatenate(labels), {expert: np.concatenate(parts) for expert, parts in logits.items()}


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    dataset: ImageDataset,
    collate: ImageCollator,
    num_images: int = 512,
    label_order: torch.Tensor | None = None,
) -> Observed:
    """Computes the logits of all images of a data set, and the attention and features of `num_images`, spread over it.

    The other parameters are those of [`predict`].

    Raises:
        ValueError: If the model has no attention over patches.
    """
    check_transformer(model)
    grid, patch_size = patch_grid(model)
    labels, logits = predict(model, dataset, collate, label_order)
    chosen = spread_rows(len(dataset), num_images)
    parts, distances, spreads, seen = [], np.zeros(()), np.zeros(()), 0
    with eager_attention(model):
        for batch in DataLoader(Subset(dataset, chosen), BATCH // 2, collate_fn=collate):
            outputs = model.eval()(
                pixel_values=batch["pixel_values"].to(model.device), output_attentions=True, output_hidden_states=True
            )
            # Reduced at once: the attention of all layers of a ViT-B/16 is 23 MB per image.
            layers = [layer.float().cpu().numpy() for layer in outputs.attentions]
            num_tokens = layers[0].shape[-1] - grid[0] * grid[1]
            arguments = (grid, patch_size, num_tokens)
            number = len(batch["labels"])
            # Weighted by images: the last batch can be smaller.
            distances = distances + number * np.stack([attention_distances(layer, *arguments) for layer in layers])
            spreads = spreads + number * np.stack([token_spreads(layer, *arguments) for layer in layers])
            seen += number
            # The first hidden states are the embeddings, before any block.
            hidden = [state[:, :num_tokens].float().cpu().numpy() for state in outputs.hidden_states[1:]]
            parts.append(np.stack(hidden))
    tokens = ["cls", "distillation"][:num_tokens]
    features = np.concatenate(parts, axis=1)
    return Observed(labels, logits, features, np.array(chosen), distances / seen, spreads / seen, tokens, grid)


def patch_grid(model: PreTrainedModel) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the number of rows and columns of patches, and height and width of a patch in pixels."""
    image, patch = (
        (size, size) if isinstance(size, int) else tuple(size)
        for size in (model.config.image_size, model.config.patch_size)
    )
    return (image[0] // patch[0], image[1] // patch[1]), patch


@torch.no_grad()
def check_transformer(model: PreTrainedModel) -> None:
    """Checks with one image whether a model is a transformer that the analyses support.

    Raises:
        ValueError: If the layers do not all have attention over CLS, or CLS and DIST, and all patches.
    """
    refusal = f"{type(model).__name__} has no attention over patches; give a DeiT-LT, a DeiT or a ViT."
    config = model.config
    if getattr(config, "patch_size", None) is None or getattr(config, "image_size", None) is None:
        raise ValueError(refusal)
    (rows, columns), (height, width) = patch_grid(model)
    image = torch.zeros(1, config.num_channels, rows * height, columns * width, device=model.device, dtype=model.dtype)
    with eager_attention(model):
        layers = model.eval()(pixel_values=image, output_attentions=True).get("attentions") or [image]
    sizes = {layer.shape[-2:] for layer in layers}
    if sizes not in ({(rows * columns + tokens,) * 2} for tokens in (1, 2)):
        raise ValueError(refusal)
