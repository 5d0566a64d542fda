"""Tests of a saved folder in other libraries: plain transformers, `trust_remote_code`, Accelerate, PEFT and export."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import datasets
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification

from deitlt_hf import (
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
)
from deitlt_hf.data import image_processor
from deitlt_hf.hub.pushing import check_folder
from helpers import IMAGES, make_student

NAMES = [f"species {label}" for label in range(10)]


def run_python(code, folder, package):
    """Runs code in a separate process, which can be one that cannot import this package."""
    hide = "" if package else "import sys; sys.modules['deitlt_hf'] = None\n"
    quick = "import gc; gc.disable()\n"  # a sixth of the time of importing transformers
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", quick + hide + code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


# ---- Three ways of loading ----


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A student with its processor, image files, and the output of `scripts/evaluate.py` for them."""
    folder = tmp_path_factory.mktemp("published")
    model = make_student(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)}).eval()
    random = np.random.RandomState(0)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # rotated by its EXIF orientation
    for name, mode, options in (
        ("colour.png", "RGB", {}),
        ("grey.png", "L", {}),
        ("transparent.png", "RGBA", {}),
        ("photo.jpg", "RGB", {"exif": rotated}),
    ):
        pixels = random.randint(0, 256, (12, 20, 4), dtype=np.uint8)
        Image.fromarray(pixels[:, :, : len(mode)].squeeze()).convert(mode).save(folder / name, **options)
    files = sorted(path.name for path in folder.iterdir())
    rows = {"image": [str(folder / name) for name in files], "label": [0] * len(files)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    trainer = DeiTLTTrainer(
        model=model,
        args=DeiTLTTrainingArguments(output_dir=str(folder / "model"), per_device_eval_batch_size=2),
        eval_dataset=datasets.Dataset.from_dict(rows, features=features),
        processing_class=image_processor(8),
        groups={"head": [0, 1], "mid": [2, 3], "tail": [4, 5, 6, 7, 8, 9]},
    )
    trainer.save_model()
    with torch.no_grad():
        logits = torch.cat([model(batch["pixel_values"]).logits for batch in trainer.get_eval_dataloader()])
    return folder, files, logits


@pytest.fixture(scope="module")
def server(published):
    """Serves the folder on the loopback interface."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=published[0])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


USE = """
import json
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

config = AutoConfig.from_pretrained("model", trust_remote_code={trust})
processor = AutoImageProcessor.from_pretrained("model", trust_remote_code={trust})
{load}
classifier = pipeline("image-classification", model={model}, image_processor=processor, trust_remote_code={trust})
files = {files}
with torch.no_grad():
    logits = torch.cat([model.eval()(**classifier.preprocess(file)).logits for file in files])
base = AutoModel.from_pretrained("model", trust_remote_code={trust}).eval()
features = base(**classifier.preprocess(files[0])).last_hidden_state
print(json.dumps({{
    "classes": [type(x).__name__ for x in (config, model, classifier.model, base)],
    "logits": logits.tolist(),
    "tokens": features.shape[1],
    "path": classifier(files[0], top_k=10),
    "batch": classifier(files, batch_size=2, top_k=10),
    "image": classifier(Image.open(files[0]), top_k=10),
    "url": classifier("{url}/" + files[0], top_k=10),
}}))
"""
WAYS = {
    "plain transformers": (False, "model = AutoModelForImageClassification.from_pretrained('model')", "'model'"),
    "the package": (
        False,
        "from deitlt_hf import DeiTLTForImageClassification\n"
        "model = DeiTLTForImageClassification.from_pretrained('model')",
        "model",
    ),
    "trust_remote_code": (
        True,
        "model = AutoModelForImageClassification.from_pretrained('model', trust_remote_code=True)",
        "'model'",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_three_ways_of_loading_give_the_same_scores(published, server, way):
    """Each of three ways of loading gives the same scores, in separate processes; two cannot import the package."""
    folder, files, expected = published
    trust, load, model = WAYS[way]
    code = USE.format(trust=trust, load=load, model=model, files=files, url=server)
    done = run_python(code, folder, package=way == "the package")
    result = json.loads(done.stdout)
    ours, native = "DeiTLTForImageClassification", "DeiTForImageClassificationWithTeacher"
    assert (
        result["classes"]
        == {
            "plain transformers": ["DeiTConfig", native, native, "DeiTModel"],
            "the package": ["DeiTConfig", ours, ours, "DeiTModel"],
            "trust_remote_code": ["DeiTLTConfig", ours, ours, "DeiTLTModel"],
        }[way]
    )
    logits = torch.tensor(result["logits"])
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)
    assert result["tokens"] == 2 + 4
    scores = expected.softmax(dim=1)
    for row, answers in enumerate(result["batch"]):
        assert [answer["label"] for answer in answers] == [NAMES[i] for i in scores[row].argsort(descending=True)]
        found = {answer["label"]: answer["score"] for answer in answers}
        assert [found[name] for name in NAMES] == pytest.approx(scores[row].tolist(), abs=1e-6)
    for source in ("path", "image", "url"):
        assert [answer["label"] for answer in result[source]] == [answer["label"] for answer in result["batch"][0]]


def test_plain_loading_gives_no_warning(published):
    """Plain transformers loads the model without warnings about unexpected, missing or newly initialised weights."""
    code = """
import transformers
transformers.utils.logging.disable_progress_bar()
from transformers import pipeline
print(pipeline("image-classification", model="model")("grey.png")[0]["label"])
"""
    done = run_python(code, published[0], package=False)
    assert done.stdout.strip() in NAMES
    assert not [line for line in done.stderr.splitlines() if any(word in line.lower() for word in ("init", "unexp"))]


def test_remote_model_can_be_saved_and_loaded_again(published, tmp_path):
    """A model loaded with remote code can be saved and loaded again.

    A fine-tuned copy must not depend on the repository that its code came from.
    """
    code = f"""
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True)
model.save_pretrained(r"{tmp_path}/copy")
"""
    run_python(code, published[0], package=False)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["architectures"] == ["DeiTForImageClassificationWithTeacher"]
    assert set(config["auto_map"].values()) == {
        "configuration_deitlt.DeiTLTConfig",
        "modeling_deitlt.DeiTLTModel",
        "modeling_deitlt.DeiTLTForImageClassification",
    }
    original = AutoModelForImageClassification.from_pretrained(published[0] / "model").eval()
    copy = AutoModelForImageClassification.from_pretrained(tmp_path / "copy").eval()
    assert torch.equal(original(IMAGES).logits, copy(IMAGES).logits)


def test_teachers_load_without_the_package(tmp_path):
    teachers = {}
    for name, backbone in (("own", "resnet32"), ("timm", "timm/resnet18")):
        config = FlatTeacherConfig(backbone=backbone, image_size=32, id2label=dict(enumerate(NAMES)))
        teachers[name] = FlatTeacherForImageClassification(config).eval()
        teachers[name].save_pretrained(tmp_path / name)
        image_processor(32).save_pretrained(tmp_path / name)
    Image.effect_noise((32, 32), 90).save(tmp_path / "image.png")
    torch.save(torch.randn(2, 3, 32, 32), tmp_path / "images.pt")
    code = """
