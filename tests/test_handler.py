"""Tests of the inference handler: scores and attention, ways of sending an image, and refused requests."""

import base64
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from deitlt_hf import FlatTeacherConfig
from deitlt_hf.analysis.attention import attention_rollout
from deitlt_hf.data import image_processor
from deitlt_hf.data.images import open_image
from deitlt_hf.hub.handler_file import add_handler, handler_source
from deitlt_hf.serving import handler as handler_module
from deitlt_hf.serving.handler import EndpointHandler, read_image
from helpers import ROOT, encoded, make_student

COUNTS = [100, 80, 60, 40, 30, 20, 10, 8, 6, 4]
GROUPS = {"head": [0, 1, 2], "mid": [3, 4, 5], "tail": [6, 7, 8, 9]}


def image_of(seed, size=(12, 9), mode="RGB"):
    return Image.frombytes(mode, size, np.random.default_rng(seed).bytes(size[0] * size[1] * len(mode)))


def text(image):
    return base64.b64encode(encoded(image)).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    names = {label: f"class {label}" for label in range(10)}
    make_student(class_counts=COUNTS, class_groups=GROUPS, id2label=names).save_pretrained(folder)
    image_processor(8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def handler(folder):
    return EndpointHandler(folder)


def outputs_of(folder, images, **options):
    """Outputs of plain transformers, without the handler."""
    model = AutoModelForImageClassification.from_pretrained(folder, **options)
    with torch.no_grad():
        pixel_values = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt").pixel_values
        return model(pixel_values, output_attentions=options.get("attn_implementation") == "eager")


def test_scores_match_the_model_and_each_expert(folder, handler):
    images = [image_of(seed) for seed in range(3)]
    outputs = outputs_of(folder, images)
    for index, result in enumerate(handler({"inputs": images, "parameters": {"top_k": 10}})):
        mean, cls, distillation = (
            outputs[name][index].softmax(-1) for name in ("logits", "cls_logits", "distillation_logits")
        )
        assert [entry["label"] for entry in result["predictions"]] == [
            f"class {label}" for label in mean.argsort(descending=True).tolist()
        ]
        for entry in result["predictions"]:
            label = int(entry["label"].split()[1])
            assert entry["score"] == pytest.approx(mean[label].item(), abs=1e-6)
            assert entry["cls_score"] == pytest.approx(cls[label].item(), abs=1e-6)
            assert entry["distillation_score"] == pytest.approx(distillation[label].item(), abs=1e-6)
            assert entry["training_images"] == COUNTS[label]
            assert label in GROUPS[entry["group"]]
        for expert, scores in (("cls", cls), ("distillation", distillation)):
            assert result[expert]["label"] == f"class {scores.argmax().item()}"
            assert result[expert]["score"] == pytest.approx(scores.max().item(), abs=1e-6)


def test_scores_are_those_of_the_native_pipeline(folder, handler):
    native = pipeline("image-classification", model=str(folder))
    image = image_of(5, (31, 20))
    predictions = handler({"inputs": image})[0]["predictions"]
    for ours, theirs in zip(predictions, native(image), strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)


def test_attention_is_each_tokens_rollout(folder, handler):
    images = [image_of(seed) for seed in range(11)]  # more images than one forward pass takes
    results = handler({"inputs": images, "parameters": {"attention": True}})
    attentions = outputs_of(folder, images, attn_implementation="eager").attentions
    expected = attention_rollout([layer.numpy() for layer in attentions])[:, :2, 2:].reshape(11, 2, 2, 2)
    expected /= expected.max(axis=(2, 3), keepdims=True)
    for result, maps in zip(results, expected, strict=True):
        assert list(result["attention"]) == ["cls", "distillation"]
        np.testing.assert_allclose(list(result["attention"].values()), maps, atol=1e-5)
    plain = handler({"inputs": images})
    assert "attention" not in plain[0]
    assert [entry["label"] for entry in plain[0]["predictions"]] == [
        entry["label"] for entry in results[0]["predictions"]
    ]


def test_attention_uses_the_same_weights(handler):
    """The model that returns attention shares the weights; a second copy would double the memory."""
    pairs = zip(handler.model.parameters(), handler._observed.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert handler.model.config._attn_implementation == "sdpa"


def test_handler_works_without_the_package(folder, tmp_path):
    """The handler works without the package.

    The toolkit loads the file by its path, where deitlt_hf is not installed.
    """
    copy = add_handler(folder)
    (tmp_path / "image.png").write_bytes(encoded(image_of(1)))
    code = f"""
import importlib.util, json, sys
sys.modules["deitlt_hf"] = None
spec = importlib.util.spec_from_file_location("endpoint", {str(copy)!r})
module = importlib.util.module_from_spec(spec)
sys.modules["endpoint"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler({str(folder)!r})
print(json.dumps(handler({{"inputs": open({str(tmp_path / "image.png")!r}, "rb").read()}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EndpointHandler(folder)({"inputs": image_of(1)})


def test_add_handler_needs_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json; give the folder of a saved model"):
        add_handler(tmp_path)
    assert not list(tmp_path.iterdir())


def test_add_handler_keeps_a_foreign_handler(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "handler.py").write_text("class EndpointHandler: ...")
    with pytest.raises(FileExistsError, match=r"handler.py' is another handler; move it away"):
        add_handler(tmp_path)
    assert (tmp_path / "handler.py").read_text() == "class EndpointHandler: ..."
    (tmp_path / "handler.py").write_text(handler_source().splitlines()[0] + "\n\nof an earlier version")
    assert add_handler(tmp_path).read_text() == handler_source()


def test_add_handler_does_not_write_through_a_link(folder, tmp_path):
    """A handler file that is a link, as in the Hub's cache, is replaced; the file that it points to stays unchanged."""
    shutil.copy(folder / "config.json", tmp_path)
    earlier = handler_source().splitlines()[0]
    (tmp_path / "blob").write_text(earlier)
    (tmp_path / "handler.py").symlink_to(tmp_path / "blob")
    assert add_handler(tmp_path).read_text() == handler_source()
    assert (tmp_path / "blob").read_text() == earlier


def test_add_handler_refuses_models_that_endpoints_cannot_load(tmp_path):
    FlatTeacherConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a model of type 'flat_teacher', which transformers does not know"):
        add_handler(tmp_path)
    assert not (tmp_path / "handler.py").exists()


@pytest.mark.parametrize("path", ["nowhere", "/nowhere/model", "./nowhere"])
def test_a_missing_model_is_named_in_the_error(path):
    with pytest.raises(FileNotFoundError, match=f"'{path}' is not a model folder"):
        EndpointHandler(path)


def test_a_mistyped_folder_is_not_requested_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(FileNotFoundError, match="'outputs/typo' is not a model folder: it does not exist"):
        EndpointHandler("outputs/typo")


def test_damaged_weights_give_a_clear_message(folder, tmp_path):
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cannot be loaded as an image classifier: [^\n]*\.$"):
        EndpointHandler(tmp_path)


# ---- Ways to send an image ----


def test_all_ways_of_sending_an_image_give_the_same_answer(handler):
    image = image_of(1)
    base = text(image)
    ways = [
        image,
        encoded(image),
        base,
        f"data:image/png;base64,{base}",
        "\n".join(base[start : start + 76] for start in range(0, len(base), 76)),
    ]
    results = [handler({"inputs": way})[0] for way in ways]
    assert all(result == results[0] for result in results)
    for result in handler({"inputs": ways}):
        assert result["predictions"][0]["score"] == pytest.approx(results[0]["predictions"][0]["score"], abs=1e-6)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({}, "the request has no inputs"),
        ({"inputs": None}, "the request has no inputs"),
        ([1], "the request has no inputs"),
        ({"inputs": []}, r"inputs has 0 images; give 1 to 64\."),
        ({"inputs": ["x"] * 65}, r"inputs has 65 images; give 1 to 64\."),
        ({"inputs": 3}, "inputs is of type int; give an image"),
        ({"inputs": b""}, "inputs cannot be read as an image: it has no bytes"),
        ({"inputs": b"nonsense"}, "damaged, or of none of the formats"),
        ({"inputs": "bm9uc2Vuc2U="}, "damaged, or of none of the formats"),
        ({"inputs": "/etc/passwd"}, "inputs is not an image in base64; it begins with '/etc/passwd'"),
        ({"inputs": "file:///etc/passwd"}, "not an image in base64"),
        ({"inputs": "data:image/png,raw"}, "not an image in base64"),
        ({"inputs": [text(image_of(0)), "x"]}, r"^inputs\[1\] is not an image"),
        ({"inputs": text(image_of(0)), "parameters": 5}, "parameters must be an object"),
        ({"inputs": text(image_of(0)), "parameters": {"topk": 5}}, "no 'topk'; it can have top_k and attention"),
        ({"inputs": text(image_of(0)), "parameters": {"top_k": 0}}, "top_k must be a whole number from 1, got 0"),
        ({"inputs": text(image_of(0)), "parameters": {"top_k": True}}, "top_k must be a whole number"),
        ({"inputs": text(image_of(0)), "parameters": {"top_k": "5"}}, "top_k must be a whole number"),
        ({"inputs": text(image_of(0)), "parameters": {"attention": 1}}, "attention must be true or false, got 1"),
    ],
)
def test_an_invalid_request_gives_a_clear_message(handler, request_, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        handler(request_)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith(".")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/image.png", "https://huggingface.co/image.png"])
@pytest.mark.parametrize("is_batch", [False, True])
def test_a_url_is_refused_without_a_connection(handler, monkeypatch, url, is_batch):
    for name in ("socket.socket", "socket.getaddrinfo"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("the network was asked"))
    name = "inputs[1]" if is_batch else "inputs"
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} is a URL; ") as refusal:
        handler({"inputs": [image_of(0), url] if is_batch else url})
    sentence = "send the bytes of the image or base64 text; this endpoint does not download URLs."
    assert str(refusal.value) == f"{name} is a URL; {sentence}"
    with pytest.raises(ValueError, match=sentence):
        read_image(url, "image")


