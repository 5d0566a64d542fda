"""Converts a checkpoint of the DeiT-LT authors, student or teacher, to a folder that transformers loads."""

from deitlt_hf.commands.convert import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
