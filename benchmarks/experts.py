"""DeiT-LT compared with the same student trained on labels only, and with its teacher, over seeds.

    python benchmarks/experts.py --recipe digits_lt --seeds 0 1 2

Every run is a separate process and writes its results to `benchmarks/results/`. A run with existing results is not
repeated, and an interrupted series continues. The seed changes the long-tailed subset, the initialisation, the
augmentation and the order. All numbers are of the last epoch.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from series import GROUPS, RESULTS, ROOT, mean_and_deviation, run, slug, write_record

from deitlt_hf.records import read_record

# What each student learns from, with the same epochs and the same end of mixing. With beta 0 all class weights are 1.
STUDENTS = {
    "DeiT-LT": [],
    "labels alone": ["--distillation", "none", "--drw_beta", "0"],
    "labels alone, second token re-weighted": ["--distillation", "none"],
}


class Series:
    """Runs of one recipe, each with its own folder and record."""

    def __init__(self, recipe: str, data_arguments: list[str]):
        self.recipe = recipe
        self.data_arguments = data_arguments

    def folder(self, name: str, seed: int) -> Path:
        return ROOT / "outputs" / "experts" / self.recipe / f"seed{seed}" / slug(name)

    def record(self, name: str, seed: int) -> Path:
        return RESULTS / f"{self.recipe}-{slug(name)}-seed{seed}.json"

    def run(self, name: str, seed: int, script: str, *arguments) -> None:
        """Runs a script and keeps its results."""
        print(f"{self.recipe}, seed {seed}: {name}", flush=True)
        command = [ROOT / "scripts" / script, "--recipe", self.recipe, "--output_dir", self.folder(name, seed)]
        command += ["--seed", seed, "--subset_seed", seed, "--overwrite", *arguments, *self.data_arguments]
        run(*command)
        write_record(self.record(name, seed), read_record(self.folder(name, seed)))

    def results(self, seeds: list[int]) -> dict[str, list[dict]]:
        """Results of all methods by seed; runs that are missing are made first."""
        for seed in seeds:
            teacher = self.folder("teacher", seed)
            wanted = not self.record("DeiT-LT", seed).exists() and not (teacher / "model.safetensors").exists()
            if wanted or not self.record("teacher", seed).exists():
                self.run("teacher", seed, "train_teacher.py")
            for name, arguments in STUDENTS.items():
                if not self.record(name, seed).exists():
                    self.run(name, seed, "distill.py", *(arguments or ["--teacher", teacher]))
        return {
            name: [json.loads(self.record(name, seed).read_text()) for seed in seeds] for name in ("teacher", *STUDENTS)
        }


def table(results: dict[str, list[dict]]) -> str:
    """Mean and standard deviation over seeds, in %, as Markdown."""
    lines = [f"| trained | expert | {' | '.join(GROUPS)} |", "|---|---|" + "---:|" * len(GROUPS)]
    for name, runs in results.items():
        for expert in runs[0]["last"]["accuracies"]:
            rows = [entry["last"]["accuracies"][expert] for entry in runs]
            cells = mean_and_deviation(100 * np.array([[row[group] for group in GROUPS] for row in rows]))
            lines.append(f"| {name} | {expert} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits_lt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data_dir")
    args = parser.parse_args()
    data_arguments = ["--data_dir", args.data_dir] if args.data_dir else []
    print(table(Series(args.recipe, data_arguments).results(args.seeds)))


if __name__ == "__main__":
    main()
