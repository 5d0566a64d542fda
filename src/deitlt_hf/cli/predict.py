"""Classifies image files and prints the most likely classes of each, or writes them and features into a folder.

deitlt predict --model outputs/digits_lt_fast/student photo.jpg photos/ 'more/**/*.png'
deitlt predict --model outputs/digits_lt_fast/student --experts --csv photos/ > predictions.csv
find photos -newer yesterday | deitlt predict --model DIR_OR_HUB_ID --jsonl - > predictions.jsonl
deitlt predict --model DIR_OR_HUB_ID photos/ --output predictions --features tokens
deitlt predict --model DIR_OR_HUB_ID --dataset ORG/NAME --split test --output predictions
accelerate launch --no_python deitlt predict --model DIR_OR_HUB_ID photos/ --output predictions
"""

import argparse
import csv
import io
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress

from ..console import quiet_log
from ..data.images import usable_cores
from ..data.sources.files import not_read
from ..io import one_line
from ..serving.classifiers import read_model_config
from ..serving.handler import EXPERTS
from ..serving.prediction import find_images, load_handler, predict_images, read_file
from ..serving.rows import DatasetImages, dataset_images
from ..serving.shards import FEATURES, FORMATS, Contents, Shards, Tabulator, predict_shards
from .parser import command_parser

COLUMNS = ("image", "rank", "label", "score", "group", "training_images")
SPLIT = "test"
SHOWN = 20  # classes of a prediction set that are printed as text
DATA_SUFFIXES = {".parquet", ".arrow", ".tar", ".csv", ".jsonl"}
FOLDER_OPTIONS = ("format", "features", "shard_size")
EXPERT_COLUMNS = ("cls_score", "distillation_score", "cls_label", "distillation_label")

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parsed(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:
        raise ValueError("standard output is closed; redirect it to a file, or to /dev/null.")
    _check(args)
    others: Counter[str] = Counter()
    rows = None
    if args.dataset is not None or args.data_dir is not None:
        quiet_log()
        read_model_config(args.model)  # a wrong name must not be found after the images are loaded
        rows = dataset_images(args.dataset or "imagefolder", args.data_dir, args.split or SPLIT, args.image_column)
    paths = find_images(args.images, others) if rows is None else iter(rows.names)
    total = None
    # Files are listed first to know their number; standard input may be endless.
    if "-" not in args.images or args.output is not None:
        listed = list(paths)
        paths, total = iter(listed), len(listed)
    first = next(paths, None)
    if first is None:
        found = f" ({not_read(others)})" if others else ""
        if others.keys() & DATA_SUFFIXES:
            found = "; tables and archives are read with --data_dir"
        given = one_line(", ".join(map(repr, args.images or [args.split or SPLIT])))
        raise ValueError(f"no images in {given}; give files, or folders with images{found}.")
    try:
        if args.output is not None:
            _write_folder(args, [first, *paths], rows)
            is_complete = True
        else:
            is_complete = _classify(args, itertools.chain([first], paths), total, rows)
        if others and int(os.environ.get("RANK", "0")) == 0:
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
        nargs="*",
        default=[],  # otherwise the usage shows it among the required arguments
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
    parser.add_argument(
        "--device", help="device of the model, such as cpu or cuda:1; by default the GPU if there is one"
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        help="processes that read images, each two batches ahead; by default 0, and with --output up to 8 if the "
        "model is on a GPU, or up to 2 (one for four cores) if it is on the CPU, which it needs itself",
    )
    _add_groups(parser)
    return parser


def _add_groups(parser: argparse.ArgumentParser) -> None:
    rows = parser.add_argument_group("a data set instead of files")
    rows.add_argument("--dataset", help="'digits' (embedded), or the id of a Hub data set")
    rows.add_argument(
        "--data_dir",
        metavar="DIR",
        help="folder in any layout that training reads: saved data set, parquet, list files, ...",
    )
    rows.add_argument("--split", help=f"split of the data set (default {SPLIT})")
    rows.add_argument("--image_column", help="column with the images; by default the only one")
    folder = parser.add_argument_group("many images")
    folder.add_argument(
        "--output",
        metavar="DIR",
        help="write tables with one row for each image into this folder; a repeated command continues where it stopped",
    )
    folder.add_argument("--format", choices=FORMATS, help="format of the tables (default parquet)")
    folder.add_argument(
        "--features",
        choices=FEATURES,
        help="add the final tokens of a student (cls, distillation, their mean, or both with tokens), or the input of "
        "the last layer of any other classifier (head)",
    )
    folder.add_argument("--shard_size", type=int, help=f"images in a table (default {Contents.shard_size})")


def _check(args: argparse.Namespace) -> None:
    """Checks options that do not fit each other, before any file is searched."""
    if min(args.top_k, args.batch_size) < 1 or (args.num_workers or 0) < 0:
        raise ValueError("--top_k and --batch_size must be 1 or more, and --num_workers 0 or more.")
    from_dataset = args.dataset is not None or args.data_dir is not None
    if from_dataset == bool(args.images):
        raise ValueError("give either images (files, folders, patterns or -), or a data set (--dataset or --data_dir).")
    if not from_dataset and (args.split or args.image_column):
        raise ValueError("--split and --image_column are of a data set; give --dataset or --data_dir.")
    if args.device is not None:
        _check_device(args.device)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if args.output is None:
        given = [f"--{name}" for name in FOLDER_OPTIONS if getattr(args, name) is not None]
        if given:
            raise ValueError(f"{given[0]} needs --output.")
        if several:
            raise ValueError("the output of several processes would be mixed; give --output, or start one process.")
    elif args.jsonl or args.csv:
        raise ValueError("--output writes tables; leave --jsonl and --csv out, or give --format csv.")
    elif several and "-" in args.images:
        raise ValueError("several processes cannot share standard input; give files, folders or patterns.")
    elif several and args.device not in (None, "cpu"):
        raise ValueError("each of several processes takes its own device; leave --device out, or give cpu.")
    _contents(args)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"--device {name!r} cannot be used: {one_line(error, 150).rstrip('.')}.") from error


