"""Checks that need GPUs: each is a short, separate run on one GPU or on all.

    python benchmarks/device_checks.py
    python benchmarks/device_checks.py --only bf16 fp16 memory
    python benchmarks/device_checks.py --trial        # the same commands on a CPU, which shows nothing about GPUs

Half precision, SAM under a GradScaler, flash attention, torch.compile, steps that wait for nothing, resuming to the
same bytes, DDP, FSDP2 and DeepSpeed through Accelerate's configuration files, one command from a folder of images to a
student, and the memory of a ViT-B/16 step compared with the estimate of `deitlt plan`. Runs use the digits recipe,
shortened; they pass if they end with code 0, a decreased loss, and weights in float32. `gpu_first.py` runs most of
them first of all things on a new machine.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pandas
import torch
from safetensors.torch import load_file
from series import RESULTS, ROOT, run, slug, write_record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torture import digest
from transformers import TrainerCallback

from deitlt_hf import (
    DeiTLTConfig,
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
)
from deitlt_hf.analysis.budget import OVERHEAD_BYTES
from deitlt_hf.analysis.model_cost import student_model
from deitlt_hf.data import load_long_tailed
from deitlt_hf.recipes import StudentArguments
from deitlt_hf.records import read_record
from deitlt_hf.training.results import installed_versions

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
CONFIGURATIONS = ROOT / "scripts" / "accelerate"
EPOCHS = 40 if HAS_GPU else 8
SHORT = ["--recipe", "digits_lt", "--num_train_epochs", EPOCHS, "--drw_start_epoch", EPOCHS * 3 // 4]
SHORT += ["--warmup_epochs", 2, "--logging_steps", "10", "--eval_strategy", "no", "--save_strategy", "no"]
# Configuration file and arguments of each run.
RUNS = {
    "float32": ("one_gpu.yaml", ["--bf16", "false"]),
    "bf16": ("one_gpu.yaml", ["--bf16", "true", "--ema_decay", "0.99"]),
    "fp16": ("one_gpu.yaml", ["--fp16", "true", "--on_nonfinite", "skip"]),
    "compiled": ("one_gpu.yaml", ["--bf16", "true", "--torch_compile", "true"]),
    "checkpointed activations": ("one_gpu.yaml", ["--bf16", "true", "--activation_checkpointing", "true"]),
    "flash attention 2": ("one_gpu.yaml", ["--bf16", "true", "--attn_implementation", "flash_attention_2"]),
    "all GPUs": ("gpus.yaml", ["--bf16", "true"]),
    "FSDP2": ("fsdp2.yaml", ["--bf16", "true"]),
    "DeepSpeed": ("deepspeed.yaml", ["--bf16", "true"]),
}
PACKAGES = {"flash attention 2": "flash_attn", "DeepSpeed": "deepspeed"}  # that these runs need


def adapted(values: list[str]) -> list[str]:
    """Arguments of a run, without a GPU those that a CPU can try."""
    if HAS_GPU:
        return values
    return [*(value.replace("--fp16", "--bf16") for value in values), "--use_cpu", "true"]


def taught(place: Path) -> list:
    """Arguments with the teacher that `check_sam` left; without one, a run trains its own."""
    folder = place / "teacher"
    return ["--teacher", folder] if (folder / "trained").exists() else []


def learned(folder: Path) -> dict:
    """Whether the loss of a run decreased and its weights are float32, its losses, its accuracy and its time."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    record = read_record(folder)
    dtypes = {str(weight.dtype) for weight in load_file(folder / "model.safetensors").values()}
    return {
        "passed": losses[-1] < losses[0] and dtypes == {"torch.float32"},
        "dtypes": sorted(dtypes),
        "losses": [losses[0], losses[-1]],
        "accuracies": record["last"]["accuracies"],
        "seconds": record["train_seconds"],
        "ran": record["ran"],
    }


def check_run(name: str, place: Path) -> dict:
    """Distils a student; returns the means of its first and last logged losses, and its accuracy."""
    configuration, values = RUNS[name]
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        return {"passed": None, "missing": PACKAGES[name]}
    processes = 1 if configuration == "one_gpu.yaml" else max(torch.cuda.device_count(), 1)
    folder = place / slug(name) / "student"  # in a folder of its own, where it trains a teacher if it has none
    shutil.rmtree(folder, ignore_errors=True)
    file = CONFIGURATIONS / (configuration if HAS_GPU else "cpu.yaml")
    command = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", processes]
    command += [] if file.name == "one_gpu.yaml" else ["--main_process_port", 0]  # 0 is any free port
    run(*command, ROOT / "scripts" / "distill.py", *SHORT, *taught(place), "--output_dir", folder, *adapted(values))
    return {"processes": processes, **learned(folder)}


def check_sam(place: Path) -> dict:
    """Trains a teacher with SAM in float16, whose gradients a GradScaler scales; other checks learn from it."""
    folder = place / "teacher"
    values = [*SHORT, "--overwrite", "--output_dir", folder, *adapted(["--fp16", "true", "--on_nonfinite", "skip"])]
    run(ROOT / "scripts" / "train_teacher.py", *values)
    (folder / "trained").touch()
    return learned(folder)


