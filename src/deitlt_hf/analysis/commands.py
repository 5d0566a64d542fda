"""From a command line to a report."""

from dataclasses import dataclass, field

import torch

from ..data.loading import training_counts
from ..recipes import DataArguments
from ..training.distillation import label_order
from ..training.report import quiet_log
from ..training.run import load_model
from .report import analyze, write_report


@dataclass
class AnalysisArguments:
    """What to look at, and where the report goes."""

    model: str = field(metadata={"help": "Folder or Hub id of a DeiT-LT, or a DeiT or ViT of transformers."})
    output: str = field(default="report", metadata={"help": "Folder of the report."})
    compare: str | None = field(default=None, metadata={"help": "Another model, to be put beside the first."})
    num_images: int = field(default=512, metadata={"help": "Images whose attention and features are looked at."})
    resamples: int = field(default=200, metadata={"help": "Samples of the bootstrap for the intervals."})


def report(recipe: str, args: AnalysisArguments, data_args: DataArguments) -> None:
    """Looks at one model or two on a recipe's test images, and writes the report.

    Raises:
        ValueError: If a model has other classes than the data, in another order, or no attention over patches.
    """
    quiet_log()
    data = data_args.load()
    names = data["test"].features["label"].names
    counts, groups = training_counts(data["train"]), data_args.groups(data)
    sections = []
    for path in [args.model] if args.compare is None else [args.model, args.compare]:
        model = load_model(path).to("cuda" if torch.cuda.is_available() else "cpu")
        if label_order(names, model.config).tolist() != list(range(model.config.num_labels)):
            raise ValueError(f"{path} has the classes of {recipe} in another order, or others beside them.")
        sections.append(analyze(path, model, data, counts, groups, args.num_images, args.resamples))
    page = write_report(sections, recipe, groups, args.output)
    print(f"The report is in {page}.")
