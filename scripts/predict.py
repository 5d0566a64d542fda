"""Classifies image files with several processes and writes the predictions into a folder."""

from deitlt_hf.cli.predict import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
