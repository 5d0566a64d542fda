"""The command line of commands that take no recipe, or few of its fields."""

import argparse


def command_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help shows the description as it is, and that takes options by their whole names only."""
    return argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
