"""Trains the flat teacher of a recipe."""

import sys

from deitlt_hf.cli import main

if __name__ == "__main__":
    main(["train-teacher", *sys.argv[1:]])
