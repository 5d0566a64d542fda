# /// script
# requires-python = ">=3.11"
# dependencies = ["deitlt-hf"]
#
# [tool.uv.sources]
# deitlt-hf = { path = "..", editable = true }
# ///
"""Trains the DeiT-LT student of a recipe. Trains the teacher of the recipe first if no teacher is given."""

from deitlt_hf.cli.distill import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