def _contents(args: argparse.Namespace) -> Contents:
    given = {name: value for name in FOLDER_OPTIONS if (value := getattr(args, name)) is not None}
    return Contents(top_k=args.top_k, experts=args.experts, **given)


def _write_folder(args: argparse.Namespace, paths: Sequence[str], rows: DatasetImages | None) -> None:
    """Computes this process's share of the tables that are missing in the folder."""
    quiet_log()
    state = PartialState(cpu=args.device == "cpu")
    own_device = str(state.device) if state.num_processes > 1 else None
    classifier = load_handler(args.model, args.device or own_device)
    contents = _contents(args)
    tabulate = Tabulator(classifier, contents)  # refuses options that do not suit the model, before the folder exists
    shards = Shards(args.output, paths, contents, "" if rows is None else rows.sha256)
    with state.main_process_first():
        shards.claim(classifier)
    missing = shards.missing()
    state.wait_for_everyone()  # all processes must list the missing tables before the first is written
    mine = missing[state.process_index :: state.num_processes]
    if state.is_main_process and len(missing) < shards.number:
        print(f"{shards.number - len(missing)} of {shards.number} tables in {args.output} are complete already.")
    total = sum(len(shards.paths_of(index)) for index in mine)
    workers = default_workers(state) if args.num_workers is None else args.num_workers
    start, done, unreadable = time.perf_counter(), 0, 0
    is_bar_hidden = not (state.is_main_process and sys.stderr.isatty())
    with Progress(console=Console(stderr=True), redirect_stdout=False, disable=is_bar_hidden) as progress:
        bar = progress.add_task("images", total=total)
        read = read_file if rows is None else rows.read
        for number, failed in predict_shards(tabulate, shards, mine, args.batch_size, workers, read):
            done, unreadable = done + number, unreadable + failed
            progress.update(bar, advance=number)
    if mine:
        rate = done / (time.perf_counter() - start)
        print(f"{done:,} images, {rate:,.0f} a second, in {len(mine)} table{'s' * (len(mine) > 1)} in {args.output}.")
    if unreadable:
        print(f"warning: {unreadable} images could not be read; see the column error.", file=sys.stderr)


def default_workers(state: PartialState) -> int:
    """Workers of a process: a GPU is fed by up to 8; on a CPU, the model itself uses the cores."""
    share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    return max(min(8, share - 1), 0) if state.device.type == "cuda" else min(2, share // 4)


def _classify(args: argparse.Namespace, paths: Iterable[str], total: int | None, rows: DatasetImages | None) -> bool:
    """Prints each result as soon as it is ready; returns whether all images could be read."""
    quiet_log()
    classifier = load_handler(args.model, args.device)
    write = _writer(args, classifier.coverage is not None)
    done = unreadable = 0
    # A progress bar would mix with results on the same terminal.
    is_bar_hidden = sys.stdout.isatty() or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), redirect_stdout=False, disable=is_bar_hidden) as progress:
        bar = progress.add_task("images", total=total)
        read = read_file if rows is None else rows.read
        options = (args.top_k, args.batch_size, args.num_workers or 0, read)
        for path, result in predict_images(classifier, paths, *options):
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
    return {name: value for name, value in result.items() if name not in EXPERTS} | {"predictions": predictions}


def _writer(args: argparse.Namespace, has_sets: bool) -> Callable[[str, Result], None]:
    if args.jsonl:
        return lambda path, result: print(json.dumps({"image": path} | result))
    if not args.csv:
        return _write_text
    # File names are bytes that may not be valid text; surrogateescape writes them unchanged.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    columns = COLUMNS + (EXPERT_COLUMNS if args.experts else ()) + (("prediction_set",) if has_sets else ())
    # A file name can hold a carriage return, which Python before 3.13 quotes only with QUOTE_NONNUMERIC.
    table = csv.DictWriter(sys.stdout, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    table.writeheader()

    def write(path: str, result: Result) -> None:
        choices = {f"{expert}_label": result[expert]["label"] for expert in EXPERTS if expert in result}
        if has_sets:
            choices["prediction_set"] = json.dumps(result["prediction_set"]["labels"], ensure_ascii=False)
        for rank, prediction in enumerate(result["predictions"], start=1):
            table.writerow({"image": path, "rank": rank} | prediction | choices)

    return write


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
    if "prediction_set" in result:
        labels = result["prediction_set"]["labels"]
        others = f" and {len(labels) - SHOWN} others" if len(labels) > SHOWN else ""
        print(f"          {100 * result['prediction_set']['coverage']:.4g}% set: {', '.join(labels[:SHOWN])}{others}")
