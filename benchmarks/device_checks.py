"""Checks that need GPUs: each is a short, separate run on one GPU or on all.

    python benchmarks/device_checks.py
    python benchmarks/device_checks.py --only bf16 fp16 memory

Half precision, torch.compile, FSDP2 and DeepSpeed through Accelerate's configuration files, steps that wait for
nothing, and the memory of a ViT-B/16 step compared with the estimate of `deitlt plan`. Runs use the digits recipe with
its teacher, shortened; they pass if they end with code 0 and a decreased loss. Without a GPU the script reports that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from series import RESULTS, ROOT, write_record
from transformers import TrainerCallback

from deitlt_hf import (
    DeiTLTConfig,
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
)
from deitlt_hf.analysis.budget import OVERHEAD_BYTES, student_model
from deitlt_hf.data import load_long_tailed
from deitlt_hf.recipes import StudentArguments
from deitlt_hf.records import read_record

CONFIGURATIONS = ROOT / "scripts" / "accelerate"
SHORT = ["--recipe", "digits_lt", "--num_train_epochs", "40", "--drw_start_epoch", "30", "--logging_steps", "10"]
# Configuration file and arguments of each run.
RUNS = {
    "float32": ("one_gpu.yaml", ["--bf16", "false"]),
    "bf16": ("one_gpu.yaml", ["--bf16", "true", "--ema_decay", "0.99"]),
    "fp16": ("one_gpu.yaml", ["--fp16", "true", "--on_nonfinite", "skip"]),
    "compiled": ("one_gpu.yaml", ["--bf16", "true", "--torch_compile", "true"]),
    "checkpointed activations": ("one_gpu.yaml", ["--bf16", "true", "--activation_checkpointing", "true"]),
    "flash attention": ("one_gpu.yaml", ["--bf16", "true", "--attn_implementation", "flash_attention_2"]),
    "all GPUs": ("gpus.yaml", ["--bf16", "true"]),
    "FSDP2": ("fsdp2.yaml", ["--bf16", "true"]),
    "DeepSpeed": ("deepspeed.yaml", ["--bf16", "true"]),
}


def check_run(name: str, place: Path) -> dict:
    """Distils a student; returns the means of its first and last logged losses, and its accuracy."""
    configuration, values = RUNS[name]
    processes = "1" if configuration == "one_gpu.yaml" else str(torch.cuda.device_count())
    folder = place / "run" / name.replace(" ", "_")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGURATIONS / configuration]
    command += ["--num_processes", processes, ROOT / "scripts" / "distill.py", *SHORT, "--output_dir", folder, *values]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    if done.returncode:
        return {"passed": False, "error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    results = read_record(folder)
    accuracy = results["last"]["accuracies"]["mean"]["overall"]
    return {
        "passed": losses[-1] < losses[0],
        "processes": int(processes),
        "losses": [losses[0], losses[-1]],
        "accuracy": accuracy,
        "seconds": results["train_seconds"],
    }


def check_memory(place: Path) -> dict:
    """Peak memory of ViT-B/16 steps in bfloat16, and the estimate of the plan."""
    batch_size = 128
    planned = student_model(StudentArguments(), 1000, None, DeiTLTTrainingArguments(str(place), num_train_epochs=1))
    model = DeiTLTForImageClassification(StudentArguments(drop_path_rate=0.0).config(num_labels=1000)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.zeros(batch_size, 3, 224, 224, device="cuda"), torch.zeros(batch_size, dtype=int).cuda()
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() + OVERHEAD_BYTES
    expected = planned.state_bytes + batch_size * planned.activation_bytes + OVERHEAD_BYTES
    ratio = measured / expected
    return {"passed": 0.8 < ratio < 1.25, "measured_gb": measured / 1e9, "planned_gb": expected / 1e9, "ratio": ratio}


class RefuseToWait(TrainerCallback):
    """Lets torch raise an error if a step waits for the device, from the third to the twelfth step."""

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("error" if 2 <= state.global_step < 12 else "default")


def check_waiting(place: Path) -> dict:
    """Steps of a student without logging and evaluation do not wait for the device."""
    data = load_long_tailed("digits", imbalance_ratio=20)
    labels = {"image_size": 16, "num_labels": 10}
    values = {"repeated_augmentation": 1, "train_crop": "padded", "logging_steps": 1000, "eval_strategy": "no"}
    args = DeiTLTTrainingArguments(str(place / "waiting"), max_steps=15, save_strategy="no", bf16=True, **values)
    trainer = DeiTLTTrainer(
        model=DeiTLTForImageClassification(DeiTLTConfig(patch_size=4, hidden_size=96, num_attention_heads=3, **labels)),
        teacher=FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", **labels)),
        args=args,
        train_dataset=data["train"],
        callbacks=[RefuseToWait()],
    )
    try:
        trainer.train()
    except RuntimeError as error:
        return {"passed": False, "error": str(error)}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"passed": True}


CHECKS = {"waiting": check_waiting, "memory": check_memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*RUNS, *CHECKS], default=[*RUNS, *CHECKS])
    names = parser.parse_args().only
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here, and nothing that these checks could show.")
    record = {"device": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "checks": {}}
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            found = CHECKS[name](Path(place)) if name in CHECKS else check_run(name, Path(place))
            record["checks"][name] = found
            print(f"{'ok  ' if found['passed'] else 'FAIL'} {name}: {found}", flush=True)
    write_record(RESULTS / "device_checks.json", record)
    sys.exit(not all(found["passed"] for found in record["checks"].values()))


if __name__ == "__main__":
    main()
