"""Converts a checkpoint of the DeiT-LT authors, student or teacher, to a folder that transformers loads.

deitlt convert student.pth out/student --recipe cifar10_lt_rho100
deitlt convert paco.pth.tar out/teacher --class_names names.txt
deitlt convert ldam.pth.tar out/ldam_teacher --class_names names.txt --class_map out/student
deitlt convert saved_by_0.1.0 out/student

Of a folder that an earlier version saved it makes one as this version saves it: the same weights, with an image
processor and code that more versions of transformers take.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoImageProcessor, PreTrainedModel

from ..data import class_counts, read_class_map, read_class_names
from ..hub.mending import mend_folder
from ..original import convert_original
from ..original.conversion import check_holds_no_model
from ..recipes import DataArguments, parse_arguments
from ..serving.loading import load_model
from ..training.inputs import label_names
from .parser import command_parser, parse_with_fields


def resave(source: str, folder: str) -> PreTrainedModel:
    """Saves the model of a folder, with its image processor, as this version does.

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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "file", help="the authors' .pth, .pth.tar, or a .safetensors file of the same tensors; or a model folder"
    )
    parser.add_argument("folder", help="where to write the model")
    parser.add_argument(
        "--recipe",
        help="take names and counts of the classes from this recipe's data; 'deitlt data --help' has its fields",
    )
    parser.add_argument("--class_names", help="file with the names: one a line, or JSON")
    parser.add_argument(
        "--class_map", help="for each class its row in the file's head: a JSON list, or a folder converted before"
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of a student's weights")
    parser.add_argument("--num_attention_heads", type=int, help="of a student whose heads are not 64 wide")
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
            raise ValueError(f"{args.file} is a model folder, which says itself what its classes are; give no options.")
        model = resave(args.file, args.folder)
    else:
        model = convert_original(args.file, args.folder, args.ema, **classes)
    names = label_names(model.config)
    print(
        f"{args.folder}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{model.config.num_labels} classes ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
    )
