"""Argument parsers for commands that take no recipe, or only some of its fields."""

import argparse
from collections.abc import Sequence
from typing import Any

from ..recipes.usage import BriefParser, refuse_unknown


def command_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Makes a parser whose help shows the description verbatim, and that accepts no abbreviated options."""
    return BriefParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


class _CollectField(argparse.Action):
    """Collects the values of fields in the attribute `fields` of the arguments."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if isinstance(values, list):
            values = values[0] if len(values) == 1 else values or self.const
        namespace.fields[self.dest] = values


def parse_with_fields(
    parser: argparse.ArgumentParser, classes: Sequence[type], arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Separates the arguments of a command from recipe fields (of `classes`), which may be in any order.

    argparse alone would take the value of an unknown option as a positional argument of the command. An option of the
    parser belongs to the command also if a field has its name. If the parser has an option `--recipe` that is not
    given, there can be no fields.

    Returns:
        The arguments, and the values of the given fields as texts (or lists of texts), by name.
    """
    from transformers import HfArgumentParser
    from transformers.hf_argparser import DataClassType

    # One parser for each class: teacher and student share fields, and a parser accepts a name only once.
    for cls in classes:
        for field in HfArgumentParser(DataClassType(cls), add_help=False)._actions:
            names = [name for name in field.option_strings if name not in parser._option_string_actions]
            if names:
                parser.add_argument(
                    *names,
                    dest=field.dest,
                    nargs=field.nargs,
                    const=field.const,
                    action=_CollectField,
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )
    known, unknown = parser.parse_known_args(arguments, argparse.Namespace(fields={}))
    given = vars(known).pop("fields")
    options = [word.removeprefix("--").partition("=")[0] for word in unknown if word.startswith("--")]
    if getattr(known, "recipe", "") is None:
        unknown = [*(f"--{name}" for name in given), *unknown]
    else:
        accepted = {name.removeprefix("--") for name in parser._option_string_actions}
        refuse_unknown(options, accepted, "the command line", listed_by=f"{parser.prog} --help")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return known, given


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
