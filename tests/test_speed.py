"""Tests that optimisations for speed do not change results."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import fx, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from deitlt_hf import FlatTeacherConfig, FlatTeacherForImageClassification
from deitlt_hf.cli import main
from deitlt_hf.training.memory import keep_freed_memory
from helpers import ROOT, student_trainer


def norms(model):
    """Batch norms that are computed: modules, and calls in graphs that torch.fx has traced."""
    modules = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    graphs = [module.graph for module in model.modules() if isinstance(module, fx.GraphModule)]
    return modules + [node for graph in graphs for node in graph.nodes if node.target is F.batch_norm]


# For the last three, except the last layers, timm has norm and activation in one module.
BACKBONES = {
    "resnet32": True,
    "timm/resnet18": True,
    "timm/mobilenetv3_small_050": False,
    "timm/regnetx_002": False,
    "timm/densenet121": False,
}


@pytest.mark.parametrize(("backbone", "is_folded"), BACKBONES.items())
def test_folded_teacher_gives_the_same_labels(backbone, is_folded, digits):
    """A teacher with folded batch norms gives the same labels.

    A wrongly folded batch norm would still give plausible logits, and the student would learn from another teacher.
    """
    torch.manual_seed(0)
    teacher = FlatTeacherForImageClassification(FlatTeacherConfig(backbone=backbone, image_size=32, num_labels=10))
    pictures = [digits["test"][row]["image"].resize((32, 32)) for row in range(300)]
    images = torch.stack([pil_to_tensor(picture.convert("RGB")) for picture in pictures]) / 255
    with torch.no_grad():
        teacher.train()(images)  # statistics unlike those of a new model
        for norm in norms(teacher):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.2)
        expected = teacher.eval()(images).logits
        folded = teacher.folded()
        found = folded(images).logits
    assert bool(norms(folded)) != is_folded
    assert norms(teacher)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))


class LooksAtItsInput(nn.Module):
    """A backbone that torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.num_features = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 4

    def forward(self, images):
        features = self.norm(self.conv(images)).mean(dim=(2, 3))
        return features if features.sum() > 0 else -features


def test_an_untraceable_backbone_is_not_changed():
    teacher = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=2))
    teacher.backbone, teacher.classifier = LooksAtItsInput(), nn.Linear(4, 2)
    images = torch.randn(5, 3, 8, 8)
    folded = teacher.eval().folded()
    assert norms(folded)
    torch.testing.assert_close(folded(images).logits, teacher(images).logits)


class TwoNormsOfOneConvolution(nn.Module):
    """A traceable backbone with one convolution that both batch norms would be folded into."""

    def __init__(self):
        super().__init__()
        self.conv, self.num_features = nn.Conv2d(3, 3, 1), 3
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(2)])

    def forward(self, images):
        for norm in self.norms:
            images = norm(self.conv(images))
        return images.mean(dim=(2, 3))


def test_a_backbone_that_folding_would_change_is_not_folded():
    """A backbone that folding would change is not folded.

    Its labels would be plausible, but those of another teacher.
    """
    torch.manual_seed(0)
    teacher = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=2))
    teacher.backbone, teacher.classifier = TwoNormsOfOneConvolution(), nn.Linear(3, 2)
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        teacher.train()(images)
        for norm in teacher.backbone.norms:
            norm.weight.uniform_(0.5, 1.5)
        torch.testing.assert_close(teacher.eval().folded()(images).logits, teacher(images).logits)


def test_folding_draws_no_random_numbers(teacher):
    """Folding draws no random numbers; otherwise runs with and without it would differ."""
    state = torch.get_rng_state()
    teacher.folded()
    assert torch.equal(torch.get_rng_state(), state)


def test_trainer_folds_a_copy_of_the_teacher_where_that_is_safe(tmp_path, digits, teacher):
    """The trainer folds a copy of the teacher where that is safe; the user may save or train the original."""
    plain = student_trainer(tmp_path, digits, teacher, fold_teacher=False)
    folding = student_trainer(tmp_path, digits, teacher)
    assert norms(plain.teacher)
    assert norms(teacher)
    assert not norms(folding.teacher)
    assert norms(student_trainer(tmp_path, digits, teacher, bf16=True, use_cpu=True).teacher)
    images = next(iter(plain.get_eval_dataloader()))["pixel_values"]
    expected, found = plain.teacher_logits(images), folding.teacher_logits(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))
    assert plain.check_teacher() == folding.check_teacher()


