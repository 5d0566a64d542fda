"""Learning rates of Muon and AdamW for a student that starts from the trunk of a student of other classes.

    OMP_NUM_THREADS=1 python benchmarks/fine_tuning_rates.py --data_dir /usr/share/datasets/fashion-mnist

The first student learns five classes of Fashion-MNIST. Students that start from it, and one from scratch, learn a
long-tailed part of the other five, on labels with a balanced softmax. The test images are held out of the training
split, as in research/.
"""

import argparse
import sys
from pathlib import Path

from datasets import ClassLabel
from series import RESULTS, ROOT, write_record

from deitlt_hf.cli import main as deitlt
from deitlt_hf.data.sources.arrays import load_idx
from deitlt_hf.records import read_record

sys.path.append(str(ROOT / "research"))
from arms import SHORT, hold_out

OUTPUT = ROOT / "outputs" / "fine_tuning_rates"
# T-shirt, pullover, coat, shirt and bag for the trunk; trouser, dress, sandal, sneaker and ankle boot for the others.
CLASSES = {"trunk": (0, 2, 4, 6, 8), "target": (1, 3, 5, 7, 9)}
RECIPE = ("--recipe", "fashion_mnist_lt_tiny_fast", "--distillation", "none", "--patch_size", "7", *SHORT)
# Optimiser, learning rate, and whether the student starts from the trunk.
ARMS = [("muon", rate, True) for rate in (3e-3, 1e-3, 3e-4)] + [("adamw_torch", rate, True) for rate in (1e-3, 3e-4)]
ARMS += [("muon", 3e-3, False)]


def part(source: Path, name: str) -> Path:
    """Saves the images of some classes as a data set, with new labels."""
    folder = OUTPUT / f"{name}_images"
    if not folder.exists():
        splits = load_idx(source).filter(lambda label: label in CLASSES[name], input_columns="label")
        labels = ClassLabel(names=[splits["train"].features["label"].names[label] for label in CLASSES[name]])
        for split, rows in splits.items():
            new = [CLASSES[name].index(label) for label in rows["label"]]
            splits[split] = rows.remove_columns("label").add_column("label", new).cast_column("label", labels)
        splits.save_to_disk(folder)
    return folder


def train(name: str, data: Path, *options) -> dict:
    """Trains a student of five classes, or reads the record of a trained trunk; returns its accuracies in %."""
    classes = ("--class_names", *"abcde", "--group_boundaries", 2, 4)
    command = ("distill", *RECIPE, "--data_dir", data, "--output_dir", OUTPUT / name, *classes, *options)
    if name != "trunk" or not (OUTPUT / name / "model.safetensors").is_file():
        deitlt([str(argument) for argument in command])
    accuracies = read_record(OUTPUT / name)["last"]["accuracies"]["mean"]
    return {group: round(100 * accuracy, 1) for group, accuracy in accuracies.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder of the IDX files")
    parser.add_argument("--trunk_images", type=int, default=1000, help="images of each class for the trunk")
    parser.add_argument("--trunk_epochs", type=int, default=3)
    parser.add_argument("--max_per_class", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--record", type=Path, default=RESULTS / "fine_tuning_rates.json", help="output file")
    args = parser.parse_args()
    source = hold_out(args.data_dir)
    size = ("--imbalance_ratio", 1, "--max_per_class", args.trunk_images, "--num_train_epochs", args.trunk_epochs)
    trunk = train("trunk", part(source, "trunk"), *size, "--warmup_epochs", 0.5)
    record = {name: value for name, value in vars(args).items() if isinstance(value, int)} | {
        "trunk": trunk,
        "rows": [],
    }
    size = ("--max_per_class", args.max_per_class, "--num_train_epochs", args.epochs, "--warmup_epochs", 1)
    for optimizer, rate, is_started in ARMS:
        start = ("--init_from", OUTPUT / "trunk") if is_started else ()
        found = train("student", part(source, "target"), *size, *start, "--optim", optimizer, "--learning_rate", rate)
        record["rows"].append({"optimizer": optimizer, "learning_rate": rate, "from_trunk": is_started, **found})
        print(record["rows"][-1], flush=True)
        write_record(args.record, record)


if __name__ == "__main__":
    main()