import json, torch
from transformers import AutoModelForImageClassification, pipeline
found = {}
for name in ("own", "timm"):
    model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True).eval()
    classifier = pipeline("image-classification", model=name, trust_remote_code=True)
    logits = model(torch.load("images.pt", weights_only=True)).logits
    found[name] = [logits.tolist(), classifier("image.png", top_k=10)]
print(json.dumps(found))
"""
    found = json.loads(run_python(code, tmp_path, package=False).stdout)
    images = torch.load(tmp_path / "images.pt", weights_only=True)
    for name, (logits, answers) in found.items():
        torch.testing.assert_close(torch.tensor(logits), teachers[name](images).logits, atol=1e-6, rtol=1e-6)
        assert sorted(answer["label"] for answer in answers) == NAMES


# ---- Loading ----


@pytest.mark.parametrize("model_class", [DeiTLTForImageClassification, AutoModelForImageClassification])
def test_sharded_saving(tmp_path, student, model_class):
    student.eval().save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.pt")], "weights are saved as safetensors only"
    assert torch.equal(model_class.from_pretrained(tmp_path).eval()(IMAGES).logits, student(IMAGES).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, student, teacher, dtype):
    student.eval().save_pretrained(tmp_path / "student")
    teacher.eval().save_pretrained(tmp_path / "teacher")
    for model, model_class in ((student, DeiTLTForImageClassification), (teacher, FlatTeacherForImageClassification)):
        folder = tmp_path / ("student" if model is student else "teacher")
        half = model_class.from_pretrained(folder, dtype=dtype, device_map="auto").eval()
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        outputs = half(IMAGES.to(dtype), labels=torch.tensor([0, 1, 2]))
        assert outputs.logits.dtype == dtype
        expected = model(IMAGES, labels=torch.tensor([0, 1, 2]))
        scale = expected.logits.abs().max()
        assert (outputs.logits.float() - expected.logits).abs().max() < 20 * torch.finfo(dtype).eps * scale
        assert outputs.loss.dtype == torch.float32


def test_offloading_to_the_disk(tmp_path, student):
    student.eval().save_pretrained(tmp_path / "model", max_shard_size="10KB")
    device_map = {"deit.embeddings": "cpu", "deit.layers.0": "disk", "deit.layers.1": "cpu", "deit.layers.2": "disk"}
    device_map |= {"deit.layernorm": "cpu", "cls_classifier": "cpu", "distillation_classifier": "disk"}
    model = DeiTLTForImageClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert model.hf_device_map["deit.layers.2"] == "disk"
    assert model.deit.layers[2].mlp.fc1.weight.is_meta
    assert torch.equal(model(IMAGES).logits, student(IMAGES).logits)


def test_accelerate_reads_a_folder_saved_with_names_as_in_memory(tmp_path, student):
    """Accelerate loads a folder saved with parameter names as in memory.

    Its loader does not know transformers' renaming; with the file's usual names it loads nothing.
    """
    student.eval().save_pretrained(tmp_path, save_original_format=False)
    with init_empty_weights():
        empty = DeiTLTForImageClassification(student.config)
    assert empty.cls_classifier.weight.is_meta
    model = load_checkpoint_and_dispatch(empty, tmp_path, device_map="auto", no_split_module_classes=["DeiTLTLayer"])
    assert torch.equal(model.eval()(IMAGES).logits, student(IMAGES).logits)
    native = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(native(IMAGES).logits, student(IMAGES).logits, atol=1e-6, rtol=0)


# ---- Export, compilation and adapters ----


def test_torch_export_with_any_batch_size(student):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(student.eval(), (IMAGES,), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        images = torch.randn(size, 3, 8, 8)
        outputs = program.module()(images)
        torch.testing.assert_close(outputs.logits, student(images).logits, atol=1e-6, rtol=0)
        torch.testing.assert_close(outputs.cls_logits, student(images).cls_logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(training):
    """The model compiles as one graph: `fullgraph` refuses graph breaks.

    The code generator, which needs a compiler, is off.
    """
    model = make_student(drop_path_rate=0.0).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = torch.tensor([0, 1, 2])
    ours, expected = compiled(IMAGES, labels=labels), model(IMAGES, labels=labels)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad(outputs.loss, model.cls_classifier.weight)[0] for outputs in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def lora(kind):
    """A student with adapters: a PEFT model, or a student with transformers' `add_adapter`."""
    torch.manual_seed(0)
    heads = ["cls_classifier", "distillation_classifier"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=heads)
    student = make_student(drop_path_rate=0.0)
    if kind == "PEFT":
        return get_peft_model(student, config)
    student.add_adapter(config)
    return student


