"""The files of a model folder: their names, those of the weights, and links that must not be followed."""

import hashlib
from os import PathLike
from pathlib import Path

from .io import one_line, read_json

LOG_FILE = "log.jsonl"
CURVES_FILE = "training_curves.png"
EMA_FOLDER = "ema"  # the model folder of the moving average
STAGING = ".saving"  # where files are written before they get their names


def weight_files(folder: str | PathLike) -> list[Path]:
    """Lists the files from which transformers loads the weights of a model folder, sorted by name.

    The list is empty if the folder has no weights. Other weight files, such as shards that the index does not name,
    belong to an earlier model and are not listed.

    Raises:
        FileNotFoundError: If a file that an index names is missing.
        ValueError: If an index cannot be read, or names anything but weight files in the folder.
    """
    folder = Path(folder)
    # In the order in which transformers looks for them.
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index} does not name the files of the weights; save the model again.")
        for shard in shards.values():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(Path(name).suffix):
                raise ValueError(
                    f"{index} names {one_line(shard, 100)!r}, which is not a weight file in its folder; save the "
                    "model again."
                )
            if not (folder / shard).is_file():
                raise FileNotFoundError(
                    f"{folder} is not a complete model folder: {shard} is missing; save the model again."
                )
        return [folder / shard for shard in sorted(set(shards.values()))]
    return []


def check_link(path: str | PathLike, folder: str | PathLike) -> None:
    """Raises `ValueError` if a path in a model folder links to a file outside the folder or to a file of another kind.

    Pushing such a link would publish a file by mistake: a folder from a third party could publish any file of the
    user. The folder itself may be a link. In a snapshot of the Hub's cache all files are links to its blobs, which is
    allowed.
    """
    target, top = Path(path).resolve(), Path(folder).resolve()
    is_same_kind = target.is_relative_to(top) and target.suffix == Path(path).suffix
    if is_same_kind and not any(part.startswith(".") for part in target.relative_to(top).parts):
        return
    if top.parent.name == "snapshots" and target.parent == top.parents[1] / "blobs":
        return
    raise ValueError(f"{path} is a link to {target}; replace the link by a copy of the intended file, or remove it.")


def weights_digest(folder: str | PathLike) -> str | None:
    """The SHA-256 digest over all weight files of a model folder ([`weight_files`]); None if it has no weights.

    Records, cards, ONNX files and reports use it to identify the weights that they describe.
    """
    files = weight_files(folder)
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)  # adds the content to the digest
    return digest.hexdigest() if files else None
