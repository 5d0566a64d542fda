"""Classifies image files: the most likely classes of each, as text, JSON lines or CSV."""

from deitlt_hf.commands.predict import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
