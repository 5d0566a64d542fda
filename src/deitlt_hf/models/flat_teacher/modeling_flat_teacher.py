"""The CNN teacher of DeiT-LT: a CIFAR ResNet or any timm backbone under a linear or cosine classifier.

This file is copied into every saved folder and Hub repository, so it imports transformers and torch only, and timm for
timm backbones.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.utils import logging

from .configuration_flat_teacher import CIFAR_RESNETS, FlatTeacherConfig

try:
    from transformers import initialization as init
except ImportError:  # transformers 4 uses torch's; the module of transformers 5 skips weights that are already loaded
    from torch.nn import init  # type: ignore[no-redef]

logger = logging.get_logger(__name__)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut: subsampled and zero-padded (He et al., 2016, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            # Option A, not a 1x1 convolution: the authors' CIFAR teachers have no weights in their shortcuts.
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out.add_(x), inplace=True)


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 images: three stages of 16, 32 and 64 channels, (depth - 2) / 6 blocks each."""

    num_features = 64

    def __init__(self, depth: int, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images (batch, channels, height, width) to pooled features (batch, 64)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean(dim=(2, 3))


class CosineClassifier(nn.Module):
    """Cosine between features and class weights: (batch, features) to (batch, classes), in [-1, 1]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


@dataclass
class FlatTeacherOutput(ImageClassifierOutputWithNoAttention):
    """Output of [`FlatTeacherForImageClassification`].

    Args:
        projections: Features that PaCo compares, not normalised; (batch, projection_size). None without that head.
    """

    projections: torch.FloatTensor | None = None


class FlatTeacherForImageClassification(PreTrainedModel):
    """A CNN classifier. [`FlatTeacherTrainer`] trains it with SAM, which makes its loss surface flat.

    With a cosine classifier the logits are cosines times `config.logit_scale`.
    """

    config: FlatTeacherConfig
    config_class = FlatTeacherConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False  # the loss is a mean, so transformers' Trainer must divide by accumulation steps

    def __init__(self, config: FlatTeacherConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # never None: transformers' default is two labels
        self.num_labels = config.num_labels
        self.backbone: nn.Module
        if config.backbone in CIFAR_RESNETS:
            self.backbone = CifarResNet(int(config.backbone.removeprefix("resnet")), config.num_channels)
        else:
            import timm

            self.backbone = timm.create_model(
                config.backbone.removeprefix("timm/"), num_classes=0, in_chans=config.num_channels
            )
        # Some timm backbones have another layer before the classifier, of size `head_hidden_size`.
        features: int = getattr(self.backbone, "head_hidden_size", 0) or getattr(self.backbone, "num_features", 0)
        classifier = CosineClassifier if config.classifier == "cosine" else nn.Linear
        self.classifier = classifier(features, config.num_labels)
        self.projection = None
        if config.projection_size > 0:
            self.projection = nn.Sequential(
                nn.Linear(features, features),
                nn.BatchNorm1d(features),
                nn.ReLU(),
                nn.Linear(features, config.projection_size),
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_buffers = getattr(module, "init_non_persistent_buffers", None)
        if init_buffers is not None:  # buffers of timm modules that no file contains
            init_buffers()
        if isinstance(module, nn.Conv2d):
            # Kaiming initialisation with fan-out: in a grouped convolution an input reaches its group's channels only.
            fan_out = module.weight[:, 0].numel() // module.groups
            init.normal_(module.weight, std=math.sqrt(2) / math.sqrt(fan_out))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | CosineClassifier):
            init.kaiming_normal_(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @torch.inference_mode(False)  # the copy must not contain inference tensors: it is used outside that mode
    @torch.no_grad()
    def folded(self) -> "FlatTeacherForImageClassification":
        """Makes a copy for inference on a CPU: batch norms are folded into the preceding convolutions, channels last.

        Its logits equal those of evaluation mode up to rounding. Batch norms that timm combines with an activation in
        one module are not folded. No norm is folded if torch.fx cannot trace the backbone correctly.
        """
        copied = deepcopy(self).eval().requires_grad_(False)
        if any(isinstance(module, nn.BatchNorm2d) for module in copied.backbone.modules()):
            try:
                from torch.fx.experimental.optimization import fuse  # if it moves, only the folding is lost

                shape = (2, self.config.num_channels, self.config.image_size, self.config.image_size)
                # With a separate generator: a run with folding draws the same numbers as one without.
                images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
                fused, expected = fuse(copied.backbone), copied.backbone(images)
                # A wrong fold would give plausible labels, but those of another teacher.
                if torch.allclose(fused(images), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()):
                    copied.backbone = fused
            except Exception as error:  # tracing runs third-party code on symbols instead of tensors: any exception
                logger.info(f"batch norms are not folded: {type(error).__name__}: {error}")
        return copied.to(memory_format=torch.channels_last)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> FlatTeacherOutput | tuple[torch.Tensor, ...]:
        """Classifies images.

        Args:
            pixel_values: Normalised images; (batch, channels, height, width).
            labels: Class indices (batch,) or probabilities (batch, num_labels); with them the output has the cross
                entropy as its loss.
            return_dict: False returns a tuple of the fields that are set. None: as the configuration says.

        Raises:
            ValueError: If labels are given and `problem_type` is not single-label classification.
        """
        if labels is not None and self.config.problem_type not in (None, "single_label_classification"):
            problem = self.config.problem_type
            raise ValueError(f"problem_type {problem!r} has no loss here: an image has one class. Set it to None.")
        # An evaluation in half precision casts weights only.
        features = self.backbone(pixel_values.to(self.classifier.weight.dtype))
        logits = self.classifier(features)
        if self.config.logit_scale != 1.0:  # cosines alone would give almost the same probability to every class
            logits = self.config.logit_scale * logits
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        projections = None if self.projection is None else self.projection(features)
        output = FlatTeacherOutput(loss=loss, logits=logits, projections=projections)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


FlatTeacherForImageClassification.register_for_auto_class("AutoModelForImageClassification")
