"""Pushes a model folder to the Hugging Face Hub: weights, processor, code, card and results, but no checkpoints."""

import sys

from deitlt_hf.cli import main

if __name__ == "__main__":
    main(["push", *sys.argv[1:]])
