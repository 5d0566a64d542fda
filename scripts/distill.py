# /// script
# requires-python = ">=3.11"
# dependencies = ["deitlt-hf"]
#
# [tool.uv.sources]
# deitlt-hf = { path = "..", editable = true }
# ///
"""Trains the DeiT-LT student of a recipe. Trains the teacher of the recipe first if no teacher is given."""

import sys

from deitlt_hf.cli import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
