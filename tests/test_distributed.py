"""Tests that several data-parallel processes compute the same as one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from timm.data.distributed_sampler import RepeatAugSampler
from torch.nn import functional as F

from deitlt_hf import DeiTLTForImageClassification
from deitlt_hf.data import class_counts, load_long_tailed
from deitlt_hf.losses import effective_number_weights
from distributed_worker import (
    GLOBAL_BATCH,
    fixed_batch,
    gradients_of_a_step,
    make_trainers,
    run_of_two_steps,
    uneven_evaluation,
    weights_after_muon,
)
from helpers import ROOT, make_student


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).parent / "distributed_worker.py"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [*launcher, str(worker), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [{"folder": folder, **torch.load(folder / f"rank{rank}.pt", weights_only=True)} for rank in range(2)]


@pytest.mark.parametrize("name", ["student", "sharded", "sam", "sam, accumulated"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_does_not_depend_on_processes_and_micro_batches(two_ranks, tmp_path, name, accumulation):
    """The gradient is the same for any number of processes and micro-batches.

    With class weights, the mean of each process's own weighted mean would be another loss.
    """
    trainer = dict(make_trainers(str(tmp_path), accumulation))[
        name.removesuffix(", accumulated").replace("sharded", "student")
    ]
    assert trainer.args.gradient_accumulation_steps == accumulation
    for parameter, gradient in gradients_of_a_step(trainer).items():
        for rank in two_ranks:
            torch.testing.assert_close(rank[name]["gradients"][parameter], gradient, atol=1e-6, rtol=1e-4)


def test_a_step_of_muon_is_the_same_with_sharded_weights(two_ranks, tmp_path):
    trainer = dict(make_trainers(str(tmp_path)))["student"]
    gradients_of_a_step(trainer)
    for name, weight in weights_after_muon(trainer).items():
        for rank in two_ranks:
            torch.testing.assert_close(rank["sharded"]["stepped"][name], weight, atol=2e-6, rtol=1e-4)


def test_processes_can_perturb_separately(two_ranks):
    """With `sam_per_process`, each process perturbs the weights for its own part of the batch.

    The expected gradient is computed by hand: each half of the batch has its gradient at the point that half's gradient
    leads to.
    """
    batch, halves = fixed_batch(), (slice(0, GLOBAL_BATCH // 2), slice(GLOBAL_BATCH // 2, GLOBAL_BATCH))
    labels = load_long_tailed("digits", imbalance_ratio=10, max_per_class=60)["train"]["label"]
    weights = effective_number_weights(class_counts(labels))
    total = {}
    for half in halves:
        model = make_student(drop_path_rate=0.0)
        for is_second_pass in (False, True):
            model.zero_grad()
            logits = model(batch["pixel_values"][half]).logits
            loss = F.cross_entropy(logits, batch["labels"][half], weights, reduction="sum")
            (loss / weights[batch["labels"]].sum()).backward()
            if not is_second_pass:
                norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 0.5 * parameter.grad / norm
        for name, parameter in model.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad
    for name, gradient in total.items():
        for rank in two_ranks:
            torch.testing.assert_close(rank["sam_per_process"]["gradients"][name], gradient, atol=1e-6, rtol=1e-4)
    shared = two_ranks[0]["sam"]["gradients"]
    assert max((shared[name] - gradient).abs().max() for name, gradient in total.items()) > 1e-4


def test_repeated_augmentation_matches_timm_in_each_process(two_ranks):
    """Repeated augmentation gives each process the images of timm's sampler.

    The order changes with every epoch; a sampler that does not receive the epoch number would repeat the first order.
    """
    for rank, found in enumerate(two_ranks):
        timms = RepeatAugSampler(range(found["repeated"]["images"]), num_replicas=2, rank=rank)
        for epoch, indices in enumerate(found["repeated"]["epochs"]):
            timms.set_epoch(epoch)
            assert len(indices) >= 256 // 2
            assert indices == list(timms)[: len(indices)]


@pytest.mark.parametrize("name", ["student", "sam"])
def test_processes_share_an_epoch_without_overlap(two_ranks, name):
    """Processes share the images of an epoch without overlap; with separate orders, some images would appear twice."""
    indices = [[[index for index, _ in batch] for batch in rank[name]["batches"]] for rank in two_ranks]
    assert len(indices[0]) == len(indices[1]) == 240 // GLOBAL_BATCH
    flat = [index for rank in indices for batch in rank for index in batch]
    assert len(set(flat)) == len(flat)
    assert indices[0] != sorted(indices[0])


def test_processes_with_different_images_are_refused(two_ranks):
    """Every process refuses, so that none waits for the others."""
    for rank in two_ranks:
        assert len(rank["different"]) == 3  # in two trainings and an evaluation
        assert all("process 1 of 2 reads other images" in error for error in rank["different"])


def test_evaluation_counts_every_image_once(two_ranks, tmp_path):
    """Evaluation counts each of 101 images once, although the sampler repeats images to fill the last batches."""
    alone = uneven_evaluation(str(tmp_path))
    assert alone["images"] == 101
    for rank in two_ranks:
        assert rank["evaluation"]["images"] == 101
        assert rank["evaluation"]["figures"] == pytest.approx(alone["figures"])


def test_processes_evaluate_the_model_that_is_saved(two_ranks):
    """All processes evaluate the model that is saved.

    Each process has batch-norm statistics of its own images; the file contains those of the main process.
    """
    first, second = (rank["statistics"] for rank in two_ranks)
    assert torch.equal(first, second)


def test_processes_have_the_same_queue(two_ranks):
    """All processes have the same queue, with the keys of every process; separate queues would give two losses."""
    first, second = (rank["paco"] for rank in two_ranks)
    assert len(first["keys"]) == 70
    for name in ("keys", "labels", "weight"):
        assert torch.equal(first[name], second[name])
    assert len(torch.unique(first["keys"], dim=0)) == 70


# ---- Accelerate's configuration files ----

CONFIGURATIONS = sorted((ROOT / "scripts" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configuration_files_are_valid_for_accelerate(path):
    """The configuration files are valid for Accelerate, which refuses unknown keys."""
    config = load_config_from_file(str(path))
    assert config.mixed_precision in ("bf16", "no")
    if path.stem == "fsdp2":
        assert (
            config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in DeiTLTForImageClassification._no_split_modules
        )


def test_sharded_students_are_saved_as_themselves(two_ranks):
    """FSDP 2 replaces the class of a model; the saved folder names and contains this package's files, not torch's."""
    folder = two_ranks[0]["folder"] / "fsdp"
    assert {path.name for path in folder.glob("*.py")} == {"configuration_deitlt.py", "modeling_deitlt.py"}
    references = json.loads((folder / "config.json").read_text())["auto_map"]
    assert references["AutoModelForImageClassification"] == "modeling_deitlt.DeiTLTForImageClassification"
    assert json.loads((folder / "results.json").read_text())["model"] == "DeiTLTForImageClassification"


def test_sharded_runs_resume_with_and_without_shards(two_ranks, tmp_path):
    at_once, resumed = two_ranks[0]["fsdp"]
    assert all(torch.equal(at_once[name], resumed[name]) for name in at_once)
    folder = two_ranks[0]["folder"] / "fsdp"
    shutil.copytree(folder, tmp_path / "run")
    alone = run_of_two_steps(tmp_path / "run")
    alone.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    sharded = DeiTLTForImageClassification.from_pretrained(folder).state_dict()
    torch.testing.assert_close(alone.model.state_dict(), sharded, atol=1e-5, rtol=0)


def test_a_run_without_shards_is_not_resumed_with_them(two_ranks):
    assert all("is of a run without FSDP" in rank["refused"] for rank in two_ranks)


def launch(configuration, output_dir, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "scripts" / "accelerate" / configuration), *arguments, "scripts/train_teacher.py"]
    command += ["--recipe", "digits_lt", "--output_dir", str(output_dir), "--max_steps", "3", "--eval_strategy", "no"]
    return subprocess.Popen(
        [*command, "--save_strategy", "no"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )


def check(process, output_dir):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    results = json.loads((output_dir / "results.json").read_text())
    assert results["finished"]
    assert results["processes"]["processes"] == 2
    assert results["processes"]["per_device_train_batch_size"] == 32


def test_processes_on_a_cpu_train(tmp_path):
    check(launch("cpu.yaml", tmp_path), tmp_path)


def test_launchers_on_several_machines_train(tmp_path):
    """Two launchers find each other by address, as on two machines that share the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = ("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    machines = [launch("nodes.yaml", tmp_path, *place, "--machine_rank", str(rank)) for rank in range(2)]
    for machine in machines:
        check(machine, tmp_path)
