"""Teachers trained with SGD compared with the same teachers trained with SAM: accuracy, flatness, time and memory.

    python benchmarks/flat_teachers.py --data_dir /usr/share/datasets/fashion-mnist --jobs 2

The data are long-tailed Fashion-MNIST at ratio 100, with 1,500 to 15 images a class, reduced to 14 pixels; 60 epochs
then take minutes. The seed changes the subset, the initialisation, the augmentation and the order; SGD and SAM share
all of these. Runs write their records to `benchmarks/results/` and are not repeated; an interrupted series continues.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from series import GROUPS, RESULTS, ROOT, mean_and_deviation, run, write_record

from deitlt_hf.records import read_record

RECIPE = "fashion_mnist_lt_tiny"
SETTINGS = ["--image_size", 14, "--num_train_epochs", 60, "--warmup_epochs", 5, "--global_batch_size", 64]
SETTINGS += ["--eval_strategy", "no", "--save_strategy", "no"]
# For each loss: its settings, and SAM's rho, which was chosen on seed 10 (see docs/results.md).
LOSSES = {
    "ce": (["--learning_rate", 0.05, "--drw_start_epoch", 48], 0.1),
    "ldam": (["--learning_rate", 0.05, "--drw_start_epoch", 48], 0.1),
    "paco": (["--learning_rate", 0.025, "--drw_start_epoch", "inf"], 0.05),
}
TITLES = {"ce": "CE-DRW", "ldam": "LDAM-DRW", "paco": "PaCo"}
FLATNESS = ["--num_images", 256, "--num_vectors", 16, "--rho", 0.05]


def record_of(loss: str, rho: float, seed: int) -> Path:
    """Path of a run's record."""
    return RESULTS / f"flat_teacher-{loss}-{f'sam{rho:g}' if rho else 'sgd'}-seed{seed}.json"


def measure(loss: str, rho: float, seed: int, data_dir: str, threads: int) -> None:
    """Trains a teacher, measures its flatness, and saves both results."""
    record = record_of(loss, rho, seed)
    if record.exists():
        return
    print(record.stem, flush=True)
    folder = ROOT / "outputs" / "flat_teachers" / record.stem
    data = ["--recipe", RECIPE, "--data_dir", data_dir, "--subset_seed", seed]
    command = [ROOT / "scripts" / "train_teacher.py", *data, "--teacher_loss", loss, "--seed", seed, "--sam_rho", rho]
    usage = run(*command, "--output_dir", folder, "--overwrite", *SETTINGS, *LOSSES[loss][0], threads=threads)
    flatness = folder / "sharpness.json"
    command = ["-m", "deitlt_hf.cli", "sharpness", *data, "--model", folder, "--json", flatness, *FLATNESS]
    run(*command, threads=threads)
    results = read_record(folder)
    results |= {"peak_memory_mib": usage.ru_maxrss / 1024, "sharpness": json.loads(flatness.read_text())}
    write_record(record, results)


def table(seeds: list[int], rhos: list[float] | None = None) -> str:
    """Mean and standard deviation over seeds, as Markdown; by default of SGD and of the chosen rho."""
    columns = [*GROUPS, "eigenvalue", "eigenvalue, tail", "trace", "loss rise", "loss rise, tail", "minutes", "MiB"]
    lines = [f"| loss | optimiser | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for loss, (_, chosen) in LOSSES.items():
        for rho in rhos or (0.0, chosen):
            records = [record_of(loss, rho, seed) for seed in seeds]
            if not all(record.exists() for record in records):
                continue
            runs = [json.loads(record.read_text()) for record in records]
            accuracies = [[entry["last"]["accuracies"]["teacher"][group] for group in GROUPS] for entry in runs]
            cells = mean_and_deviation(100 * np.array(accuracies))
            for field, decimals in (("eigenvalue", 1), ("trace", 0), ("loss_rise", 3)):
                for group in ("overall", "tail") if field != "trace" else ("overall",):
                    values = np.array([[entry["sharpness"][group][field]] for entry in runs])
                    cells += mean_and_deviation(values, decimals)
            # The minimum, because other programs on the machine can only add time.
            cells.append(f"{min(entry['train_seconds'] for entry in runs) / 60:.1f}")
            cells.append(f"{np.mean([entry['peak_memory_mib'] for entry in runs]):.0f}")
            lines.append(f"| {TITLES[loss]} | {f'SAM {rho:g}' if rho else 'SGD'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--rho", type=float, nargs="+", help="values of rho instead of 0 (SGD) and the chosen one")
    parser.add_argument("--jobs", type=int, default=1, help="number of simultaneous runs, which share the cores")
    args = parser.parse_args()
    threads = max(len(os.sched_getaffinity(0)) // args.jobs, 1)
    runs = [
        (loss, rho, seed, args.data_dir, threads)
        for seed in args.seeds
        for loss in args.losses
        for rho in args.rho or (0.0, LOSSES[loss][1])
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda values: measure(*values), runs):
            pass
    print(table(args.seeds, args.rho))


if __name__ == "__main__":
    main()
