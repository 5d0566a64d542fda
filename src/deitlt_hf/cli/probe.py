"""Measures what the frozen features of a backbone give: a linear classifier on them, with accuracies and intervals.

deitlt probe --recipe digits_lt --model outputs/digits_lt_fast/student
deitlt probe --recipe image_folder --data_dir photos --model facebook/dinov2-small --json probe.json

The classifier is a logistic regression with balanced classes. Its regularisation is chosen on a part of the training
images, never on the test images.
"""

from collections.abc import Sequence

from ..analysis.probing import ProbeArguments, probe, probe_figures
from ..console import quiet_log, show
from ..recipes import DataArguments, parse_arguments
from ..serving.classifiers import read_model_config
from .json_output import json_output


def main(arguments: Sequence[str] | None = None) -> None:
    _, args, data_args = parse_arguments("data", (ProbeArguments, DataArguments), arguments, __doc__)
    quiet_log()
    if data_args.streaming:
        raise ValueError("a probe reads all training images; leave --streaming out.")
    read_model_config(args.model)  # a wrong name must not be found after the images are loaded
    with json_output(args.json) as write:
        data = data_args.load()
        found = probe(args.model, data)
        table, figures = probe_figures(found, data["test"]["label"][:], data_args.groups(data), args.resamples)
        show(table)
        for note in table.notes:
            print(f"Note: {note}")
        of = "validation" if "validation" in data else "held-out training"
        chosen = f"chosen on {found.held_out:,} {of} images" if found.held_out else "not chosen, with one image a class"
        print(
            f"{found.features} features, {len(data['train']):,} training images, regularisation C = {found.strength:g} "
            f"{chosen}, {found.seconds:.1f} s."
        )
        write(figures)
