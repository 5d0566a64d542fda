"""Prints the accuracy of each expert of a saved student or teacher on a recipe's test images.

deitlt evaluate --recipe digits_lt --model outputs/digits_lt_fast/student
deitlt evaluate --recipe digits_lt --model outputs/digits_lt_fast/student --fusion all
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass

import torch

from ..analysis.observe import predict
from ..console import show
from ..data.images import ImageCollator
from ..data.loading import training_counts
from ..data.long_tail import class_counts
from ..evaluation import ExpertTable, group_accuracies
from ..evaluation.fusion import RULES, balanced_rows, fit_fusion, fold
from ..io import check_can_be_folder
from ..options import option
from ..recipes import DataArguments, parse_arguments
from ..serving.classifiers import load_model, load_processor
from ..training import DeiTLTTrainingArguments
from ..training.output_folder import run_files
from ..training.runs import EVALUATION_FIELDS, evaluate
from ..training.taught import check_class_order
from .json_output import json_output

# The training arguments that affect an evaluation. Other arguments would be accepted, but have no effect.
RunArguments = make_dataclass(
    "RunArguments",
    [
        (item.name, item.type, copy.copy(item))
        for item in fields(DeiTLTTrainingArguments)
        if item.name in EVALUATION_FIELDS
    ],
)


@dataclass
class EvaluationArguments:
    """The model to evaluate, and the output."""

    model: str = option(help="Folder or Hub id of a student, a teacher, or any classifier.")
    json: str | None = option(None, "Also write the accuracies to this file; - prints them instead of the tables.")


@dataclass
class FusionArguments:
    """Options to combine the experts of a student by a fitted rule."""

    fusion: str | None = option(
        None,
        "Rule to combine the experts, fitted on the training images, or with --validation_fraction on the "
        f"validation images: one of {', '.join(RULES)}. The model in fused_output has the rule folded into its "
        "heads. 'all' compares all rules.",
    )
    fused_output: str | None = option(None, "Folder for the model with the fusion folded into its heads.")

    def __post_init__(self) -> None:
        if self.fusion not in (None, "all", *RULES):
            raise ValueError(f"fusion must be one of all, {', '.join(RULES)}, got {self.fusion!r}.")
        if (self.fused_output is not None) != (self.fusion in RULES):
            raise ValueError("one rule of --fusion and --fused_output must be given together; 'all' only compares.")


def compare_fusions(path: str, data_args: DataArguments, args: FusionArguments) -> dict[str, dict[str, float]]:
    """Fits fusions of a student's experts, and prints and returns their accuracy on the test images.

    They are fitted on the validation images, or without such on the training images. With one rule, the model with the
    fusion folded into its heads is saved in `args.fused_output`.

    Raises:
        FileExistsError: If `args.fused_output` holds a model, or is a file.
        ValueError: If the model has only one expert, its classes have another order, or the training images are
            streamed.
    """
    _check_free(args.fused_output)
    if data_args.streaming:
        raise ValueError("a fusion cannot be fitted on streamed training images; leave --streaming out.")
    model = load_model(path).to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    collate = ImageCollator(load_processor(path))
    data = data_args.load()
    check_class_order(data["train"].features["label"].names, model.config, f"model {path}")
    counts, groups = training_counts(data["train"]), data_args.groups(data)
    source = "validation" if "validation" in data else "train"
    fitted = data[source].select(balanced_rows(data[source]["label"][:]))
    labels, logits = predict(model, collate.images(fitted), collate)
    if "cls" not in logits:
        raise ValueError(f"{path} has one expert only; a fusion needs a DeiT-LT student.")
    true, tested = predict(model, collate.images(data["test"]), collate)
    (cls, distillation), tested_heads = (
        [torch.from_numpy(found[name]).double() for name in ("cls", "distillation")] for found in (logits, tested)
    )
    rules = RULES if args.fusion == "all" else [str(args.fusion)]
    fusions = {rule: fit_fusion(rule, cls, distillation, torch.from_numpy(labels), counts, groups) for rule in rules}
    accuracies = {
        rule: group_accuracies(fusion(*tested_heads).argmax(dim=1).numpy(), true, groups)
        for rule, fusion in fusions.items()
    }
    title = f"fusions, fitted on the {'training' if source == 'train' else source} images"
    show(ExpertTable(title, accuracies, groups, class_counts(true, len(counts)).tolist()))
    if args.fused_output is not None:
        fold(model, fusions[str(args.fusion)]).save_pretrained(args.fused_output)
        collate.image_processor.save_pretrained(args.fused_output)
        print(f"The fused model is in {args.fused_output}: the mean of its heads is the fusion.")
    return accuracies


def _check_free(folder: str | None) -> None:
    if folder is None:
        return
    check_can_be_folder(folder)
    if run_files(folder):
        raise FileExistsError(f"{folder} holds a model or run; choose another --fused_output.")


def main(arguments: Sequence[str] | None = None) -> None:
    classes = (EvaluationArguments, FusionArguments, DataArguments, RunArguments)
    _, what, fusion_args, data_args, run_args = parse_arguments("student", classes, arguments, __doc__, partly=True)
    _check_free(fusion_args.fused_output)
    with json_output(what.json) as write:
        trainer = evaluate(what.model, data_args, DeiTLTTrainingArguments(**vars(run_args)))
        if not trainer.is_world_process_zero():
            return
        accuracies = dict(trainer.last_table.accuracies)
        if fusion_args.fusion is not None:
            fused = compare_fusions(what.model, data_args, fusion_args)
            accuracies |= {f"fusion_{rule}": row for rule, row in fused.items()}
        write(accuracies)
