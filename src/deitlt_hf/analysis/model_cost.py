"""What a model costs in a training step: operations and memory per image, counted on this machine without a GPU."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from ..data.transforms import ImageFormat
from ..models.deitlt.configuration_deitlt import DeiTLTConfig
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..recipes import StudentArguments
from ..serving.classifiers import load_classifier, load_processor
from ..training import DeiTLTTrainingArguments, FlatTeacherTrainingArguments
from ..training.tuning import FULL, HEADS, check_tunable, freeze, last_blocks, trained_parameters

# Per parameter, in float32: weight, gradient, and the two moments of AdamW, or momentum and SAM's copy of the weight.
STATE_BYTES = 16


@dataclass(frozen=True)
class Model:
    """What a model costs. Only the first two numbers are of a model that is not trained."""

    parameters: int
    flops: int  # operations of a forward pass per image; a multiplication and an addition are two
    training_flops: float = 0.0  # operations of a training step per image
    state_bytes: int = 0  # kept between steps: weights, gradients, optimiser state and other copies of the weights
    activation_bytes: int = 0  # that the forward pass keeps for the backward pass, per image
    trained: int = 0  # number of trained parameters


def counted_flops(model: nn.Module, image_size: int) -> int:
    """Operations of a forward pass per image, as counted by torch; the model may be on the meta device."""
    return _flop_counter(model, image_size).get_total_flops()


def student_flops(config: DeiTLTConfig) -> tuple[int, list[int]]:
    """Operations of a student's forward pass per image, and of each of its blocks.

    The last block costs less: it computes only the CLS and DIST tokens, from all tokens.
    """
    with torch.device("meta"):  # counting needs the shapes only, not a ViT-B's worth of memory and arithmetic
        model = DeiTLTForImageClassification(config)
    counter = _flop_counter(model, config.image_size)  # type: ignore[arg-type]
    counts, blocks = counter.get_flop_counts(), range(config.num_hidden_layers)
    of_blocks = [sum(counts[f"{type(model).__name__}.deit.layers.{index}"].values()) for index in blocks]
    return counter.get_total_flops(), of_blocks


def _flop_counter(model: nn.Module, image_size: int) -> FlopCounterMode:
    """Torch's counter after a forward pass of one image."""
    images = torch.empty(1, 3, image_size, image_size, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(pixel_values=images)
    return counter


def activation_bytes(model: nn.Module, image_size: int, half: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, per image; measured on the CPU, in training mode.

    `half` uses mixed precision (bfloat16).
    """
    # The difference removes memory that does not grow with the batch, such as weights in half precision.
    few, more = (_kept_bytes(model.train(), torch.zeros(size, 3, image_size, image_size), half) for size in (2, 4))
    return (more - few) // 2


def _kept_bytes(model: nn.Module, images: torch.Tensor, half: bool) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)  # both batches drop the same share of residual branches
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=half):
        # The graph stays alive until `del`: memory is not reused meanwhile, so the addresses in `kept` stay unique.
        outputs = model(pixel_values=images)
    del outputs
    return sum(kept.values())


def student_model(
    student_args: StudentArguments, num_labels: int, teacher: Model | None, args: DeiTLTTrainingArguments
) -> Model:
    """Training cost of a student with AdamW, with the forward pass of its teacher."""
    config = student_args.config(num_labels=num_labels)
    args.check_sizes(student_args.image_size, student_args.patch_size)
    trained = 0.0
    for size, share in args.size_shares(student_args.image_size).items():
        flops, of_blocks = student_flops(replace(student_args, image_size=size).config(num_labels=num_labels))
        # Stochastic depth skips a block for a share of the images, which rises linearly over the blocks.
        rates = np.linspace(0.0, config.drop_path_rate, config.num_hidden_layers)
        trained += share * (flops - float(rates @ of_blocks))
    teacher_flops, frozen_bytes = (0, 0) if teacher is None else (teacher.flops, 4 * teacher.parameters)
    config.drop_path_rate = 0.0  # without stochastic depth, a step keeps the most memory
    model = DeiTLTForImageClassification(config)
    parameters = model.num_parameters()
    check_tunable(model, args.tune)
    freeze(model, args.tune, args.lora_rank)
    tuned = trained_parameters(model)
    if args.gradient_checkpointing:
        # transformers 5.23 has the newer name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    weight_bytes = 4 + 4 * (args.ema_decay is not None)
    return Model(
        parameters=parameters,
        flops=flops,  # of the last size, which is the image size
        training_flops=args.gradients_per_step * (1 + _backward_share(args.tune, config)) * trained + teacher_flops,
        # Frozen weights have no gradient and no state of the optimiser.
        state_bytes=weight_bytes * parameters + (STATE_BYTES - 4) * tuned + frozen_bytes,
        activation_bytes=activation_bytes(model, student_args.image_size, half=True),
        trained=tuned,
    )


def _backward_share(tune: str, config: PreTrainedConfig) -> float:
    """Operations of the backward pass, relative to the forward pass.

    The gradients of the activations cost one forward pass, and those of the weights another. With `last_N` and LoRA the
    former reach down to the tokens.
    """
    if tune in (FULL, HEADS):
        return 2.0 if tune == FULL else 0.0
    return 1.0 + (last_blocks(tune) or 0) / config.num_hidden_layers


def teacher_model(config: FlatTeacherConfig, args: FlatTeacherTrainingArguments) -> Model:
    """Training cost of a teacher with SGD, including SAM's second pass and PaCo's second view."""
    model = FlatTeacherForImageClassification(config)
    parameters, flops = model.num_parameters(), counted_flops(model, config.image_size)
    return Model(
        parameters=parameters,
        flops=flops,
        # Forward and backward cost three forward passes. SAM needs two gradients in a step, PaCo one more forward pass
        # for the keys of its second view, and a copy of the weights for them.
        training_flops=(3 * args.gradients_per_step + args.loss.contrast) * flops,
        state_bytes=(STATE_BYTES + 4 * args.loss.contrast) * parameters,
        activation_bytes=activation_bytes(model, config.image_size, half=True),
        trained=parameters,
    )


def frozen_model(path: str) -> Model:
    """What a trained teacher costs: one forward pass per image."""
    model = load_classifier(path)
    size = ImageFormat.of(load_processor(path)).size[0]
    return Model(model.num_parameters(), counted_flops(model, size))
