"""Tests of ONNX files: logits equal torch's at every size, int8 works, and a refused export leaves no file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, pipeline

from deitlt_hf import DeiTLTConfig, DeiTLTForImageClassification, FlatTeacherConfig, FlatTeacherForImageClassification
from deitlt_hf.cli.export import main
from deitlt_hf.cli.predict import main as predict
from deitlt_hf.data import image_processor
from deitlt_hf.model_folder import weights_digest
from deitlt_hf.serving.onnx import OUTPUTS, OnnxClassifier, export_onnx, quantize
from deitlt_hf.serving.prediction import load_handler
from helpers import make_student

pytestmark = pytest.mark.slow  # an export takes seconds


def lively(model):
    """Sets every parameter to values that affect the output; biases and position embeddings start at or near zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def largest_difference(path, model, images, **options):
    with torch.no_grad():
        expected = model.eval()(pixel_values=images, **options)
    found = OnnxClassifier(path)(images)
    assert all(expected[name].std() > 0.05 for name in found)  # otherwise the comparison would show nothing
    return max((found[name] - expected[name]).abs().max().item() for name in found)


@pytest.fixture(scope="module")
def student():
    return lively(make_student(hidden_size=64, intermediate_size=256, num_hidden_layers=2))


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    return export_onnx(student, tmp_path_factory.mktemp("student"))


@pytest.mark.parametrize("number", [1, 3, 7])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (20, 12), (9, 31), (4, 4)])
def test_logits_match_torch_for_any_number_and_size(student, exported, number, size):
    """ONNX logits equal torch's for any number and size of images.

    The graph resizes position embeddings; a graph traced at one size would work for that size only.
    """
    images = torch.randn(number, 3, *size)
    assert largest_difference(exported, student, images, interpolate_pos_encoding=True) < 1e-4


def test_file_has_the_layout_that_runtimes_expect(student, exported):
    session = onnxruntime.InferenceSession(exported)
    assert exported.parts[-2:] == ("onnx", "model.onnx")
    assert [entry.name for entry in session.get_inputs()] == ["pixel_values"]
    assert session.get_inputs()[0].shape == ["batch_size", 3, "height", "width"]
    assert tuple(entry.name for entry in session.get_outputs()) == OUTPUTS
    names = json.loads(session.get_modelmeta().custom_metadata_map["id2label"])
    assert names == {str(label): name for label, name in student.config.id2label.items()}
    assert (
        str(Path(__file__).parents[1]).encode() not in exported.read_bytes()
    )  # the file contains no paths of the exporting machine


def test_a_fixed_size_accepts_only_that_size(student, tmp_path):
    path = export_onnx(student, tmp_path, dynamic_size=False)
    assert largest_difference(path, student, torch.randn(3, 3, 8, 8)) < 1e-4
    with pytest.raises(Exception, match="Got: 16 Expected: 8"):
        OnnxClassifier(path)(torch.randn(1, 3, 16, 16))


def test_native_deit_and_other_transformers(student, tmp_path):
    student.save_pretrained(tmp_path)
    native = AutoModelForImageClassification.from_pretrained(tmp_path)
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vit = ViTForImageClassification(ViTConfig(**{name: getattr(student.config, name) for name in names}))
    for model in (native, lively(vit)):
        path = export_onnx(model, tmp_path)
        assert largest_difference(path, model, torch.randn(2, 3, 12, 8), interpolate_pos_encoding=True) < 1e-4
    assert OnnxClassifier(path).names == ["logits"]


def test_teacher_has_one_output(tmp_path):
    """A teacher's file has one output, also for PaCo, whose projections are left out."""
    config = {"backbone": "resnet20", "image_size": 8, "num_labels": 10, "classifier": "cosine", "projection_size": 8}
    teacher = FlatTeacherForImageClassification(FlatTeacherConfig(**config))
    path = export_onnx(teacher, tmp_path)
    assert OnnxClassifier(path).names == ["logits"]
    for images in (torch.randn(1, 3, 8, 8), torch.randn(3, 3, 12, 20)):
        assert (OnnxClassifier(path)(images)["logits"] - teacher.eval()(images).logits).abs().max() < 1e-4
    with pytest.raises(ValueError, match="0% of its weights in matrix products"):
        quantize(path)