def test_more_classes_than_exist_gives_all(handler):
    assert len(handler({"inputs": image_of(0), "parameters": {"top_k": 1000}})[0]["predictions"]) == 10


# ---- Unusual images ----


def sixteen_bits():
    values = np.random.default_rng(0).integers(0, 65536, (9, 12), dtype=np.uint16)
    return Image.fromarray(values)


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image_of(2), exif=exif)


ODD_IMAGES = {
    "cmyk": encoded(image_of(1, mode="CMYK"), "TIFF"),
    "grey": encoded(image_of(1, mode="L")),
    "grey and alpha": encoded(image_of(1, mode="LA")),
    "alpha": encoded(image_of(1, mode="RGBA")),
    "palette and alpha": encoded(image_of(1).quantize(8), transparency=bytes(range(0, 80, 10))),
    "black and white": encoded(image_of(1, mode="L").convert("1")),
    "16 bits": encoded(sixteen_bits()),
    "animated": encoded(image_of(1), "GIF", save_all=True, append_images=[image_of(2), image_of(3)]),
    "several pictures": encoded(image_of(1), "MPO", save_all=True, append_images=[image_of(2)]),
    "one pixel": encoded(image_of(1, (1, 1))),
    **{f"orientation {value}": with_orientation(value) for value in range(1, 9)},
}


