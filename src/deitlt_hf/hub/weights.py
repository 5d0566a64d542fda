"""Of which weights something is: a record, a card, an ONNX file, a report."""

import hashlib
from os import PathLike
from pathlib import Path

_BLOCK = 2**20


def weights_digest(folder: str | PathLike) -> str | None:
    """The sha256 of a model folder's weights, in all their files; None if there are none.

    Args:
        folder: It has `model.safetensors`, or the parts of it.
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest() if files else None
