"""Lists the recipes of the package, prints one, or fits one to a folder of images.

deitlt recipes
deitlt recipes show digits_lt_fast
deitlt recipes init photos --minutes 60 > my.yaml
"""

import contextlib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..recipes import recipe_names
from ..recipes.usage import check_recipe
from .parser import command_parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("command", nargs="?", choices=["list", "show", "init"], default="list")
    parser.add_argument("name", nargs="?", help="show: name or path of a recipe; init: folder with the images")
    parser.add_argument("--minutes", type=float, help="init: time for training; chooses image size and epochs")
    arguments = sys.argv[1:] if arguments is None else arguments
    if "init" in arguments:
        from ..quickstart.fitting import fit, print_fitted
        from ..quickstart.folder_training import IMAGES_FOLDER, recipe_title
        from .train import parse_for_folder

        args, given = parse_for_folder(parser, arguments)
    else:
        args, rest = parser.parse_known_args(arguments)
        given = dict.fromkeys(rest)
    if args.command != "init" and (given or args.minutes is not None):
        parser.error(f"{args.command} takes no options, got {next(iter(given), '--minutes')}")
    if (args.command == "list") != (args.name is None):
        parser.error("give 'show NAME' or 'init FOLDER', or nothing for the list")
    if args.command == "show":
        check_recipe(args.name)
    from ..recipes import load_recipe, recipe_description

    if args.command == "list":
        width = max(map(len, recipe_names()))
        for name in recipe_names():
            sentence, end, _ = " ".join(recipe_description(name).split()).partition(". ")
            print(f"{name:{width}}  {sentence}{end.strip()}")
        print(
            "\n'deitlt recipes show NAME' prints all values; 'deitlt recipes init FOLDER' fits a recipe to your images."
        )
    elif args.command == "show":
        for line in textwrap.wrap(recipe_description(args.name), 108):
            print(f"# {line}")
        sections = {section: values for section, values in load_recipe(args.name).items() if values}
        print(yaml.safe_dump(sections, sort_keys=False, default_flow_style=None, width=110), end="")
    else:
        folder = Path(args.name)
        cache = str(Path("outputs") / folder.resolve().name / IMAGES_FOLDER)
        fitted = fit(folder, args.minutes, given, cache)
        with contextlib.redirect_stdout(sys.stderr):  # the plan; standard output is the recipe alone
            print_fitted(fitted)
            print("To train with this recipe, save it in a FILE and run deitlt distill --recipe FILE.")
        print(fitted.text(recipe_title(folder, args.minutes)), end="")
