"""Complete analysis of one or two models: figures, tables and the report page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..console import quiet_log, show
from ..data.loading import training_counts
from ..data.long_tail import class_counts
from ..evaluation import ExpertTable
from ..model_folder import weights_digest
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..options import option
from ..recipes import DataArguments
from ..serving.classifiers import load_model
from ..training.taught import label_order
from .observe import check_transformer
from .pictures import require_matplotlib
from .report import analyze
from .report_page import Section, check_report_folder, write_report
from .teaching import teacher_agreement


@dataclass
class AnalysisArguments:
    """Options of the analysis: models, sample sizes and the folder of the report."""

    model: str = option(help="Folder or Hub id of a DeiT-LT, or a DeiT or ViT of transformers.")
    output: str = option("report", "Folder of the report.")
    compare: str | None = option(None, "Another model, shown next to the first.")
    teacher: str | None = option(
        None, "Folder or Hub id of the first model's teacher; the report then shows how often they agree."
    )
    num_images: int = option(512, "Number of images for attention and features.")
    resamples: int = option(200, "Bootstrap samples for the confidence intervals.")
    sharpness_images: int = option(
        128, "Training images, overall and of each group, for the flatness of the loss; 0 leaves it out."
    )
    json: str | None = option(None, "Also write the figures to this file; - prints them instead of the tables.")

    def __post_init__(self) -> None:
        for name, least in (("num_images", 2), ("resamples", 1), ("sharpness_images", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}.")


def report(recipe: str, args: AnalysisArguments, data_args: DataArguments, tables: bool = True) -> Path:
    """Analyses one or two models on a recipe's test images, writes the report, and returns its HTML page.

    Raises:
        FileExistsError: If `args.output` is a file, or holds a page or record that is not from this command.
        ValueError: If a model does not know the classes of the data or has no attention over patches, or matplotlib is
            not installed.
    """
    quiet_log()
    require_matplotlib()
    check_report_folder(args.output)
    data = data_args.load()
    names = data["test"].features["label"].names
    counts, groups = training_counts(data["train"]), data_args.groups(data)
    models = _models(args, names)
    Path(args.output).mkdir(parents=True, exist_ok=True)  # fails before the work, and only after the models are checked
    sections: list[Section] = []
    for path, model, order in models:
        agreement = None
        if args.teacher is not None and not sections:
            agreement = teacher_agreement(recipe, model, args.teacher, data, groups)
        section = analyze(
            path,
            model,
            data,
            counts,
            groups,
            args.num_images,
            args.resamples,
            0 if data_args.streaming else args.sharpness_images,
            agreement,
            order,
        )
        section.findings["weights_sha256"] = weights_digest(path)
        sections.append(section)
        if tables:
            accuracies = {
                expert: {name: row[name] for name in ("overall", *groups)} for expert, row in section.figures.items()
            }
            show(ExpertTable(path, accuracies, groups, class_counts(data["test"]["label"][:], len(names)).tolist()))
    page = write_report(sections, recipe, groups, args.output)
    print(f"The report is in {page}.")
    return page


def _models(args: AnalysisArguments, names: Sequence[str]) -> list[tuple[str, PreTrainedModel, torch.Tensor]]:
    """Loads and checks the models: path, model, and positions of the data's classes among its own."""
    models = []
    for path in [args.model] if args.compare is None else [args.model, args.compare]:
        model = load_model(path).float().to("cuda" if torch.cuda.is_available() else "cpu")
        check_transformer(model)
        models.append((path, model, label_order(names, model.config, f"model {path}")))
    if args.teacher is not None and not isinstance(models[0][1], DeiTLTForImageClassification):
        raise ValueError(f"{args.model} is not a DeiT-LT student; leave --teacher out.")
    return models
