"""Updates model folders of earlier versions: image processor, model code and handler."""

import inspect
from os import PathLike
from pathlib import Path

from ..io import atomic_write, read_json, write_json
from ..models.deitlt import configuration_deitlt, modeling_deitlt
from ..models.flat_teacher import configuration_flat_teacher, modeling_flat_teacher
from .handler_file import handler_source, is_version_of

_MODEL_CODE = (configuration_deitlt, modeling_deitlt, configuration_flat_teacher, modeling_flat_teacher)


def mend_folder(folder: str | PathLike) -> list[str]:
    """Updates the image processor, the model code and the handler in a model folder; the weights are not changed.

    Folders of 0.1.0 have a `DeiTImageProcessor` that resizes the shorter side, which transformers 4 refuses. Their code
    runs in few versions of transformers, and returns the cosines of an LDAM teacher instead of its logits. Code that is
    not a version of this package's code is not changed.

    Returns:
        Names of the updated files.

    Raises:
        ValueError: If the configuration of the image processor cannot be read.
        OSError: If a file cannot be written.
    """
    folder, mended = Path(folder), []
    path = folder / "preprocessor_config.json"
    content = read_json(path) if path.is_file() else {}
    size = content.get("size")
    is_deit = str(content.get("image_processor_type")).startswith("DeiT")
    if is_deit and isinstance(size, dict) and "shortest_edge" in size:
        write_json(path, content | {"image_processor_type": "BitImageProcessor"})
        mended.append(path.name)
    code = {Path(inspect.getfile(module)).name: inspect.getsource(module) for module in _MODEL_CODE}
    for name, own in {**code, "handler.py": handler_source()}.items():
        target = folder / name
        if target.is_file() and is_version_of(target, own) and target.read_bytes() != own.encode():
            with atomic_write(target) as part:
                part.write_bytes(own.encode())
            mended.append(name)
    return mended
