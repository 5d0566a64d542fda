"""The report page, the commands that make it, and the fusion of experts by command."""

import base64
import io
import json
import re
import subprocess
from html.parser import HTMLParser

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from conftest import CHROMIUM, make_student
from deitlt_hf import FlatTeacherForImageClassification
from deitlt_hf.analysis.observe import observe
from deitlt_hf.analysis.teaching import teacher_agreement
from deitlt_hf.commands.analyze import AnalysisArguments, main, report
from deitlt_hf.commands.evaluate import FusionArguments, compare_fusions
from deitlt_hf.data import ImageCollator, ImageDataset, image_processor
from deitlt_hf.evaluation import METRIC_PATH
from deitlt_hf.evaluation.metrics import long_tail_figures
from deitlt_hf.recipes import DataArguments

DATA = {"dataset": "digits", "imbalance_ratio": 10, "max_per_class": 60}
FIGURES = [
    "classes", "accuracy", "outcomes", "gains", "attention_distance", "rank", "spectrum", "similarity", "flatness",
    "confusions", "attention",
]  # fmt: skip


def save(model, folder, digits):
    names = digits["train"].features["label"].names
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: label for label, name in enumerate(names)}
    model.save_pretrained(folder)
    image_processor(8).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory, digits):
    return save(make_student(), tmp_path_factory.mktemp("student"), digits)


