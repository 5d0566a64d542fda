"""Measures how flat the loss of a model is on training images, for all classes and for head, mid and tail.

deitlt sharpness --recipe digits_lt --model outputs/digits_lt/teacher

Every field of a recipe's data can be given too.
"""

import dataclasses
from collections.abc import Sequence

import torch
from rich.markup import escape
from rich.table import Table
from transformers import AutoImageProcessor

from ..analysis.sharpness import sharpness_of_groups
from ..data.images import ImageCollator, ImageDataset
from ..recipes import DataArguments, parse_arguments
from ..training.distillation import label_order
from ..training.report import quiet_log, show
from ..training.run import load_classifier
from .output import json_output
from .parser import command_parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a teacher, a student, or any classifier")
    parser.add_argument("--num_images", type=int, default=512, help="images overall, and of each group, at most")
    parser.add_argument("--rho", type=float, default=0.05, help="radius of the loss rise")
    parser.add_argument("--num_vectors", type=int, default=32, help="random vectors for the trace")
    parser.add_argument("--seed", type=int, default=0, help="of images and vectors")
    parser.add_argument("--json", help="write the figures to this file too; - prints them in place of the table")
    parser.add_argument("--recipe", required=True, help="recipe of the data")
    args, rest = parser.parse_known_args(arguments)
    quiet_log()
    _, data_args = parse_arguments("data", (DataArguments,), ["--recipe", args.recipe, *rest])
    if data_args.streaming:
        raise ValueError("the sharpness needs images at hand; leave --streaming out.")
    with json_output(args.json) as write:
        model = load_classifier(args.model).float().to("cuda" if torch.cuda.is_available() else "cpu")
        collate = ImageCollator(AutoImageProcessor.from_pretrained(args.model))
        data = data_args.load()
        names = data["train"].features["label"].names
        dataset = ImageDataset(data["train"], "image", "label")
        measured = sharpness_of_groups(
            model,
            dataset,
            collate,
            data_args.groups(data),
            args.num_images,
            label_order(names, model.config, "model"),
            rho=args.rho,
            num_vectors=args.num_vectors,
            seed=args.seed,
        )
        table = Table(
            "images of", "number", "loss", f"rise at {args.rho:g}", "eigenvalue", "trace", title=escape(str(args.model))
        )
        for name, found in measured.items():
            values = (found.loss, found.loss_rise, found.eigenvalue, found.trace)
            table.add_row(name, str(found.num_images), *(f"{value:.4g}" for value in values))
        show(table)
        write({name: dataclasses.asdict(found) for name, found in measured.items()})
