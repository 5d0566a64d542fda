"""The DeiT-LT student: transformers' DeiT with stochastic depth, DeiT-LT's initialisation and a training loss.

This file is copied into every saved folder and Hub repository, so it imports transformers and torch only. Parameter
names and shapes are exactly those of `DeiTForImageClassificationWithTeacher`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import ModelOutput

from .configuration_deitlt import DeiTLTConfig

try:  # internals of transformers, which can change between versions
    from transformers import initialization as init
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.deit.modeling_deit import (
        DeiTAttention,
        DeiTEmbeddings,
        DeiTLayer,
        DeiTModel,
        DeiTPreTrainedModel,
        eager_attention_forward,
    )
    from transformers.utils.generic import can_return_tuple
except ImportError as error:
    raise ImportError(
        f"the code of DeiT-LT does not support transformers {transformers.__version__} ({error}); use 5.9 to 5.24, or "
        "leave trust_remote_code out: the model loads without its own code."
    ) from error

_WHOLE_OUTPUTS = ("output_hidden_states", "output_attentions")  # outputs with all tokens of the last block


@dataclass
class DeiTLTImageClassifierOutput(ModelOutput):
    """Output of [`DeiTLTForImageClassification`], with the same fields in training and evaluation.

    Args:
        loss: Scalar; mean cross entropy of the two heads, when labels are given.
        logits: Mean of the two heads' logits, the prediction; (batch, num_labels).
        cls_logits: Logits of the CLS head, the expert on head classes; (batch, num_labels).
        distillation_logits: Logits of the DIST head, the expert on tail classes; (batch, num_labels).
        token_features: Final CLS and DIST tokens, the inputs of the heads; (batch, 2, hidden_size).
        hidden_states: Embeddings and the output of each block, on request; (batch, 2 + patches, hidden_size) each.
        attentions: Attention weights of each block, on request; (batch, heads, 2 + patches, 2 + patches) each. In
            training mode they lack the images that stochastic depth drops, so use evaluation mode.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cls_logits: torch.Tensor | None = None
    distillation_logits: torch.Tensor | None = None
    token_features: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class DeiTLTDropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drops a residual branch for whole samples and scales up the others.

    The branch is computed only for the samples that keep it.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(
        self,
        hidden_states: torch.Tensor,
        branch: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Adds a branch to the residual.

        Args:
            hidden_states: Input of the branch; (batch, tokens, size).
            branch: Function of the hidden states of some samples and of the indices of these samples (None for all).
            residual: Tensor that the branch is added to, by default the hidden states; (batch, tokens, size).
        """
        residual = hidden_states if residual is None else residual
        if self.drop_prob == 0.0 or not self.training:
            return residual + branch(hidden_states, None)
        keep_prob = 1.0 - self.drop_prob
        # Drawn on the CPU: the number of kept samples is then known without synchronising with the device. A compiled
        # model does not need the number, and CUDA graphs cannot contain an operation on the CPU.
        device = hidden_states.device if torch.compiler.is_compiling() else "cpu"
        is_kept = torch.rand(hidden_states.shape[0], device=device) < keep_prob
        # A compiled model needs static shapes, and a step that drops all samples must still give gradients.
        if torch.compiler.is_compiling() or not is_kept.any():
            scale = (is_kept / keep_prob).to(hidden_states, non_blocking=True)
            return residual + branch(hidden_states, None) * scale.view(-1, *(1,) * (residual.dim() - 1))
        kept = is_kept.nonzero().squeeze(1).to(hidden_states.device, non_blocking=True)
        # Under autocast the branch has half precision, and `index_add` takes one dtype.
        added = branch(hidden_states.index_select(0, kept), kept).to(residual.dtype)
        return residual.index_add(0, kept, added, alpha=1.0 / keep_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


def first_tokens_attend(
    attention: DeiTAttention,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    num_queries: int | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Computes attention for the first tokens as queries, with all tokens as keys and values.

    Args:
        attention: Attention module of DeiT.
        hidden_states: Input tokens; (batch, tokens, hidden_size).
        attention_mask: Mask for the attention function; (batch or 1, 1, tokens, tokens) for eager and sdpa.
        num_queries: Number of first tokens that are queries; None for all.
        **kwargs: Further arguments of the attention function.

    Returns:
        Attention output of the queries; (batch, queries, hidden_size).
    """
    # Masks of flex and flash attention have no rows per query that could be selected.
    rows = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4 else None
    if num_queries is None or (attention_mask is not None and rows is None):
        return attention(hidden_states, attention_mask, **kwargs)[0][:, :num_queries]
    heads = (-1, attention.head_dim)
    query = attention.q_proj(hidden_states[:, :num_queries].contiguous()).unflatten(-1, heads).transpose(1, 2)
    key = attention.k_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
    value = attention.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
    mask = None if rows is None else rows[:, :, :num_queries]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    dropout = attention.attention_dropout if attention.training else 0.0
    seen, _ = attend(attention, query, key, value, mask, dropout=dropout, scaling=attention.scaling, **kwargs)
    return attention.o_proj(seen.flatten(2))


class DeiTLTLayer(DeiTLayer):
    """A DeiT block whose two residual branches go through stochastic depth.

    On request the last block computes only the two tokens that the heads use.
    """

    def __init__(self, config: DeiTLTConfig, drop_path_rate: float, is_last: bool) -> None:
        super().__init__(config)
        self.drop_path = DeiTLTDropPath(drop_path_rate)
        self.is_last = is_last

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        class_tokens_only: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        # Keys and values of the last block still come from all tokens; only queries, projection and MLP are saved.
        num_queries = 2 if class_tokens_only and self.is_last else None

        def attend(states: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
            mask = attention_mask
            if kept is not None and isinstance(mask, torch.Tensor) and len(mask) > 1:  # a mask for each image
                mask = mask[kept]
            states = self.layernorm_before(states)
            return self.dropout(first_tokens_attend(self.attention, states, mask, num_queries, **kwargs))

        def transform(states: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
            return self.dropout(self.mlp(self.layernorm_after(states)))

        residual = None if num_queries is None else hidden_states[:, :num_queries]
        return self.drop_path(self.drop_path(hidden_states, attend, residual), transform)


class DeiTLTPreTrainedModel(DeiTPreTrainedModel):
    """Base class with the weight initialisation of the authors' model; it loads and saves as transformers does."""

    config: DeiTLTConfig
    config_class = DeiTLTConfig
    _no_split_modules = ["DeiTEmbeddings", "DeiTLTLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, DeiTEmbeddings):
            # CLS begins at almost zero, as in timm; transformers' DeiT would begin DIST and the positions at zero, too.
            init.normal_(module.cls_token, std=1e-6)
            init.trunc_normal_(module.distillation_token, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            # The authors leave the patch projection at torch's default, uniform in +-1/sqrt(fan_in).
            bound = 1.0 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)  # type: ignore[arg-type]


class DeiTLTModel(DeiTLTPreTrainedModel, DeiTModel):
    """The bare student: embeddings, blocks with stochastic depth, final layer norm. There is no pooler.

    Differences from [`~transformers.DeiTModel`]: stochastic depth, initialisation.

    Raises:
        ValueError: If the configuration is a plain `DeiTConfig`.
    """

    def __init__(self, config: DeiTLTConfig) -> None:
        if not hasattr(config, "drop_path_rate"):
            raise ValueError(
                f"a student needs a DeiTLTConfig, got a {type(config).__name__}; load it with "
                "DeiTLTConfig.from_pretrained."
            )
        # Not the constructor of DeiTModel: it would create blocks without stochastic depth, and a pooler.
        DeiTPreTrainedModel.__init__(self, config)
        depth = config.num_hidden_layers
        self.embeddings = DeiTEmbeddings(config)
        self.layers = nn.ModuleList(
            DeiTLTLayer(config, config.drop_path_rate * index / max(depth - 1, 1), is_last=index == depth - 1)
            for index in range(depth)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = None  # `DeiTModel.forward` asks for it
        self.post_init()


class DeiTLTForImageClassification(DeiTLTPreTrainedModel):
    """DeiT-LT (Rangwani et al., CVPR 2024): a CLS head for the labels and a DIST head for the flat teacher.

    Differences from [`~transformers.DeiTForImageClassificationWithTeacher`]: a loss when labels are given, stochastic
    depth, initialisation, and `token_features` in the output. Train it with [`DeiTLTTrainer`].
    """

    accepts_loss_kwargs = False  # the loss is a mean, so transformers' Trainer must divide by accumulation steps

    def __init__(self, config: DeiTLTConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # never None: transformers' default is two labels
        self.num_labels = config.num_labels
        self.deit = DeiTLTModel(config)
        self.cls_classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.distillation_classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        class_tokens_only: bool | None = None,
        **kwargs: Any,
    ) -> DeiTLTImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: Normalised images; (batch, channels, height, width).
            labels: Class indices (batch,) or class probabilities (batch, num_labels). With labels the output has a
                loss, the mean cross entropy of both heads on the labels: training without a teacher.
            interpolate_pos_encoding: Accept images of another size than the configuration's.
            class_tokens_only: Compute the last block's output for the CLS and DIST tokens only, the inputs of the
                heads. Logits and gradients are the same at a lower cost. (Dropout, which the paper does not use, draws
                other random numbers.) Hooks on the last block and the final norm then see two tokens. None: True,
                unless hidden states or attentions are requested, which contain all tokens.
            **kwargs: `output_attentions`, `output_hidden_states` and arguments of the attention function.

        Raises:
            ValueError: If the images have another number of channels, or another size and
                `interpolate_pos_encoding` is False; or if labels are given and `problem_type` is not single-label
                classification.
        """
        if labels is not None and self.config.problem_type not in (None, "single_label_classification"):
            problem = self.config.problem_type
            raise ValueError(f"problem_type {problem!r} has no loss here: an image has one class. Set it to None.")
        if class_tokens_only is None:
            asked = (kwargs.get(name, getattr(self.config, name, False)) for name in _WHOLE_OUTPUTS)
            class_tokens_only = not any(asked)
        outputs = self.deit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            class_tokens_only=class_tokens_only,
            **kwargs,
        )
        # The order of tokens is that of DeiT: CLS, DIST, patches. Each head reads only its own token.
        token_features = outputs.last_hidden_state[:, :2]
        cls_logits = self.cls_classifier(token_features[:, 0])
        distillation_logits = self.distillation_classifier(token_features[:, 1])

        loss = None
        if labels is not None:
            heads = (cls_logits, distillation_logits)
            cls_loss, other_loss = (nn.functional.cross_entropy(logits.float(), labels) for logits in heads)
            loss = (cls_loss + other_loss) / 2

        return DeiTLTImageClassifierOutput(
            loss=loss,
            logits=(cls_logits + distillation_logits) / 2,  # as in transformers' class, which loads the same folder
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            token_features=token_features,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# transformers renames DeiT's parameters between file and memory, but for custom classes only if they are registered.
# With this, every DeiT checkpoint loads into this class, and saved files have the names that all versions read.
register_checkpoint_conversion_mapping("DeiTLTModel", get_checkpoint_conversion_mapping("DeiTModel"), overwrite=True)

DeiTLTModel.register_for_auto_class("AutoModel")
DeiTLTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
