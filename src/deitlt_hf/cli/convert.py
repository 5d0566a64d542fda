"""Converts a checkpoint of the DeiT-LT authors, student or teacher, to a model folder for transformers.

deitlt convert student.pth out/student --recipe cifar10_lt_rho100
deitlt convert paco.pth.tar out/teacher --class_names names.txt
deitlt convert ldam.pth.tar out/ldam_teacher --class_names names.txt --class_map out/student
deitlt convert saved_by_0.1.0 out/student

It also converts a model folder of an earlier version of this package: the new folder has the same weights, and an image
processor and code that work with more versions of transformers.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoImageProcessor, PreTrainedModel

from ..data import class_counts, read_class_map, read_class_names
from ..hub.mending import mend_folder
from ..original import convert_original
from ..original.conversion import check_holds_no_model
from ..recipes import DataArguments, parse_arguments
from ..serving.classifiers import load_model
from ..training.inputs import label_names
from .parser import command_parser, parse_with_fields


def resave(source: str, folder: str) -> PreTrainedModel:
    """Saves a model folder of an earlier version, with its image processor, in the format of this version.

    Raises:
        FileExistsError: If the new folder holds a model, or is a file.
        FileNotFoundError: If the source has no model.
    """
    check_holds_no_model(folder)
    processor, model = AutoImageProcessor.from_pretrained(source), load_model(source)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    mend_folder(folder)
    return model


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument(
        "file", help="the authors' .pth or .pth.tar file, a .safetensors file with the same tensors, or a model folder"
    )
    parser.add_argument("folder", help="folder to write the model to")
    parser.add_argument(
        "--recipe",
        help="take names and counts of the classes from this recipe's data; 'deitlt data --help' lists its fields",
    )
    parser.add_argument("--class_names", help="file with the class names: one per line, or JSON")
    parser.add_argument(
        "--class_map",
        help="the row of each class in the classifier of the file: a JSON list, or a folder that was converted before",
    )
    parser.add_argument("--ema", action="store_true", help="convert the moving average of a student's weights")
    parser.add_argument(
        "--num_attention_heads", type=int, help="number of heads of a student whose heads are not 64 wide"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args, rest = parse_with_fields(parser, (DataArguments,), arguments)
    classes = {}
    if args.recipe is not None:
        _, data_args = parse_arguments("data", (DataArguments,), ["--recipe", args.recipe, *rest])
        labels = data_args.load()["train"]
        classes["class_names"] = labels.features["label"].names
        classes["class_counts"] = class_counts(labels["label"][:], len(classes["class_names"])).tolist()
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.class_names is not None:
        classes["class_names"] = read_class_names(args.class_names)
    if args.class_map is not None:
        classes["class_map"] = read_class_map(args.class_map)
    if args.num_attention_heads is not None:
        classes["num_attention_heads"] = args.num_attention_heads
    if Path(args.file).is_dir():
        if classes or args.ema:
            raise ValueError(f"{args.file} is a model folder, which already has its classes; give no options.")
        model = resave(args.file, args.folder)
    else:
        model = convert_original(args.file, args.folder, args.ema, **classes)
    names = label_names(model.config)
    print(
        f"{args.folder}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{model.config.num_labels} classes ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
    )
