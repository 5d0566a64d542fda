"""Checks of a command line for the commands whose parsers need heavy libraries, before these are imported."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from ..recipes.usage import BriefParser, check_recipe, refuse_unknown

RECIPE, OF_MODEL = ("--recipe",), ("--model", "--recipe")
REQUIRED = {  # names of options and positional arguments, in the order of the command's own parser
    **dict.fromkeys(("train", "compare"), ("folder",)),
    "data": ("{check,show}", "--recipe"),
    **dict.fromkeys(("plan", "pretrain", "train-teacher", "distill"), RECIPE),
    **dict.fromkeys(("evaluate", "probe", "analyze", "sharpness", "calibrate"), OF_MODEL),
    **dict.fromkeys(("predict", "export"), ("--model",)),
    "convert": ("file", "folder"),
}
# Commands that take fields of a recipe.
WITH_FIELDS = {name for name, required in REQUIRED.items() if "--recipe" in required} | {"train", "compare", "recipes"}
ROOMS = ("analysis", "losses", "recipes", "training")  # subpackages that define fields
# Options in source text: fields of dataclasses, and literal options.
_OPTIONS = re.compile(r'^    (\w+): .*= option\(|"--(\w+)"', re.MULTILINE)
_ATTRIBUTES = re.compile(r"^    (\w+): ", re.MULTILINE)


def check_options(command: str, arguments: Sequence[str]) -> None:
    """Checks that the options of a command exist in some command. Its own parser checks the rest.

    The names come from source text, because an import of the dataclasses, with torch and transformers, takes seconds.

    Raises:
        ValueError: If there is no such option.
    """
    given = [word.removeprefix("--").partition("=")[0] for word in arguments if word.startswith("--")]
    library = importlib.util.find_spec("transformers")
    if "help" in given or command not in WITH_FIELDS or library is None or library.origin is None:
        return
    place = Path(__file__)
    files = [path for room in ROOMS for path in (place.parents[1] / room).glob("*.py")]
    files += [place.with_name(f"{name.replace('-', '_')}.py") for name in WITH_FIELDS]
    inherited = Path(library.origin).with_name("training_args.py").read_text(encoding="utf-8")
    text = "\n".join([inherited, *(file.read_text(encoding="utf-8") for file in files)])
    options = {field or literal for field, literal in _OPTIONS.findall(text)}
    known = {"", *options, *_ATTRIBUTES.findall(inherited)}  # in any form, in any version of the library
    unknown = [name for name in given if name.replace("-", "_").removeprefix("no_") not in known]
    refuse_unknown(unknown, options, "the command line")


def check_required(command: str, arguments: Sequence[str]) -> None:
    """Checks that required arguments are there, and that the recipe exists.

    The command's own parser checks everything else: here, the value of an option can pass for a positional argument.

    Raises:
        FileNotFoundError: If there is no such recipe.
        SystemExit: With 2, after a message, if an argument is missing.
    """
    if {"-h", "--help"} & set(arguments) or command not in REQUIRED:
        return
    parser = BriefParser(prog=f"deitlt {command}", add_help=False, allow_abbrev=False)
    for name in REQUIRED[command]:
        if name.startswith("-"):
            parser.add_argument(name, required=True)
        else:
            parser.add_argument(name)
    given = parser.parse_known_args(arguments)[0]
    if getattr(given, "recipe", None) is not None:
        check_recipe(given.recipe)
