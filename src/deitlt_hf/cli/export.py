"""Exports a model to ONNX, in float32 and with int8 weights, and compares the accuracy of the files with torch.

deitlt export --model outputs/digits_lt_fast/student
deitlt export --model outputs/digits_lt_fast/student --int8 --recipe digits_lt
deitlt export --model ORG/NAME --output exported --fixed_size
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..analysis.observe import predict
from ..console import quiet_log, show
from ..data.images import ImageCollator
from ..data.long_tail import class_counts
from ..evaluation import ExpertTable, group_accuracies
from ..io import check_can_be_folder
from ..model_folder import weights_digest
from ..recipes import DataArguments, data_help
from ..serving.classifiers import load_model, load_processor
from ..serving.onnx import (
    MODEL_FILE,
    QUANTIZED_FILE,
    OnnxClassifier,
    check_quantizable,
    export_onnx,
    quantize,
    require_libraries,
)
from ..training.output_folder import run_files
from ..training.recipe import Recipe
from ..training.taught import check_class_order
from .parser import command_parser, parse_with_fields

_CONFIGURATIONS = ("config.json", "preprocessor_config.json")


def compare(
    networks: Mapping[str, PreTrainedModel | OnnxClassifier], path: str, data: Mapping, data_args: DataArguments
) -> ExpertTable:
    """Measures each expert of a torch model at `path`, and of its ONNX files, on a recipe's test images."""
    groups = data_args.groups(data)
    collate = ImageCollator(load_processor(path))
    accuracies = {}
    for name, network in networks.items():
        images = collate.images(data["test"])
        labels, logits = predict(network, images, collate)
        for expert, values in logits.items():
            accuracies[f"{name}: {expert}"] = group_accuracies(values.argmax(axis=1), labels, groups)
    counts = class_counts(labels, data["test"].features["label"].num_classes).tolist()
    return ExpertTable("torch and the files", accuracies, groups, counts)


def main(arguments: Sequence[str] | None = None) -> None:
    args, fields = parse_with_fields(_parser(), (DataArguments,), arguments)
    require_libraries()
    quiet_log()
    folder = _output_folder(args.model, args.output)
    model = load_model(args.model)
    if args.int8:
        check_quantizable(model)
    found = [] if args.output is None else [cached_file(args.model, name) for name in _CONFIGURATIONS]
    if args.recipe is not None:
        data_args = Recipe.load(args.recipe).data(**fields)
        data = data_args.load()
        check_class_order(data["test"].features["label"].names, model.config, f"model {args.model}")
    config_file = cached_file(args.model, "config.json")
    digest = None if config_file is None else weights_digest(Path(config_file).parent)
    files = {"ONNX float32": export_onnx(model, folder, not args.fixed_size, digest)}
    if args.int8:
        files["ONNX int8"] = quantize(files["ONNX float32"])
    for configuration in filter(None, found):
        shutil.copyfile(configuration, folder / Path(configuration).name)
    if args.recipe is not None:
        forms = {"torch": model} | {name: OnnxClassifier(path) for name, path in files.items()}
        show(compare(forms, args.model, data, data_args))
    for name, path in files.items():
        print(f"{name}: {path}, {path.stat().st_size / 1e6:.1f} MB")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, data_help())
    parser.add_argument("--model", required=True, help="folder or Hub id of a student, a teacher, or a DeiT or ViT")
    parser.add_argument(
        "--output", metavar="FOLDER", help=f"folder for {MODEL_FILE}; by default the folder of the model"
    )
    parser.add_argument("--int8", action="store_true", help=f"also write {QUANTIZED_FILE}, with int8 weights")
    parser.add_argument("--fixed_size", action="store_true", help="accept only images of the model's image size")
    parser.add_argument(
        "--recipe", help="compare the accuracy of torch and the files on this recipe's test images, see below"
    )
    return parser


def _output_folder(model: str, output: str | None) -> Path:
    """Returns the folder to write to.

    Raises:
        FileExistsError: If the folder holds another model, or cannot be created.
        ValueError: If the model is on the Hub and no output folder is given.
    """
    if output is not None:
        check_can_be_folder(output)
        if run_files(output):
            raise FileExistsError(
                f"{output} holds a model; choose another --output, or leave it out to write to the folder of --model."
            )
        return Path(output)
    if not Path(model).is_dir() and model.count("/") == 1:
        raise ValueError(
            f"there is no folder {model!r}; for a model on the Hub, give --output, a folder for the files."
        )
    return Path(model)
