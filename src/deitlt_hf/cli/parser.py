"""Argument parsers for commands that take no recipe, or only some of its fields."""

import argparse
from collections.abc import Sequence
from typing import Any

from ..recipes.usage import BriefParser


def command_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Makes a parser whose help shows the description verbatim, and that accepts no abbreviated options."""
    return BriefParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_with_fields(
    parser: argparse.ArgumentParser, classes: Sequence[type], arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Separates the arguments of a command from recipe fields (of `classes`), which may be in any order.

    argparse alone would take the value of an unknown option as a positional argument of the command. An option of the
    parser belongs to the command also if a field has its name. Returns the arguments, and the rest of the command line.
    """
    from transformers import HfArgumentParser
    from transformers.hf_argparser import DataClassType

    rest: list[str] = []

    class CollectField(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: str | Sequence[Any] | None,
            option_string: str | None = None,
        ) -> None:
            assert option_string is not None  # an option, which has no positional form
            words: list[Any] = values if isinstance(values, list) else [values]
            rest.extend([option_string, *(word for word in words if word is not None)])  # None: option without a value

    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument("--recipe")
    # One parser for each class: teacher and student share fields, and a parser accepts a name only once.
    for fields in (recipe, *(HfArgumentParser(DataClassType(cls), add_help=False) for cls in classes)):
        for field in fields._actions:
            names = [name for name in field.option_strings if name not in parser._option_string_actions]
            if names:
                parser.add_argument(
                    *names,
                    nargs=field.nargs,
                    action=CollectField,
                    dest=argparse.SUPPRESS,
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )
    known, unknown = parser.parse_known_args(arguments)
    return known, rest + unknown


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the metadata of a model card; see [`card_metadata`]."""
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence of the weights, by its id on the Hub (cc-by-4.0). By default the licence of the existing card",
    )
    parser.add_argument("--tags", nargs="+", metavar="TAG", help="tags of the card, in addition to its default tags")


def card_metadata(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of [`add_card_options`] that were given."""
    return {name: value for name in ("license", "tags") if (value := getattr(args, name)) is not None}
