"""Measures the flatness of a model's loss on training images, for all classes and for head, mid and tail.

deitlt sharpness --recipe digits_lt --model outputs/digits_lt_fast/teacher
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.markup import escape
from rich.table import Table

from ..analysis.flatness import images_of_groups, sharpness
from ..console import quiet_log, show
from ..data.images import ImageCollator
from ..options import option
from ..recipes import DataArguments, parse_arguments
from ..serving.classifiers import load_classifier, load_processor
from ..training.taught import label_order
from .json_output import json_output


@dataclass
class SharpnessArguments:
    """Options of the measurement."""

    model: str = option(help="Folder or Hub id of a teacher, a student, or any classifier.")
    num_images: int = option(512, "Maximum number of images overall, and of each group.")
    rho: float = option(0.05, "Radius around the weights for the rise of the loss.")
    num_vectors: int = option(32, "Random vectors for the estimate of the trace.")
    seed: int = option(0, "Seed of the choice of images and of the random vectors.")
    json: str | None = option(None, "Also write the figures to this file; - prints them instead of the table.")

    def __post_init__(self) -> None:
        for name in ("num_images", "num_vectors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if not self.rho > 0:
            raise ValueError(f"rho must be above 0, got {self.rho:g}.")


def main(arguments: Sequence[str] | None = None) -> None:
    _, args, data_args = parse_arguments("data", (SharpnessArguments, DataArguments), arguments, __doc__)
    quiet_log()
    if data_args.streaming:
        raise ValueError("the sharpness cannot be measured on streamed images; leave --streaming out.")
    with json_output(args.json) as write:
        model = load_classifier(args.model).float().to("cuda" if torch.cuda.is_available() else "cpu")
        collate = ImageCollator(load_processor(args.model))
        data = data_args.load()
        names = data["train"].features["label"].names
        dataset = collate.images(data["train"])
        order = label_order(names, model.config, "model")
        images = images_of_groups(model, dataset, collate, data_args.groups(data), args.num_images, order, args.seed)
        measured = {name: sharpness(model, batches, args.rho, args.num_vectors, args.seed) for name, batches in images}
        table = Table(
            "images of", "number", "loss", f"rise at {args.rho:g}", "eigenvalue", "trace", title=escape(str(args.model))
        )
        for name, found in measured.items():
            values = (found.loss, found.loss_rise, found.eigenvalue, found.trace)
            table.add_row(name, str(found.num_images), *(f"{value:.4g}" for value in values))
        show(table)
        write({name: dataclasses.asdict(found) for name, found in measured.items()})
