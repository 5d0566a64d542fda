"""Cost of a step of SAM: time in forward-backward passes, memory in copies of the parameters.

    python benchmarks/sam_step.py
    python benchmarks/sam_step.py --backbone timm/resnet50 --image_size 64 --batch_size 8

The script compares the trainer's step, with SAM and with SGD, with one bare forward-backward pass and, if
`pytorch-optimizer` is installed, with that library's SAM. All take turns; the output has the median ratio of a turn.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time

import torch
from series import RESULTS, write_record
from torch.nn import functional as F

from deitlt_hf import (
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
    FlatTeacherTrainer,
    FlatTeacherTrainingArguments,
)
from deitlt_hf.data import load_long_tailed
from deitlt_hf.training import SAM


def trainer_step(config: FlatTeacherConfig, batch: dict, rho: float, folder: str):
    """A training step of [`FlatTeacherTrainer`] on a fixed batch, with the optimiser's update."""
    args = FlatTeacherTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=len(batch["labels"]),
        sam_rho=[rho],
        learning_rate=1e-3,
        eval_strategy="no",
    )
    model = FlatTeacherForImageClassification(config)
    trainer = FlatTeacherTrainer(model=model, args=args, train_dataset=load_long_tailed("digits")["train"])
    trainer.create_optimizer()

    def step():
        batches, _ = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
        trainer.training_step(trainer.model, batches[0])
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def plain_step(config: FlatTeacherConfig, batch: dict, optimizer_class=None):
    """One forward-backward pass; with a SAM of pytorch-optimizer, its complete step."""
    model = FlatTeacherForImageClassification(config).train().to(batch["labels"].device)

    def loss():
        return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])

    if optimizer_class is None:

        def step():
            loss().backward()
            model.zero_grad()

        return step
    optimizer = optimizer_class(model.parameters(), torch.optim.SGD, rho=0.05, lr=1e-3, momentum=0.9)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    def step():
        closure()
        optimizer.step(closure)

    return step


def live_bytes() -> int:
    """Memory of all tensors that exist."""
    storages = {}
    for value in gc.get_objects():
        if isinstance(value, torch.Tensor):
            for tensor in (value, value.grad if value.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def extra_copies(config: FlatTeacherConfig, batch: dict) -> float:
    """Memory of SAM after the second pass minus that after the first, in copies of the parameters."""
    model = FlatTeacherForImageClassification(config).train().to(batch["labels"].device)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    used = []
    for _ in range(2):
        F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
        used.append(live_bytes())
        if len(used) == 1:
            optimizer.ascend()
    return (used[1] - used[0]) / size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet32")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = FlatTeacherConfig(backbone=args.backbone, image_size=args.image_size, num_labels=10)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    batch = {"pixel_values": images, "labels": torch.arange(args.batch_size, device=device) % 10}
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "forward and backward": plain_step(config, batch),
            "SGD step of the trainer": trainer_step(config, batch, 0.0, folder),
            "SAM step of the trainer": trainer_step(config, batch, 0.05, folder),
        }
        try:
            from pytorch_optimizer import SAM as PeerSAM
        except ImportError:
            print("pytorch-optimizer is not installed: no peer to compare with.")
        else:
            steps["SAM step of pytorch-optimizer"] = plain_step(config, batch, PeerSAM)
        seconds = {name: [] for name in steps}
        for turn in range(args.turns + 2):  # the first two are for warm-up
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if device == "cuda":
                    torch.cuda.synchronize()
                if turn >= 2:
                    seconds[name].append(time.perf_counter() - started)
    passes = seconds["forward and backward"]
    figures = {
        name: {
            "ms": round(1000 * statistics.median(values), 1),
            "passes": round(statistics.median(a / b for a, b in zip(values, passes, strict=True)), 3),
        }
        for name, values in seconds.items()
    }
    figures["extra copies of the parameters"] = round(extra_copies(config, batch), 2)
    print(json.dumps(figures, indent=1))
    write_record(RESULTS / f"sam_step-{args.backbone.replace('/', '-')}.json", vars(args) | {"figures": figures})


if __name__ == "__main__":
    main()
