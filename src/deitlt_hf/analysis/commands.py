"""From a command line to a report, or to a fusion."""

from dataclasses import dataclass, field

import torch
from transformers import AutoImageProcessor

from ..data.images import ImageCollator, ImageDataset
from ..data.loading import training_counts
from ..data.long_tail import class_counts
from ..evaluation import ExpertTable, group_accuracies
from ..modeling_deitlt import DeiTLTForImageClassification
from ..recipes import DataArguments
from ..training.distillation import label_order
from ..training.report import quiet_log, run_files, show
from ..training.run import load_model
from .fusion import RULES, fit_fusion, fold
from .observe import predict
from .report import analyze, write_report
from .teaching import teacher_agreement


@dataclass
class AnalysisArguments:
    """What to look at, and where the report goes."""

    model: str = field(metadata={"help": "Folder or Hub id of a DeiT-LT, or a DeiT or ViT of transformers."})
    output: str = field(default="report", metadata={"help": "Folder of the report."})
    compare: str | None = field(default=None, metadata={"help": "Another model, to be put beside the first."})
    teacher: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the first model's teacher, to see how often they agree."}
    )
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
        agreement = None
        if args.teacher is not None and not sections:
            if not isinstance(model, DeiTLTForImageClassification):
                raise ValueError(f"{path} is no DeiT-LT student; leave --teacher out.")
            agreement = teacher_agreement(recipe, model, args.teacher, data, groups)
        sections.append(analyze(path, model, data, counts, groups, args.num_images, args.resamples, agreement))
    page = write_report(sections, recipe, groups, args.output)
    print(f"The report is in {page}.")


@dataclass
class FusionArguments:
    """How the experts of a student are put together."""

    fusion: str | None = field(
        default=None,
        metadata={
            "help": f"'all' compares the rules that are fitted on the training images: {', '.join(RULES)}. One of them "
            "alone is folded into the heads of the model in fused_output."
        },
    )
    fused_output: str | None = field(default=None, metadata={"help": "Folder for the model with the fusion folded in."})

    def __post_init__(self):
        if self.fusion not in (None, "all", *RULES):
            raise ValueError(f"fusion must be one of all, {', '.join(RULES)}, got {self.fusion!r}.")
        if (self.fused_output is not None) != (self.fusion in RULES):
            raise ValueError("one rule of --fusion and --fused_output belong together; --fusion all only compares.")


def compare_fusions(path: str, data_args: DataArguments, args: FusionArguments) -> dict[str, dict[str, float]]:
    """Fits fusions of a student's experts on the training images, without augmentation, and shows them on the test
    images.

    With one rule, the model with the fusion in its heads is saved in `args.fused_output`.

    Returns:
        Accuracies of each rule, see [`group_accuracies`].

    Raises:
        FileExistsError: If `args.fused_output` holds a model.
        ValueError: If the model has no experts, or the training images are streamed.
    """
    if data_args.streaming:
        raise ValueError("fusions are fitted on the training images at hand; leave --streaming out.")
    model = load_model(path).to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoImageProcessor.from_pretrained(path)
    data = data_args.load()
    counts, groups = training_counts(data["train"]), data_args.groups(data)
    seen = {
        split: predict(model, ImageDataset(data[split], "image", "label"), ImageCollator(processor))
        for split in ("train", "test")
    }
    if "cls" not in seen["test"][1]:
        raise ValueError(f"{path} has one expert only; a fusion needs a DeiT-LT student.")
    logits = {
        split: [torch.from_numpy(found[name]).double() for name in ("cls", "distillation")]
        for split, (_, found) in seen.items()
    }
    labels = torch.from_numpy(seen["train"][0])
    rules = list(RULES) if args.fusion == "all" else [args.fusion]
    fusions = {rule: fit_fusion(rule, *logits["train"], labels, counts, groups) for rule in rules}
    accuracies = {
        rule: group_accuracies(fusion(*logits["test"]).argmax(dim=1).numpy(), seen["test"][0], groups)
        for rule, fusion in fusions.items()
    }
    tested = class_counts(seen["test"][0], len(counts)).tolist()
    show(ExpertTable("fusions, fitted on the training images", accuracies, groups, tested))
    if args.fused_output is not None:
        if run_files(args.fused_output):
            raise FileExistsError(f"{args.fused_output} holds a model or run; choose another --fused_output.")
        fold(model, fusions[args.fusion]).save_pretrained(args.fused_output)
        processor.save_pretrained(args.fused_output)
        print(f"The mean of the heads in {args.fused_output} is the fusion.")
    return accuracies
