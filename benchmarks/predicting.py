"""Speed of `deitlt predict --output` on many files beside transformers' pipeline, with the same answers.

    python benchmarks/predicting.py                       # 5,000 small files and 300 large ones
    python benchmarks/predicting.py --small 50000 --large 0 --rounds 1

Both read the same files with the same model in turn, in one process. The pipeline first tries batch sizes and numbers
of workers on a part of the files, and then takes the fastest. `deitlt predict` has a batch size of 128 and its default
workers; it reads the files and writes parquet.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from series import RESULTS, write_record

BATCH_SIZES, WORKERS = (1, 32, 128), (0, 1, 2)
TOLERANCE = 1e-5  # of a score
STUDENTS = {
    "digits_lt": {"image_size": 16, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 6},
    "fashion_mnist_lt_tiny": {"image_size": 28, "patch_size": 4, "hidden_size": 128, "num_hidden_layers": 6},
}


def make_files(folder: Path, number: int, sides: tuple[int, int], kinds: tuple[str, ...]) -> list[str]:
    """Makes photo-like files with random sides, half of each kind."""
    folder.mkdir()
    random = np.random.default_rng(0)
    paths = []
    for index in range(number):
        width, height = random.integers(*sides, 2, endpoint=True)
        coarse = Image.fromarray(random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
        paths.append(str(folder / f"{index:06d}.{kinds[index % len(kinds)]}"))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def make_student(folder: Path, config: dict) -> str:
    """Saves a student with random weights and large logits, whose scores differ between images."""
    from deitlt_hf import DeiTLTConfig, DeiTLTForImageClassification
    from deitlt_hf.data import image_processor

    torch.manual_seed(0)
    width = config["hidden_size"]
    sizes = {"num_attention_heads": width // 32, "intermediate_size": 4 * width, "num_labels": 10}
    student = DeiTLTForImageClassification(DeiTLTConfig(**config, **sizes))
    torch.nn.init.normal_(student.cls_classifier.weight)
    student.save_pretrained(folder)
    image_processor(config["image_size"]).save_pretrained(folder)
    return str(folder)


class Pipeline:
    """transformers' pipeline with its fastest batch size and number of workers."""

    def __init__(self, model: str, paths: list[str]):
        from transformers import pipeline

        self.classifier = pipeline("image-classification", model=model)
        settings = [{"batch_size": size, "num_workers": workers} for size in BATCH_SIZES for workers in WORKERS]
        part = paths[: max(len(paths) // 10, 50)]
        self.classifier(part[:50])
        self.rates = {str(setting): rate(self.classifier, part, **setting) for setting in settings}
        self.setting = max(settings, key=lambda setting: self.rates[str(setting)])

    def __call__(self, paths: list[str]) -> tuple[list[str], np.ndarray]:
        found = [results[0] for results in self.classifier(paths, **self.setting)]
        return [result["label"] for result in found], np.array([result["score"] for result in found])


class Predict:
    """What `deitlt predict --output` does after it has loaded the model and listed the files."""

    def __init__(self, model: str, batch_size: int):
        from accelerate import PartialState

        from deitlt_hf.cli.predict import default_workers
        from deitlt_hf.serving.prediction import load_handler

        self.classifier, self.batch_size = load_handler(model), batch_size
        self.workers = default_workers(PartialState())

    def __call__(self, paths: list[str]) -> tuple[list[str], np.ndarray]:
        from deitlt_hf.serving.shards import Contents, Shards, Tabulator, predict_shards

        with tempfile.TemporaryDirectory() as folder:
            tabulate, shards = Tabulator(self.classifier, Contents()), Shards(folder, paths, Contents())
            shards.claim(self.classifier)
            for _ in predict_shards(tabulate, shards, shards.missing(), self.batch_size, self.workers):
                pass
            table = pyarrow.parquet.read_table(folder, columns=["label", "score"])
        return table["label"].to_pylist(), table["score"].to_numpy()


def rate(way, paths: list[str], **options) -> float:
    """Images a second."""
    start = time.perf_counter()
    way(paths, **options)
    return round(len(paths) / (time.perf_counter() - start), 1)


def parts(ways: dict, paths: list[str]) -> dict[str, float]:
    """Milliseconds of a core per image, without workers: reading in both ways, and the model with its table."""
    from deitlt_hf.serving.prediction import batches_of, read_batches
    from deitlt_hf.serving.shards import Contents, Tabulator

    ours, classifier = ways["deitlt predict"], ways["pipeline"].classifier
    tabulate, read = Tabulator(ours.classifier, Contents()), []

    def milliseconds(work) -> float:
        start = time.process_time()
        work()
        return round(1000 * (time.process_time() - start) / len(paths), 3)

    return {
        "pipeline reads": milliseconds(lambda: [classifier.preprocess(path) for path in paths]),
        "deitlt predict reads": milliseconds(
            lambda: read.extend(read_batches(ours.classifier, batches_of(paths, ours.batch_size)))
        ),
        "model and table": milliseconds(lambda: [tabulate(batch) for batch in read]),
        "model": milliseconds(lambda: [tabulate._outputs(batch.stacks[0][1]) for batch in read]),
        "whole pipeline": milliseconds(lambda: classifier(paths, batch_size=ways["pipeline"].setting["batch_size"])),
    }


def compare(model: str, paths: list[str], rounds: int, batch_size: int) -> dict:
    """Measures both in turn and compares their answers."""
    ways = {"pipeline": Pipeline(model, paths), "deitlt predict": Predict(model, batch_size)}
    (labels, scores), (our_labels, our_scores) = (way(paths) for way in ways.values())
    assert our_labels == labels
    np.testing.assert_allclose(our_scores, scores, rtol=0, atol=TOLERANCE)
    rates = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(rate(way, paths))
    ratios = np.divide(rates["deitlt predict"], rates["pipeline"])
    return {
        "files": len(paths),
        "images_a_second": rates,
        "ratio": round(float(np.median(ratios)), 2),
        "largest_difference_of_a_score": float(np.abs(our_scores - scores).max()),
        "pipeline_setting": ways["pipeline"].setting,
        "pipeline_tried": ways["pipeline"].rates,
        "workers": ways["deitlt predict"].workers,
        "core_ms_per_image": parts(ways, paths[:1000]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=5000, help="files of 28 to 64 pixels, PNG and JPEG in turn")
    parser.add_argument("--large", type=int, default=300, help="JPEGs of 1,000 pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=128, help="of deitlt predict")
    parser.add_argument("--record", default=str(RESULTS / "predicting.json"), help="output file")
    args = parser.parse_args()
    record = {"threads": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as place:
        top = Path(place)
        files = {
            "small": make_files(top / "small", args.small, (28, 64), ("png", "jpg")),
            "large": make_files(top / "large", args.large, (1000, 1000), ("jpg",)),
        }
        for name, config in STUDENTS.items():
            model = make_student(top / name, config)
            for kind, paths in files.items():
                if paths:
                    record[f"{name}, {kind}"] = found = compare(model, paths, args.rounds, args.batch_size)
                    print(f"{name}, {kind}: {found}", flush=True)
    write_record(Path(args.record), record)


if __name__ == "__main__":
    main()
