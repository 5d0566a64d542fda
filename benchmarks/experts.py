"""DeiT-LT beside the same student on labels alone, and beside its teacher, over seeds.

    python benchmarks/experts.py --recipe digits_lt --seeds 0 1 2
    python benchmarks/experts.py --recipe fashion_mnist_lt_tiny --seeds 0 --data_dir DIR

Every run is a process of its own and leaves its results in `benchmarks/results/`; a run whose results are there is not
repeated, so that an interrupted series goes on. The seed changes the long-tailed subset, the initialisation, the
augmentation and the order. All numbers are of the last epoch.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# What a student learns from, with the same epochs and the same end of mixing. With beta 0 all class weights are 1.
STUDENTS = {
    "DeiT-LT": [],
    "labels alone": ["--distillation", "none", "--drw_beta", "0"],
    "labels alone, second token re-weighted": ["--distillation", "none"],
}
COLUMNS = ("overall", "head", "mid", "tail")


def run(recipe: str, name: str, seed: int, script: str, arguments: list[str], data_arguments: list[str]) -> dict:
    """Runs a script unless its results are there, and returns them."""
    slug = name.lower().replace(",", "").replace(" ", "_")
    record = RESULTS / f"{recipe}-{slug}-seed{seed}.json"
    if not record.exists():
        output_dir = ROOT / "outputs" / "experts" / recipe / f"seed{seed}" / slug
        print(f"{recipe}, seed {seed}: {name}", flush=True)
        command = [sys.executable, ROOT / "scripts" / script, "--recipe", recipe, "--output_dir", output_dir]
        command += ["--seed", seed, "--subset_seed", seed, "--overwrite", *arguments, *data_arguments]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        results = json.loads((output_dir / "results.json").read_text())
        part = record.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, record)
    return json.loads(record.read_text())


def series(recipe: str, seeds: list[int], data_arguments: list[str]) -> dict[str, list[dict]]:
    """Results of all runs, by method and then by seed."""
    results = {}
    for seed in seeds:
        results.setdefault("teacher", []).append(run(recipe, "teacher", seed, "train_teacher.py", [], data_arguments))
        teacher = ["--teacher", ROOT / "outputs" / "experts" / recipe / f"seed{seed}" / "teacher"]
        for name, arguments in STUDENTS.items():
            given = arguments or teacher
            results.setdefault(name, []).append(run(recipe, name, seed, "distill.py", given, data_arguments))
    return results


def table(results: dict[str, list[dict]]) -> str:
    """Mean and standard deviation over seeds, in %, as Markdown."""
    lines = ["| trained | expert | " + " | ".join(COLUMNS) + " | minutes |", "|---|---|" + "---:|" * (len(COLUMNS) + 1)]
    for name, runs in results.items():
        minutes = np.mean([entry["train_seconds"] for entry in runs]) / 60
        for expert in runs[0]["last"]["accuracies"]:
            rows = [entry["last"]["accuracies"][expert] for entry in runs]
            values = 100 * np.array([[row[column] for column in COLUMNS] for row in rows])
            cells = [f"{mean:.1f}" for mean in values.mean(axis=0)]
            if len(runs) > 1:
                spread = values.std(axis=0, ddof=1)
                cells = [f"{cell} ± {deviation:.1f}" for cell, deviation in zip(cells, spread, strict=True)]
            lines.append(f"| {name} | {expert} | {' | '.join(cells)} | {minutes:.1f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits_lt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data_dir")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    data_arguments = ["--data_dir", args.data_dir] if args.data_dir else []
    print(table(series(args.recipe, args.seeds, data_arguments)))


if __name__ == "__main__":
    main()
