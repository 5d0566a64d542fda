"""Exports models as ONNX files for onnxruntime, optimum and transformers.js: in float32, or with int8 weights.

The export uses torch's exporter. optimum's exporter cannot be installed together with transformers 5 (optimum-onnx
0.1.0 requires transformers below 4.58). The exporter of transformers 5.23 is experimental, and also outputs token
features.
"""

import contextlib
import copy
import importlib.util
import inspect
import json
import logging
import warnings
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.deit.modeling_deit import DeiTPreTrainedModel, eager_attention_forward

from ..io import atomic_write

# Paths in a model folder at which transformers.js and optimum expect the files.
MODEL_FILE, QUANTIZED_FILE = "onnx/model.onnx", "onnx/model_quantized.onnx"
INPUT, OUTPUTS = "pixel_values", ("logits", "cls_logits", "distillation_logits")
OPSET = 20  # the first with GELU as one operation; needs onnxruntime 1.18 (May 2024) or newer
TOLERANCE = 1e-4  # on logits in float32
MAX_BYTES = 2**31 - 2**24  # a protobuf file holds at most 2 GiB; the rest is for the graph
# Eager attention under a new name, for which transformers makes no mask: it would export a mask of zeros in each block.
_ATTENTION = "deitlt_onnx"
_LIBRARIES = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(
    model: PreTrainedModel,
    output: str | PathLike,
    dynamic_size: bool = True,
    weights_sha256: str | None = None,
) -> Path:
    """Writes a model as `onnx/model.onnx` in float32, and compares its logits with torch.

    The input of the file is `pixel_values`, normalised images. Its outputs are `logits` and, for a DeiT with two heads,
    `cls_logits` and `distillation_logits`. The metadata holds `id2label` as JSON. A quantized file of an earlier export
    is removed.

    Args:
        model: A DeiT-LT, a flat teacher, or an image classifier of transformers. It is not changed.
        output: The model's folder, or another folder.
        dynamic_size: Accept images of any size, not only the size in the configuration. The graph then resizes position
            embeddings like `interpolate_pos_encoding` of transformers. The batch size is always dynamic.
        weights_sha256: [`weights_digest`] of the folder that the model was loaded from, for the metadata. A push
            includes only ONNX files with the digest of the pushed weights.

    Returns:
        Path of the file.

    Raises:
        ValueError: If a library is missing, the model is too large, has no image size or cannot be exported, or if the
            logits differ from torch's by more than 1e-4. No file is written then, and an earlier file stays.
    """
    require_libraries()
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    height, width = _image_size(model)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size > MAX_BYTES:
        raise ValueError(f"the model has {size / 2**30:.1f} GiB of weights; an ONNX file can hold less than 2 GiB.")
    # Traced at its own image size, the number of patches of a DeiT would become a constant.
    other = (2 * height, width * 3 // 2) if dynamic_size else (height, width)
    network = _Logits(model, dynamic_size)
    axes = {0: "batch_size"} | ({2: "height", 3: "width"} if dynamic_size else {})
    # Two images: `torch.export` makes a constant of a dimension of size 1.
    program = _translated(network, _random_images(model, 2, *other), axes)
    ClearMetadataAndDocStringPass()(program.model)  # the metadata of nodes contain paths of this machine
    program.model.metadata_props["id2label"] = json.dumps(model.config.id2label)
    if weights_sha256 is not None:
        program.model.metadata_props["weights_sha256"] = weights_sha256
    path = Path(output) / MODEL_FILE
    with atomic_write(path) as part:
        program.save(part, external_data=False)
        # Other numbers of images than the traced two, and another size: the graph could hold these as constants.
        for images in (_random_images(model, 1, height, width), _random_images(model, 3, *other)):
            _compare(network, part, images)
    _quantized_path(path).unlink(missing_ok=True)
    return path


def quantize(path: str | PathLike) -> Path:
    """Writes `model_quantized.onnx` next to a file from [`export_onnx`], and returns its path.

    Weights are int8, and activations are dynamically quantized to 8 bits. Matrix products with weights are quantized,
    with one scale for each output. In a ViT, that is everything except the patch embedding, which is a convolution. No
    calibration is needed.

    Raises:
        ValueError: If a library is missing, or most weights belong to convolutions, as in a CNN.
    """
    require_libraries()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    products = {name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") for name in node.input}
    _check_share(sum(sizes[name] for name in products & sizes.keys()), sum(sizes.values()), str(path))
    # torch 2.7 lists the shapes of weights here too; they become wrong, because the quantizer transposes some weights.
    del model.graph.value_info[:]
    quantized = _quantized_path(path)
    with atomic_write(quantized) as part, _quiet():
        quantize_dynamic(
            model,
            part,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            # Use 7 bits: on processors without VNNI, the sum of two 8-bit products overflows.
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        OnnxClassifier(part)  # raises an error if onnxruntime cannot load the file
    return quantized


def check_quantizable(model: PreTrainedModel) -> None:
    """Checks before the export whether [`quantize`] will accept the model.

    Raises:
        ValueError: If most weights belong to convolutions, as in a CNN.
    """
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    _check_share(matrices, sum(parameter.numel() for parameter in model.parameters()), f"a {type(model).__name__}")


def _check_share(in_products: int, in_all: int, what: str) -> None:
    share = in_products / in_all
    if share < 0.5:
        raise ValueError(
            f"{what} has {share:.0%} of its weights in matrix products, and only those become int8; keep it in float32."
        )


class OnnxClassifier(nn.Module):
    """Runs an ONNX file with the interface of a model: torch tensors in and out, on the CPU.

    Args:
        path: Path of the ONNX file.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | PathLike) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised as exceptions anyway
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns logits by name, (batch, classes) each, of images (batch, channels, height, width)."""
        logits = self.session.run(self.names, {INPUT: pixel_values.numpy()})
        return dict(zip(self.names, map(torch.from_numpy, logits), strict=True))


class _Logits(nn.Module):
    """The module to export: a copy of a model, on the CPU and in float32, that returns only logits."""

    def __init__(self, model: PreTrainedModel, dynamic_size: bool) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float()
        if isinstance(model, DeiTPreTrainedModel):
            AttentionInterface.register(_ATTENTION, eager_attention_forward)
            self.model.set_attn_implementation(_ATTENTION)
        self.options = {}
        if dynamic_size and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self.options["interpolate_pos_encoding"] = True
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.model(pixel_values=pixel_values, **self.options)
        return {name: outputs[name] for name in OUTPUTS if outputs.get(name) is not None}


def _translated(network: _Logits, images: torch.Tensor, axes: dict[int, str]) -> "torch.onnx.ONNXProgram":
    """Exports the network to torch's `ONNXProgram`."""
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                network,
                (images,),
                input_names=[INPUT],
                output_names=list(network(images)),
                dynamic_shapes=(axes,),
                opset_version=OPSET,
                custom_translation_table={torch.ops.aten.linear.default: _linear},
                dynamo=True,
                verbose=False,
            )
            assert program is not None  # with `dynamo`
            return program
        except (AssertionError, RuntimeError, ValueError) as error:  # the exporter raises RuntimeErrors
            raise ValueError(
                f"{type(network.model).__name__} cannot be exported with any {', '.join(axes.values())}: "
                f"{_first_cause(error)}"
            ) from error


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:  # torch reads these: no constraint
    """Translates a linear layer into one `Gemm`, which includes the bias, instead of a product and a sum."""
    from onnxscript import opset20 as op

    if len(x.shape) == 2:
        return op.Gemm(x, weight, bias, transB=1)
    shape = op.Concat(op.Shape(x, end=-1), op.Constant(value_ints=[weight.shape[0]]), axis=0)
    rows = op.Reshape(x, op.Constant(value_ints=[-1, weight.shape[1]]))
    return op.Reshape(op.Gemm(rows, weight, bias, transB=1), shape)


def _compare(network: _Logits, path: Path, images: torch.Tensor) -> None:
    """Raises `ValueError` if onnxruntime cannot run a file, or its logits differ from the network's."""
    shown = f"{len(images)} random image(s) of {images.shape[3]} x {images.shape[2]} pixels"
    with torch.no_grad():
        expected = network(images)
    try:
        found = OnnxClassifier(path)(images)
    except Exception as error:  # the exceptions of onnxruntime have no other base class
        raise ValueError(f"onnxruntime cannot run the file on {shown}; it was not kept: {error}") from error
    difference = max((found[name] - logits).abs().max().item() for name, logits in expected.items())
    if not difference <= TOLERANCE:  # also true for NaN
        raise ValueError(
            f"the ONNX file's logits differ from torch's by {difference:.2g} on {shown}, more than {TOLERANCE:g}; it "
            "was not kept."
        )


def _first_cause(error: BaseException) -> str:
    """Returns the first line of the error at the start of a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _random_images(model: PreTrainedModel, number: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, getattr(model.config, "num_channels", 3), height, width, generator=generator)


def _image_size(model: PreTrainedModel) -> tuple[int, int]:
    """Returns height and width of the images that a model is configured for."""
    size = getattr(model.config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return tuple(size)
    raise ValueError(f"{type(model.config).__name__} has no usable image_size, got {size!r}; set it in the config.")


def require_libraries() -> None:
    """Checks that the libraries for an export are installed.

    Raises:
        ValueError: If a library is missing.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX export needs {', '.join(missing)}: pip install 'deitlt-hf[onnx]'.")


def _quantized_path(path: str | PathLike) -> Path:
    """Returns the path of the quantized file that belongs to an ONNX file."""
    return Path(path).with_name(Path(QUANTIZED_FILE).name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses log messages and warnings of the exporter and the quantizer about their internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
