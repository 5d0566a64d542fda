"""Evaluates a saved student or teacher on the test images of a recipe and prints the accuracies of each expert."""

import sys

from deitlt_hf.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
