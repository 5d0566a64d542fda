"""Tests of reading and writing the authors' checkpoints."""

import argparse
import contextlib
import pathlib
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor

from deitlt_hf import DeiTLTConfig, DeiTLTForImageClassification, FlatTeacherForImageClassification
from deitlt_hf.data import decreasing_count_map
from deitlt_hf.hub import (
    convert_original,
    export_original_student,
    load_original_student,
    load_original_teacher,
    read_class_map,
    read_class_names,
)
from deitlt_hf.models.safe_loading import read_checkpoint
from deitlt_hf.original.layouts import student_to_original
from helpers import filled_state_dict, make_student


def normal(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def paco_state_dict(values):
    """Reference weights as in the authors' files: names have a prefix, which does not enter the generator's seed."""
    names = {name.removeprefix("module."): spec for name, spec in values["keys"].items()}
    return {f"module.{name}": tensor for name, tensor in filled_state_dict(names).items()}


@pytest.fixture(scope="module")
def student_file(reference, tmp_path_factory):
    """A student's file as the authors write it: weights with a command line, an optimiser and numpy numbers."""
    weights = filled_state_dict(reference["student_base"]["keys"])
    args = argparse.Namespace(lr=5e-4, output_dir=pathlib.PosixPath("deit_out/run"), data_set="CIFAR10LT")
    content = {
        "model": weights,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0, 1]}]},
        "lr_scheduler": {"t_initial": 1200},
        "epoch": 1199,
        "model_ema": {name: tensor + 1 for name, tensor in weights.items()},
        "scaler": {"scale": 65536.0},
        "args": args,
        "head_acc_avg": np.float64(94.5),
    }
    path = tmp_path_factory.mktemp("original") / "student.pth"
    torch.save(content, path)
    return path


def test_student_logits(reference, student_file):
    """A converted student gives the reference logits.

    A wrong layer-norm epsilon, token order or qkv split fails only here.
    """
    values = reference["student_base"]
    model = load_original_student(student_file)
    with torch.no_grad():
        outputs = model(normal(100, (2, 3, 224, 224)))
    cls_logits, dist_logits = torch.tensor(values["cls_logits"]), torch.tensor(values["dist_logits"])
    assert (outputs.cls_logits - cls_logits).abs().max() < 2e-5
    assert (outputs.distillation_logits - dist_logits).abs().max() < 2e-5
    assert (outputs.logits - (cls_logits + dist_logits) / 2).abs().max() < 2e-5


def test_student_exports_bit_for_bit(reference, student_file, tmp_path):
    export_original_student(load_original_student(student_file), tmp_path / "back.pth")
    before = filled_state_dict(reference["student_base"]["keys"])
    after = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert {name: list(tensor.shape) for name, tensor in after.items()} == reference["student_base"]["keys"]
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize("name", ["teacher_paco_cifar", "teacher_ldam_cifar"])
def test_cifar_teacher_logits(reference, tmp_path, name, key):
    values = reference[name]
    weights = paco_state_dict(values) if "paco" in name else filled_state_dict(values["keys"])
    torch.save({"epoch": 400, "arch": "resnet32", key: weights, "best_acc1": torch.tensor(0.8)}, tmp_path / "t.pth.tar")
    model = load_original_teacher(tmp_path / "t.pth.tar")
    with torch.no_grad():
        logits = model(normal(200, (4, 3, 32, 32))).logits
    # The authors' LDAM classifier returns cosines; their loss applies the scale.
    scale = 1 if "paco" in name else 30
    assert (logits / scale - torch.tensor(values["logits"])).abs().max() < 2e-5


def test_imagenet_teacher_logits(reference, tmp_path):
    """The ImageNet teacher gives the reference logits within 1e-6 of the largest.

    The logits reach 192, where float32 has steps of 1.5e-5.

    The reference differs by as much from the same network in float64. On one machine there is no difference from
    torchvision's ResNet-50, which the original code uses.
    """
    values = reference["teacher_paco_imagenet"]
    weights = paco_state_dict(values)
    torch.save({"state_dict": weights}, tmp_path / "teacher.pth.tar")
    model = load_original_teacher(tmp_path / "teacher.pth.tar")
    images, expected = normal(300, (2, 3, 224, 224)), torch.tensor(values["logits"])
    peer = torchvision.models.resnet50(num_classes=20).eval()
    prefix = "module.encoder_q."
    state = {
        name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix) and ".fc." not in name
    }
    peer.load_state_dict(state | {f"fc.{part}": weights[f"module.linear.{part}"] for part in ("weight", "bias")})
    with torch.no_grad():
        logits = model(images).logits
        assert torch.equal(logits, peer(images))
    assert (logits - expected).abs().max() < 1e-6 * expected.abs().max()


