"""Evaluates a saved student or teacher on the test images of a recipe and prints the accuracies of each expert."""

from deitlt_hf.cli.evaluate import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