def check_resume(place: Path) -> dict:
    """A run that ended after its first checkpoint and was resumed gives the bytes of one that was not interrupted."""
    whole, resumed = place / "whole" / "run", place / "resumed" / "run"
    for folder in (whole, resumed):
        shutil.rmtree(folder, ignore_errors=True)
    values = ["--max_steps", 12, "--save_strategy", "steps", "--save_steps", 6, "--save_total_limit", 2]
    values += [*taught(place), *adapted(["--bf16", "true", "--full_determinism", "true"])]
    run(ROOT / "scripts" / "distill.py", *SHORT, *values, "--output_dir", whole)
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    run(ROOT / "scripts" / "distill.py", *SHORT, *values, "--output_dir", resumed, "--resume_from_checkpoint", "auto")
    was_resumed = bool(read_record(resumed)["resumed"])
    digests = [digest(folder) for folder in (whole, resumed)]
    return {"passed": was_resumed and digests[0] == digests[1], "resumed": was_resumed, "sha256": digests}


def check_flash(place: Path) -> dict:
    """Flash attention gives the loss and the gradients of plain attention, as far as bfloat16 allows."""
    torch.manual_seed(0)
    config = DeiTLTConfig(num_hidden_layers=4, drop_path_rate=0.0, num_labels=10, attn_implementation="sdpa")
    model = DeiTLTForImageClassification(config).to(DEVICE)
    images, labels = torch.randn(4, 3, 224, 224, device=DEVICE), torch.arange(4, device=DEVICE)
    found = {}
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        model.zero_grad()
        with sdpa_kernel(kernel), torch.autocast(DEVICE, torch.bfloat16):
            model(pixel_values=images, labels=labels).loss.backward()
        found[kernel] = torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])
    plain, flash = found.values()
    difference = ((flash - plain).norm() / plain.norm()).item()
    return {"passed": difference < 0.02, "relative_difference_of_the_gradient": difference}


def check_folder(place: Path) -> dict:
    """`deitlt train` on a folder of images ends with a student, whose predictions are the same on GPU and CPU."""
    folder, output = place / "digits", place / "folder"
    for path in (folder, output):
        shutil.rmtree(path, ignore_errors=True)
    data = load_long_tailed("digits", imbalance_ratio=20)
    for split in ("train", "test"):
        for number, example in enumerate(data[split]):
            path = folder / split / f"digit {example['label']}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            example["image"].save(path)
    deitlt = ("-m", "deitlt_hf.cli")
    run(*deitlt, "train", folder, "--minutes", 1, "--output_dir", output, *adapted([]))
    tables = []
    for device in (DEVICE, "cpu"):
        written = output / f"predicted on {device}"
        run(*deitlt, "predict", "--model", output / "student", "--device", device, "--output", written, folder / "test")
        tables.append(pandas.concat(map(pandas.read_parquet, sorted(written.glob("*.parquet")))))
    here, on_cpu = tables
    same = float((here["label"] == on_cpu["label"]).mean())
    difference = float((here["score"] - on_cpu["score"]).abs().max())
    accuracies = read_record(output / "student")["last"]["accuracies"]
    passed = same > 0.99 and difference < 0.01 and accuracies["mean"]["overall"] > 0.2  # twice chance
    return {"passed": passed, "difference_of_scores": difference, "same_class": same, "accuracies": accuracies}


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


CHECKS = {
    "SAM": check_sam,
    "flash attention": check_flash,
    "waiting": check_waiting,
    "resume": check_resume,
    "folder": check_folder,
    "memory": check_memory,
}
NEED_A_GPU = ("waiting", "memory")


def check(name: str, place: Path) -> dict:
    """What a check found; `passed` is None if the machine lacks what it needs."""
    if name in NEED_A_GPU and not HAS_GPU:
        return {"passed": None, "missing": "a GPU"}
    try:
        return CHECKS[name](place) if name in CHECKS else check_run(name, place)
    except Exception as error:  # of whatever kind, it is the result, and the other checks follow
        return {"passed": False, "error": str(error)[-4000:]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*CHECKS, *RUNS], default=[*CHECKS, *RUNS])
    parser.add_argument("--json", type=Path, default=RESULTS / "device_checks.json", help="default: %(default)s")
    parser.add_argument("--work", type=Path, help="folder of the runs, which other calls can share")
    parser.add_argument("--trial", action="store_true", help="try the commands without a GPU")
    args = parser.parse_args()
    if not HAS_GPU and not args.trial:
        sys.exit("there is no GPU here, and nothing that these checks could show.")
    device = torch.cuda.get_device_name() if HAS_GPU else "cpu"
    record = {"device": device, "gpus": torch.cuda.device_count(), "versions": installed_versions(), "checks": {}}
    with contextlib.ExitStack() as stack:
        place = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in args.only:
            found = record["checks"][name] = check(name, place)
            said = {None: "n/a ", True: "ok  ", False: "FAIL"}[found["passed"]]
            print(f"{said} {name}: {found}", flush=True)
            write_record(args.json, record)
    sys.exit(any(found["passed"] is False for found in record["checks"].values()))


if __name__ == "__main__":
    main()
