"""An argument parser with short error messages."""

import argparse
from typing import NoReturn


class BriefParser(argparse.ArgumentParser):
    """An argument parser whose errors have two lines: the required options, and the error.

    argparse itself prints all options, and a run has more than a hundred.

    Attributes:
        listed_by: Command that lists all options, for a parser that has only some of a command's options. Its errors
            have one line, since the required options are those of the command.
    """

    listed_by: str | None = None

    def format_usage(self) -> str:
        """The required options, or the `usage` that was given to the constructor."""
        if self.usage is not None:
            return super().format_usage()
        formatter = argparse.HelpFormatter(self.prog, width=10_000)
        formatter.add_usage(None, [action for action in self._actions if action.required], [])
        return f"{formatter.format_help().strip()} [options]\n"

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits with status 2."""
        usage = "" if self.listed_by else self.format_usage()
        listed_by = self.listed_by or f"{self.prog} --help"
        self.exit(2, f"{usage}error: {message.rstrip('.')}; {listed_by} lists all options.\n")