def small_weights(**config):
    """A small student's weights under the authors' names, without the class order."""
    model = make_student(hidden_size=128, **config).eval()
    return model, student_to_original(model.state_dict())


def test_timm_and_this_package_load_each_others_files(tmp_path):
    """timm loads our exports, and timm's files load here.

    timm's distilled DeiT uses the authors' parameter names. It serves as an independent reader and as a model to start
    from.
    """
    model, _ = small_weights()
    export_original_student(model, tmp_path / "student.pth")
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 128, "depth": 3, "num_heads": 2, "mlp_ratio": 0.25}
    peer = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, **settings).eval()
    peer.load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True)["model"], strict=True)
    images = normal(0, (2, 3, 8, 8))
    torch.testing.assert_close(peer(images), model(images).logits, atol=1e-6, rtol=0)

    fresh = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, **settings).eval()
    save_file(fresh.state_dict(), tmp_path / "model.safetensors")
    for source in (fresh.state_dict(), tmp_path / "model.safetensors"):
        torch.testing.assert_close(load_original_student(source)(images).logits, fresh(images), atol=1e-6, rtol=0)


def test_start_from_a_student_with_other_classes():
    model, weights = small_weights()
    other = load_original_student({"model": weights}, num_labels=4, class_names=list("abcd"), drop_path_rate=0.3)
    assert other(normal(0, (2, 3, 8, 8))).logits.shape == (2, 4)
    assert other.config.id2label == dict(enumerate("abcd"))
    assert other.config.drop_path_rate == 0.3
    for name, tensor in model.deit.state_dict().items():
        assert torch.equal(other.deit.state_dict()[name], tensor)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_of_a_wrapped_model_load(tmp_path, prefix):
    """Weights of wrapped models load.

    torch.compile, DataParallel and others add prefixes to the names of weights, in any order.
    """
    _, weights = small_weights()
    torch.save({prefix + name: weight for name, weight in weights.items()}, tmp_path / "wrapped.pth")
    expected = load_original_student(weights).state_dict()
    loaded = load_original_student(tmp_path / "wrapped.pth").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
    blocks = {name.replace("blocks.0.", "blocks.0._orig_mod."): weight for name, weight in weights.items()}
    assert load_original_student(blocks).state_dict().keys() == expected.keys()
    with pytest.raises(ValueError, match="weights both of a model and of a wrapped model"):
        load_original_student(weights | {prefix + "cls_token": weights["cls_token"]})


def test_moving_average_is_loaded_on_request(student_file, tmp_path):
    raw, ema = load_original_student(student_file), load_original_student(student_file, ema=True)
    for name, tensor in raw.state_dict().items():
        assert torch.equal(ema.state_dict()[name], tensor + 1), name
    torch.save({"model": small_weights()[1]}, tmp_path / "raw.pth")
    with pytest.raises(ValueError, match="has no moving average of the weights"):
        load_original_student(tmp_path / "raw.pth", ema=True)


# ---- Class order ----

COUNTS = [5, 40, 5, 100, 40, 7, 1, 5, 60, 40]
MAP = decreasing_count_map(COUNTS).tolist()
NAMES = [f"class {label}" for label in range(10)]


@pytest.fixture
def sorted_file(tmp_path):
    """A student as trained on ImageNet-LT: its head is in order of decreasing count; the command line has the map."""
    model, weights = small_weights()
    rows = np.argsort(MAP)
    in_file = {name: tensor[rows] if name.startswith("head") else tensor for name, tensor in weights.items()}
    args = argparse.Namespace(
        data_set="IMAGENETLT", class_map=MAP, cls_num_list=[np.int64(COUNTS[label]) for label in rows]
    )
    torch.save({"model": in_file, "args": args}, tmp_path / "sorted.pth")
    return tmp_path / "sorted.pth", model


