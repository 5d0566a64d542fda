"""Tests of the report page, of the commands that make it, and of the fusion of experts by command."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from deitlt_hf import FlatTeacherForImageClassification
from deitlt_hf.analysis.figures import draw_images
from deitlt_hf.analysis.observe import observe, spread_rows
from deitlt_hf.analysis.report_page import Picture, Section, _share_axes
from deitlt_hf.analysis.reporting import AnalysisArguments, report
from deitlt_hf.analysis.teaching import teacher_agreement
from deitlt_hf.cli.analyze import main
from deitlt_hf.cli.evaluate import FusionArguments, compare_fusions
from deitlt_hf.cli.evaluate import main as evaluate_main
from deitlt_hf.data import ImageCollator, ImageDataset, image_processor
from deitlt_hf.evaluation import METRIC_PATH
from deitlt_hf.evaluation.metrics import long_tail_figures
from deitlt_hf.recipes import DataArguments
from deitlt_hf.serving.classifiers import load_model
from deitlt_hf.training import DeiTLTTrainer
from deitlt_hf.training.taught import label_order
from helpers import CHROMIUM, make_student

pytestmark = pytest.mark.slow  # a report takes seconds

DATA = {"dataset": "digits", "imbalance_ratio": 10, "max_per_class": 60}
FIGURES = [
    "classes", "accuracy", "confusion_matrix",
    "outcomes", "gains", "attention_distance", "rank", "spectrum", "group_rank", "similarity",
    "flatness", "confusions", "attention",
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
    """A report of a student, and one of a student and a ViT, which has one token and one expert."""
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
    """The parsed content of a report page."""

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


def test_a_page_is_complete_in_one_file(pages):
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
    # Pages may be published: they contain only the last part of folder names.
    assert str(alone.parent) not in (alone / "index.html").read_text() + (alone / "report.json").read_text()
    low, high = model["intervals"]["cls"]["overall"]
    assert low <= model["figures"]["cls"]["overall"] <= high
    assert len(model["attention_distance"]) == 3
    assert len(model["class_accuracies"]["cls"]) == 10
    assert [len(blocks) for blocks in model["singular_values"].values()] == [3, 3]
    assert model["images_of_group_rank"] * 3 <= model["images_of_rank"] == 60
    assert all(rank <= model["images_of_group_rank"] for rank in model["effective_rank_of_groups"]["cls"]["tail"])
    assert sum(model["outcomes"]["overall"][name] for name in ("both", "only_cls", "only_distillation", "neither")) == (
        pytest.approx(1.0)
    )


def test_the_terminal_shows_the_table_or_only_the_json(student_folder, tmp_path, capsys):
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
    assert "The CLS head learned from the labels" in text


def test_a_report_of_one_expert_does_not_mention_two(pages, student_folder, digits, tmp_path):
    """A report of one expert does not mention two experts.

    It removes the pictures of an earlier report in its folder.
    """
    _, beside = pages
    vit = str(beside.parent / json.loads((beside / "report.json").read_text())["models"][1]["model"].split("/")[-1])
    for model in (student_folder, vit):
        args = AnalysisArguments(model, str(tmp_path), num_images=9, resamples=2, sharpness_images=5)
        (tmp_path / "notes.png").write_bytes(b"the user's own")
        report("digits", args, DataArguments(**DATA))
    text = (tmp_path / "index.html").read_text()
    assert "The CLS head learned" not in text
    assert 'class="best"' not in text
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"notes", *Page(text).headings}


def test_figures_of_two_models_share_one_scale():
    """Figures of two models share one scale.

    With separate scales, a small difference would look like none or like a large one.
    """
    sections = []
    for height in (1.0, 3.0):
        figure = Figure()
        figure.subplots().plot([0, height])
        sections.append(Section("model", {}, {}, [Picture("rank", "", "", figure)], {}))
    _share_axes(sections)
    (low, high), other = (section.pictures[0].figure.axes[0].get_ylim() for section in sections)
    assert (low, high) == other
    assert high >= 3


def test_names_with_dollars_are_drawn_literally():
    """Names with dollar signs are drawn literally.

    matplotlib reads text between two of them as mathematics, and may fail.
    """
    figure = Figure()
    draw_images([figure.subplots()], [np.zeros((4, 4, 3), dtype=np.uint8)], ["Ke$ha\n$x^$"])
    assert Picture("confusions", "", "", figure).png.startswith(b"\x89PNG")


def test_sizes_as_pairs_and_images_that_are_not_square(digits):
    """A model's image_size and patch_size may have two values."""
    student = make_student(image_size=[8, 16], patch_size=[4, 4]).eval()
    dataset = ImageDataset(digits["test"].select(range(6)), "image", "label")

    def collate(rows):
        return {"pixel_values": torch.randn(len(rows), 3, 8, 16), "labels": torch.zeros(len(rows), dtype=torch.long)}

    observed = observe(student, dataset, collate, num_images=4)
    assert observed.grid == (2, 4)
    assert observed.distances.shape == (3, 2)


