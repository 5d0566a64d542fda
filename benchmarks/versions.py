"""Scores of saved students and teachers in other versions of transformers, compared with those of this environment.

    python benchmarks/versions.py
    python benchmarks/versions.py --versions 4.57.6 5.0.0 --installed /tmp/versions

Each version is installed into a separate folder, of its dependencies only with tokenizers and huggingface_hub. The
folder is removed before the next version unless --installed keeps it. A process with this version first on its path,
which cannot import deitlt_hf, loads a student in four ways and teachers in the one that exists for them. Its scores are
compared with those of this environment's classes. The models have random weights and run on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from series import RESULTS, write_record

# Each version with the tokenizers and huggingface_hub that it requires, and NumPy where it needs an older one.
VERSIONS = {
    "4.41.2": ("tokenizers==0.19.1", "huggingface_hub==0.36.0", "numpy<2"),
    "4.44.2": ("tokenizers==0.19.1", "huggingface_hub==0.36.0", "numpy<2"),
    "4.49.0": ("tokenizers==0.21.4", "huggingface_hub==0.36.0"),
    "4.57.6": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
    "5.0.0": ("tokenizers==0.22.2", "huggingface_hub==1.3.0"),
    "5.10.4": ("tokenizers==0.22.2", "huggingface_hub==1.33.0"),
    "5.17.0": ("tokenizers==0.23.1", "huggingface_hub==1.33.0"),
    "5.23.0": ("tokenizers==0.23.1", "huggingface_hub==2.4.0"),
    "5.24.0": ("tokenizers==0.23.1", "huggingface_hub==2.4.0"),
}
WAYS = {
    "pipeline": "student",
    "auto classes": "student",
    "handler": "student",
    "remote code, student": "student",
    "remote code, CE teacher": "ce",
    "remote code, LDAM teacher": "ldam",
}
CLASSES = 10
NOISE = {"student": 0.15, "ce": 0.02, "ldam": 0.05}  # added to initial weights; scores then differ
TOLERANCE = 1e-3  # of a score, in [0, 1]; 4.x resizes with Pillow and 5.x with torchvision, two grey levels apart


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS), metavar="VERSION")
    parser.add_argument("--installed", metavar="FOLDER", help="keep installed versions in this folder and reuse them")
    parser.add_argument("--answer", metavar="FOLDER", help=argparse.SUPPRESS)  # used in the process of a version
    args = parser.parse_args()
    if args.answer is not None:
        print(json.dumps({way: answer(way, Path(args.answer)) for way in WAYS}))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        expected = make_models(folder)
        for version in args.versions:
            rows[version] = compare(version, folder, args.installed, expected)
            print(f"{version}: {json.dumps(rows[version])}", file=sys.stderr, flush=True)
    print(f"\n| transformers | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    for version, row in rows.items():
        print(f"| {version} | {' | '.join(row[way].partition(';')[0] for way in WAYS)} |")
    if list(rows) == list(VERSIONS):
        write_record(RESULTS / "versions.json", rows)


# ---- In this environment ----


def make_models(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Saves a student, two teachers (all with random weights) and images; returns our classes' scores by model."""
    import numpy as np
    import torch
    from PIL import Image

    from deitlt_hf import DeiTLTConfig, DeiTLTForImageClassification, FlatTeacherConfig
    from deitlt_hf import FlatTeacherForImageClassification as FlatTeacher
    from deitlt_hf.data.transforms import model_processor
    from deitlt_hf.hub.handler_file import add_handler

    random = np.random.RandomState(0)
    for index, (height, width) in enumerate(((100, 130), (64, 48), (33, 32))):
        coarse = Image.fromarray(random.randint(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    names = [f"class {label}, ü" for label in range(CLASSES)]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    models = {
        "student": DeiTLTForImageClassification(DeiTLTConfig(**sizes, intermediate_size=128, **labels)),
        "ce": FlatTeacher(FlatTeacherConfig(backbone="resnet20", **labels)),
        "ldam": FlatTeacher(FlatTeacherConfig(backbone="resnet20", classifier="cosine", logit_scale=20.0, **labels)),
    }
    expected = {}
    for name, model in models.items():
        processor = model_processor(model.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(NOISE[name] * torch.randn(parameter.shape))
            model.eval().save_pretrained(folder / name)
            processor.save_pretrained(folder / name)
            images = [Image.open(path) for path in sorted(folder.glob("*.png"))]
            logits = model(processor(images, return_tensors="pt").pixel_values).logits
        expected[name] = [dict(zip(names, scores, strict=True)) for scores in logits.softmax(dim=1).tolist()]
    add_handler(folder / "student")
    return expected


def install(version: str, folder: Path) -> Path:
    """Installs a version into its own folder inside `folder`, unless it exists; returns the path."""
    target = folder / f"transformers-{version}"
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:  # an interrupted pip leaves an incomplete package
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                f"{unfinished}/whole",
            ]
            subprocess.run([*command, f"transformers=={version}", *VERSIONS[version]], check=True)
            Path(unfinished, "whole").rename(target)
    return target


def compare(version: str, folder: Path, installed: str | Path | None, expected: dict) -> dict[str, str]:
    """Compares each way of a version: the same scores, the size of the difference, or the error."""
    with tempfile.TemporaryDirectory() as place:
        target = install(version, Path(installed or place))
        paths = {"PYTHONPATH": str(target), "HF_HOME": str(Path(place) / "cache"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--answer", folder]
        process = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"transformers {version}: {process.stderr[-2000:]}")
    answers = json.loads(process.stdout.splitlines()[-1])
    return {way: verdict(answers[way], expected[model]) for way, model in WAYS.items()}


def verdict(answers: str | list[dict[str, float]], expected: list[dict[str, float]]) -> str:
    if isinstance(answers, str):
        return answers
    if any(answer.keys() != wanted.keys() for answer, wanted in zip(answers, expected, strict=True)):
        return "other classes"
    pairs = zip(answers, expected, strict=True)
    difference = max(abs(answer[name] - wanted[name]) for answer, wanted in pairs for name in wanted)
    return f"{'same' if difference <= TOLERANCE else 'different'} ({difference:.0e})"


# ---- In the environment of another version ----


def answer(way: str, folder: Path) -> str | list[dict[str, float]]:
    """Scores of each image by class name, or the error."""
    sys.modules["deitlt_hf"] = None  # the package is not installed where these versions are used
    images = sorted(folder.glob("*.png"))
    path = str(folder / WAYS[way])
    try:
        if way == "pipeline":
            from transformers import pipeline

            answers = pipeline("image-classification", model=path, device="cpu")(list(map(str, images)), top_k=CLASSES)
        elif way == "handler":
            sys.path.insert(0, path)
            from handler import EndpointHandler

            request = {"inputs": [image.read_bytes() for image in images], "parameters": {"top_k": CLASSES}}
            handler = EndpointHandler(path)
            answers = [result["predictions"] for result in handler(request)]
            request["parameters"]["attention"] = True
            assert all(len(result["attention"]["cls"]) == 4 for result in handler(request))
        else:
            return by_auto_classes(path, images, way.startswith("remote code"))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return [{guess["label"]: guess["score"] for guess in guesses} for guesses in answers]


def by_auto_classes(path: str, images: list[Path], trust_remote_code: bool) -> list[dict[str, float]]:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(path)
    model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=trust_remote_code).eval()
    with torch.no_grad():
        inputs = processor([Image.open(image) for image in images], return_tensors="pt")
        scores = model(**inputs).logits.softmax(dim=1).tolist()
    return [{model.config.id2label[label]: score for label, score in enumerate(row)} for row in scores]


if __name__ == "__main__":
    main()