@pytest.mark.parametrize("kind", ["PEFT", "add_adapter"])
def test_a_trainer_saves_a_student_with_adapters_as_a_plain_folder(tmp_path, digits, kind):
    """A trainer saves a student with adapters as a plain folder, which loads without PEFT and can be pushed.

    A resumed run continues from the adapter in its checkpoint and ends with the same bytes.
    """

    def trained(resume=None):
        args = DeiTLTTrainingArguments(
            output_dir=str(tmp_path / "student"),
            distillation="none",
            max_steps=2,
            warmup_epochs=0,
            learning_rate=1e-2,
            per_device_train_batch_size=32,
            repeated_augmentation=1,
            train_crop="padded",
            ema_decay=0.5,
            save_strategy="steps",
            save_steps=1,
            save_adapter=True,
        )
        data = {"train_dataset": digits["train"], "eval_dataset": digits["test"].select(range(20))}
        trainer = DeiTLTTrainer(model=lora(kind), args=args, processing_class=image_processor(8), **data)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.create_model_card()
        return trainer.model.eval()

    model, folder = trained(), tmp_path / "student"
    check_folder(folder)
    assert "adapter_model.safetensors" in [path.name for path in (folder / "checkpoint-1").iterdir()]
    AutoModelForImageClassification.from_pretrained(folder / "ema")
    native = AutoModelForImageClassification.from_pretrained(folder).eval()
    expected = model(pixel_values=IMAGES).logits
    torch.testing.assert_close(native(IMAGES).logits, expected, atol=1e-5, rtol=0)
    assert (expected - make_student(drop_path_rate=0.0).eval()(IMAGES).logits).abs().max() > 1e-3
    for path in [*folder.glob("*.*"), *folder.glob("adapter/*"), *folder.glob("ema/*")]:
        assert path.suffix not in (".md", ".json") or str(tmp_path) not in path.read_text(), path
    again = PeftModel.from_pretrained(lora("PEFT").unload(), folder / "adapter").eval()
    torch.testing.assert_close(again(pixel_values=IMAGES).logits, expected, atol=1e-5, rtol=0)

    weights = (folder / "model.safetensors").read_bytes()
    trained(resume=str(folder / "checkpoint-1"))
    assert (folder / "model.safetensors").read_bytes() == weights


def test_lora_trains_attention_projections_and_heads_only(tmp_path):
    """LoRA trains only attention projections and heads.

    The saved adapter loads onto the same base, and plain transformers loads the merged model's folder.
    """
    base = make_student(drop_path_rate=0.0)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    heads = ["cls_classifier", "distillation_classifier"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=heads)
    model = get_peft_model(base, config).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len([name for name in trained if "lora_" in name]) == 3 * 2 * 2
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(pixel_values=IMAGES, labels=torch.tensor([0, 4, 9])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.named_parameters():
        if name not in trained:
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
            assert torch.equal(parameter, before[name]), name

    logits = model.eval()(pixel_values=IMAGES).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make_student(drop_path_rate=0.0), tmp_path / "adapter").eval()
    assert torch.equal(again(pixel_values=IMAGES).logits, logits)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    native = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(native(IMAGES).logits, logits, atol=1e-5, rtol=0)