def test_classes_are_reordered_to_the_order_of_the_data(sorted_file, tmp_path):
    path, model = sorted_file
    images = normal(0, (2, 3, 8, 8))
    loaded = load_original_student(path, class_names=NAMES)
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert loaded.config.class_counts == COUNTS
    assert loaded.config.id2label[3] == "class 3"
    assert loaded.config.class_map == MAP
    # The map is saved in our folder, and the export equals the original file.
    loaded.save_pretrained(tmp_path / "ours")
    again = DeiTLTForImageClassification.from_pretrained(tmp_path / "ours")
    export_original_student(again, tmp_path / "back.pth")
    before, after = read_checkpoint(path)["model"], read_checkpoint(tmp_path / "back.pth")["model"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    third = load_original_student(tmp_path / "back.pth")
    assert torch.equal(third(images).logits, model(images).logits)
    assert third.config.class_counts == COUNTS


def test_class_order_from_counts_or_a_given_map(sorted_file, tmp_path, caplog):
    """The class order comes from counts or a given map.

    A file from another run of the authors may lack the map; a teacher's file never has it.
    """
    path, model = sorted_file
    images = normal(0, (2, 3, 8, 8))
    weights = read_checkpoint(path)["model"]
    torch.save({"model": weights, "args": argparse.Namespace(data_set="INAT18")}, tmp_path / "no_map.pth")
    for given in ({"class_counts": COUNTS}, {"class_map": MAP}):
        loaded = load_original_student(tmp_path / "no_map.pth", class_names=NAMES, **given)
        assert torch.equal(loaded(images).logits, model(images).logits)
    with pytest.raises(ValueError, match=r"no_map\.pth orders its classes by decreasing training count"):
        load_original_student(tmp_path / "no_map.pth", class_names=NAMES)
    in_order = load_original_student(tmp_path / "no_map.pth")
    for head in ("cls_classifier", "distillation_classifier"):
        for name, value in getattr(model, head).named_parameters():
            assert torch.equal(dict(getattr(in_order, head).named_parameters())[name][MAP], value)
    # Not bit for bit: on some processors the position of a class changes the order of additions.
    torch.testing.assert_close(in_order(images).logits[:, MAP], model(images).logits)


TEACHER_COUNTS = [20 - abs(label - 9) for label in range(20)]
TEACHER_NAMES = [f"class {label}" for label in range(20)]


def test_a_paco_teacher_is_reordered_to_the_order_of_the_data(reference, tmp_path, caplog):
    """A PaCo teacher is reordered to the data's classes, with counts, with names, or with neither.

    The authors' DeiT-LT maps its predictions to the order of the students' heads.
    """
    weights = paco_state_dict(reference["teacher_paco_imagenet"])
    for given in ({}, {"class_counts": TEACHER_COUNTS}, {"class_names": TEACHER_NAMES}):
        loaded = load_original_teacher(weights, **given)
        assert loaded.config.class_map is None
        assert loaded.config.class_counts == given.get("class_counts")
        assert torch.equal(loaded.classifier.weight, weights["module.linear.weight"])
        assert torch.equal(loaded.classifier.bias, weights["module.linear.bias"])
    assert "order" not in caplog.text
    class_map = decreasing_count_map(TEACHER_COUNTS).tolist()
    with pytest.raises(ValueError, match="whose head is already in the data set's order; leave class_map"):
        convert_original(weights, tmp_path / "teacher", class_map=class_map)
    assert not (tmp_path / "teacher").exists()


def test_an_ldam_teacher_of_imagenet_lt_is_reordered_to_the_data(reference, caplog):
    """An LDAM teacher of Saddle-LongTail is reordered to the data's classes.

    It is torchvision's ResNet-50 with a cosine classifier `fc`, in order of decreasing count.
    """
    paco = paco_state_dict(reference["teacher_paco_imagenet"])
    prefix = "module.encoder_q."
    weights = {f"module.{name.removeprefix(prefix)}": paco[name] for name in paco if name.startswith(prefix)}
    weights = {name: tensor for name, tensor in weights.items() if ".fc." not in name}
    weights["module.fc.weight"] = normal(400, (2048, 20))
    ordered = load_original_teacher({"state_dict": weights}, class_counts=TEACHER_COUNTS, class_names=TEACHER_NAMES)
    class_map = decreasing_count_map(TEACHER_COUNTS).tolist()
    assert ordered.config.class_map == class_map
    assert (ordered.config.backbone, ordered.config.classifier) == ("timm/resnet50", "cosine")
    assert torch.equal(ordered.classifier.weight, weights["module.fc.weight"].T[class_map])
    with pytest.raises(ValueError, match="orders its classes by decreasing training count, so these names"):
        load_original_teacher({"state_dict": weights}, class_names=TEACHER_NAMES)
    as_in_file = load_original_teacher({"state_dict": weights})
    assert "orders its classes by decreasing training count" in caplog.text
    assert torch.equal(as_in_file.classifier.weight[class_map], ordered.classifier.weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_counts": [3] * 9}, "class_counts has 9 entries but .* has 10 classes"),
        ({"class_names": ["a"]}, "class_names has 1 entries but .* has 10 classes"),
        ({"class_map": [0] * 10}, r"class_map must hold each of 0 to 9 once; it begins with \[0, 0"),
        ({"class_counts": [6, *COUNTS[1:]]}, "class 0 had 5 training images for .* but has 6 in class_counts"),
    ],
)
def test_classes_that_do_not_fit_are_refused(sorted_file, given, message):
    with pytest.raises(ValueError, match=message):
        load_original_student(sorted_file[0], **given)