TEACHERS = {
    "LDAM teacher": {"classifier": "cosine", "logit_scale": 20.0},
    "CE teacher": {},
    "PaCo teacher": {"projection_size": 8},
}


@pytest.mark.parametrize("kind", ["student", *TEACHERS])
def test_every_way_gives_the_same_scores(tmp_path, kind, capsys):
    """Pipeline, handler, command and ONNX give the same scores.

    Without the scale of LDAM's cosines, each class would have a score of about 0.11.
    """
    names = {label: f"class {label}, Käfer" for label in range(10)}
    labels = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    if kind == "student":
        model = lively(make_student(**labels))
    else:
        torch.manual_seed(0)
        config = FlatTeacherConfig(backbone="resnet20", image_size=8, **TEACHERS[kind], **labels)
        model = FlatTeacherForImageClassification(config)
    folder, processor, image = str(tmp_path / "model"), image_processor(8), tmp_path / "image.png"
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (9, 11, 3), dtype=np.uint8)).save(image)
    pixels = processor(Image.open(image), return_tensors="pt").pixel_values
    with torch.no_grad():
        scores = model(pixels).logits.softmax(dim=1)[0]
    expected = {names[label]: score for label, score in enumerate(scores.tolist())}
    assert max(expected.values()) > 0.2

    classify = pipeline("image-classification", model=folder, trust_remote_code=kind != "student")
    answers = {"pipeline": classify(str(image), top_k=10)}
    answers["handler"] = load_handler(folder)({"inputs": image.read_bytes(), "parameters": {"top_k": 10}})
    predict(["--model", folder, "--jsonl", "--top_k", "10", str(image)])
    answers["predict"] = [json.loads(capsys.readouterr().out)]
    found = {way: answer if way == "pipeline" else answer[0]["predictions"] for way, answer in answers.items()}
    found["ONNX"] = [
        {"label": names[label], "score": score}
        for label, score in enumerate(
            OnnxClassifier(export_onnx(model, folder))(pixels)["logits"].softmax(dim=1)[0].tolist()
        )
    ]
    for way, guesses in found.items():
        assert {guess["label"]: guess["score"] for guess in guesses} == pytest.approx(expected, abs=1e-5), way


def test_int8_agrees_and_is_smaller(exported):
    path = quantize(exported)
    assert path.parts[-2:] == ("onnx", "model_quantized.onnx")
    assert path.stat().st_size < 0.4 * exported.stat().st_size
    images = torch.randn(200, 3, 8, 8)
    full, quantized = OnnxClassifier(exported)(images), OnnxClassifier(path)(images)
    for name in OUTPUTS:
        assert (full[name] - quantized[name]).norm() < 0.1 * full[name].norm()
        assert (full[name].argmax(dim=1) == quantized[name].argmax(dim=1)).float().mean() > 0.9
    assert onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map.keys() >= {"id2label"}


@pytest.fixture
def exported_before(exported, tmp_path):
    """A copy of `exported` in `tmp_path`."""
    return shutil.copytree(exported.parent, tmp_path / "onnx") / exported.name


def test_export_keeps_the_model_and_removes_old_int8_weights(exported_before, tmp_path):
    """An export leaves the model unchanged and removes old int8 weights.

    int8 weights of an earlier model next to new float32 weights would be another model under the same name.
    """
    quantize(exported_before)
    model = make_student(num_hidden_layers=1).bfloat16().train()
    attention = model.config._attn_implementation
    path = export_onnx(model, tmp_path)
    assert list(path.parent.iterdir()) == [path]
    assert model.training
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == attention


