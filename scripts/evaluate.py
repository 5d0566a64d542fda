"""Prints the table of experts of a saved student or teacher on a recipe's test images."""

from deitlt_hf.cli.evaluate import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
