"""Converts a checkpoint of the DeiT-LT authors, student or teacher, to a model folder for transformers.

deitlt convert student.pth out/student --recipe cifar10_lt_rho100
deitlt convert paco.pth.tar out/teacher --class_names names.txt
deitlt convert ldam.pth.tar out/ldam_teacher --class_names names.txt --class_map out/student
"""

import argparse
from collections.abc import Sequence

from ..data import class_counts, read_class_map, read_class_names
from ..original import convert_original
from ..recipes import DataArguments
from ..training.inputs import label_names
from ..training.recipe import Recipe
from .parser import command_parser, parse_with_fields


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("file", help="the authors' .pth or .pth.tar file, or a .safetensors file with the same tensors")
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
    args, fields = parse_with_fields(_parser(), (DataArguments,), arguments)
    classes = {}
    if args.recipe is not None:
        labels = Recipe.load(args.recipe).data(**fields).load()["train"]
        classes["class_names"] = labels.features["label"].names
        classes["class_counts"] = class_counts(labels["label"][:], len(classes["class_names"])).tolist()
    if args.class_names is not None:
        classes["class_names"] = read_class_names(args.class_names)
    if args.class_map is not None:
        classes["class_map"] = read_class_map(args.class_map)
    if args.num_attention_heads is not None:
        classes["num_attention_heads"] = args.num_attention_heads
    model = convert_original(args.file, args.folder, args.ema, **classes)
    names = label_names(model.config)
    print(
        f"{args.folder}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{model.config.num_labels} classes ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
    )