def test_a_file_that_disagrees_with_torch_is_not_kept(exported_before, tmp_path):
    before = {path: path.read_bytes() for path in exported_before.parent.iterdir()}
    broken = make_student(num_hidden_layers=1)
    torch.nn.init.constant_(broken.cls_classifier.weight, torch.nan)
    with pytest.raises(ValueError, match="differ from torch's by nan"):
        export_onnx(broken, tmp_path)
    assert {path: path.read_bytes() for path in exported_before.parent.iterdir()} == before


def test_invalid_exports_are_refused(student, tmp_path, monkeypatch):
    with torch.device("meta"):
        giant = DeiTLTForImageClassification(
            DeiTLTConfig(hidden_size=2560, num_attention_heads=16, intermediate_size=10240)
        )
    with pytest.raises(ValueError, match=r"the model has 3\.5 GiB of weights"):
        export_onnx(giant, tmp_path)
    config = FlatTeacherConfig(backbone="timm/vit_tiny_patch16_224", image_size=224, num_labels=2)
    with pytest.raises(ValueError, match=r"Input height \(448\) doesn't match model"):
        export_onnx(FlatTeacherForImageClassification(config), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"ONNX export needs onnxscript: pip install 'deitlt-hf\[onnx\]'"):
        export_onnx(student, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved student for the digits, with random weights."""
    folder = tmp_path_factory.mktemp("saved")
    names = {label: str(label) for label in range(10)}
    label2id = {name: label for label, name in names.items()}
    lively(make_student(image_size=16, id2label=names, label2id=label2id)).save_pretrained(folder)
    image_processor(16).save_pretrained(folder)
    return folder


def test_command_compares_on_test_images(folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "deitlt_hf.cli",
        "export",
        "--model",
        folder,
        "--output",
        tmp_path / "out",
        "--int8",
    ]
    done = subprocess.run([*command, "--recipe", "digits_lt"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in done.stdout.splitlines() if "│" in line}
    for expert in ("mean", "cls", "distillation"):
        assert rows[f"ONNX float32: {expert}"] == rows[f"torch: {expert}"]
        assert f"ONNX int8: {expert}" in rows
    assert "model_quantized.onnx, 0.1 MB" in done.stdout
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    digest = weights_digest(folder)
    for name in ("model.onnx", "model_quantized.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / name)
        assert session.get_modelmeta().custom_metadata_map["weights_sha256"] == digest
        assert digest.encode() in (tmp_path / "out" / "onnx" / name).read_bytes()  # as a push looks for it
    assert found == ["config.json", "onnx/model.onnx", "onnx/model_quantized.onnx", "preprocessor_config.json"]
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{folder}"], "holds a model; choose another --output"),
        (["--output", "{file}"], "is a file; choose another folder"),
        (["--output", "{file}/deeper"], "file is a file; choose another folder to write to than .*/deeper"),
        (["--output", "{out}", "--recipe", "digits_lt", "--inte8", "true"], "unknown field 'inte8'"),
        (["--output", "{out}", "--recipe", "digits_lt", "--use_cpu", "true"], "unknown field 'use_cpu'"),
        (["--model", "outputs/typo"], "there is no folder 'outputs/typo'; for a model on the Hub"),
        (["--output", "{out}", "--recipe", "digits_lt", "--class_names", *"abcdefghij"], "does not know the classes"),
        (["--model", "ORG/NAME"], "give --output, a folder for the files"),
        (["--model", "nowhere"], "no model folder 'nowhere'"),
    ],
)
def test_command_refuses_before_it_writes(folder, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    places = {"folder": folder, "out": tmp_path / "out", "file": tmp_path / "file"}
    filled = [argument.format(**places) for argument in arguments]
    with pytest.raises((ValueError, OSError), match=message):
        main(["--model", str(folder), *filled])
    assert not (tmp_path / "out").exists()
    assert not (folder / "onnx").exists()


def test_command_refuses_int8_of_a_cnn_before_it_writes(tmp_path):
    config = FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10)
    FlatTeacherForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model_quantized.onnx").write_text("of an earlier model")
    with pytest.raises(ValueError, match=r"^a FlatTeacherForImageClassification has 0% of its weights"):
        main(["--model", str(tmp_path), "--int8"])
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model_quantized.onnx"]
