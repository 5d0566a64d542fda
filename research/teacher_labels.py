"""Labels that teachers give the images that a student is trained on: how often they name each group of classes.

python research/teacher_labels.py --recipe R --teachers NAME=DIR ... --json FILE
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from deitlt_hf import DeiTLTForImageClassification, DeiTLTTrainer, DeiTLTTrainingArguments
from deitlt_hf.recipes import DataArguments, StudentArguments, parse_arguments
from deitlt_hf.serving.classifiers import load_classifier

UNMIXED = ("--mixup", "0", "--cutmix", "0")
# The views that a teacher can see, as options of `scripts/distill.py`.
VIEWS = {
    "out of distribution": (),
    "out of distribution, not mixed": UNMIXED,
    "in distribution": ("--teacher_view", "weak", *UNMIXED),
}


def trainer_of(argv: Sequence[str], teacher: str, folder: str) -> DeiTLTTrainer:
    """The trainer of a student, as `scripts/distill.py` makes it."""
    argv = [*argv, "--output_dir", folder, "--dataloader_num_workers", "0", "--report_to", "none"]
    classes = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
    _, data_args, model_args, args = parse_arguments("student", classes, argv)
    data = data_args.load()
    names = data["train"].features["label"].names
    return DeiTLTTrainer(
        model=DeiTLTForImageClassification(model_args.config(id2label=dict(enumerate(names)))),
        args=args,
        teacher=load_classifier(teacher),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        groups=data_args.groups(data),
    )


@torch.no_grad()
def labels_of_epoch(trainer: DeiTLTTrainer) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's class for each image of the first epoch, and the class with the largest share of the image."""
    seen, true = [], []
    for batch in trainer.get_train_dataloader():
        trainer.seed_micro_batch(len(seen), purpose=1)  # all teachers see the same images
        prepared = trainer.training_batch(batch)
        labels = prepared["labels"]
        seen.append(prepared["teacher_logits"].argmax(dim=1))
        true.append(labels.argmax(dim=1) if labels.dim() == 2 else labels)
    return torch.cat(seen).numpy(), torch.cat(true).numpy()


def shares(labels: np.ndarray, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Shares of the groups among some labels."""
    return {name: float(np.isin(labels, list(classes)).mean()) for name, classes in groups.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teachers", required=True, nargs="+", metavar="NAME=DIR", help="the others are compared to the first"
    )
    parser.add_argument("--json", required=True)
    args, rest = parser.parse_known_args()
    teachers = dict(teacher.split("=", 1) for teacher in args.teachers)
    views = {}
    for view, options in VIEWS.items():
        said = {}
        for name, path in teachers.items():
            with tempfile.TemporaryDirectory() as scratch:
                trainer = trainer_of([*rest, *options], path, scratch)
                said[name], true = labels_of_epoch(trainer)
        first = next(iter(said.values()))
        views[view] = {
            name: {
                **shares(labels, trainer.groups),
                "right": float((labels == true).mean()),
                "as first": float((labels == first).mean()),
            }
            for name, labels in said.items()
        }
    # Mixing pairs the images of a batch, and does not change these images.
    found = {"images": {"number": len(true), **shares(true, trainer.groups)}, "views": views}
    with open(args.json, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
