"""Classifies image files and prints the most likely classes of each as text, JSON lines or CSV.

deitlt predict --model outputs/digits_lt_fast/student photo.jpg photos/ 'more/**/*.png'
deitlt predict --model outputs/digits_lt_fast/student --experts --csv photos/ > predictions.csv
find photos -newer yesterday | deitlt predict --model DIR_OR_HUB_ID --jsonl - > predictions.jsonl
"""

import argparse
import csv
import io
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..console import quiet_log
from ..data.sources.files import not_read
from ..io import one_line
from ..serving.handler import EXPERTS
from ..serving.prediction import find_images, load_classifier, predict_images
from .parser import command_parser

COLUMNS = ("image", "rank", "label", "score", "group", "training_images")
EXPERT_COLUMNS = ("cls_score", "distillation_score", "cls_label", "distillation_label")

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parsed(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:
        raise ValueError("standard output is closed; redirect it to a file, or to /dev/null.")
    if min(args.top_k, args.batch_size) < 1:
        raise ValueError("--top_k and --batch_size must be 1 or more.")
    others: Counter[str] = Counter()
    paths = find_images(args.images, others)
    total = None
    if "-" not in args.images:  # files are listed first to know their number; standard input may be endless
        listed = list(paths)
        paths, total = iter(listed), len(listed)
    first = next(paths, None)
    if first is None:
        found = f" ({not_read(others)})" if others else ""
        raise ValueError(
            f"no images in {one_line(', '.join(map(repr, args.images)))}; give files, or folders with images{found}."
        )
    try:
        is_complete = _classify(args, itertools.chain([first], paths), total)
        if others:
            print(f"warning: {not_read(others)}.", file=sys.stderr)
    except BrokenPipeError:  # the reader of the results, such as `head`, has closed the pipe
        # Else the interpreter would report another BrokenPipeError when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        is_complete = False
    if not is_complete:
        sys.exit(1)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    # Intermixed parsing allows images between options. In Python 3.11 it loses arguments after "--".
    return parser.parse_args(arguments) if "--" in arguments else parser.parse_intermixed_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a student, or of any image classifier")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="file; folder, searched with its subfolders; pattern; or - to read any of these from standard input, one "
        "per line",
    )
    parser.add_argument("--experts", action="store_true", help="also print the prediction of each expert")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--jsonl", action="store_true", help="print one JSON object per image, one per line")
    form.add_argument("--csv", action="store_true", help="print a table with a row for each class of each image")
    parser.add_argument("--top_k", type=int, default=5, help="number of classes for each image (default 5)")
    parser.add_argument("--batch_size", type=int, default=32, help="images per forward pass (default 32)")
    return parser


def _classify(args: argparse.Namespace, paths: Iterable[str], total: int | None) -> bool:
    """Prints each result as soon as it is ready; returns whether all images could be read."""
    quiet_log()
    write = _writer(args)
    classifier = load_classifier(args.model)
    done = unreadable = 0
    # A progress bar would mix with results on the same terminal.
    is_bar_hidden = sys.stdout.isatty() or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), redirect_stdout=False, disable=is_bar_hidden) as progress:
        bar = progress.add_task("images", total=total)
        for path, result in predict_images(classifier, paths, args.top_k, args.batch_size):
            done += 1
            if isinstance(result, ValueError):
                unreadable += 1
                print(f"error: {result}", file=sys.stderr)
            else:
                write(path, result if args.experts else _without_experts(result))
                sys.stdout.flush()
            progress.update(bar, advance=1)
    if unreadable:
        print(f"error: {unreadable} of {done} images could not be read.", file=sys.stderr)
    return unreadable == 0


def _without_experts(result: Result) -> Result:
    predictions = [
        {name: value for name, value in prediction.items() if name not in EXPERT_COLUMNS}
        for prediction in result["predictions"]
    ]
    return {"predictions": predictions}


def _writer(args: argparse.Namespace) -> Callable[[str, Result], None]:
    if args.jsonl:
        return _write_json
    if not args.csv:
        return _write_text
    # File names are bytes that may not be valid text; surrogateescape writes them unchanged.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    columns = COLUMNS + (EXPERT_COLUMNS if args.experts else ())
    # A file name can hold a carriage return, which Python before 3.13 quotes only with QUOTE_NONNUMERIC.
    table = csv.DictWriter(sys.stdout, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    table.writeheader()

    def write(path: str, result: Result) -> None:
        choices = {f"{expert}_label": result[expert]["label"] for expert in EXPERTS if expert in result}
        for rank, prediction in enumerate(result["predictions"], start=1):
            table.writerow({"image": path, "rank": rank} | prediction | choices)

    return write


def _write_json(path: str, result: Result) -> None:
    print(json.dumps({"image": path} | result))


def _write_text(path: str, result: Result) -> None:
    print(path if path.isprintable() else repr(path))
    for prediction in result["predictions"]:
        about = [prediction["group"]] if prediction["group"] else []
        if prediction["training_images"] is not None:
            about.append(f"{prediction['training_images']} training images")
        if "cls_score" in prediction:
            about += [f"cls {prediction['cls_score']:.1%}", f"distillation {prediction['distillation_score']:.1%}"]
        print(f"  {prediction['score']:6.1%}  {prediction['label']}" + (f"  ({', '.join(about)})" if about else ""))
    if "cls" in result:
        choices = (f"{expert} says {result[expert]['label']}" for expert in EXPERTS)
        print(f"          {', '.join(choices)}")