@pytest.mark.parametrize("data", ODD_IMAGES.values(), ids=ODD_IMAGES.keys())
def test_unusual_images_are_read_as_in_training(handler, data):
    expected = open_image({"bytes": data, "path": None}).decode()
    tolerance = 2 if data.startswith(b"\xff\xd8") else 0  # training reads JPEG with another decoder
    for source in (data, Image.open(io.BytesIO(data))):
        image = read_image(source, "inputs")
        assert image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image).astype(int), expected.astype(int), atol=tolerance)
    assert handler({"inputs": data})


def png_header(width, height):
    """A PNG file that declares a size and has no pixels."""
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (png_header(10_000, 10_000), "its 10000 x 10000 pixels are more than the limit of 89478485"),
        (png_header(100_000, 100_000), "it has more than 89478485 pixels"),
        (encoded(Image.new("L", (1010, 10))), "one side of its 1010 x 10 pixels is more than 100 times the other"),
        (encoded(image_of(1, (64, 64)), "JPEG")[:-800], "truncated"),
        (encoded(image_of(1, (64, 64)))[:-800], "truncated"),
        (encoded(Image.new("F", (9, 9)), "TIFF"), "floating-point numbers, whose range is not known"),
        (encoded(image_of(1), "EPS"), "of none of the formats"),
    ],
)
def test_unreadable_images_are_refused_with_a_clear_message(handler, data, sentence):
    with pytest.raises(ValueError, match=rf"^inputs cannot be read as an image: .*({sentence})") as refusal:
        handler({"inputs": data})
    assert "\n" not in str(refusal.value)


