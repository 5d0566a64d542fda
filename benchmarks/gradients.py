"""Differences between gradients of one optimiser step, with class weights, for several distributions of its batch.

    python benchmarks/gradients.py

The models are a student in its DRW phase, with both heads re-weighted, and a teacher under SAM, on 64 fixed images.
Each arrangement runs real processes (gloo, on the CPU) that call the trainer's `training_step`; FSDP2 is torch's
`fully_shard` around every block. The table gives the largest difference of any entry of any parameter's gradient from
that of one process with the complete batch, and the largest entry. It also shows the mean of the weighted means of the
micro-batches (`per_process`).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from series import RESULTS, write_record

from deitlt_hf import (
    DeiTLTConfig,
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherTrainer,
    FlatTeacherTrainingArguments,
)
from deitlt_hf.data import load_long_tailed

IMAGES = 64
# Processes, images of a process in a micro-batch, micro-batches, and how weights and loss are distributed.
ARRANGEMENTS = {
    "1 x 64": (1, 64, 1, ""),
    "1 x 32 x 2 micro-batches": (1, 32, 2, ""),
    "1 x 8 x 8 micro-batches": (1, 8, 8, ""),
    "2 x 32": (2, 32, 1, ""),
    "2 x 16 x 2 micro-batches": (2, 16, 2, ""),
    "2 x 32, FSDP2": (2, 32, 1, "fsdp"),
    "2 x 32, per_process": (2, 32, 1, "per_process"),
    "1 x 32 x 2 micro-batches, per_process": (1, 32, 2, "per_process"),
}


def make_trainer(kind: str, folder: str, batch_size: int, normalization: str):
    """A trainer whose model is the same in every process and arrangement."""
    data = load_long_tailed("digits", imbalance_ratio=20)
    values = {
        "output_dir": folder,
        "use_cpu": True,
        "global_batch_size": IMAGES,
        "per_device_train_batch_size": batch_size,
        "drw_start_epoch": 0,
        "loss_normalization": normalization,
    }
    datasets = {"train_dataset": data["train"], "eval_dataset": data["test"]}
    torch.manual_seed(0)
    config = DeiTLTConfig(
        image_size=16, patch_size=4, hidden_size=96, num_hidden_layers=6, num_attention_heads=3, intermediate_size=384,
        num_labels=10, drop_path_rate=0.0,
    )  # fmt: skip
    student = DeiTLTForImageClassification(config)
    if kind == "teacher, SAM":  # a ViT, because a CNN's batch norm depends on the micro-batch
        args = FlatTeacherTrainingArguments(**values, sam_rho=[0.05])
        return FlatTeacherTrainer(model=student, args=args, **datasets)
    values |= {"distillation": "none", "reweight_cls": True, "repeated_augmentation": 1, "train_crop": "padded"}
    return DeiTLTTrainer(model=student, args=DeiTLTTrainingArguments(**values), **datasets)


def gradients(kind: str, folder: str, batch_size: int, micro_batches: int, spread: str) -> dict[str, torch.Tensor]:
    """This process's gradients after all micro-batches, as the optimiser receives them."""
    trainer = make_trainer(kind, folder, batch_size, spread if spread == "per_process" else "global")
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(IMAGES, 3, 16, 16, generator=generator)
    labels = (torch.rand(IMAGES, generator=generator) ** 2 * 10).long()  # a long-tailed distribution
    processes, rank = trainer.args.world_size, trainer.args.process_index
    trainer.create_optimizer()
    model = trainer.model
    if spread == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.deit.layers:
            fully_shard(layer)
        fully_shard(model)
    elif processes > 1:
        model = trainer.accelerator.prepare(model)
    starts = [(index * processes + rank) * batch_size for index in range(micro_batches)]
    parts = [{"pixel_values": images[at : at + batch_size], "labels": labels[at : at + batch_size]} for at in starts]
    batches, _ = trainer.get_batch_samples(iter(parts), micro_batches, trainer.args.device)
    for index, part in enumerate(batches):
        last = index == micro_batches - 1
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        if last:
            trainer.training_step(model, part)
        else:
            with trainer.accelerator.no_sync(model):
                trainer.training_step(model, part)
    found = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    return {name: value.full_tensor() if spread == "fsdp" else value.clone() for name, value in found.items()}


def measure(kind: str, name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of an arrangement, computed in separate processes."""
    processes = ARRANGEMENTS[name][0]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    out = folder / "gradients.pt"
    command = [*launcher, __file__, "--kind", kind, "--arrangement", name, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return torch.load(out, weights_only=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--arrangement", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.arrangement is not None:
            found = gradients(args.kind, folder, *ARRANGEMENTS[args.arrangement][1:])
            if int(os.environ.get("RANK", "0")) == 0:
                torch.save(found, args.out)
            return
        record = {}
        for kind in ("student", "teacher, SAM"):
            whole = measure(kind, "1 x 64", Path(folder))
            largest = max(value.abs().max().item() for value in whole.values())
            print(f"\n| {kind} (largest entry {largest:.2g}) | largest difference |\n|---|---:|", flush=True)
            for name, (*_, spread) in list(ARRANGEMENTS.items())[1:]:
                if kind != "student" and spread == "fsdp":
                    continue  # SAM is refused here
                found = measure(kind, name, Path(folder))
                difference = max((found[key] - value).abs().max().item() for key, value in whole.items())
                record[f"{kind}: {name}"] = difference
                print(f"| {name} | {difference:.1e} |", flush=True)
    write_record(RESULTS / "gradients.json", record)


if __name__ == "__main__":
    main()