@pytest.mark.parametrize(
    ("text", "names"),
    [("tench\n goldfish \n", ["tench", "goldfish"]), ('["a", "b"]', ["a", "b"]), ('{"1": "b", "0": "a"}', ["a", "b"])],
)
def test_class_names_from_a_file(tmp_path, text, names):
    (tmp_path / "names").write_text(text)
    assert read_class_names(tmp_path / "names") == names


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_class_names, '{"1": "b"}', "must have the keys 0 to 0"),
        (read_class_names, "[1, 2]", "must hold names as strings"),
        (read_class_names, '["a"', "cannot be read: "),
        (read_class_map, '{"model_type": "deit"}', "has no class_map"),
        (read_class_map, '["a"]', "has no class_map"),
    ],
)
def test_invalid_class_files_are_refused(tmp_path, read, text, message):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "file")


# ---- Malicious and corrupt files ----


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def write_pickle(path, marker):
    path.write_bytes(pickle.dumps({"model": Bomb(marker)}, protocol=2))


def write_zip(path, marker):
    torch.save({"model": {}, "args": argparse.Namespace(output_dir=Bomb(marker))}, path)


def write_legacy(path, marker):
    torch.save({"model": {"cls_token": Bomb(marker)}}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [write_pickle, write_zip, write_legacy])
@pytest.mark.parametrize("load", [load_original_student, load_original_teacher])
def test_malicious_files_run_no_code(tmp_path, write, load):
    path, marker = tmp_path / "hostile.pth", tmp_path / "marker"
    write(path, marker)
    with pytest.raises(ValueError, match=r"hostile\.pth cannot be loaded: it refers to \S*open"):
        load(path)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert marker.exists(), "the file must be dangerous, or this test shows nothing"


def truncated(path):
    torch.save({"model": small_weights()[1]}, path)
    path.write_bytes(path.read_bytes()[:-1000])


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def damaged(path):
    torch.save({"model": small_weights()[1]}, path)
    content = path.read_bytes()
    at = content.index(b"cls_token")
    path.write_bytes(content[:at] + b"\xff" * 9 + content[at + 9 :])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (truncated, "it is cut short; copy or download it again"),
        (other_zip, r"it is a zip archive of something else \(readme\.txt\)"),
        (damaged, "it is damaged, or holds other objects"),
        (Path.touch, "it is empty"),
        (lambda path: path.write_text("<html>404"), "it is not a torch file; it begins with b'<html>404'"),
        (lambda path: torch.save(torch.zeros(3), path), "holds a Tensor, not the weights of a network"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "it refers to torch.nn.modules.linear.Linear"),
    ],
)
def test_corrupt_files_are_refused(tmp_path, write, message):
    path = tmp_path / "broken.pth"
    write(path)
    with pytest.raises(ValueError, match=rf"broken\.pth .*{message}"):
        load_original_student(path)


