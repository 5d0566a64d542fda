"""Prediction sets of a saved model: fitted on images that it did not learn, measured, and stored in its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from scipy.stats import binomtest

from ..console import show
from ..data.images import ImageCollator
from ..data.long_tail import Groups
from ..evaluation.prediction_sets import ALL, PredictionSets, fit_prediction_sets, needed_images
from ..hub.cards import CARD_FILE, write_card
from ..io import read_json, write_json
from ..options import option
from ..recipes import DataArguments
from ..serving.classifiers import load_model, load_processor
from ..training.taught import check_class_order
from .observe import predict


@dataclass
class CalibrationArguments:
    """The model, and the share of its sets that are to hold the true class."""

    model: str = option(help="Folder of a student, a teacher, or any classifier; its config.json changes.")
    coverage: float = option(0.9, "Target coverage: the share of prediction sets that contain the true class.")
    calibration_seed: int = option(0, "Seed that divides the test images, if there is no validation split.")

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage must be between 0 and 1, such as 0.9, got {self.coverage}.")
        if not Path(self.model, "config.json").is_file():
            raise FileNotFoundError(f"{self.model} is not a model folder; its config.json stores the thresholds.")


def calibrate(args: CalibrationArguments, data_args: DataArguments) -> PredictionSets:
    """Fits prediction sets, measures them on other images, and stores them in the model's configuration.

    They are fitted on the validation images if the data have some, and otherwise on a random half of the test images;
    they are measured on the (other) test images. The model must not have been trained on, or chosen by, either.
    """
    model = load_model(args.model).float().to("cuda" if torch.cuda.is_available() else "cpu")
    collate = ImageCollator(load_processor(args.model))
    data = data_args.load()
    check_class_order(data["test"].features["label"].names, model.config, f"model {args.model}")
    groups: Groups = getattr(model.config, "class_groups", None) or data_args.groups(data)
    known, source = {}, "the validation images"
    for split in data.keys() & {"validation", "test"}:
        labels, logits = predict(model, collate.images(data[split]), collate)
        # By torch, as the handler computes the scores that it compares with the thresholds.
        known[split] = (labels, torch.from_numpy(logits["mean"]).softmax(dim=-1).numpy())
    if "validation" not in known:
        labels, scores = known["test"]
        first, second = np.array_split(np.random.default_rng(args.calibration_seed).permutation(len(labels)), 2)
        known = {"validation": (labels[first], scores[first]), "test": (labels[second], scores[second])}
        source = "half of the test images"
    sets = fit_prediction_sets(known["validation"][1], known["validation"][0], groups, args.coverage)
    _store(args.model, sets, groups)
    show(_table(sets, groups, *known["test"], f"prediction sets of {100 * args.coverage:.4g}%, fitted on {source}"))
    for name, number in sets.images.items():
        if number < needed_images(args.coverage):
            print(
                f"Note: {name} has {number} images to fit on, and {needed_images(args.coverage)} are needed: every set "
                "holds all of its classes."
            )
    return sets


def _store(folder: str, sets: PredictionSets, groups: Groups) -> None:
    path = Path(folder) / "config.json"
    stored: dict[str, Any] = {"prediction_sets": sets.to_dict()}
    if groups:
        stored["class_groups"] = {name: np.asarray(classes).tolist() for name, classes in groups.items()}
    write_json(path, read_json(path) | stored)
    if (Path(folder) / CARD_FILE).is_file():
        write_card(folder)


def _table(sets: PredictionSets, groups: Groups, labels: np.ndarray, scores: np.ndarray, title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "coverage and sizes on other test images; in brackets the 95 % interval of the coverage"
    for name in ("group", "fitted on", "threshold", "test images", "coverage in %", "classes in a set"):
        table.add_column(name, justify="left" if name == "group" else "right")
    members = sets.members(scores, groups)
    is_covered, sizes = members[np.arange(len(labels)), labels], members.sum(axis=1)
    rows = {name: np.isin(labels, np.asarray(classes, np.int64)) for name, classes in groups.items()}
    for name, chosen in (rows | {ALL: np.ones(len(labels), bool)}).items():
        number, covered = int(chosen.sum()), int(is_covered[chosen].sum())
        threshold = f"{sets.thresholds[name]:.4f}" if name in sets.thresholds else ""
        measured = "-"
        if number:
            low, high = binomtest(covered, number).proportion_ci()  # exact, by Clopper and Pearson
            measured = f"{100 * covered / number:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        size = f"{sizes[chosen].mean():.2f}" if number else "-"
        fitted = sets.images[name] if name in sets.images else sum(sets.images.values())
        table.add_row(escape(name), str(fitted), threshold, str(number), measured, size)
    return table