@pytest.mark.parametrize("order", [list("9876543210"), list("0123456789ab")])
def test_classes_in_another_order_or_among_others(student_folder, digits, tmp_path, order):
    """Observations of a model are in the order of the data's classes."""
    names = list("0123456789")
    torch.manual_seed(0)
    student = make_student(num_labels=len(order)).eval()
    student.config.id2label = dict(enumerate(order))
    dataset = ImageDataset(digits["test"].select(range(6)), "image", "label")
    collate = ImageCollator(image_processor(8))
    positions = label_order(names, student.config, "model")
    observed = observe(student, dataset, collate, num_images=4, label_order=positions)
    batch = collate([dataset[row] for row in range(6)])
    with torch.no_grad():
        expected = student(batch["pixel_values"]).logits
    for label, name in enumerate(names):
        np.testing.assert_allclose(observed.logits["mean"][:, label], expected[:, order.index(name)], atol=1e-5)
    with pytest.raises(ValueError, match="the model does not know the classes 'z'"):
        label_order(["z"], student.config, "model")


def test_invalid_input_is_reported_before_any_work(student_folder, teacher_folder, tmp_path, capsys, monkeypatch):
    data = DataArguments(**DATA)
    for values, error, message in (
        ({"compare": str(teacher_folder)}, ValueError, "has no attention over patches"),
        ({"compare": "./nowhere"}, FileNotFoundError, "there is no model folder"),
        ({"output": str(tmp_path / "file")}, FileExistsError, "file"),
        ({"output": str(tmp_path / "page")}, FileExistsError, "index.html is not from a report of this package"),
        ({"output": str(tmp_path / "record")}, FileExistsError, "report.json is not from a report of this package"),
        ({"output": str(tmp_path / "list")}, FileExistsError, "report.json is not from a report of this package"),
    ):
        (tmp_path / "file").touch()
        for name, content in (("page/index.html", "mine"), ("record/report.json", "{"), ("list/report.json", "[1]")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        with pytest.raises(error, match=message):
            report("digits", AnalysisArguments(student_folder, **{"output": str(tmp_path / "out"), **values}), data)
    with pytest.raises(FileNotFoundError, match="there is no folder for the file --json"):
        main(["--model", student_folder, "--recipe", "digits_lt", "--json", str(tmp_path / "no" / "x.json")])
    with pytest.raises(IsADirectoryError, match=f"--json {tmp_path} is a folder; name a file"):
        main(["--model", student_folder, "--recipe", "digits_lt", "--json", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # simulates that matplotlib is not installed
    with pytest.raises(ValueError, match="pictures need matplotlib: pip install"):
        report("digits", AnalysisArguments(student_folder, str(tmp_path / "out")), data)
    assert capsys.readouterr().out == ""
    for values in ({"num_images": 1}, {"resamples": 0}, {"sharpness_images": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(values))} must be"):
            AnalysisArguments(student_folder, **values)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; the page itself is checked above")
def test_pages_open_in_a_browser(pages, tmp_path):
    """Pages open in a browser without errors in the console, and every image is drawn."""
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


def test_observations_match_the_models_outputs(digits, monkeypatch):
    monkeypatch.setattr("deitlt_hf.analysis.observe.BATCH", 16)
    student = make_student(attn_implementation="eager").eval()
    dataset = ImageDataset(digits["test"].select(range(40)), "image", "label")
    collate = ImageCollator(image_processor(8))
    observed = observe(student, dataset, collate, num_images=12)
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


def test_the_metric_loads_from_its_file_and_accepts_batches(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    random = np.random.RandomState(0)
    labels, predictions = random.randint(0, 6, 50), random.randint(0, 6, (50, 2))
    confidences = random.rand(50, 2).astype(np.float32)
    groups = {"head": [0, 1], "mid": [2, 3], "tail": [4, 5]}
    metric = evaluate.load(METRIC_PATH)
    for rows in np.array_split(np.arange(50), 3):
        metric.add_batch(predictions=predictions[rows], confidences=confidences[rows], references=labels[rows])
    found = metric.compute(groups=groups, experts=["cls", "distillation"], resamples=20)
    for column, expert in enumerate(("cls", "distillation")):
        expected = long_tail_figures(predictions[:, column], labels, groups, confidences[:, column])
        assert {name: found[f"{expert}_{name}"] for name in expected} == pytest.approx(expected)
        low, high = found[f"{expert}_intervals"]["tail"]
        assert low <= expected["tail"] <= high
        assert len(found[f"{expert}_per_class"]) == 6
    assert found["tail"] == found["cls_tail"]
    unknown = np.full_like(confidences, np.nan)
    found = metric.compute(
        predictions=predictions, confidences=unknown, references=labels, groups=groups, experts=["cls", "distillation"]
    )
    assert "calibration_error" not in found
    with pytest.raises(ValueError, match=r"predictions have shape \(50, 2\), but there are 3 experts"):
        metric.compute(predictions=predictions, confidences=confidences, references=labels, groups=groups)


def test_fusions_are_compared_and_saved(student_folder, tmp_path, capsys):
    data = DataArguments(**DATA)
    rows = compare_fusions(student_folder, data, FusionArguments("all"))
    assert list(rows) == ["mean", "temperatures", "weight", "group_weights", "count_weights", "logit_adjustment"]
    args = FusionArguments("group_weights", str(tmp_path / "fused"))
    assert compare_fusions(student_folder, data, args)["group_weights"] == rows["group_weights"]
    again = compare_fusions(str(tmp_path / "fused"), data, FusionArguments("mean", str(tmp_path / "again")))
    assert again["mean"] == rows["group_weights"]
    with pytest.raises(FileExistsError, match="holds a model or run; choose another --fused_output"):
        compare_fusions(student_folder, data, args)
    capsys.readouterr()
    options = ["--recipe", "digits_lt", "--fusion", "group_weights", "--fused_output", str(tmp_path / "fused")]
    with pytest.raises(FileExistsError, match="choose another --fused_output"):
        evaluate_main(["--model", student_folder, *options])
    assert capsys.readouterr().out == ""  # before anything is evaluated


def test_evaluation_uses_settings_of_the_recipe_or_the_command_line(student_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "deitlt_hf.cli.evaluate.evaluate",
        lambda path, data_args, args: seen.append((path, args)) or SimpleNamespace(is_world_process_zero=lambda: False),
    )
    for words, size in (([], 200), (["--per_device_eval_batch_size", "9"], 9)):
        evaluate_main(["--model", student_folder, "--recipe", "digits_lt", *words])
        path, args = seen.pop()
        assert path == student_folder
        assert (args.per_device_eval_batch_size, args.dataloader_num_workers) == (size, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_size", "99"], "unknown field 'image_size' in the command line"),
        (["--teacher", "nonsense"], "unknown field 'teacher' in the command line"),
        (["--learning_rate", "1"], "unknown field 'learning_rate' in the command line"),
        (["--json", "."], "--json . is a folder; name a file"),
        (["--fusion", "weight", "--fused_output", __file__], "is a file; choose another folder"),
    ],
)
def test_evaluation_refuses_before_any_work(words, message):
    with pytest.raises((ValueError, OSError), match=message):
        evaluate_main(["--model", "./nowhere", "--recipe", "digits_lt", *words])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fusion": "vote"}, "fusion must be one of all, mean, .*, got 'vote'"),
        ({"fusion": "all", "fused_output": "x"}, "one rule of --fusion and --fused_output must be given together"),
        ({"fusion": "weight"}, "one rule of --fusion and --fused_output must be given together"),
    ],
)
def test_invalid_fusion_arguments_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FusionArguments(**values)


def test_agreement_with_the_teacher_matches_its_definition(digits, teacher_folder):
    """The agreement with the teacher matches its definition, which the test computes by hand for clean images."""
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
    # With a test split sorted by class, a few batches still have images of all classes.
    by_class = {**digits, "test": digits["test"].sort("label")}
    found = teacher_agreement("digits_lt", student, str(teacher_folder), by_class, groups, num_batches=1)
    rows = np.argsort(digits["test"]["label"][:], kind="stable")[spread_rows(len(images), 200)]
    expected = (outputs.logits.argmax(dim=1) == taught)[rows].float().mean().item()
    assert found["in distribution"]["mean"] == pytest.approx(expected, abs=0.01)


def test_agreement_uses_the_students_augmentation(digits, teacher_folder, tmp_path, monkeypatch):
    """The agreement uses the augmentation and mixing of the student's record.

    The data have fewer images than one round of repeated augmentation.
    """
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {dataset: digits}\n"
        "student: {train_crop: padded, global_batch_size: 32, per_device_train_batch_size: 32, warmup_epochs: 0}\n"
    )
    make_student().save_pretrained(tmp_path / "student")
    image_processor(8).save_pretrained(tmp_path / "student")
    shown = {"mixup": 0, "cutmix": 0, "auto_augment": None, "random_erasing": 0, "hflip": 0}
    record = {"settings": {**shown, "num_train_epochs": 7}, "data": {}}
    (tmp_path / "student" / "results.json").write_text(json.dumps(record))
    trainers = []

    class Kept(DeiTLTTrainer):
        def training_batch(self, batch):
            trainers.append((self, super().training_batch(batch)))
            return trainers[-1][1]

    monkeypatch.setattr("deitlt_hf.analysis.teaching.DeiTLTTrainer", Kept)
    assert len(digits["train"]) < 256
    student = load_model(str(tmp_path / "student"))
    groups = {"head": [0, 1, 2], "mid": [3, 4, 5], "tail": [6, 7, 8, 9]}
    teacher_agreement(str(recipe), student, str(teacher_folder), digits, groups, num_batches=2)
    assert len(trainers) == 2
    for trainer, batch in trainers:
        assert {name: getattr(trainer.args, name) for name in shown} == shown
        # Nothing is mixed: without the share that smoothing gives to all classes, a label is one class.
        labels = batch["labels"] if batch["labels"].dim() == 2 else torch.eye(10)[batch["labels"]]
        assert ((labels > labels.amin(dim=1, keepdim=True)).sum(dim=1) == 1).all()


def test_a_report_with_the_teacher(student_folder, teacher_folder, tmp_path):
    args = AnalysisArguments(student_folder, str(tmp_path), None, str(teacher_folder), num_images=20, resamples=3)
    report("digits_lt", args, DataArguments(**DATA))
    assert "teacher" in Page((tmp_path / "index.html").read_text()).headings
    record = json.loads((tmp_path / "report.json").read_text())["models"][0]
    assert set(record["teacher_agreement"]) == {"in distribution", "out of distribution"}


def test_a_refused_analysis_leaves_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        report(
            "digits_lt",
            AnalysisArguments(model=str(tmp_path / "none"), output=str(tmp_path / "report")),
            DataArguments(),
        )
    assert not (tmp_path / "report").exists()
