"""Hosted inference with both experts: what each says, which group a class is of, and where the tokens look.

Inference Endpoints run a model without any code. With a copy of this file in its repository, named handler.py, they
run [`EndpointHandler`] instead. The file travels alone, so it imports torch, transformers, NumPy, Pillow and the
standard library only.
"""

import base64
import copy
import http.client
import io
import ipaddress
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image, ImageColor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

try:
    from transformers import PreTrainedConfig
except ImportError:  # its name in transformers 4
    from transformers import PretrainedConfig as PreTrainedConfig

MAX_BATCH = 64
MAX_REQUEST_PIXELS = 2**27  # of all images of a request together, as they are decoded
REDUCED_FROM = 2**24  # pixels; the processor takes eight times their bytes
MAX_DOWNLOAD = 20 * 2**20  # bytes
MAX_URL = 8192  # characters
WAIT = 10  # seconds for each answer of another server
DEADLINE = 30  # seconds for all downloads of a request together
EXPERTS = ("cls", "distillation")
ATTENTION_IMAGES = 8  # at once; all layers' attention of an image is 23 MB for a ViT-B/16

ImageSource = Image.Image | bytes | str
Model = TypeVar("Model", bound=PreTrainedModel)


class EndpointHandler:
    """Classifies images with a DeiT-LT student, or with any image classifier of transformers.

    Threads can call it at the same time.

    Args:
        path: Folder or Hub id of the model.

    Raises:
        FileNotFoundError: If there is no such folder, or no model in it.
        ValueError: If it holds no image classifier that transformers knows, or the Hub has none of that name.
    """

    def __init__(self, path: str | os.PathLike = ""):
        self.processor, model = _load(path)
        self.background = getattr(self.processor, "background", None)  # as in training
        self.model = on_best_device(model).eval()
        self._observed = _observed(self.model)
        num_labels = self.model.config.num_labels
        counts = getattr(self.model.config, "class_counts", None) or []
        groups = getattr(self.model.config, "class_groups", None) or {}
        # Whoever gives a model other classes with plain transformers leaves the old ones' counts and groups in place.
        self.training_images = counts if len(counts) == num_labels else [None] * num_labels
        self.group_of = {label: name for name, labels in groups.items() for label in labels}
        if max(self.group_of, default=0) >= num_labels or (counts and len(counts) != num_labels):
            self.group_of = {}

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Answers a request.

        Args:
            data: `inputs` is an image or a list of at most 64: a PIL image, the bytes of a file, base64 (with or
                without `data:image/...;base64,`), or an http(s) URL. `parameters` can have `top_k`, the number of
                classes (5), and `attention`, whether to tell where the tokens look (False).

        Returns:
            One dictionary an image:

            - `predictions`: the `top_k` classes by the mean of the experts' logits, the first one first, each with
              `label`, `score`, `cls_score`, `distillation_score` (softmax of the mean, and of each expert's logits),
              `group` and `training_images` (None where the model does not tell).
            - `cls`, `distillation`: `label` and `score` of each expert's own first class.
            - `attention`, if asked for: by token, attention rollout (Abnar and Zuidema, ACL 2020) over the patches, in
              rows and columns, the highest 1.

            A classifier without the two heads has no scores and choices of experts.

        Raises:
            ValueError: If something in the request is wrong; the message is one sentence for whoever sent it.
        """
        if not isinstance(data, dict) or data.get("inputs") is None:
            raise ValueError("the request has no inputs; give an image, or a list of images.")
        top_k, attention = _parameters(data.get("parameters") or {})
        inputs = data["inputs"]
        if not isinstance(inputs, list | tuple):
            return self.classify([self.prepare(inputs, "inputs")], top_k, attention)
        if not 1 <= len(inputs) <= MAX_BATCH:
            raise ValueError(f"inputs has {len(inputs)} images; give 1 to {MAX_BATCH}.")
        # One after the other: of large images only one is in memory.
        prepared, left = [], MAX_REQUEST_PIXELS
        for name, source in _fetched(inputs):
            image, pixels = _read(source, name, self.background, left)
            left -= pixels
            prepared.append(self._processed(image))
        return self.classify(prepared, top_k, attention)

    def prepare(self, source: ImageSource, name: str) -> torch.Tensor:
        """Reads an image as the evaluation does; (1, channels, height, width).

        Args:
            source: As in `inputs` of a request.
            name: What errors call it.

        Raises:
            ValueError: If it cannot be read.
        """
        return self._processed(read_image(source, name, self.background))

    def _processed(self, image: Image.Image) -> torch.Tensor:
        return self.processor(image, return_tensors="pt").pixel_values

    @torch.inference_mode()
    def classify(
        self, prepared: Sequence[torch.Tensor], top_k: int = 5, attention: bool = False
    ) -> list[dict[str, Any]]:
        """Classifies images that [`prepare`] has read, of one size or several; the result is that of a request.

        Raises:
            ValueError: If attention is asked for but the model has none over patches.
        """
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
        patch = config.patch_size if isinstance(config.patch_size, Sequence) else (config.patch_size,) * 2
        grid = tuple(side // length for side, length in zip(pixel_values.shape[-2:], patch, strict=True))
        maps = _rollouts(outputs.get("attentions"), grid)
        if not maps:
            raise ValueError(f"a {config.model_type} has no tokens that look at all patches; leave attention out.")
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
        return results

    def _prediction(self, label: int, scores: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {
            "label": self.model.config.id2label[label],
            **{name: values[label].item() for name, values in scores.items()},
            "group": self.group_of.get(label),
            "training_images": self.training_images[label],
        }


def add_handler(folder: str | os.PathLike) -> Path:
    """Puts a copy of this file into a model folder, so that pushing the folder takes it along.

    It needs no requirements.txt: what it imports is in every image of Inference Endpoints that runs transformers.

    Returns:
        The copy.

    Raises:
        FileNotFoundError: If the folder holds no model.
        FileExistsError: If it has a handler.py that is no version of this file.
        ValueError: If the model is of a type that transformers does not know, and an endpoint could not load it.
    """
    from ..io import atomic_write  # which the copy neither has nor needs

    target = check_handler(folder)
    with atomic_write(target) as part:
        shutil.copyfile(__file__, part)
    return target


def check_handler(folder: str | os.PathLike) -> Path:
    """The place of the handler in a folder; what [`add_handler`] refuses is refused."""
    _check_folder(folder)
    model_type = model_config(str(folder)).get("model_type")
    if model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(
            f"{str(folder)!r} has a model of type {model_type!r}, which transformers does not know: no endpoint can "
            "load it; leave the handler out."
        )
    target = Path(folder) / "handler.py"
    if target.exists() and not is_version_of(target, __file__):
        raise FileExistsError(f"{str(target)!r} is another handler; move it away to have that of deitlt_hf.")
    return target


def is_version_of(path: str | os.PathLike, own: str | os.PathLike) -> bool:
    """Whether a file is a version of one of this package's, of which all begin with the same docstring."""
    return _first_line(path) == _first_line(own)


def _first_line(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as file:
        return file.readline().rstrip().removesuffix(b'"""')


def _check_folder(folder: str | os.PathLike) -> None:
    if not (Path(folder) / "config.json").is_file():
        why = "there is no config.json in it" if Path(folder).is_dir() else "it does not exist"
        raise FileNotFoundError(f"{str(folder)!r} is no model folder: {why}.")


def is_hub_id(name: str) -> bool:
    """Whether the name of a model is `ORG/NAME` on the Hub, not a path: no folder of that name or named ORG is here.

    What is in the Hub's cache is an id in any case, so that a folder named like an organisation does no harm.
    """
    if Path(name).exists() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is None or name.startswith("outputs/"):
        return False  # outputs is where training writes by default
    return not Path(name).parent.is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)


def model_config(path: str) -> dict[str, Any]:
    """What the configuration of a model folder or Hub repository says; of a path, the Hub is not asked.

    Raises:
        FileNotFoundError: If it is the path of a folder that is not there.
        OSError: If it cannot be had.
        ValueError: If it is no object, or as [`check_config`].
    """
    path = str(path)
    if not Path(path).is_dir() and not is_hub_id(path):
        raise FileNotFoundError(f"there is no model folder {path!r}.")
    try:
        config = PreTrainedConfig.get_config_dict(path)[0]
        if not isinstance(config, dict):
            raise TypeError
    except TypeError as error:  # also of get_config_dict itself
        raise ValueError(f"the config.json of {path!r} does not hold an object; save the model again.") from error
    check_config(config, f"the config.json of {path!r}")
    return config


def check_config(config: dict[str, Any], place: str) -> None:
    """Checks the types of what is read of a configuration beside the model: its type, classes and groups.

    Args:
        config: Content of a `config.json`.
        place: What errors call it.

    Raises:
        ValueError: If a field has another type than models are saved with.
    """
    names, groups, counts = (config.get(name) or {} for name in ("id2label", "class_groups", "class_counts"))
    is_right = {
        "model_type": isinstance(config.get("model_type"), str),
        "id2label": isinstance(names, dict) and {*names} == {str(label) for label in range(len(names))},
        "class_counts": not counts or _are_whole(counts),
        "class_groups": isinstance(groups, dict) and all(map(_are_whole, groups.values())),
        "architectures": isinstance(config.get("architectures") or [], list),
    }
    for name, right in is_right.items():
        if not right:
            shown = " ".join(str(config.get(name))[:60].split())
            raise ValueError(f"{place} has a {name} that no model is saved with ({shown}); save the model again.")


def _are_whole(values: Any) -> bool:
    """Whether these are numbers of classes, or of their images."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def load_native(path: str) -> PreTrainedModel:
    """Loads any image classifier of transformers or timm, from a folder or the Hub, without code of its own."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if config.model_type == "timm_wrapper" and config.model_args:  # the class of it would import timm
        # timm 1.0.31 writes their number here too, and transformers 5.23 then gives it to the model twice.
        config.model_args.pop("num_classes", None)
    return AutoModelForImageClassification.from_pretrained(path, config=config, trust_remote_code=False)


def on_best_device(model: Model) -> Model:
    """The same model, on a GPU if there is one."""
    module: torch.nn.Module = model
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def _load(path: str | os.PathLike) -> tuple[BaseImageProcessor, PreTrainedModel]:
    name = str(path)
    if not is_hub_id(name):
        _check_folder(path)
    try:
        model_config(name)
        return AutoImageProcessor.from_pretrained(name), load_native(name)
    except Exception as error:  # damaged weights can raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(f"{name!r} cannot be loaded as an image classifier: {reason}.") from error


def _parameters(parameters: dict[str, Any]) -> tuple[int, bool]:
    """`top_k` and `attention` of a request."""
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


# ---- Where the tokens look ----


def _observed(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model once more, on the same weights, with attention that can be looked at; None if it has no patches.

    The fast attention of the model itself keeps no weights, and switching it for one request would switch it for those
    that other threads are answering.
    """
    if getattr(model.config, "patch_size", None) is None:
        return None
    if not hasattr(model, "set_attn_implementation"):  # before transformers 4.54 the classes of the layers decide it
        observed = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
        observed.load_state_dict(model.state_dict(), assign=True)
        return observed
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    observed = copy.deepcopy(model, shared)
    observed.set_attn_implementation("eager")
    return observed


def _rollouts(attentions: Sequence[torch.Tensor] | None, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """How much each token before the patches holds of each patch; (images, rows, columns) each, the highest 1.

    Args:
        attentions: Weights of all layers, the first one first; (images, heads, tokens, tokens) each.
        grid: Patches down and across.
    """
    patches = grid[0] * grid[1]
    if not attentions:
        return {}
    num_tokens = attentions[0].shape[-1] - patches
    if not 1 <= num_tokens <= len(EXPERTS):
        return {}
    identity = torch.eye(num_tokens + patches, device=attentions[0].device)
    rollout = identity[:num_tokens]
    for layer in reversed(attentions):
        rollout = rollout @ (layer.float().mean(dim=1) + identity) / 2  # half of a layer is the residual connection
    maps = rollout[..., num_tokens:].unflatten(-1, grid)
    maps = (maps / maps.amax(dim=(-2, -1), keepdim=True)).cpu()
    return {token: maps[:, index] for index, token in enumerate(EXPERTS[:num_tokens])}


# ---- One rule of what an image is: the same text as in data/image_rule.py ----

# Not all that Pillow reads: it hands EPS to Ghostscript, for one.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # Pillow's own limit, at which it only warns: 256 MiB of RGB
MAX_ASPECT = 100  # the processor enlarges the short side: of a line of pixels that would be gigabytes
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_PNG_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts in which Pillow looks for it
_PNG_OPTIONAL = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")  # transparency, orientation, animation
_MAX_TEXT = 2**20  # bytes; of more Pillow refuses the image

# What Pillow warns of (palettes, damaged EXIF, TIFF tags) changes no pixel, and would come once an image or a worker.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_encoded(data: bytes | bytearray) -> Image.Image:
    """Opens the bytes of an image file, of which only the header is read.

    Raises:
        ValueError: If they are of none of `FORMATS`, or the image is larger or longer than the limits.
    """
    if not data:
        raise ValueError("it has no bytes")
    Image.init()
    try:
        image = Image.open(io.BytesIO(_without_texts(data)), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is damaged, or of none of the formats " + ", ".join(FORMATS)) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"its pixels are more than {MAX_PIXELS}") from error
    check_size(*image.size)
    return image


def image_suffixes() -> tuple[str, ...]:
    """How names of files of these formats end, in lower case."""
    Image.init()
    return tuple(suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS)


def check_size(width: int, height: int) -> None:
    """Refuses an image that would take too much memory.

    Raises:
        ValueError: If it has more than `MAX_PIXELS`, or a side is more than `MAX_ASPECT` times the other.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"its {width} x {height} pixels are more than {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"of its {width} x {height} pixels one side is more than {MAX_ASPECT} times the other")


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied, 1 to 8; 1 where none can be read.

    Pillow's reader of TIFF turns the image as it decodes it, so that one is decoded here.
    """
    if image.format == "TIFF":
        image.load()
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # damaged EXIF can raise anything, and says nothing of the pixels
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1  # some cameras write text


def upright_rgb(image: Image.Image, background: str | None = None) -> Image.Image:
    """Decodes an image into upright RGB.

    Of an animation it is the first frame, and 16 bits a channel are scaled to 8.

    Args:
        image: Of any mode.
        background: Colour that shows through transparent pixels, as Pillow writes colours (`white`, `#ff8000`). None
            leaves transparency out, as transformers does: transparent pixels have whatever colour the file holds.

    Raises:
        ValueError: If its values have no known range.
    """
    turn = _TURNS.get(orientation_of(image))
    image = _eight_bits(image)
    if is_transparent(image) and (background is not None or image.mode == "P"):
        image = image.convert("RGBA")  # of palettes, Pillow would warn of the direct way to the same pixels
        if background is not None:
            canvas = Image.new("RGBA", image.size, colour(background))
            image = Image.alpha_composite(canvas, image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def colour(text: str) -> str:
    """A colour by its name or as `#rrggbb`, as `#rrggbb`.

    Raises:
        ValueError: If there is no such colour.
    """
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"background must be a colour such as white or #ff8000, got {str(text)[:80]!r}") from error
    return f"#{red:02x}{green:02x}{blue:02x}"


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has an alpha channel, or a colour or palette that stands for transparency."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16 bits to 8, which Pillow would clip."""
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, whose range is not known; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError(f"its values from {values.min()} to {values.max()} do not fit 16 bits")
    scaled = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        scaled.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled


def _without_texts(data: bytes | bytearray) -> bytes | bytearray:
    """A PNG without what says nothing of its pixels: Pillow refuses images for a large or damaged text or profile."""
    if data[:8] != _PNG:
        return data
    kept, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        if kind[:1].isupper() or kind in _PNG_OPTIONAL or _has_orientation(kind, data[start + 8 : end - 4]):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _has_orientation(kind: bytes | bytearray, content: bytes | bytearray) -> bool:
    """Whether a chunk of a PNG is a text with the orientation in it, of a size that Pillow reads."""
    if kind not in _PNG_TEXT or not content.startswith(_PNG_ORIENTATION):
        return False
    start = content.index(b"\0") + 1
    is_compressed = kind == b"zTXt" or (kind == b"iTXt" and content[start : start + 1] == b"\1")
    if not is_compressed:
        return len(content) < _MAX_TEXT
    if kind == b"iTXt":  # flag, method, language and translated keyword
        start = content.find(b"\0", content.find(b"\0", start + 2) + 1)
    try:
        return len(zlib.decompressobj().decompress(content[start + 1 :], _MAX_TEXT)) < _MAX_TEXT
    except zlib.error:
        return False


# ---- Reading images ----


def read_image(source: ImageSource, name: str, background: str | None = None) -> Image.Image:
    """Reads an image, upright and in RGB, as in training.

    Of an animation it is the first frame, and 16 bits a channel are scaled to 8. An image of more than 16.8 million
    pixels is reduced to a half, a quarter or an eighth of its sides: of these at least 4.2 million are left.

    Args:
        source: A PIL image, the bytes of a file, base64, or an http(s) URL.
        name: What errors call it.
        background: As for [`upright_rgb`].

    Raises:
        ValueError: If it cannot be read, has more than 89 million pixels, or one side is more than 100 times the other.
    """
    return _read(source, name, background, MAX_PIXELS)[0]


def _read(source: ImageSource, name: str, background: str | None, max_pixels: int) -> tuple[Image.Image, int]:
    """As [`read_image`], and how many pixels were decoded for it, which is no more than `max_pixels`."""
    if isinstance(source, str):
        source = _download(source, name) if _is_url(source) else _decode(source, name)
    if not isinstance(source, Image.Image | bytes):
        kind = type(source).__name__
        raise ValueError(f"{name} is of type {kind}; give an image, its bytes, base64 or an http(s) URL.")
    try:
        image = source if isinstance(source, Image.Image) else open_encoded(source)
        check_size(*image.size)
        step = next((step for step in (1, 2, 4) if image.width * image.height <= step**2 * REDUCED_FROM), 8)
        if step > 1 and isinstance(source, bytes) and image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (image.width // step, image.height // step))  # which decodes no more than that
            step = 1
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise ValueError(
                f"with it the images of the request have more than {MAX_REQUEST_PIXELS} pixels; send fewer or smaller"
            )
        upright = upright_rgb(image, background)
        return upright if step == 1 else upright.reduce(step), pixels
    except Exception as error:  # a damaged file can raise anything
        what = " ".join(str(error)[:1000].split()).rstrip(".")[:300] or type(error).__name__
        raise ValueError(f"{name} cannot be read as an image: {what}.") from error


def _decode(text: str, name: str) -> bytes:
    """Bytes of base64, with line breaks or without, or of a `data:` URL."""
    header, comma, encoded = text.partition(",") if text.startswith("data:") else ("", "", text)
    try:
        if comma and not header.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:
        beginning = f"it begins with {text[:40]!r}"
        raise ValueError(f"{name} is neither an http(s) URL nor an image in base64; {beginning}.") from error


# ---- Downloads: a server must not fetch for strangers what only it can reach ----


def _is_url(source: ImageSource) -> TypeGuard[str]:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def _fetched(sources: Sequence[ImageSource]) -> Iterator[tuple[str, ImageSource]]:
    """The images of a request with their names, one after the other; all downloads have one deadline together."""
    seconds: float = DEADLINE
    for index, source in enumerate(sources):
        name = f"inputs[{index}]"
        if _is_url(source):
            start = time.monotonic()
            source = _download(source, name, seconds)
            seconds -= time.monotonic() - start
        yield name, source


def _download(url: str, name: str, seconds: float | None = None) -> bytes:
    """Fetches an image of the public internet, of at most 20 MiB and within 30 seconds, or those that are left.

    Addresses of private networks are let through if the environment has DEITLT_ALLOW_PRIVATE_URLS=1.
    """
    deadline = time.monotonic() + (DEADLINE if seconds is None else seconds)
    # Of the files of this machine, of FTP and of the environment's proxies this opener knows nothing.
    opener = urllib.request.OpenerDirector()
    for handler in (
        _PublicHTTPHandler(deadline),
        _RedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    place = "its URL"
    try:
        place = _without_query(url)
        with opener.open(url) as response:
            content = bytearray()
            while chunk := response.read1(2**16):
                content += chunk
                if len(content) > MAX_DOWNLOAD:
                    raise ValueError(f"it has more than {MAX_DOWNLOAD // 2**20} MiB")
            return bytes(content)
    except (OSError, ValueError, http.client.HTTPException) as error:
        is_late = time.monotonic() >= deadline
        reason = f"the downloads of a request took more than {DEADLINE} seconds" if is_late else _reason(error)
        raise ValueError(f"{name} cannot be fetched from {place}: {reason}.") from error


def _seconds_left(deadline: float) -> float:
    """How long the next step of a download may take."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, WAIT)


def _without_query(url: str) -> str:
    """What errors and logs call a URL, whose query can hold what grants access."""
    if len(url) > MAX_URL:
        raise ValueError(f"it has more than {MAX_URL} characters")
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname or parts.username is not None:
        raise ValueError("it has no host, or a password")
    return f"{parts.scheme}://{parts.hostname}{parts.path}"[:100]


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the answer is {error.code}"
    if isinstance(error, http.client.HTTPException):
        return "its URL or the answer is not valid HTTP"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return getattr(cause, "strerror", None) or " ".join(str(cause).split()).rstrip(".") or type(cause).__name__


def _refuse_private(address: str) -> None:
    if os.environ.get("DEITLT_ALLOW_PRIVATE_URLS") != "1" and not _is_public(ipaddress.ip_address(address)):
        raise ValueError("its address is not of the public internet")


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if address.version == 6:
        # IPv4 addresses in IPv6's form, as they are and for a translator (NAT64), are judged as what they stand for.
        if address.ipv4_mapped or address in ipaddress.ip_network("64:ff9b::/96"):
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        # All others that lead on to an IPv4 address are out of use, as is what is outside of the public 2000::/3.
        if address.sixtofour or address.teredo or address not in ipaddress.ip_network("2000::/3"):
            return False
    return address.is_global and not address.is_multicast


class _PublicHTTPConnection(http.client.HTTPConnection):
    """A connection to an address of the public internet, which ends at its deadline however slowly bytes come."""

    deadline: float  # by the monotonic clock

    def connect(self):
        # A name is looked up once: the next time it may have another address than the one that was judged.
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        places = [(str(address[0]), address[1]) for *_, address in found]
        for host, _ in places:
            _refuse_private(host)
        for place in places:
            try:
                self.sock = socket.create_connection(place, _seconds_left(self.deadline))
                break
            except OSError as error:
                failure = error
        else:
            raise failure
        self.sock.settimeout(_seconds_left(self.deadline))

    def response_class(self, sock, **options):  # type: ignore[override]
        return http.client.HTTPResponse(_TimedReader(sock, self.deadline), **options)  # type: ignore[arg-type]


class _PublicHTTPSConnection(http.client.HTTPSConnection, _PublicHTTPConnection):
    """The same with TLS, which begins after [`_PublicHTTPConnection.connect`]."""


class _TimedReader(io.RawIOBase):
    """What a socket receives until the deadline; its own timeout begins anew with each byte."""

    def __init__(self, sock: socket.socket, deadline: float):
        self.sock, self.deadline = sock, deadline
        self.file = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        self.sock.settimeout(_seconds_left(self.deadline))
        return self.file.readinto(buffer)

    def close(self) -> None:
        self.file.close()
        super().close()


class _PublicHTTPHandler(urllib.request.AbstractHTTPHandler):
    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, deadline: float):
        super().__init__()
        self.deadline = deadline

    def http_open(self, request):
        return self._open(_PublicHTTPConnection, request)

    def https_open(self, request):
        return self._open(_PublicHTTPSConnection, request)

    def _open(self, kind, request):
        def connection(host, **options):
            made = kind(host, **options)
            made.deadline = self.deadline
            return made

        return self.do_open(connection, request)


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, *args):
        redirected = super().redirect_request(request, response, *args)
        response.close()  # it would be read into memory, however large
        return redirected