def test_a_request_has_a_limit_of_pixels(handler, monkeypatch):
    """A request has a limit of pixels.

    One PNG of a few bytes can have 89 million pixels; no more pixels are decoded than a request may have.
    """
    monkeypatch.setattr(handler_module, "MAX_REQUEST_PIXELS", 1000)
    decoded = []
    upright_rgb = handler_module.upright_rgb
    monkeypatch.setattr(handler_module, "upright_rgb", lambda *args: (decoded.append(1), upright_rgb(*args))[1])
    images = [encoded(Image.new("RGB", (20, 20)))] * 3
    assert len(handler({"inputs": images[:2]})) == 2
    decoded.clear()
    with pytest.raises(ValueError, match=r"^inputs\[2\] cannot be read .* than 1000 pixels; send fewer"):
        handler({"inputs": images})
    assert len(decoded) == 2
    assert handler({"inputs": images[0]})


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_images_are_reduced(monkeypatch, kind):
    """Large images are reduced before the processor, which would need eight times their memory.

    The processor's output stays nearly the same.
    """
    image = image_of(3, (8, 6)).resize((800, 600), Image.BICUBIC)
    data = encoded(image, kind)
    whole = read_image(data, "inputs")
    monkeypatch.setattr(handler_module, "REDUCED_FROM", 800 * 600 // 4 - 1)
    reduced = read_image(data, "inputs")
    assert (whole.size, reduced.size) == ((800, 600), (200, 150))
    views = [np.asarray(image.resize((40, 30), Image.BICUBIC)).astype(int) for image in (whole, reduced)]
    assert np.abs(views[0] - views[1]).mean() < 1


# ---- Other models ----


def test_a_vit_has_attention_and_no_experts(tmp_path):
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config.num_labels = 3
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    (result,) = EndpointHandler(tmp_path)({"inputs": image_of(0), "parameters": {"attention": True}})
    assert list(result) == ["predictions", "attention"]
    assert list(result["predictions"][0]) == ["label", "score", "group", "training_images"]
    assert list(result["attention"]) == ["cls"]
    assert np.shape(result["attention"]["cls"]) == (2, 2)


def test_a_cnn_has_no_attention(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    handler = EndpointHandler(tmp_path)
    assert len(handler({"inputs": image_of(0)})[0]["predictions"]) == 3
    with pytest.raises(ValueError, match="a resnet has no attention over patches; leave attention out"):
        handler({"inputs": image_of(0), "parameters": {"attention": True}})


def test_a_model_of_timm(tmp_path):
    """The handler serves a timm model in the form that timm itself saves."""
    data = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
    model = timm.create_model("resnet10t", num_classes=3, pretrained_cfg_overlay=data).eval()
    save_for_hf(model, tmp_path, model_config={"label_names": ["cat", "dog", "fox"]})
    (result,) = EndpointHandler(tmp_path)({"inputs": image_of(0, (32, 32))})
    pixels = torch.from_numpy(np.array(image_of(0, (32, 32)))).permute(2, 0, 1) / 255
    with torch.no_grad():
        expected = model((pixels[None] - 0.5) / 0.25).softmax(dim=-1)[0]
    scores = {entry["label"]: entry["score"] for entry in result["predictions"]}
    assert [scores[name] for name in ("cat", "dog", "fox")] == pytest.approx(expected.tolist(), abs=1e-5)


def test_images_of_several_sizes_get_their_own_answers(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(do_resize=False).save_pretrained(tmp_path)
    handler = EndpointHandler(tmp_path)
    images = [image_of(seed, size) for seed, size in enumerate([(40, 40), (50, 40), (40, 40), (40, 50)])]
    for image, result in zip(images, handler({"inputs": images}), strict=True):
        (expected,) = handler({"inputs": image})
        assert [entry["label"] for entry in result["predictions"]] == [
            entry["label"] for entry in expected["predictions"]
        ]
        assert result["predictions"][0]["score"] == pytest.approx(expected["predictions"][0]["score"], abs=1e-6)


def test_attention_in_versions_that_cannot_switch_the_implementation(handler, monkeypatch):
    """Attention works in transformers 4.41 to 4.53, whose models cannot switch the implementation.

    Many endpoints run these versions; the weights are in memory only once there too.
    """
    monkeypatch.delattr(PreTrainedModel, "set_attn_implementation")
    observed, pixels = handler_module._observed(handler.model), torch.randn(2, 3, 8, 8)
    pairs = zip(handler.model.parameters(), observed.parameters(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    found, expected = (model(pixels, output_attentions=True).attentions for model in (observed, handler._observed))
    torch.testing.assert_close(found, expected)


def test_counts_and_groups_of_other_classes_are_left_out(folder, tmp_path):
    """Counts and groups of other classes are left out.

    Plain transformers keeps both when it gives a model a new head.
    """
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=4, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    image_processor(8).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["class_counts"] == COUNTS
    for prediction in EndpointHandler(tmp_path)({"inputs": image_of(0)})[0]["predictions"]:
        assert prediction["group"] is None
        assert prediction["training_images"] is None


# ---- Concurrency ----


def test_threads_receive_their_own_answers(handler):
    """Threads receive their own answers: attention requested by one thread appears in that answer only."""
    requests = [{"inputs": image_of(seed), "parameters": {"attention": seed % 2 == 0}} for seed in range(8)]
    alone = [handler(request) for request in requests]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(handler, requests * 25))
    for index, answer in enumerate(together):
        assert answer == alone[index % 8]


def test_eight_clients_over_http(folder, tmp_path):
    """The benchmark's server and eight clients work over HTTP; the test runs them for seconds instead of a minute."""
    command = [sys.executable, "benchmarks/serving.py", "--model", folder, "--seconds", "2"]
    done = subprocess.run(
        [*map(str, command), "--record", str(tmp_path / "record.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, phase in json.loads((tmp_path / "record.json").read_text())[str(folder)].items():
        assert phase["errors"] == phase["wrong_answers"] == 0, name
        assert phase["handler"]["requests"] > phase["clients"]
        if "rss_mib" in phase:
            assert phase["rss_mib"]["end"] < phase["rss_mib"]["after_tenth"] + 20
