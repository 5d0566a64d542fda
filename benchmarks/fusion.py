"""Rules that combine DeiT-LT's experts, compared with their mean, over seeds.

    python benchmarks/fusion.py --recipe digits_lt --seeds 0 1 2

The script uses the students of `benchmarks/experts.py` and trains missing ones. The rules are fitted on the training
images; the table shows the test images. Records are in `benchmarks/results/`.
"""

import argparse
import json

import numpy as np
from experts import Series
from series import GROUPS, RESULTS, ROOT, mean_and_deviation, run, write_record


def fusions(series: Series, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies of each rule and expert."""
    student, teacher = series.folder("DeiT-LT", seed), series.folder("teacher", seed)
    if not (student / "model.safetensors").exists():
        if not (teacher / "model.safetensors").exists():
            series.run("teacher", seed, "train_teacher.py")
        series.run("DeiT-LT", seed, "distill.py", "--teacher", teacher)
    record = RESULTS / f"{series.recipe}-fusion-seed{seed}.json"
    part = student / "fusion.json"
    command = [ROOT / "scripts" / "evaluate.py", "--recipe", series.recipe, "--model", student, "--subset_seed", seed]
    run(*command, "--fusion", "all", "--json", part, *series.data_arguments)
    write_record(record, json.loads(part.read_text()))
    return json.loads(record.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits_lt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, rest = parser.parse_known_args()
    series = Series(args.recipe, rest)
    found = [fusions(series, seed) for seed in args.seeds]
    print("| prediction | overall | head | mid | tail |\n|---|---:|---:|---:|---:|")
    names = [name for name in found[0] if name not in ("mean", "cls")]  # "mean" is a rule as well
    for name in names:
        cells = mean_and_deviation(np.array([[100 * rows[name][group] for group in GROUPS] for rows in found]))
        print(f"| {name.removeprefix('fusion_')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
