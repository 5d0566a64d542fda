"""The command line of commands that take no recipe, or few of its fields."""

import argparse
from collections.abc import Sequence
from typing import Any

from ..recipes.usage import BriefParser


def command_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help shows the description as it is, and that takes options by their whole names only."""
    return BriefParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_with_fields(
    parser: argparse.ArgumentParser, classes: Sequence[type], arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command's own arguments, and leaves aside the fields of a recipe, in any order.

    argparse would take the value of an option that it does not know for a positional argument of the command.

    Args:
        parser: With the command's own arguments.
        classes: Dataclasses of the fields. A name that the parser has already is the command's.
        arguments: Command line; by default this process's.

    Returns:
        The command's arguments, and the command line without them.
    """
    from transformers import HfArgumentParser
    from transformers.hf_argparser import DataClassType

    rest: list[str] = []

    class LeaveAside(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            words = values if isinstance(values, list) else [values]
            rest.extend([option_string, *(word for word in words if word is not None)])  # None: a flag without a value

    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument("--recipe")
    # One parser for each class: teacher and student share fields, and a parser takes a name once.
    for fields in (recipe, *(HfArgumentParser(DataClassType(cls), add_help=False) for cls in classes)):
        for field in fields._actions:
            names = [name for name in field.option_strings if name not in parser._option_string_actions]
            if names:
                parser.add_argument(
                    *names,
                    nargs=field.nargs,
                    action=LeaveAside,
                    dest=argparse.SUPPRESS,
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )
    known, unknown = parser.parse_known_args(arguments)
    return known, rest + unknown


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """What the card of a model can be given; see [`card_metadata`]."""
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence of the weights, by its id on the Hub (cc-by-4.0). By default that of the card before, if any",
    )
    parser.add_argument("--tags", nargs="+", metavar="TAG", help="tags of the card, beside its own")


def card_metadata(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the options of [`add_card_options`] that were given."""
    return {name: value for name in ("license", "tags") if (value := getattr(args, name)) is not None}
