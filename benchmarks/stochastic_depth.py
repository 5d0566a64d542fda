"""A training step whose stochastic depth skips dropped samples, compared with one that multiplies them by zero.

    python benchmarks/stochastic_depth.py

Both run in one process in alternating turns, on one model; the figures are medians. A compiled model multiplies; for
that case the script makes torch report that the model is being compiled.
"""

import time
from unittest.mock import patch

import numpy as np
import torch
from series import RESULTS, write_record

from deitlt_hf import DeiTLTConfig, DeiTLTForImageClassification

# Image size, patch size, width, blocks, heads; images; drop rate of the last block; turns.
CASES = {
    "digits_lt, 16 px": ((16, 4, 96, 6, 3), 64, 0.1, 60),
    "192 wide, 32 px": ((32, 4, 192, 9, 3), 64, 0.1, 15),
    "192 wide, 32 px, rate 0.3": ((32, 4, 192, 9, 3), 64, 0.3, 15),
    "ViT-S/16, 224 px": ((224, 16, 384, 12, 6), 8, 0.1, 9),
}


def seconds(model: DeiTLTForImageClassification, images: torch.Tensor, multiplies: bool) -> float:
    """Time of a forward and a backward pass."""
    labels = torch.zeros(len(images), dtype=torch.long)
    with patch.object(torch.compiler, "is_compiling", lambda: multiplies):
        begun = time.perf_counter()
        model(pixel_values=images, labels=labels).loss.backward()
    return time.perf_counter() - begun


def main():
    record = {}
    print("| student | skips, ms | multiplies, ms | ratio |\n|---|---:|---:|---:|")
    for name, ((side, patch_size, width, blocks, heads), batch_size, rate, turns) in CASES.items():
        torch.manual_seed(0)
        config = DeiTLTConfig(
            image_size=side, patch_size=patch_size, hidden_size=width, num_hidden_layers=blocks,
            num_attention_heads=heads, intermediate_size=4 * width, num_labels=10, drop_path_rate=rate,
        )  # fmt: skip
        model, images = DeiTLTForImageClassification(config).train(), torch.randn(batch_size, 3, side, side)
        times = [[seconds(model, images, multiplies) for multiplies in (False, True)] for _ in range(turns + 1)]
        skips, multiplies = np.median(times[1:], axis=0)
        record[name] = {
            "skips": round(skips, 4),
            "multiplies": round(multiplies, 4),
            "ratio": round(skips / multiplies, 3),
        }
        print(f"| {name} | {1000 * skips:.1f} | {1000 * multiplies:.1f} | {skips / multiplies:.3f} |", flush=True)
    write_record(RESULTS / "stochastic_depth.json", record)


if __name__ == "__main__":
    main()
