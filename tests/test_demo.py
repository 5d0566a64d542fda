"""Tests of the demo with a server process and a browser, and of its functions without either."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from deitlt_hf.cli.demo import main
from deitlt_hf.data import image_processor
from deitlt_hf.serving.handler import EndpointHandler
from deitlt_hf.serving.web_demo import Explanation, attention_over, build_demo, model_view, with_sign
from helpers import CHROMIUM, make_student

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
# Class names with markup, templates and a length that would widen the page if they were not escaped and cut.
NAMES = [
    "<b>bold</b>",
    "${1+1} {{value}}",
    "Pneumonoultramicroscopicsilicovolcanoconiosis" * 2,
    "a, b",
    "plain",
    "last",
]
CLASSES = {"num_labels": 6, "id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
SIZES = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


def save(model, folder):
    model.save_pretrained(folder)
    image_processor(8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    student = make_student(**CLASSES)
    student.config.class_counts = [1200, 90, 40, 12, 5, 1]
    student.config.class_groups = {"head": [0, 1], "mid": [2, 3], "tail": [4, 5]}
    folder = save(student, tmp_path_factory.mktemp("student"))
    (folder / "examples").mkdir()
    draw(5).save(folder / "examples" / "five.png")
    (folder / "examples" / "notes.txt").write_text("no image")
    return folder


def draw(seed, size=(60, 40)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def address(model_folder, tmp_path_factory):
    """Address at which `deitlt demo` serves the student, in a separate process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deitlt_hf.cli", "demo", "--model", model_folder, "--port", str(port)]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads"))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        first_line = server.stdout.readline()
        assert first_line == f"The demo is at http://127.0.0.1:{port}/ until Ctrl+C.\n"
        yield f"http://127.0.0.1:{port}/"
        server.terminate()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page in a window as wide as a phone.

    The fixture fails if the page logs an error or requests anything from another host.
    """
    page = browser.new_page(viewport={"width": 375, "height": 700})
    complaints, hosts = [], set()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(address)
    page.get_by_text("Drop an image or take a photo").wait_for()
    yield page
    page.close()
    assert complaints == []
    assert hosts - {None} == {"127.0.0.1"}  # None: data: and blob: URLs


def upload(page, path):
    page.locator("input[type=file]").set_input_files(path)


def shown_table(page):
    """Cells of the table, and class names without the text below them."""
    rows = [row.locator("th, td").all_inner_texts() for row in page.locator(".experts tbody tr").all()]
    return [[row[0].strip().splitlines()[0].strip(), *map(str.strip, row[1:])] for row in rows]


@needs_browser
def test_an_uploaded_image_shows_the_handlers_answer(page, model_folder, tmp_path):
    draw(1).save(tmp_path / "one.png")
    upload(page, tmp_path / "one.png")
    page.locator(".answer").wait_for()
    (answer,) = EndpointHandler(model_folder)({"inputs": draw(1)})
    best = answer["predictions"][0]
    assert shown_table(page) == [
        [row["label"], *(with_sign(row[key]) for key in ("cls_score", "distillation_score", "score"))]
        for row in answer["predictions"]
    ]
    text = page.locator(".experts").inner_text()
    assert text.startswith(f"{best['label']} {with_sign(best['score'])}")
    assert f"{best['group'].capitalize()} class: {best['training_images']:,} training image" in text
    assert f"{with_sign(best['training_images'] / 1200)} of the most frequent class's 1,200" in text
    for expert, name in (("cls", "CLS"), ("distillation", "DIST")):
        said = rf"{name} says\s+{re.escape(answer[expert]['label'])}\s+{with_sign(answer[expert]['score'])} sure"
        assert re.search(said, text)
    pictures = page.locator(".experts img")
    assert [picture.evaluate("image => image.naturalWidth") for picture in pictures.all()] == [224, 224, 224]
    assert [picture.get_attribute("alt")[:18] for picture in pictures.all()] == [
        "The image as the m", "Where CLS looks: m", "Where DIST looks: ",
    ]  # fmt: skip
    assert page.locator(".answer").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@needs_browser
def test_an_example_is_explained_and_removed(page, model_folder):
    example = page.get_by_role("button", name="five.png")
    example.focus()
    page.keyboard.press("Enter")
    page.locator(".answer").wait_for()
    (answer,) = EndpointHandler(model_folder)({"inputs": draw(5)})
    assert [row[0] for row in shown_table(page)] == [row["label"] for row in answer["predictions"]]
    page.get_by_label("Remove Image").click()
    page.locator(".answer").wait_for(state="detached")


@needs_browser
def test_a_broken_image_shows_an_error_and_removes_the_old_answer(page, tmp_path):
    draw(1).save(tmp_path / "one.png")
    upload(page, tmp_path / "one.png")
    page.locator(".answer").wait_for()
    (tmp_path / "broken.png").write_bytes((tmp_path / "one.png").read_bytes()[:300])
    upload(page, tmp_path / "broken.png")
    message = page.get_by_test_id("toast-body")
    message.wait_for()
    assert "Your image cannot be read as an image" in message.inner_text()
    page.locator(".answer").wait_for(state="detached")


def test_files_of_the_server_are_not_served(address, tmp_path):
    """The server does not serve other files.

    A request can name any path, and can leave out the field that makes Gradio check it.
    """
    draw(3).save(tmp_path / "private.png")
    events = httpx.get(f"{address}config").json()["dependencies"]
    (on_upload,) = (event["id"] for event in events if "upload" in [kind for _, kind in event["targets"]])
    for path in (tmp_path / "private.png", "/etc/passwd", tmp_path / "nothing"):
        session = f"session {path}"
        request = {"data": [{"path": str(path)}], "fn_index": on_upload, "session_hash": session}
        httpx.post(f"{address}gradio_api/queue/join", json=request).raise_for_status()
        with httpx.stream("GET", f"{address}gradio_api/queue/data", params={"session_hash": session}) as events:
            lines = [line.removeprefix("data:") for line in events.iter_lines() if line.startswith("data:")]
        (end,) = [message for message in map(json.loads, lines) if message["msg"] == "process_completed"]
        assert not end["success"]
        assert end["output"]["error"] == "Your image was not uploaded to this page; try again."


def test_a_classifier_with_one_expert_gets_one_column(tmp_path):
    torch.manual_seed(0)
    folder = save(ViTForImageClassification(ViTConfig(**SIZES, **CLASSES)), tmp_path)
    explain = Explanation(folder)
    assert not explain.has_experts
    draw(2).save(tmp_path / "two.png")
    html = explain((tmp_path / "two.png").read_bytes())
    assert html.count("<tr>") == 6
    assert re.findall(r'<th scope="col">(\w+)', html) == ["Class", "Score"]
    assert html.count("<img") == 2
    assert "training image" not in html
    assert "&lt;b&gt;bold" in html
    assert "<b>bold" not in html


def test_an_example_that_is_a_link_is_not_served(model_folder, tmp_path):
    """An example that is a link is not served; a cloned repository can contain links to any file of this machine."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (tmp_path / "private").write_text("key")
    (folder / "examples" / "key.png").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=r"key\.png is a link to .*private"):
        build_demo(folder)


def test_unusable_models_and_examples_are_refused(tmp_path, model_folder):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], **CLASSES)
    save(ResNetForImageClassification(config), tmp_path)
    with pytest.raises(ValueError, match="has no attention over patches to show"):
        build_demo(tmp_path)
    with pytest.raises(FileNotFoundError, match="there are no images in --examples"):
        build_demo(model_folder, tmp_path)


def test_an_address_in_use_is_reported_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ValueError, match=f"cannot serve on 127.0.0.1:{port}: the port is taken"):
            main(["--model", "no model", "--port", port])


def test_pictures_show_the_models_input_and_attention():
    image = draw(3, (16, 8))
    seen = model_view(image_processor(8), image)
    assert seen.size == (224, 224)
    np.testing.assert_array_equal(np.asarray(seen)[14::28, 14::28], np.asarray(image.crop((4, 0, 12, 8))))
    weights = np.array([[0.5, 0.5], [0.5, 1.0]])
    brightness = np.asarray(attention_over(seen, weights).convert("L"), dtype=float)
    assert brightness[112:, 112:].mean() > brightness[:112, :112].mean() + 50
    flat = np.asarray(attention_over(seen, np.ones((2, 2))))
    assert flat.shape == (224, 224, 3)