def test_corrupt_safetensors_and_missing_files_are_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_original_student(tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        load_original_teacher(tmp_path / "nowhere.pth")


def without(*names):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("dist_token"), "it lacks 'dist_token'"),
        (without("head_dist.weight", "head_dist.bias", "dist_token"), "it lacks 'dist_token', 'head_dist.weight', "),
        (without("pos_embed"), "it lacks 'pos_embed'"),
        (without("blocks.1.norm1.bias"), "it lacks 'blocks.1.norm1.bias'"),
        (without("blocks.1.attn.qkv.weight"), "it lacks 'blocks.1.attn.qkv.weight'"),
        (lambda state: {**state, "blocks.0.gate": torch.zeros(1)}, "it has 'blocks.0.gate' too"),
        (lambda state: {**state, "norm.bias": torch.zeros(7)}, r"norm.bias is \(7,\) instead of \(128,\)"),
        (lambda state: {**state, "pos_embed": torch.zeros(7)}, "is not a student as the authors save it"),
        (lambda state: {**state, "cls_token": "x"}, "has no weights below 'model' or 'state_dict'"),
        (lambda state: {}, "it contains nothing"),
        (
            lambda state: torchvision.models.resnet18().state_dict(),
            "is neither a DeiT-LT student nor .* 'conv1.weight'",
        ),
    ],
)
def test_incomplete_state_dicts_of_a_student_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        load_original_student({"model": change(small_weights()[1])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("linear.weight"), "is neither a DeiT-LT student nor a PaCo"),
        (without("bn1.running_mean"), "it lacks 'bn1.running_mean'"),
        (without("conv1.weight"), "is only part of an LDAM teacher: it lacks 'conv1.weight'"),
        (lambda s: {**s, "layer1.9.conv1.weight": s["conv1.weight"]}, "its stages have 6, 5, 5 blocks"),
        (lambda s: {**s, "fc.weight": s["conv1.weight"]}, "it has 'fc.weight' too"),
    ],
)
def test_incomplete_state_dicts_of_a_teacher_are_refused(reference, change, message):
    with pytest.raises(ValueError, match=message):
        load_original_teacher(change(filled_state_dict(reference["teacher_ldam_cifar"]["keys"])))


def test_the_wrong_loader_names_the_right_one(reference):
    with pytest.raises(ValueError, match="holds a PaCo teacher, not a student; use load_original_teacher"):
        load_original_student(paco_state_dict(reference["teacher_paco_cifar"]))
    with pytest.raises(ValueError, match="holds a student, not a teacher; use load_original_student"):
        load_original_teacher(small_weights()[1])


# ---- Converted folders ----


def test_converted_teacher_has_its_processor(reference, tmp_path):
    weights = paco_state_dict(reference["teacher_paco_cifar"])
    convert_original(weights, tmp_path / "teacher", class_names=NAMES)
    model = FlatTeacherForImageClassification.from_pretrained(tmp_path / "teacher").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "teacher")
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype=np.uint8))
    pixel_values = processor(image, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 32, 32)
    assert torch.equal(model(pixel_values).logits, load_original_teacher(weights)(pixel_values).logits)
    assert model.config.id2label[9] == "class 9"
    with pytest.raises(FileExistsError, match="holds a model; choose another folder"):
        convert_original(weights, tmp_path / "teacher")


# ---- Unusual files and models ----


def test_a_compressed_zip_is_refused(tmp_path):
    """A compressed zip file is refused: mapped into memory, its compressed bytes would be read as weights."""
    model = make_student(hidden_size=64, num_attention_heads=1)
    export_original_student(model, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "small.pth", "w") as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    loaded = load_original_student(tmp_path / "small.pth").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_export_keeps_settings_that_tensors_do_not_determine(tmp_path):
    """An export keeps settings that tensor shapes do not determine.

    The digits' student has three heads for a width of 96; with one head it would compute another function.
    """
    model = make_student(hidden_size=96, num_attention_heads=3, layer_norm_eps=1e-5).eval()
    export_original_student(model, tmp_path / "new" / "student.pth")
    loaded = load_original_student(tmp_path / "new" / "student.pth")
    assert (loaded.config.num_attention_heads, loaded.config.layer_norm_eps) == (3, 1e-5)
    images = normal(0, (2, 3, 8, 8))
    torch.testing.assert_close(loaded(images).logits, model(images).logits)
    converted = convert_original(
        {"model": torch.load(tmp_path / "new" / "student.pth", weights_only=True)["model"]},
        tmp_path / "out",
        num_attention_heads=3,
    )
    assert converted.config.num_attention_heads == 3


