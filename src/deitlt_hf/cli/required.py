"""The required arguments of the commands, which are checked before heavy libraries are imported."""

from collections.abc import Sequence

from ..recipes.usage import BriefParser, check_recipe

RECIPE, OF_MODEL = ("--recipe",), ("--model", "--recipe")
REQUIRED = {  # names of options and positional arguments, in the order of the command's own parser
    **dict.fromkeys(("train", "compare"), ("folder",)),
    "data": ("{check,show}", "--recipe"),
    **dict.fromkeys(("plan", "pretrain", "train-teacher", "distill"), RECIPE),
    **dict.fromkeys(("evaluate", "probe", "analyze", "sharpness", "calibrate"), OF_MODEL),
    **dict.fromkeys(("predict", "demo", "export"), ("--model",)),
    "convert": ("file", "folder"),
    "push": ("folder", "ORG/NAME"),
}


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
