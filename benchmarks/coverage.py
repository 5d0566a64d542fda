"""Coverage of prediction sets by group over random halves of the test images, beside one threshold for all classes.

    python benchmarks/coverage.py --model outputs/digits_lt/student

Each split fits the sets on one half of the recipe's test images and measures coverage and size on the other half.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from series import RESULTS, write_record

from deitlt_hf.analysis.observe import predict
from deitlt_hf.data.images import ImageCollator, ImageDataset
from deitlt_hf.evaluation.prediction_sets import fit_prediction_sets
from deitlt_hf.recipes import DataArguments, parse_arguments
from deitlt_hf.serving.classifiers import load_model, load_processor


def measure(scores: np.ndarray, labels: np.ndarray, groups: dict, coverage: float, by_group: bool, splits: int) -> dict:
    """Mean and standard deviation over splits of coverage (in %) and mean size of the sets of each group."""
    found = {name: [] for name in groups}
    rule = groups if by_group else {}
    for seed in range(splits):
        first, second = np.array_split(np.random.default_rng(seed).permutation(len(labels)), 2)
        sets = fit_prediction_sets(scores[first], labels[first], rule, coverage)
        members = sets.members(scores[second], rule)
        covered = members[np.arange(len(second)), labels[second]]
        for name, classes in groups.items():
            chosen = np.isin(labels[second], classes)
            found[name].append((100 * covered[chosen].mean(), members[chosen].sum(axis=1).mean()))
    columns = ("coverage", "coverage_deviation", "size", "size_deviation")
    stacked = {name: np.array(rows) for name, rows in found.items()}
    return {
        name: dict(zip(columns, np.stack([rows.mean(0), rows.std(0)]).T.ravel().round(2).tolist(), strict=True))
        for name, rows in stacked.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a student of the recipe")
    parser.add_argument("--recipe", default="digits_lt")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--record", default=str(RESULTS / "coverage.json"), help="output file")
    args = parser.parse_args()
    data = parse_arguments("data", (DataArguments,), ["--recipe", args.recipe])[1].load()
    model, collate = load_model(args.model), ImageCollator(load_processor(args.model))
    labels, logits = predict(model, ImageDataset(data["test"], "image", "label"), collate)
    scores = torch.from_numpy(logits["mean"]).softmax(dim=-1).numpy()
    groups = model.config.class_groups
    record = {"recipe": args.recipe, "test_images": len(labels), "splits": args.splits}
    for coverage in (0.8, 0.9):
        for name, by_group in (("one threshold", False), ("a threshold for each group", True)):
            record[f"{name}, {coverage:.0%}"] = measure(scores, labels, groups, coverage, by_group, args.splits)
    write_record(Path(args.record), record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
