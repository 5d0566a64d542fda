"""Compares ways to train on a folder of images at about the same cost, and says which is worth its cost.

deitlt compare photos --minutes 60
deitlt compare photos --dry_run
deitlt compare photos --init_from facebook/deit-small-distilled-patch16-224

The ways are the CNN alone, a ViT on labels only, DeiT-LT as in the paper, and the recipe of 'deitlt train'; with
--init_from also a linear probe and LoRA of that model. All have the same training and test images. --minutes is the
time for all of them together. The same command continues after an interruption.
"""

from collections.abc import Sequence

from ..comparison import compare
from .train import run_on_folder


def main(arguments: Sequence[str] | None = None) -> None:
    run_on_folder(compare, __doc__ or "", arguments)
