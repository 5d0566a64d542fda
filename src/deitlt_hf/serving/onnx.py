"""Models as ONNX files, for onnxruntime, optimum and transformers.js: in float32, or with int8 weights.

torch's own exporter is used. optimum's cannot be installed beside transformers 5 (optimum-onnx 0.1.0 wants less than
4.58), and that of transformers 5.23 is experimental and gives token features as a result too.
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

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.deit.modeling_deit import DeiTPreTrainedModel, eager_attention_forward

from ..io import atomic_write

# Where transformers.js and optimum look for them, in a model folder.
MODEL_FILE, QUANTIZED_FILE = "onnx/model.onnx", "onnx/model_quantized.onnx"
INPUT, OUTPUTS = "pixel_values", ("logits", "cls_logits", "distillation_logits")
OPSET = 20  # the first with GELU as one operation; for onnxruntime 1.18, of May 2024, or newer
TOLERANCE = 1e-4  # on logits in float32
MAX_BYTES = 2**31 - 2**24  # a protobuf file ends at 2 GiB; some is left for the graph
# eager attention under a name that transformers has no mask for: in a graph it would add one, of zeros, in each block.
_ATTENTION = "deitlt_onnx"
_LIBRARIES = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(
    model: PreTrainedModel,
    output: str | PathLike,
    dynamic_size: bool = True,
    weights_sha256: str | None = None,
) -> Path:
    """Writes a model as `onnx/model.onnx` in float32, and compares it with torch.

    Its input is `pixel_values`, normalised images; its outputs are `logits` and, of a DeiT with two heads,
    `cls_logits` and `distillation_logits`. The metadata has `id2label`, as JSON. A quantized file of an earlier export
    is removed.

    Args:
        model: A DeiT-LT, a flat teacher, or an image classifier of transformers. It stays as it is.
        output: The model's folder, or another one.
        dynamic_size: Take images of any size, not only the configuration's; position embeddings are resized in the
            graph as transformers does with `interpolate_pos_encoding`. The number of images is free in any case.
        weights_sha256: [`weights_digest`] of the folder that the model was loaded from, for the metadata; a push takes
            along what is of the weights that it pushes.

    Returns:
        Path of the file.

    Raises:
        ValueError: If a library is missing, the model is too large, tells no image size or cannot be exported, or if
            the file's logits are not torch's to 1e-4. No file is written then, and an earlier one stays.
    """
    require_libraries()
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    height, width = _image_size(model)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size > MAX_BYTES:
        raise ValueError(f"the model has {size / 2**30:.1f} GiB of weights; an ONNX file can hold less than 2 GiB.")
    # Traced at its own size, a DeiT would take the number of its patches for a constant.
    other = (2 * height, width * 3 // 2) if dynamic_size else (height, width)
    network = _Logits(model, dynamic_size)
    axes = {0: "batch_size"} | ({2: "height", 3: "width"} if dynamic_size else {})
    program = _translated(network, _random_images(model, 2, *other), axes)
    ClearMetadataAndDocStringPass()(program.model)  # each node's has paths of this machine
    program.model.metadata_props["id2label"] = json.dumps(model.config.id2label)
    if weights_sha256 is not None:
        program.model.metadata_props["weights_sha256"] = weights_sha256
    path = Path(output) / MODEL_FILE
    with atomic_write(path) as part:
        program.save(part, external_data=False)
        for images in (_random_images(model, 1, height, width), _random_images(model, 3, *other)):
            _compare(network, part, images)
    _beside(path).unlink(missing_ok=True)
    return path


def quantize(path: str | PathLike) -> Path:
    """Writes `model_quantized.onnx` beside a model: int8 weights, and activations in 8 bits as they come.

    Matrix products with weights are quantized, one scale for each of their outputs; that is all of a ViT but its
    patch embedding, a convolution. There is nothing to calibrate.

    Args:
        path: File from [`export_onnx`].

    Returns:
        Path of the new file.

    Raises:
        ValueError: If a library is missing, or most weights are in convolutions, as in a CNN.
    """
    require_libraries()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    products = {name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") for name in node.input}
    _check_share(sum(sizes[name] for name in products & sizes.keys()), sum(sizes.values()), str(path))
    # torch 2.7 lists the shapes of weights there too, some of which are transposed below.
    del model.graph.value_info[:]
    quantized = _beside(path)
    with atomic_write(quantized) as part, _quiet():
        quantize_dynamic(
            model,
            part,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            # 7 bits are used: sums of two products of 8 bits overflow in processors without VNNI.
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        OnnxClassifier(part)  # which fails if onnxruntime does not take it
    return quantized


def check_quantizable(model: PreTrainedModel) -> None:
    """Refuses a model whose file [`quantize`] would refuse, before it is exported.

    Raises:
        ValueError: If most weights are in convolutions, as in a CNN.
    """
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    _check_share(matrices, sum(parameter.numel() for parameter in model.parameters()), f"a {type(model).__name__}")


def _check_share(in_products: int, in_all: int, what: str) -> None:
    share = in_products / in_all
    if share < 0.5:
        raise ValueError(
            f"{what} has {share:.0%} of its weights in matrix products, and int8 is for these; leave it in float32."
        )


class OnnxClassifier(nn.Module):
    """An ONNX file in the place of a model: what it is called with and gives are torch's tensors, on the CPU.

    Args:
        path: The file.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | PathLike):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what goes wrong is raised, too
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits by their name, (batch, classes) each, of images (batch, channels, height, width)."""
        logits = self.session.run(self.names, {INPUT: pixel_values.numpy()})
        return dict(zip(self.names, map(torch.from_numpy, logits), strict=True))


class _Logits(nn.Module):
    """What is exported: a copy of a model, on the CPU and in float32, that gives its logits only."""

    def __init__(self, model: PreTrainedModel, dynamic_size: bool):
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


def _translated(network: _Logits, images: torch.Tensor, axes: dict[int, str]):
    """The network as torch's `ONNXProgram`."""
    with torch.no_grad(), _quiet():
        try:
            return torch.onnx.export(
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
        except (AssertionError, RuntimeError, ValueError) as error:  # the exporter's are RuntimeErrors
            raise ValueError(
                f"{type(network.model).__name__} cannot be exported with any {', '.join(axes.values())}: "
                f"{_first_cause(error)}"
            ) from error


def _linear(x, weight, bias=None):
    """A linear layer as a product of two matrices with the bias in it, in place of a product and a sum."""
    from onnxscript import opset20 as op

    if len(x.shape) == 2:
        return op.Gemm(x, weight, bias, transB=1)
    shape = op.Concat(op.Shape(x, end=-1), op.Constant(value_ints=[weight.shape[0]]), axis=0)
    rows = op.Reshape(x, op.Constant(value_ints=[-1, weight.shape[1]]))
    return op.Reshape(op.Gemm(rows, weight, bias, transB=1), shape)


def _compare(network: _Logits, path: Path, images: torch.Tensor) -> None:
    """Refuses a file whose logits are not the network's."""
    shown = f"{len(images)} random image(s) of {images.shape[3]} x {images.shape[2]} pixels"
    with torch.no_grad():
        expected = network(images)
    try:
        found = OnnxClassifier(path)(images)
    except Exception as error:  # onnxruntime's have nothing else in common
        raise ValueError(f"onnxruntime cannot run the file on {shown}; it was not kept: {error}") from error
    difference = max((found[name] - logits).abs().max().item() for name, logits in expected.items())
    if not difference <= TOLERANCE:  # nor if it is not a number
        raise ValueError(
            f"the ONNX file's logits differ from torch's by {difference:.2g} on {shown}, more than {TOLERANCE:g}; it "
            "was not kept."
        )


def _first_cause(error: BaseException) -> str:
    """First line of what began a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _random_images(model: PreTrainedModel, number: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, getattr(model.config, "num_channels", 3), height, width, generator=generator)


def _image_size(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of the images that a model is for."""
    size = getattr(model.config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return tuple(size)
    raise ValueError(f"{type(model.config).__name__} does not tell the size of the model's images, got {size!r}.")


def require_libraries() -> None:
    """Asks for the libraries of an export, before anything else is done.

    Raises:
        ValueError: If one is missing.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX export needs {', '.join(missing)}: pip install 'deitlt-hf[onnx]'.")


def _beside(path: str | PathLike) -> Path:
    """The quantized file that belongs to a file."""
    return Path(path).with_name(Path(QUANTIZED_FILE).name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to themselves what exporter and quantizer have to say of their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