def test_recipe_sets_the_heads_that_a_file_does_not_contain(tmp_path):
    """A student that starts from a timm file keeps the recipe's number of heads, which the file does not contain."""
    model = make_student(hidden_size=128, num_attention_heads=4)
    export_original_student(model, tmp_path / "tells.pth")
    tensors = student_to_original(model.state_dict())
    for source, width, heads in ((tensors, 128, 8), (tensors, 96, 2), (tmp_path / "tells.pth", 128, 4)):
        loaded = load_original_student(source, like=DeiTLTConfig(hidden_size=width, num_attention_heads=8))
        assert loaded.config.num_attention_heads == heads
    assert load_original_student(tensors).config.num_attention_heads == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_student(qkv_bias=False), "the authors' students have qkv_bias True, this one False"),
        (lambda: make_student(hidden_act="relu"), "the authors' students have hidden_act 'gelu', this one 'relu'"),
        (lambda: make_student().deit, "a DeiTLTModel is not a student with two heads"),
        (lambda: torch.compile(make_student()), "is not a student with two heads: parameter '_orig_mod"),
    ],
)
def test_models_outside_the_authors_code_are_not_exported(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        export_original_student(make(), tmp_path / "student.pth")
    assert not (tmp_path / "student.pth").exists()


def test_export_with_another_formats_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"give a name ending in \.pth"):
        export_original_student(make_student(), tmp_path / "student.safetensors")


def original_student(**config):
    return student_to_original(make_student(hidden_size=64, num_attention_heads=1, num_labels=3, **config).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"head.bias": torch.ones(1).expand(10**11)}, "has no weights below .*'head.bias'"),
        (lambda s: s | {"norm.weight": s["norm.weight"].to_sparse()}, "has no weights below .*'norm.weight'"),
        (lambda s: s | {"norm.weight": s["norm.weight"].int()}, r"not floating-point .*: 'norm.weight' \(torch.int32"),
        (lambda s: s | {7: s["norm.weight"]}, "has no weights below .*'7'"),
        (lambda s: s | {"pos_embed": s["pos_embed"][:, :1]}, r"pos_embed is \(1, 1, 64\), without a patch"),
        (lambda s: s | {"patch_embed.proj.weight": torch.ones(64, 1, 4, 4)}, "images of 1 channels; only RGB"),
    ],
)  # fmt: skip
def test_invalid_tensors_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        load_original_student(change(original_student()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_map": {0: 2, 1: 1, 2: 0}}, "class_map must be a list of whole numbers, got {0: 2"),
        ({"class_map": [0.9, 1.5, 2]}, r"class_map must be a list of whole numbers, got \[0.9"),
        ({"class_map": [2, 2, 0]}, "class_map must hold each of 0 to 2 once"),
        ({"class_counts": ["a", 1, 2]}, "class_counts must be a list of whole numbers"),
        ({"class_names": ["a", "b", "a"]}, "class_names has the name 'a' 2 times"),
        ({"class_names": ["a", "", "b"]}, "class_names has an empty name for class 1"),
    ],
)
def test_invalid_classes_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        load_original_student(original_student(), **given)
    in_file = {"class_counts": "cls_num_list"}
    name = next(iter(given))
    if name != "class_names":
        with pytest.raises(
            ValueError, match=message.replace(name, in_file.get(name, name)).replace(" must", ".* must")
        ):
            load_original_student({"model": original_student(), in_file.get(name, name): given[name]})


def test_id2label_sets_the_number_of_classes():
    model = load_original_student(original_student(), id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    assert model.config.num_labels == 2
    assert model.config.label2id == {"cat": 0, "dog": 1}


def test_conversion_keeps_existing_files(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; choose another folder"):
        convert_original(original_student(), tmp_path / "file")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a model"):
        convert_original(original_student(), tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufeffcat\ndog\n", ["cat", "dog"]),
        ('\ufeff["cat", "dog"]', ["cat", "dog"]),
        ("cat\u2028fish\r\ndog\r\n\n", ["cat\u2028fish", "dog"]),
        ("cat\n\ndog", "has an empty name for class 1"),
        ("cat\ndog\ncat", "has the name 'cat' 2 times"),
        (b"caf\xe9", "is not text in UTF-8"),
    ],
)
def test_unusual_class_name_files_are_read_or_refused(tmp_path, content, expected):
    path = tmp_path / "names.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, list):
        assert read_class_names(path) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            read_class_names(path)
