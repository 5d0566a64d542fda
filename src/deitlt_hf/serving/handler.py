"""Hosted inference with both experts: what each says, which group a class is of, and where the tokens look.

Inference Endpoints run a model without any code. If its repository has a handler.py, they run its [`EndpointHandler`]
instead. `hub/handler_file.py` writes that file from this one and `data/image_rule.py`. It runs without the package, so
both import torch, transformers, NumPy, Pillow and the standard library only.
"""
# The first line of the docstring identifies copies of every version (hub/handler_file.py): it must not change.

from __future__ import annotations  # endpoints can have Python 3.9, which does not evaluate `X | Y`

import base64
import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.image_rule import MAX_PIXELS, check_size, open_encoded, upright_rgb

if TYPE_CHECKING:
    from transformers import PreTrainedConfig  # only since transformers 5

MAX_BATCH = 64
MAX_REQUEST_PIXELS = 2**27  # decoded pixels of all images of a request together
REDUCED_FROM = 2**24  # pixels above which an image is reduced: the processor needs eight times the bytes
EXPERTS = ("cls", "distillation")
ATTENTION_IMAGES = 8  # images in one forward pass: the attention of all layers is 23 MB per image for a ViT-B/16


class EndpointHandler:
    """Classifies images with a DeiT-LT student, or with any image classifier of transformers.

    The handler is thread-safe: several threads can call it at the same time.

    Args:
        path: Folder or Hub id of the model.
        device: Device of the model in torch's notation, such as `cuda:1`; by default the GPU if there is one.

    Raises:
        FileNotFoundError: If the folder does not exist, or holds no model.
        ValueError: If the path holds no image classifier that transformers knows, or the Hub has no such model.
    """

    def __init__(self, path: str | os.PathLike = "", device: str | None = None) -> None:
        self.processor, model = _load(path)
        self.background = getattr(self.processor, "background", None)  # as in training
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(device).eval()  # type: ignore[arg-type]
        self._observed = _observed(self.model)
        num_labels = self.model.config.num_labels
        counts = getattr(self.model.config, "class_counts", None) or []
        groups = getattr(self.model.config, "class_groups", None) or {}
        # Plain transformers can give a model other classes, but keeps the counts and groups of the old classes.
        self.training_images = counts if len(counts) == num_labels else [None] * num_labels
        self.group_of = {label: name for name, labels in groups.items() for label in labels}
        if max(self.group_of, default=0) >= num_labels or (counts and len(counts) != num_labels):
            self.group_of = {}
        # None: the model has no prediction sets, or they do not fit its classes.
        self.coverage, self._thresholds = _prediction_sets(self.model.config, self.group_of)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Classifies the images of a request.

        Args:
            data: `inputs` is an image or a list of at most 64 images. An image is a PIL image, the bytes of a file, or
                base64 (with or without `data:image/...;base64,`). URLs are refused. `parameters` can have `top_k`, the
                number of classes (default 5), and `attention`, whether to return attention maps (default False).

        Returns:
            One dictionary for each image:

            - `predictions`: the `top_k` classes by the mean of the experts' logits, the best first, each with `label`,
              `score`, `cls_score`, `distillation_score` (softmax of the mean, and of each expert's logits), `group` and
              `training_images` (None if the model's configuration does not have them).
            - `cls`, `distillation`: `label` and `score` of the best class of each expert.
            - `prediction_set`, if the model's configuration has thresholds for it (`deitlt calibrate`): `labels`, the
              best first, which hold the true class with the probability `coverage` in every group of classes.
            - `attention`, if requested: for each token, attention rollout (Abnar and Zuidema, ACL 2020) over the
              patches, in rows and columns, scaled to a maximum of 1.

            A classifier without the two heads returns no scores and no labels of experts.

        Raises:
            ValueError: If the request is not valid. The message is one sentence for the sender of the request.
        """
        if not isinstance(data, dict) or data.get("inputs") is None:
            raise ValueError("the request has no inputs; give an image, or a list of images.")
        top_k, attention = _parameters(data.get("parameters") or {})
        inputs = data["inputs"]
        if not isinstance(inputs, (list, tuple)):
            return self.classify([self.prepare(inputs, "inputs")], top_k, attention)
        if not 1 <= len(inputs) <= MAX_BATCH:
            raise ValueError(f"inputs has {len(inputs)} images; give 1 to {MAX_BATCH}.")
        # Each image is reduced to the model's size before the next is decoded: only one large image is in memory.
        prepared, left = [], MAX_REQUEST_PIXELS
        for index, source in enumerate(inputs):
            image, pixels = _read(source, f"inputs[{index}]", self.background, left)
            left -= pixels
            prepared.append(self._processed(image))
        return self.classify(prepared, top_k, attention)

    def prepare(self, source: Image.Image | bytes | str, name: str) -> torch.Tensor:
        """Reads and preprocesses an image as the evaluation does; returns (1, channels, height, width).

        Args:
            source: An image as in `inputs` of a request.
            name: Name of the image in error messages.

        Raises:
            ValueError: If the image cannot be read.
        """
        return self._processed(read_image(source, name, self.background))

    def _processed(self, image: Image.Image) -> torch.Tensor:
        return self.processor(image, return_tensors="pt").pixel_values

    @torch.inference_mode()
    def classify(
        self, prepared: Sequence[torch.Tensor], top_k: int = 5, attention: bool = False
    ) -> list[dict[str, Any]]:
        """Classifies images from [`prepare`], which may differ in size; returns the same as a request.

        Raises:
            ValueError: If attention is requested but the model has no attention over patches.
        """
        # A processor without a crop keeps the aspect ratio; images of different shapes cannot be stacked.
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for image in prepared:
            by_shape.setdefault(image.shape, []).append(image)
        results = {
            shape: iter(self._classify(torch.cat(images), top_k, attention)) for shape, images in by_shape.items()
        }
        return [next(results[image.shape]) for image in prepared]

    def _classify(self, pixel_values: torch.Tensor, top_k: int, attention: bool) -> list[dict[str, Any]]:
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        if not attention:
            return self._results(self.model(pixel_values), top_k)
        parts = pixel_values.split(ATTENTION_IMAGES)
        return [result for part in parts for result in self._classify_with_attention(part, top_k)]

    def _classify_with_attention(self, pixel_values: torch.Tensor, top_k: int) -> list[dict[str, Any]]:
        config = self.model.config
        if self._observed is None:
            raise ValueError(f"a {config.model_type} has no attention over patches; leave attention out.")
        outputs = self._observed(pixel_values, output_attentions=True)
        height, width = config.patch_size if isinstance(config.patch_size, Sequence) else (config.patch_size,) * 2
        grid = (pixel_values.shape[-2] // height, pixel_values.shape[-1] // width)
        maps = _rollouts(outputs.get("attentions"), grid)
        if not maps:
            raise ValueError(f"a {config.model_type} has no tokens that attend to all patches; leave attention out.")
        results = self._results(outputs, top_k)
        for index, result in enumerate(results):
            result["attention"] = {token: rollout[index].tolist() for token, rollout in maps.items()}
        return results

    def _results(self, outputs: dict[str, torch.Tensor], top_k: int) -> list[dict[str, Any]]:
        experts = [expert for expert in EXPERTS if f"{expert}_logits" in outputs]
        scores = {"score": outputs["logits"]} | {f"{expert}_score": outputs[f"{expert}_logits"] for expert in experts}
        scores = {name: logits.float().softmax(dim=-1).cpu() for name, logits in scores.items()}
        top = scores["score"].topk(min(top_k, scores["score"].shape[-1])).indices
        results = []
        for index, labels in enumerate(top.tolist()):
            of_image = {name: values[index] for name, values in scores.items()}
            result: dict[str, Any] = {"predictions": [self._prediction(label, of_image) for label in labels]}
            for expert in experts:
                score, label = of_image[f"{expert}_score"].max(dim=-1)
                result[expert] = {"label": self.model.config.id2label[label.item()], "score": score.item()}
            results.append(result)
        if self.coverage is not None:
            # No `strict` in `zip`: Python 3.9 does not have it.
            for result, labels in zip(results, self.prediction_sets(scores["score"])):
                names = [self.model.config.id2label[label] for label in labels]
                result["prediction_set"] = {"coverage": self.coverage, "labels": names}
        return results

    def prediction_sets(self, scores: torch.Tensor) -> list[list[int]]:
        """Returns the classes of each image whose scores reach the thresholds of their groups, the best class first.

        Args:
            scores: Softmax of the logits, on the CPU; (images, classes).
        """
        order = scores.argsort(dim=-1, descending=True)
        is_in = (scores >= self._thresholds).gather(-1, order)
        is_in[:, 0] = True  # no set is empty
        return [labels[chosen].tolist() for labels, chosen in zip(order, is_in)]

    def _prediction(self, label: int, scores: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {
            "label": self.model.config.id2label[label],
            **{name: values[label].item() for name, values in scores.items()},
            "group": self.group_of.get(label),
            "training_images": self.training_images[label],
        }


def _check_folder(folder: str | os.PathLike) -> None:
    if not (Path(folder) / "config.json").is_file():
        why = "it has no config.json" if Path(folder).is_dir() else "it does not exist"
        raise FileNotFoundError(f"{str(folder)!r} is not a model folder: {why}.")


def is_hub_id(name: str) -> bool:
    """Whether the name of a model is a Hub id (`ORG/NAME`) and not a local path.

    It is an id if neither the path nor a folder ORG exists here. A model in the Hub's cache is an id even if a folder
    has the name of its organisation.
    """
    if Path(name).exists() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is None or name.startswith("outputs/"):
        return False  # training writes to outputs by default
    return not Path(name).parent.is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)


def native_config(path: str) -> Any:
    """Loads the configuration of a model of transformers or timm; never runs code from its folder."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    # The type is compared by name: importing the configuration class would import timm.
    if config.model_type == "timm_wrapper" and config.model_args:
        # timm 1.0.31 writes the number of classes here too, and transformers 5.23 then passes it to the model twice.
        config.model_args.pop("num_classes", None)
    return config


def load_native(path: str) -> PreTrainedModel:
    """Loads any image classifier of transformers or timm, from a folder or the Hub; never runs code from there."""
    return AutoModelForImageClassification.from_pretrained(path, config=native_config(path), trust_remote_code=False)


def _load(path: str | os.PathLike) -> tuple[BaseImageProcessor, PreTrainedModel]:
    name = str(path)
    if not is_hub_id(name):
        _check_folder(path)
    try:
        return AutoImageProcessor.from_pretrained(name), load_native(name)
    except Exception as error:  # corrupt weights can raise any exception
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(f"{name!r} cannot be loaded as an image classifier: {reason}.") from error


def _parameters(parameters: dict[str, Any]) -> tuple[int, bool]:
    """Reads and checks `top_k` and `attention` of a request."""
    known = {"top_k": 5, "attention": False}
    if not isinstance(parameters, dict):
        raise ValueError(f"parameters must be an object with names and values, got {str(parameters)[:80]}.")
    unknown = parameters.keys() - known.keys()
    if unknown:
        raise ValueError(f"parameters has no {min(unknown)!r:.80}; it can have {' and '.join(known)}.")
    top_k, attention = (known | parameters).values()
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k must be a whole number from 1, got {top_k!r:.80}.")
    if not isinstance(attention, bool):
        raise ValueError(f"attention must be true or false, got {attention!r:.80}.")
    return top_k, attention


def _prediction_sets(config: PreTrainedConfig, group_of: dict[int, str]) -> tuple[float | None, torch.Tensor]:
    """Coverage of the prediction sets in a configuration (None without valid ones), and the threshold of each class."""
    sets = getattr(config, "prediction_sets", None)
    sets = sets if isinstance(sets, dict) else {}
    of_group, coverage = sets.get("thresholds"), sets.get("coverage")
    if not isinstance(of_group, dict) or sets.get("num_labels") != config.num_labels:
        return None, torch.empty(0)
    thresholds = [of_group.get(group_of.get(label, "all")) for label in range(config.num_labels or 0)]
    if not isinstance(coverage, float) or not all(isinstance(value, (int, float)) for value in thresholds):
        return None, torch.empty(0)
    return coverage, torch.tensor(thresholds, dtype=torch.float32)


# ---- Attention maps ----


def _observed(model: PreTrainedModel) -> PreTrainedModel | None:
    """Returns a second model that shares the weights and returns attention weights; None if it has no patches.

    The model's own fast attention returns no weights. Switching it to eager for one request would also switch it for
    requests in other threads.
    """
    if getattr(model.config, "patch_size", None) is None:
        return None
    # Before transformers 4.54, the attention implementation is a choice of layer classes, made at construction.
    if not hasattr(model, "set_attn_implementation"):
        observed = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
        observed.load_state_dict(model.state_dict(), assign=True)
        return observed
    # deepcopy takes what its memo holds as already copied: the tensors are shared, only modules are copied.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    observed = copy.deepcopy(model, shared)
    observed.set_attn_implementation("eager")
    return observed


def _rollouts(attentions: Sequence[torch.Tensor] | None, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Attention rollout from each special token to the patches; (images, rows, columns) each, with a maximum of 1.

    Args:
        attentions: Attention weights of all layers, from the first to the last; (images, heads, tokens, tokens) each.
        grid: Number of rows and columns of patches.
    """
    patches = grid[0] * grid[1]
    if not attentions:
        return {}
    num_tokens = attentions[0].shape[-1] - patches
    if not 1 <= num_tokens <= len(EXPERTS):
        return {}
    identity = torch.eye(num_tokens + patches, device=attentions[0].device)
    # Only the rows of the special tokens are needed: from the last layer back, these products are small.
    rollout = identity[:num_tokens]
    for layer in reversed(attentions):
        # The identity stands for the residual connection, with the same weight as the attention.
        rollout = rollout @ (layer.float().mean(dim=1) + identity) / 2
    maps = rollout[..., num_tokens:].unflatten(-1, grid)
    maps = (maps / maps.amax(dim=(-2, -1), keepdim=True)).cpu()
    return {token: maps[:, index] for index, token in enumerate(EXPERTS[:num_tokens])}


# ---- Reading images ----


def read_image(source: Image.Image | bytes | str, name: str, background: str | None = None) -> Image.Image:
    """Reads an image, upright and in RGB, as in training.

    An animation gives its first frame. 16 bits per channel are scaled to 8. An image of more than 16.8 million pixels
    is reduced to a half, a quarter or an eighth of its sides; at least 4.2 million pixels remain.

    Args:
        source: A PIL image, the bytes of a file, or base64.
        name: Name of the image in error messages.
        background: Colour behind transparent pixels, see [`upright_rgb`].

    Raises:
        ValueError: If the image cannot be read, has more than 89 million pixels, or one side is more than 100 times the
            other.
    """
    return _read(source, name, background, MAX_PIXELS)[0]


def _read(
    source: Image.Image | bytes | str, name: str, background: str | None, max_pixels: int
) -> tuple[Image.Image, int]:
    """Like [`read_image`], but also returns the number of decoded pixels, which is at most `max_pixels`."""
    if isinstance(source, str):
        source = _decode(source, name)
    if not isinstance(source, (Image.Image, bytes)):
        raise ValueError(f"{name} is of type {type(source).__name__}; give an image, its bytes or base64.")
    try:
        image = source if isinstance(source, Image.Image) else open_encoded(source)
        check_size(*image.size)  # a PIL image did not go through `open_encoded`
        step = next((step for step in (1, 2, 4) if image.width * image.height <= step**2 * REDUCED_FROM), 8)
        if step > 1 and isinstance(source, bytes) and image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (image.width // step, image.height // step))  # JPEG decodes at the smaller size
            step = 1
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise ValueError(
                f"with it the images of the request have more than {MAX_REQUEST_PIXELS} pixels; send fewer or smaller"
            )
        upright = upright_rgb(image, background)
        return upright if step == 1 else upright.reduce(step), pixels
    except Exception as error:  # a corrupt file can raise any exception
        what = " ".join(str(error)[:1000].split()).rstrip(".")[:300] or type(error).__name__
        raise ValueError(f"{name} cannot be read as an image: {what}.") from error


def _decode(text: str, name: str) -> bytes:
    """Decodes base64, with or without line breaks and `data:image/...;base64,`."""
    # A server that fetches any URL would let strangers reach its internal network.
    if text.startswith(("http://", "https://")):
        raise ValueError(
            f"{name} is a URL; send the bytes of the image or base64 text; this endpoint does not download URLs."
        )
    try:
        return base64.b64decode("".join(re.sub(r"^data:[^,]*;base64,", "", text).split()), validate=True)
    except ValueError as error:
        raise ValueError(f"{name} is not an image in base64; it begins with {text[:40]!r}.") from error
