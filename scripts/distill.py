# /// script
# requires-python = ">=3.11"
# dependencies = ["deitlt-hf"]
#
# [tool.uv.sources]
# deitlt-hf = { path = "..", editable = true }
# ///
"""Trains a recipe's DeiT-LT student, and first the recipe's teacher if none is given."""

from deitlt_hf.cli.distill import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
