"""Gradio demo: a web page that shows, for one image, the prediction of each expert, its attention, and the number of
training images of the predicted classes."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor

from ..data.sources.files import is_image
from ..evaluation.expert_table import COLOURS, percent
from ..model_folder import check_link
from .handler import read_image
from .prediction import load_handler

if TYPE_CHECKING:
    import gradio

TOP_K = 5
SHOWN_PIXELS = 224  # smaller images are enlarged by an integer factor, which keeps their pixels sharp
OPACITY = 0.6  # of the attention map over the image
MAX_EXAMPLES = 12
KEPT_SECONDS = 3600  # uploads are deleted after this time
NAMES = {"cls": "CLS", "distillation": "DIST"}
TWO_EXPERTS = (
    "Two experts classify every image: **CLS** learned from the labels, and **DIST** usually from a second network. "
    "The prediction is the mean of both."
)
ONE_EXPERT = "This model has one classifier, not the two experts of DeiT-LT."
# Gradio 6.31 gives example images no alt text, which screen readers need.
NAME_EXAMPLES = """() => {
    const name = (image) => { image.alt = decodeURIComponent(image.src.split("/").pop()) };
    const nameAll = () => document.querySelectorAll(".gallery-item img[alt='']").forEach(name);
    nameAll();
    new MutationObserver(nameAll).observe(document.body, { childList: true, subtree: true });
}"""
# On a phone the answer appears below the examples, out of view.
SHOW_ANSWER = '() => document.querySelector(".answer")?.scrollIntoView({ block: "nearest" })'


def build_demo(model: str | PathLike, examples: str | PathLike | None = None) -> "gradio.Blocks":
    """Builds the page; `build_demo(model).launch()` serves it, also as the `app.py` of a Space.

    Args:
        model: Folder or Hub id of a saved student. A classifier without two experts gets one column.
        examples: Folder of example images, of which the first 12 are shown. By default the folder `examples` of the
            model folder, if it exists.

    Raises:
        FileNotFoundError: If `examples` holds no images.
        OSError: If the model does not exist.
        ValueError: If the model has no attention over patches, or Gradio or matplotlib is missing.
    """
    try:
        import gradio as gr
        import matplotlib  # noqa: F401  (used only with the first image; imported here to fail before serving)
        from gradio.processing_utils import check_all_files_in_cache
    except ImportError as error:
        raise ValueError("the demo needs Gradio and matplotlib: pip install 'deitlt-hf[demo]'.") from error
    images = example_images(model, examples)
    explain = Explanation(model)

    def answer(file: dict[str, Any]) -> str:
        try:
            # Gradio checks only requests that declare a file; without this, a request could read any path here.
            check_all_files_in_cache(file)  # type: ignore[arg-type]
            return explain(Path(file["path"]).read_bytes())
        except (gr.Error, OSError) as error:
            raise gr.Error("Your image was not uploaded to this page; try again.", print_exception=False) from error
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    name = "/".join(Path(model).resolve().parts[-2:])
    with gr.Blocks(
        title=f"{name}: DeiT-LT", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as demo:
        gr.Markdown(f"# What the experts see\n`{name}`. {TWO_EXPERTS if explain.has_experts else ONE_EXPERT}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(label="Your image", alt_text="Your image", height=300, buttons=[])
                given = [image.upload]
                if images:
                    shown = gr.Examples([str(path) for path in images], image, examples_per_page=len(images))
                    given.append(shown.load_input_event.success)
                    demo.load(None, js=NAME_EXAMPLES)
            with gr.Column(scale=3, min_width=280):
                result = gr.HTML(
                    explain.empty, html_template='<div aria-live="polite">${value}</div>', apply_default_css=False
                )
        for event in given:
            # preprocess=False: Gradio's own reader would clip 16-bit images, and its error messages are unclear.
            answered = event(answer, image, result, preprocess=False, api_visibility="private")
            answered.success(None, js=SHOW_ANSWER)
            answered.failure(lambda: explain.empty, None, result, api_visibility="private")
        image.clear(lambda: explain.empty, None, result, queue=False, api_visibility="private")
    return demo


def example_images(model: str | PathLike, folder: str | PathLike | None = None) -> list[Path]:
    """Returns the first images of a folder, by default of `examples` in the model folder, sorted by name.

    Raises:
        FileNotFoundError: If a folder is given and has no images.
        ValueError: If an example in the model folder is a link to a file outside of it.
    """
    paths = sorted(path for path in Path(folder or Path(model, "examples")).glob("*") if is_image(path.name))
    # The model may come from a stranger: a link in its examples could publish any file of this machine.
    for path in [] if folder else paths:
        check_link(path, model)
    if folder and not paths:
        raise FileNotFoundError(f"there are no images in --examples {str(folder)!r}; give a folder that holds some.")
    return paths[:MAX_EXAMPLES]


class Explanation:
    """Turns the bytes of an image into the HTML that explains the prediction of a model.

    Raises:
        OSError, ValueError: If the model does not exist, or has no attention over patches.
    """

    def __init__(self, model: str | PathLike) -> None:
        from jinja2 import Environment

        self._handler = load_handler(model)
        self.has_experts = self._check_model(model)
        self._most_frequent = max(filter(None, self._handler.training_images), default=None)
        page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page.filters["percent"] = with_sign
        self._page = page.from_string(files(__package__).joinpath("demo.html").read_text(encoding="utf-8"))
        self.empty = self._page.render()

    def __call__(self, image: bytes) -> str:
        """Returns the HTML that explains the prediction for an image.

        Raises:
            ValueError: If the image cannot be read.
        """
        picture = read_image(image, "Your image", self._handler.background)
        answer = self._answer(picture)
        return self._page.render(
            answer=answer,
            experts={expert: name for expert, name in NAMES.items() if expert in answer},
            colours=COLOURS,
            most_frequent=self._most_frequent,
            pictures=self._pictures(picture, answer["attention"]),
        )

    def _check_model(self, model: str | PathLike) -> bool:
        """Whether the model has two experts; runs the model once, to refuse an unsuitable model before serving."""
        try:
            answer = self._answer(Image.new("RGB", (32, 32)))
        except ValueError as error:
            raise ValueError(
                f"{str(model)!r} has no attention over patches to show; give a DeiT-LT, a DeiT or a ViT."
            ) from error
        return "distillation" in answer

    def _answer(self, image: Image.Image) -> dict[str, Any]:
        return self._handler({"inputs": image, "parameters": {"top_k": TOP_K, "attention": True}})[0]

    def _pictures(self, image: Image.Image, attention: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, str]]:
        """Returns the image as the model sees it, without and with the attention map of each token."""
        seen = model_view(self._handler.processor, image)
        alt = "The image as the model sees it"
        pictures = [{"caption": "What the model sees", "alt": alt, "data": png_url(seen)}]
        for token, rows in attention.items():
            weights = np.asarray(rows)
            row, column = np.unravel_index(weights.argmax(), weights.shape)
            caption = f"Where {NAMES[token]} looks"
            place = f"row {row + 1} of {weights.shape[0]}, column {column + 1} of {weights.shape[1]}"
            data = png_url(attention_over(seen, weights))
            pictures.append({"caption": caption, "alt": f"{caption}: most at {place}", "data": data})
        return pictures


def model_view(processor: BaseImageProcessor, image: Image.Image) -> Image.Image:
    """Returns an image as the processor resizes and crops it for the model, enlarged if it is small."""
    pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    seen = Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8).transpose(1, 2, 0))
    factor = max(1, SHOWN_PIXELS // max(seen.size))
    return seen.resize((factor * seen.width, factor * seen.height), Image.Resampling.NEAREST)


def attention_over(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Overlays a grey version of an image with an attention map, from dark (lowest) to bright (highest).

    `image` is what the model sees, `weights` are those of each patch, at least 0; (rows, columns).
    """
    from matplotlib import colormaps

    stretched = (weights - weights.min()) / max(np.ptp(weights), np.finfo(weights.dtype).tiny)
    heat = Image.fromarray(colormaps["inferno"](stretched, bytes=True)[..., :3])
    return Image.blend(image.convert("L").convert("RGB"), heat.resize(image.size, Image.Resampling.BICUBIC), OPACITY)


def png_url(image: Image.Image) -> str:
    """Encodes an image as a PNG in a `data:` URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def with_sign(score: float) -> str:
    """Formats a score in [0, 1] in per cent, with one decimal and the sign."""
    return f"{percent(score)}\N{NO-BREAK SPACE}%"
