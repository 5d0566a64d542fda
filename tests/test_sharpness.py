"""Tests of the flatness measures against completely computed Hessians."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deitlt_hf import FlatTeacherConfig, FlatTeacherForImageClassification
from deitlt_hf.analysis.flatness import images_of_groups, loss_rises, sharpness
from deitlt_hf.cli.sharpness import main
from deitlt_hf.data import ImageCollator, ImageDataset, image_processor
from helpers import make_student

pytestmark = pytest.mark.slow  # a Hessian takes seconds


class Tiny(nn.Module):
    """A classifier with few weights, one of which does not affect the logits."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace()
        self.hidden = nn.Linear(12, 4)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.head(torch.tanh(self.hidden(pixel_values.flatten(1)))))


def batches(images=24, size=8):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, 2, 2, generator=generator)
    labels = torch.randint(0, 3, (images,), generator=generator)
    return list(zip(pixels.split(size), labels.split(size), strict=True))


def whole_hessian(model, data):
    pixels, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    names = [name for name, _ in model.named_parameters() if name != "unused"]
    shapes = [model.get_parameter(name).shape for name in names]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        logits = torch.func.functional_call(model, weights, (pixels,)).logits
        return F.cross_entropy(logits, labels)

    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
    return loss, flat, torch.func.hessian(loss)(flat)


def test_figures_match_the_complete_hessian():
    torch.manual_seed(0)
    model, data = Tiny(), batches()
    loss, flat, hessian = whole_hessian(model, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sharpness(model, data, rho=0.1)
    traces = [sharpness(model, data, num_vectors=66, seed=seed).trace for seed in range(10)]
    assert found.num_images == 24
    assert found.loss == pytest.approx(loss(flat).item(), rel=1e-5)
    assert found.eigenvalue == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-2)
    assert sum(traces) / 10 == pytest.approx(hessian.trace().item(), rel=0.1)
    gradient = torch.func.grad(loss)(flat)
    rise = loss(flat + 0.1 * gradient / gradient.norm()) - loss(flat)
    assert found.loss_rise == pytest.approx(rise.item(), rel=1e-3, abs=1e-6)
    rises = loss_rises(model, data, [0.05, 0.1])
    assert rises[1] == pytest.approx(found.loss_rise, rel=1e-5)
    assert rises[0] == pytest.approx((loss(flat + 0.05 * gradient / gradient.norm()) - loss(flat)).item(), rel=1e-3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_loaded_student_can_be_measured():
    """A student can be measured as it was loaded.

    On a CPU, torch's fast attention has no forward-mode derivatives; in low precision, small steps are lost.
    """
    student = make_student().eval()
    assert student.config._attn_implementation == "sdpa"
    data = [(torch.randn(6, 3, 8, 8), torch.arange(6))]
    found = sharpness(student, data, num_vectors=1)
    assert found.eigenvalue > 0
    assert loss_rises(student, data, [0.05]) == pytest.approx([found.loss_rise], rel=1e-3)
    assert student.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=r"lost in weights of torch\.bfloat16; load them as float32"):
        loss_rises(student.bfloat16(), data, [0.05])


def test_figures_depend_on_the_seed_and_not_on_the_batch_size():
    torch.manual_seed(0)
    model = Tiny()
    first, second = (sharpness(model, batches(), seed=3) for _ in range(2))
    assert first == second
    other = sharpness(model, batches(size=5), seed=3)
    for field in ("loss", "loss_rise", "eigenvalue", "trace"):
        assert getattr(other, field) == pytest.approx(getattr(first, field), rel=1e-3)
    assert sharpness(model, batches(), seed=4).trace != first.trace


def test_groups_are_measured_on_their_own_images(digits):
    torch.manual_seed(0)
    model = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10))
    dataset, collate = ImageDataset(digits["train"], "image", "label"), ImageCollator(image_processor(8))
    groups = {"head": [0], "mid": [], "tail": [8, 9]}
    images = images_of_groups(model, dataset, collate, groups, 50)
    found = {name: sharpness(model, batches, num_vectors=1) for name, batches in images}
    assert {name: value.num_images for name, value in found.items()} == {"overall": 50, "head": 50, "tail": 13}
    rows = [dataset[row] for row in range(len(dataset)) if dataset.labels[row] >= 8]
    batch = collate(rows)
    expected = F.cross_entropy(model.eval()(batch["pixel_values"]).logits, batch["labels"])
    assert found["tail"].loss == pytest.approx(expected.item(), rel=1e-4)


def test_command_line_writes_the_figures(teacher_folder, tmp_path, capsys):
    options = ["--num_images", "20", "--num_vectors", "1", "--json", str(tmp_path / "figures.json")]
    recipe = ["--recipe", str(Path(__file__).parent / "fixtures" / "tiny.yaml")]
    main(["--model", str(teacher_folder), *options, *recipe])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["overall", "head", "mid", "tail"]
    output = capsys.readouterr().out
    for group, values in figures.items():
        assert group in output
        assert f"{values['eigenvalue']:.4g}" in output
        assert values["num_images"] <= 20


def test_command_measures_a_half_precision_student(tmp_path, digits, capsys, monkeypatch):
    """The command measures a half-precision student in float32. It refuses an unusable output path before measuring."""
    measured = []
    monkeypatch.setattr(
        "deitlt_hf.cli.sharpness.images_of_groups", lambda model, *_: measured.append(model.dtype) or {}
    )
    student = make_student()
    student.config.id2label = {label: str(label) for label in range(10)}
    student.bfloat16().save_pretrained(tmp_path)
    image_processor(8).save_pretrained(tmp_path)
    command = ["--model", str(tmp_path), "--recipe", "digits_lt"]
    with pytest.raises(FileNotFoundError, match="there is no folder for the file --json"):
        main([*command, "--json", str(tmp_path / "nowhere" / "x.json")])
    assert measured == []
    main([*command, "--json", "-"])
    assert measured == [torch.float32]
    assert json.loads(capsys.readouterr().out) == {}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--rho", "-1"], "rho must be above 0, got -1"),
        (["--num_images", "0"], "num_images must be 1 or more, got 0"),
        (["--num_vectors", "0"], "num_vectors must be 1 or more, got 0"),
        (["--json", "."], "--json . is a folder; name a file"),
        (["--data_dri", "x"], r"unknown field 'data_dri' .*; --help lists all"),
    ],
)
def test_invalid_options_are_refused_before_any_work(option, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(["--model", "./nowhere", "--recipe", "digits_lt", *option])


def test_measuring_does_not_change_a_teacher():
    model = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=3))
    model.requires_grad_(False)
    statistics = model.backbone.bn1.running_mean.clone()
    data = [(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
    found = sharpness(model.train(), data, num_vectors=1)
    assert found.eigenvalue > 0
    assert model.training
    assert torch.equal(model.backbone.bn1.running_mean, statistics)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_invalid_sharpness_arguments_are_refused(digits):
    with pytest.raises(ValueError, match="no images to measure"):
        sharpness(Tiny(), [])
    with pytest.raises(ValueError, match="num_vectors must be 1 or more, got 0"):
        sharpness(Tiny(), batches(), num_vectors=0)
    broken = Tiny()
    broken.head.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="the loss of the model is nan"):
        sharpness(broken, batches())
    with pytest.raises(ValueError, match="no images to measure"):
        loss_rises(Tiny(), [], [0.1])
    with pytest.raises(ValueError, match="rho must be above 0, got -1"):
        sharpness(Tiny(), batches(), rho=-1)
    with pytest.raises(ValueError, match="rho must be above 0, got nan"):
        loss_rises(Tiny(), batches(), [0.1, float("nan")])
