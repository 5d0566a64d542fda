"""Training images per second on one core: timm's `create_transform` and ours, measured together in one run.

python benchmarks/input_pipeline.py [--seconds 6] [--rounds 5]

Each row is one pipeline of the paper: CIFAR enlarged to 224 pixels, CIFAR at 32, and JPEG photographs of 500 x 375 to
224. Both sides give stacked batches of 64 normalised and randomly erased float images. In the first two rows timm
receives decoded Pillow images; ours come from the data set, with labels. The rounds alternate, and the ratio is that of
the medians. timm crashes with Pillow 13 when it posterizes to 0 bits; here it keeps 1 bit.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torchvision.transforms import RandomCrop

from deitlt_hf.data import ImageCollator, ImageDataset, image_processor, train_transform

BATCH = 64
POLICY = "rand-m9-mstd0.5-inc1"


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """An image with detail at all scales, and about as many bytes as a photograph has."""
    random = np.random.RandomState(seed)
    pixels = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 256):
        if cells <= width:
            noise = random.randint(0, 256, (max(height * cells // width, 2), cells, 3)).astype(np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) / cells**0.5
    return Image.fromarray((255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8))


def encoded(width: int, height: int, seed: int) -> bytes:
    """Such an image as a JPEG."""
    stream = io.BytesIO()
    photograph(width, height, seed).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def timms(size: int, crop: str) -> Callable[[Image.Image], torch.Tensor]:
    transform = create_transform(
        size,
        is_training=True,
        color_jitter=None,
        auto_augment=POLICY,
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    if crop == "padded":  # as in the authors' code
        transform.transforms[0] = RandomCrop(size, padding=size // 8)
    for stage in transform.transforms:
        for operation in stage.ops if isinstance(stage, RandAugment) else ():
            if operation.name.startswith("Posterize"):
                posterize = operation.aug_fn
                operation.aug_fn = lambda image, bits, f=posterize, **kwargs: f(image, max(bits, 1), **kwargs)
    return transform


def timms_batches(sources: list, size: int, crop: str) -> Iterator[int]:
    """Batches as timm's users make them; `sources` are PIL images or the bytes of encoded images."""
    transform = timms(size, crop)
    while True:
        for start in range(0, len(sources), BATCH):
            images = [
                source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source)).convert("RGB")
                for source in sources[start : start + BATCH]
            ]
            yield len(torch.stack([transform(image) for image in images]))


def our_batches(sources: list, size: int, crop: str) -> Iterator[int]:
    """Batches as the trainer makes them, without worker processes."""
    processor = image_processor(size)
    transform = train_transform(processor, crop, POLICY)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": source} if isinstance(source, bytes) else source for source in sources]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0] * len(images)}, features=features)
    dataset, collate = ImageDataset(rows, "image", "label", {"pixel_values": transform}), ImageCollator(processor)
    while True:
        for start in range(0, len(dataset), BATCH):
            batch = collate([dataset[row] for row in range(start, min(start + BATCH, len(dataset)))])
            yield len(transform.finish(batch["pixel_values"]))


def rate(batches: Iterator[int], seconds: float) -> float:
    next(batches)
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        images += next(batches)
    return images / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6, help="seconds of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    small = [photograph(32, 32, seed) for seed in range(512)]
    jpegs = [encoded(500, 375, seed) for seed in range(128)]
    decoded = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in jpegs]
    cases = {
        "32 -> 224": (small, small, 224, "random_resized"),
        "32 -> 32": (small, small, 32, "padded"),
        "500 x 375 JPEG -> 224": (jpegs, jpegs, 224, "random_resized"),
        "500 x 375 JPEG -> 224, timm's decoded before": (decoded, jpegs, 224, "random_resized"),
    }
    figures = {}
    print(
        f"{'images/s':46} {'timm':>8} {'ours':>8} {'ratio':>6}   ({sum(map(len, jpegs)) // len(jpegs):,} bytes a JPEG)"
    )
    for name, (theirs, ours, size, crop) in cases.items():
        sides = {"timm": timms_batches(theirs, size, crop), "ours": our_batches(ours, size, crop)}
        rates = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, batches in sides.items():
                rates[side].append(rate(batches, args.seconds))
        timm, our = (statistics.median(rates[side]) for side in sides)
        figures[name] = {"timm": timm, "ours": our, "ratio": our / timm}
        print(f"{name:46} {timm:8.0f} {our:8.0f} {our / timm:6.2f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
