"""An optimiser step of Muon compared with one of AdamW, and its share of a training step.

    OMP_NUM_THREADS=1 python benchmarks/muon_step.py

Both run in one process in alternating turns, on one model and its gradients; the figures are medians. The training step
is forward, backward and an optimiser step, without a teacher and without reading images. timm's own step, which uses
bfloat16 on every device, is measured once after them, because it takes minutes on some processors.
"""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm.optim
import torch
from series import RESULTS, write_record

from deitlt_hf import DeiTLTConfig, DeiTLTForImageClassification
from deitlt_hf.training.optimizers import muon
from deitlt_hf.training.provenance import processor_name

# Image size, patch size, width, blocks, heads; images; turns.
CASES = {
    "digits_lt, 16 px": ((16, 4, 96, 6, 3), 64, 30),
    "fashion_mnist_lt_tiny, 28 px": ((28, 4, 128, 6, 4), 64, 15),
    "ViT-S/4, 32 px": ((32, 4, 384, 12, 6), 64, 5),
    "ViT-S/16, 224 px": ((224, 16, 384, 12, 6), 16, 5),
}
ARGUMENTS = SimpleNamespace(
    learning_rate=1e-4, layer_decay=1.0, weight_decay=0.05, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8
)


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main():
    record = {}
    print("| student, images | passes, ms | AdamW, ms | Muon, ms | Muon in bfloat16, ms | step, Muon / AdamW |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, ((side, patch_size, width, blocks, heads), batch_size, turns) in CASES.items():
        torch.manual_seed(0)
        config = DeiTLTConfig(
            image_size=side, patch_size=patch_size, hidden_size=width, num_hidden_layers=blocks,
            num_attention_heads=heads, intermediate_size=4 * width, num_labels=10,
        )  # fmt: skip
        model, images = DeiTLTForImageClassification(config).train(), torch.randn(batch_size, 3, side, side)
        labels = torch.zeros(batch_size, dtype=torch.long)
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        ours = muon(model, ARGUMENTS, [name for name, parameter in model.named_parameters() if parameter.dim() > 1])

        def passes(model=model, images=images, labels=labels):
            model.zero_grad()
            model(pixel_values=images, labels=labels).loss.backward()

        times = [[seconds(work) for work in (passes, adamw.step, ours.step)] for _ in range(turns + 1)]
        both, plain, orthogonal = np.median(times[1:], axis=0)
        in_bfloat16 = seconds(lambda ours=ours: timm.optim.Muon.step(ours))
        ratio = (both + orthogonal) / (both + plain)
        record[f"{name}, {batch_size}"] = {
            "passes": round(both, 4),
            "adamw": round(plain, 4),
            "muon": round(orthogonal, 4),
            "muon_in_bfloat16": round(in_bfloat16, 4),
            "ratio": round(ratio, 3),
        }
        cells = " | ".join(f"{1000 * value:.1f}" for value in (both, plain, orthogonal, in_bfloat16))
        print(f"| {name}, {batch_size} | {cells} | {ratio:.3f} |", flush=True)
    known = Path("/proc/cpuinfo")
    has_bfloat16 = known.is_file() and "bf16" in known.read_text()
    processor = f"{processor_name()} {'with' if has_bfloat16 else 'without'} bfloat16 instructions"
    file = RESULTS / "muon_step.json"
    write_record(file, json.loads(file.read_text()) | {processor: record})


if __name__ == "__main__":
    main()
