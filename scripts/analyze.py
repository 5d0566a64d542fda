"""Writes a report on what a model's experts know: a page, its pictures and report.json."""

from deitlt_hf.commands.analyze import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
