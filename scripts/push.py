"""Pushes a model folder to the Hugging Face Hub: weights, processor, code, card and results, but no checkpoints."""

from deitlt_hf.cli.push import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
