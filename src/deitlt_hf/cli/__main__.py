"""`python -m deitlt_hf.cli`, which is `deitlt`."""

from . import main

main()
