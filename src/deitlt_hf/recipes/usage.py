"""What a wrong command line is told."""

import argparse
from typing import NoReturn


class BriefParser(argparse.ArgumentParser):
    """A parser whose errors take two lines: what must be given, and what is wrong. argparse itself tells every option,
    of which a run has more than a hundred.

    Attributes:
        listed_by: What lists all options in place of this parser's own `--help`, if it has a part of a command's only;
            its errors take one line, as what must be given is the command's.
    """

    listed_by: str | None = None

    def format_usage(self) -> str:
        """What must be given; or the usage that the parser was made with."""
        if self.usage is not None:
            return super().format_usage()
        formatter = argparse.HelpFormatter(self.prog, width=10_000)
        formatter.add_usage(None, [action for action in self._actions if action.required], [])
        return f"{formatter.format_help().strip()} [options]\n"

    def error(self, message: str) -> NoReturn:
        """Ends the program with 2."""
        usage = "" if self.listed_by else self.format_usage()
        listed_by = self.listed_by or f"{self.prog} --help"
        self.exit(2, f"{usage}error: {message.rstrip('.')}; {listed_by} lists all options.\n")
