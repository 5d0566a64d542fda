"""Trains the flat teacher of a recipe."""

from deitlt_hf.cli.train_teacher import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
