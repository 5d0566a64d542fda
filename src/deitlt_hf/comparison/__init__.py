"""Ways to train on a folder of images at about the same cost: `deitlt compare`."""

from .comparing import compare

__all__ = ["compare"]