def test_folding_does_not_change_the_result_of_a_run(tmp_path, digits, teacher):
    for value in (True, False):
        trainer = student_trainer(tmp_path / str(value), digits, teacher, num_train_epochs=1, fold_teacher=value)
        trainer.train()
        trainer.save_model()
    ours, plain = (load_file(tmp_path / str(value) / "model.safetensors") for value in (True, False))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


FAULTS = """
import resource, torch
from deitlt_hf.training.memory import keep_freed_memory
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**22) for _ in range(16)]  # 16 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = [faults_of_a_step() for _ in range(6)]
assert keep_freed_memory()
kept = [faults_of_a_step() for _ in range(6)]
print(min(plain), min(kept))
"""


def test_freed_memory_is_used_again():
    """Freed memory is reused, which shows in the number of page faults.

    Without thresholds, it depends on the end of the heap whether glibc returns memory to the system. The process starts
    with thresholds that always return it.
    """
    gives_back = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    printed = subprocess.check_output([sys.executable, "-c", FAULTS], env={**os.environ, **gives_back}, text=True)
    plain, kept = (int(faults) for faults in printed.split())
    assert kept < plain / 4


def test_only_commands_set_the_whole_process(tmp_path, digits, monkeypatch):
    """A library must not change the process of the program that uses it, unless it is asked to."""
    calls = []
    monkeypatch.setattr("deitlt_hf.training.trainer.keep_freed_memory", lambda: calls.append("trainer"))
    monkeypatch.setattr("deitlt_hf.training.memory.keep_freed_memory", lambda: calls.append("command"))
    monkeypatch.setattr("deitlt_hf.cli.distill.StudentRun.train", lambda *_: sys.exit("not trained here"))
    student_trainer(tmp_path, digits)
    assert calls == []
    student_trainer(tmp_path, digits, keep_freed_memory=True)
    assert calls == ["trainer"]
    for options, expected in (([], ["command"]), (["--keep_freed_memory", "false"], [])):
        calls.clear()
        with pytest.raises(SystemExit):
            main(["distill", "--recipe", "digits_lt", "--use_cpu", "true", "--output_dir", str(tmp_path), *options])
        assert calls == expected


def test_other_c_libraries_are_not_changed(monkeypatch):
    """Other C libraries are not changed.

    On Windows, looking up the library without a name fails, and every trainer would fail with it.
    """

    def no_library(name):
        raise TypeError(name)

    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", no_library)
    assert keep_freed_memory() is False


# ---- The benchmark ----


@pytest.mark.slow
def test_comparison_is_measured_in_separate_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run

    record = tmp_path / "speed.json"
    command = ["run.py", "--only", "teacher_labels", "--turns", "1", "--threads", "1", "--json", str(record)]
    monkeypatch.setattr(sys, "argv", command)
    run.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "folded" in lines[1]
    figures = json.loads(record.read_text())["teacher_labels"]["contenders"]
    assert all(0 < values["low"] <= values["median"] <= values["high"] for values in figures.values())


def test_a_contender_that_dies_does_not_cost_the_others(monkeypatch):
    """On a GPU, one implementation that does not compile leaves the figures of the others; its reason is recorded."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run

    class Contender:
        def __init__(self, comparison, name, threads):
            self.name, self.memory, self.error = name, 2**20, None

        def begin(self):
            pass

        def value(self):
            if self.name == "compiled":
                self.error = "ended during its turn with code 1: RuntimeError: no compiler"
                raise RuntimeError(self.error)
            return 2.0

        turn = value

        def end(self):
            pass

    monkeypatch.setattr(run, "Contender", Contender)
    ways = dict.fromkeys(("eager", "compiled"))
    comparison = run.Comparison("steps", ways, flops=lambda: 1.0, turns=2, starts_together=True)
    record = run.measure("steps", comparison, 1, None)
    assert record["contenders"] == {"eager": {"median": 2.0, "low": 2.0, "high": 2.0, "memory_mib": 1.0}}
    assert "no compiler" in record["errors"]["compiled"]
    with pytest.raises(RuntimeError, match="no compiler"):
        run.measure("steps", run.Comparison("steps", {"compiled": None}, flops=lambda: 1.0, starts_together=True), 1, 1)
