"""What a model does on images: one pass over a data set, kept as arrays that the analyses take."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from ..data.images import ImageCollator, ImageDataset
from .attention import attention_distances, token_spreads

HEADS = {"mean": "logits", "cls": "cls_logits", "distillation": "distillation_logits"}


@dataclass
class Observed:
    """What was seen of a model.

    Args:
        labels: True class of each image; (images,).
        logits: Of each expert: of `mean`, `cls` and `distillation`, or of `mean` alone; (images, classes).
        features: Of each token before the patches, after each block; (blocks, chosen images, tokens, size).
        chosen: Indices of the images whose features and attention were looked at.
        distances: Mean attention distance, in pixels; (layers, heads).
        spreads: How spread out each token before the patches looks, in pixels; (layers, tokens, heads).
        tokens: Names of these tokens.
    """

    labels: np.ndarray
    logits: dict[str, np.ndarray]
    features: np.ndarray
    chosen: np.ndarray
    distances: np.ndarray
    spreads: np.ndarray
    tokens: Sequence[str] = field(default_factory=list)

    def predictions(self, expert: str) -> np.ndarray:
        """Predicted class of each image."""
        return self.logits[expert].argmax(axis=1)

    def confidences(self, expert: str) -> np.ndarray:
        """Probability of each predicted class."""
        logits = torch.from_numpy(self.logits[expert]).double()
        return torch.softmax(logits, dim=1).amax(dim=1).numpy()


@torch.no_grad()
def predict(
    model: PreTrainedModel, dataset: ImageDataset, collate: ImageCollator, batch_size: int = 128
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of each expert of a model.

    Args:
        model: An image classifier; a DeiT-LT or distilled DeiT has three experts, others one.
        dataset: Its images.
        collate: Prepares them for the model.
        batch_size: Images at once.

    Returns:
        True classes, (images,), and the logits of each expert, (images, classes).
    """
    labels, logits = [], {}
    for batch in DataLoader(dataset, batch_size, collate_fn=collate):
        outputs = model.eval()(pixel_values=batch["pixel_values"].to(model.device))
        labels.append(batch["labels"].numpy())
        for expert, name in HEADS.items():
            if outputs.get(name) is not None:
                logits.setdefault(expert, []).append(outputs[name].float().cpu().numpy())
    return np.concatenate(labels), {expert: np.concatenate(parts) for expert, parts in logits.items()}


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    dataset: ImageDataset,
    collate: ImageCollator,
    num_images: int = 512,
    batch_size: int = 128,
) -> Observed:
    """Looks at a transformer: logits of all images, attention and features of some.

    Args:
        model: A DeiT-LT, or a DeiT or ViT of transformers.
        dataset: Test images.
        collate: Prepares them for the model.
        num_images: Images whose attention and features are looked at, spread over the data set.
        batch_size: Images at once.

    Raises:
        ValueError: If the model has no attention over patches.
    """
    config = model.config
    if not isinstance(getattr(config, "patch_size", None), int) or not hasattr(config, "num_attention_heads"):
        raise ValueError(f"{type(model).__name__} has no attention over patches; give a DeiT-LT, a DeiT or a ViT.")
    labels, logits = predict(model, dataset, collate, batch_size)
    side = config.image_size // config.patch_size
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).astype(int)).tolist()
    attention = config._attn_implementation
    model.set_attn_implementation("eager")  # others give no weights
    features, distances, spreads, seen = [], 0.0, 0.0, 0
    try:
        for batch in DataLoader(Subset(dataset, chosen), min(batch_size, 64), collate_fn=collate):
            outputs = model.eval()(
                pixel_values=batch["pixel_values"].to(model.device), output_attentions=True, output_hidden_states=True
            )
            layers = [layer.float().cpu().numpy() for layer in outputs.attentions]
            num_tokens = layers[0].shape[-1] - side**2
            arguments = ((side, side), config.patch_size, num_tokens)
            number = len(batch["labels"])
            distances = distances + number * np.stack([attention_distances(layer, *arguments) for layer in layers])
            spreads = spreads + number * np.stack([token_spreads(layer, *arguments) for layer in layers])
            seen += number
            hidden = [state[:, :num_tokens].float().cpu().numpy() for state in outputs.hidden_states[1:]]
            features.append(np.stack(hidden))
    finally:
        model.set_attn_implementation(attention)
    tokens = ["cls", "distillation"][:num_tokens]
    return Observed(
        labels, logits, np.concatenate(features, axis=1), np.array(chosen), distances / seen, spreads / seen, tokens
    )
