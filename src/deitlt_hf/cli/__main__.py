"""Entry point of `python -m deitlt_hf.cli`, which is the same as `deitlt`."""

from . import main

main()
