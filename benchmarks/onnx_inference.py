"""Inference of one model four ways: transformers' own DeiT, our class, and its ONNX files in float32 and int8.

    python benchmarks/onnx_inference.py [--threads 1]

All in one process, turn by turn, on the same images; medians, and how many times as fast as transformers' DeiT. Weights
are random: speed does not depend on them.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from series import RESULTS, write_record
from transformers import DeiTForImageClassificationWithTeacher

from deitlt_hf import DeiTLTConfig, DeiTLTForImageClassification
from deitlt_hf.hub.onnx import OnnxClassifier, export_onnx, quantize

SIZES = {"ViT-S/16": (384, 6), "ViT-B/16": (768, 12)}  # width, heads
TURNS = {1: 25, 16: 7}  # by images at once
PAUSE = 0.1  # seconds, in which the threads of the way before stop looking for work


def ways(width: int, heads: int, folder: str) -> dict[str, torch.nn.Module]:
    """One model in the ways that are compared, the peer first."""
    torch.manual_seed(0)
    config = DeiTLTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000)
    ours = DeiTLTForImageClassification(config).eval()
    ours.save_pretrained(folder)
    exported = export_onnx(ours, folder)
    return {
        "transformers": DeiTForImageClassificationWithTeacher.from_pretrained(folder).eval(),
        "deitlt-hf": ours,
        "ONNX float32": OnnxClassifier(exported),
        "ONNX int8": OnnxClassifier(quantize(exported)),
    }


@torch.inference_mode()
def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    time.sleep(PAUSE)
    begun = time.perf_counter()
    model(pixel_values=images)
    return time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    path = RESULTS / f"onnx_inference-threads{torch.get_num_threads()}.json"
    record = {}
    print("| model | images | way | ms | 10th to 90th percentile | times as fast |\n|---|---:|---|---:|---|---:|")
    for size, (width, heads) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            models = ways(width, heads, str(Path(folder)))
            for number, turns in TURNS.items():
                images = torch.randn(number, 3, 224, 224)
                times = [[seconds(model, images) for model in models.values()] for _ in range(turns + 1)]
                low, medians, high = np.quantile(1000 * np.array(times[1:]), (0.1, 0.5, 0.9), axis=0)
                for index, way in enumerate(models):
                    ratio = medians[0] / medians[index]
                    spread = f"{low[index]:.1f} to {high[index]:.1f}"
                    print(f"| {size} | {number} | {way} | {medians[index]:.1f} | {spread} | {ratio:.2f} |", flush=True)
                    record[f"{size}, {number}, {way}"] = {
                        "ms": round(medians[index], 2),
                        "times_as_fast": round(ratio, 3),
                    }
    write_record(path, record)


if __name__ == "__main__":
    main()