@pytest.fixture(scope="module")
def pages(tmp_path_factory, digits, student_folder):
    """A report of a student, and one of it beside a ViT, which has one token and one expert."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=10,
    )  # fmt: skip
    vit = save(ViTForImageClassification(config), tmp_path_factory.mktemp("vit"), digits)
    alone, beside = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("beside")
    options = {"num_images": 60, "resamples": 5}
    report("digits", AnalysisArguments(student_folder, str(alone), **options), DataArguments(**DATA))
    report("digits", AnalysisArguments(student_folder, str(beside), vit, **options), DataArguments(**DATA))
    return alone, beside


class Page(HTMLParser):
    """What a page has."""

    def __init__(self, text):
        super().__init__()
        self.images, self.headings, self.cells, self.links, self._tag = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self._tag = tag
        if tag == "img":
            self.images.append(values["src"])
        if tag == "h2" and "id" in values:
            self.headings.append(values["id"])
        if tag in ("script", "link") and not values.get("href", "").startswith("data:"):
            self.links.append(values)

    def handle_data(self, data):
        if self._tag in ("td", "th") and data.strip():
            self.cells.append(data.strip())


def test_a_page_has_all_figures_and_needs_no_other_file(pages):
    alone, _ = pages
    page = Page((alone / "index.html").read_text())
    assert [name for name in page.headings if name != "only_distillation"] == FIGURES
    assert page.links == []
    assert len(page.images) == len(page.headings)
    for source, name in zip(page.images, page.headings, strict=True):
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert data == (alone / f"{name}.png").read_bytes()
        assert min(Image.open(io.BytesIO(data)).size) > 100
    assert page.cells[:4] == ["expert", "overall", "head", "mid"]
    assert {"mean", "cls", "distillation"} <= set(page.cells)
    record = json.loads((alone / "report.json").read_text())
    (model,) = record["models"]
    assert f"{100 * model['figures']['cls']['overall']:.1f}" in page.cells
    low, high = model["intervals"]["cls"]["overall"]
    assert low <= model["figures"]["cls"]["overall"] <= high
    assert len(model["attention_distance"]) == 3
    assert sum(model["outcomes"]["overall"][name] for name in ("both", "only_cls", "only_distillation", "neither")) == (
        pytest.approx(1.0)
    )


def test_the_terminal_has_the_table_or_the_json_alone(student_folder, tmp_path, capsys):
    data = [word for name, value in DATA.items() if name != "dataset" for word in (f"--{name}", str(value))]
    options = ["--num_images", "9", "--resamples", "2", "--sharpness_images", "0", "--output", str(tmp_path)]
    command = ["--model", student_folder, "--recipe", "digits_lt", *data, *options]
    main(command)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 24
    main([*command, "--json", "-"])
    output = capsys.readouterr()
    record = json.loads(output.out)
    assert record == json.loads((tmp_path / "report.json").read_text())
    (model,) = record["models"]
    assert "loss_rises" not in model
    assert not (tmp_path / "flatness.png").exists()
    for text in (shown, output.err):
        assert f"{100 * model['figures']['distillation']['overall']:.1f}" in text
        assert str(tmp_path / "index.html") in text.replace("\n", "")


def test_two_models_stand_side_by_side(pages):
    _, beside = pages
    text = (beside / "index.html").read_text()
    page = Page(text)
    assert [name for name in page.headings if name != "only_distillation"] == FIGURES
    assert (beside / "1_rank.png").is_file()
    assert (beside / "2_rank.png").is_file()
    assert not (beside / "2_outcomes.png").exists()
    of_two_experts = {"outcomes", "gains", "similarity", "only_distillation"}
    assert text.count("Not for") == len(of_two_experts & set(page.headings)) >= 3
    assert len(json.loads((beside / "report.json").read_text())["models"]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; the page itself is checked above")
def test_pages_open_in_a_browser(pages, tmp_path):
    """No error in the console, and every image is drawn."""
    for folder in pages:
        script = (
            "<script>addEventListener('load', () => document.body.dataset.drawn = "
            "[...document.images].map(image => image.complete && image.naturalWidth > 100))</script></body>"
        )
        copy = tmp_path / "page.html"
        copy.write_text((folder / "index.html").read_text().replace("</body>", script))
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, check=True, timeout=120)
        drawn = re.search(r'data-drawn="([^"]*)"', done.stdout).group(1).split(",")
        assert set(drawn) == {"true"}
        assert len(drawn) == done.stdout.count("<img")
        assert "CONSOLE" not in done.stderr


def test_what_is_observed_is_what_the_model_gives(digits):
    student = make_student(attn_implementation="eager").eval()
    dataset = ImageDataset(digits["test"].select(range(40)), "image", "label")
    collate = ImageCollator(image_processor(8))
    observed = observe(student, dataset, collate, num_images=12, batch_size=16)
    batch = collate([dataset[row] for row in range(40)])
    with torch.no_grad():
        outputs = student(batch["pixel_values"], output_hidden_states=True)
    np.testing.assert_allclose(observed.logits["distillation"], outputs.distillation_logits, atol=1e-5)
    assert observed.chosen.tolist() == np.linspace(0, 39, 12).astype(int).tolist()
    expected = outputs.hidden_states[2][observed.chosen, :2]
    np.testing.assert_allclose(observed.features[1], expected, atol=1e-5)
    assert observed.distances.shape == (3, 2)
    confidences = torch.softmax(outputs.logits, dim=1).amax(dim=1)
    np.testing.assert_allclose(observed.confidences("mean"), confidences, atol=1e-5)
    assert student.config._attn_implementation == "eager"


def test_a_model_without_attention_is_refused(teacher_folder):
    with pytest.raises(ValueError, match="has no attention over patches; give a DeiT-LT, a DeiT or a ViT"):
        report("digits", AnalysisArguments(str(teacher_folder)), DataArguments(**DATA))


def test_the_metric_loads_from_its_file_and_takes_batches(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    random = np.random.RandomState(0)
    labels, predictions = random.randint(0, 6, 50), random.randint(0, 6, (50, 2))
    confidences = random.rand(50, 2).astype(np.float32)
    groups = {"head": [0, 1], "mid": [2, 3], "tail": [4, 5]}
    metric = evaluate.load(METRIC_PATH)
    for rows in np.array_split(np.arange(50), 3):
        metric.add_batch(predictions=predictions[rows], confidences=confidences[rows], references=labels[rows])
    found = metric.compute(groups=groups, experts=["cls", "distillation"])
    for column, expert in enumerate(("cls", "distillation")):
        expected = long_tail_figures(predictions[:, column], labels, groups, confidences[:, column])
        assert {name: found[f"{expert}_{name}"] for name in expected} == pytest.approx(expected)
    assert found["tail"] == found["cls_tail"]
    with pytest.raises(ValueError, match=r"predictions have shape \(50, 2\), but there are 3 experts"):
        metric.compute(predictions=predictions, confidences=confidences, references=labels, groups=groups)


def test_fusions_are_compared_and_saved(student_folder, tmp_path, digits):
    data = DataArguments(**DATA)
    rows = compare_fusions(student_folder, data, FusionArguments("all"))
    assert list(rows) == ["mean", "temperatures", "weight", "group_weights", "count_weights", "logit_adjustment"]
    args = FusionArguments("group_weights", str(tmp_path / "fused"))
    assert compare_fusions(student_folder, data, args)["group_weights"] == rows["group_weights"]
    again = compare_fusions(str(tmp_path / "fused"), data, FusionArguments("mean", str(tmp_path / "again")))
    assert again["mean"] == rows["group_weights"]
    with pytest.raises(FileExistsError, match="holds a model or run; choose another --fused_output"):
        compare_fusions(student_folder, data, args)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fusion": "vote"}, "fusion must be one of all, mean, .*, got 'vote'"),
        ({"fusion": "all", "fused_output": "x"}, "one rule of --fusion and --fused_output belong together"),
        ({"fusion": "weight"}, "one rule of --fusion and --fused_output belong together"),
    ],
)
def test_fusion_arguments_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        FusionArguments(**values)


def test_agreement_with_the_teacher_is_its_definition(digits, teacher_folder):
    """In distribution by hand; out of distribution a student that is its teacher would agree on mixed images too."""
    student = make_student().eval()
    teacher = FlatTeacherForImageClassification.from_pretrained(teacher_folder).eval()
    groups = {"head": [0, 1, 2], "mid": [3, 4, 5], "tail": [6, 7, 8, 9]}
    found = teacher_agreement("digits_lt", student, str(teacher_folder), digits, groups)
    dataset = ImageDataset(digits["test"], "image", "label")
    images = ImageCollator(image_processor(8))([dataset[row] for row in range(len(dataset))])["pixel_values"]
    with torch.no_grad():
        outputs, taught = student(images), teacher(images).logits.argmax(dim=1)
    for expert, field in (("mean", "logits"), ("cls", "cls_logits"), ("distillation", "distillation_logits")):
        expected = (outputs[field].argmax(dim=1) == taught).float().mean().item()
        assert found["in distribution"][expert] == pytest.approx(expected, abs=0.01)
    assert all(0 <= share <= 1 for share in found["out of distribution"].values())
    assert found == teacher_agreement("digits_lt", student, str(teacher_folder), digits, groups)


def test_a_report_with_the_teacher(student_folder, teacher_folder, tmp_path):
    args = AnalysisArguments(student_folder, str(tmp_path), None, str(teacher_folder), num_images=20, resamples=3)
    report("digits_lt", args, DataArguments(**DATA))
    assert "teacher" in Page((tmp_path / "index.html").read_text()).headings
    record = json.loads((tmp_path / "report.json").read_text())["models"][0]
    assert set(record["teacher_agreement"]) == {"in distribution", "out of distribution"}
