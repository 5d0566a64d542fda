"""Time and memory of the index of iNaturalist 2018's 437,513 training images, and the time to the first batch.

python benchmarks/large_data.py [--layout lists|folders] [--workers 2]

The numbers of names, classes and labels are those of the real data; the files are hard links to a few JPEGs of
500 x 375. `folders` makes a link for every image, which takes a while; `lists` makes one link a class and lists it
repeatedly.
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from input_pipeline import photograph
from torch.utils.data import DataLoader

from deitlt_hf.data import ImageCollator, ImageDataset, image_processor, train_transform
from deitlt_hf.data.sampling import SeededImages, TrainBatches
from deitlt_hf.recipes import DataArguments

CLASSES, IMAGES, BATCH = 8142, 437_513, 128


def class_sizes() -> np.ndarray:
    """Decreasing counts from 1,000 to 2 that add up to the images."""
    sizes = np.maximum(1000 * 0.002 ** (np.arange(CLASSES) / (CLASSES - 1)) * 0.3, 2).astype(int)
    sizes = np.maximum(sizes * IMAGES // sizes.sum(), 2)
    sizes[: IMAGES - sizes.sum()] += 1
    return sizes


def write(folder: Path, layout: str) -> None:
    originals = []
    for seed in range(16):
        originals.append(folder / f"original{seed}.jpg")
        photograph(500, 375, seed).save(originals[-1], quality=90)
    train, test = [], []
    for label, size in enumerate(class_sizes().tolist()):
        for split, lines, links in (("train", train, size), ("val", test, 1)):
            place = folder / split / f"{label:04d}"
            place.mkdir(parents=True)
            for index in range(links if layout == "folders" else 1):
                os.link(originals[(label + index) % 16], place / f"3b60c9486db1d2ee875f11a669{index:06d}.jpg")
            if layout == "lists":
                name = f"{split}/{label:04d}/3b60c9486db1d2ee875f11a669{0:06d}.jpg"
                lines += [f"{name} {label}\n"] * links
    if layout == "lists":
        (folder / "iNaturalist18_train.txt").write_text("".join(train))
        (folder / "iNaturalist18_val.txt").write_text("".join(test))


class PeakMemory(threading.Thread):
    """Peak memory of this process above its memory at the start, in MiB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.process, self.peak, self.ended = psutil.Process(), 0.0, threading.Event()
        self.before = self.process.memory_info().rss

    def run(self):
        while not self.ended.wait(0.02):
            self.peak = max(self.peak, (self.process.memory_info().rss - self.before) / 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=["lists", "folders"], default="lists")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        write(folder, args.layout)
        memory = PeakMemory()
        memory.start()
        started = time.perf_counter()
        arguments = DataArguments(dataset="inat18", data_dir=str(folder), group_boundaries=[842, 4543])
        data = arguments.load()
        groups = arguments.groups(data)
        indexed = time.perf_counter()
        processor = image_processor(224)
        views = {"pixel_values": train_transform(processor)}
        dataset = SeededImages(ImageDataset(data["train"], "image", "label", views))
        batches = TrainBatches(len(dataset), BATCH, num_repeats=3)
        collate = ImageCollator(processor)
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=args.workers, collate_fn=collate)
        batch = next(iter(loader))
        ended = time.perf_counter()
        memory.ended.set()
        sizes = ", ".join(f"{name} {len(members):,}" for name, members in groups.items())
        print(f"{args.layout}: {len(data['train']):,} training images; {sizes} classes")
        print(f"index, counts and groups   {indexed - started:6.1f} s")
        print(f"first batch of {len(batch['labels'])} after   {ended - started:6.1f} s")
        print(f"memory at the peak         {memory.peak:6.0f} MiB more than before")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
