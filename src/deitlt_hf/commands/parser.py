"""The command line of commands that take no recipe, or few of its fields."""

import argparse
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
