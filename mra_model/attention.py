"""The ViT's attention for transformers: on a CPU by `mra_kernels`, elsewhere as `sdpa` has it."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mra_kernels import attention

NAME = "mra_sdpa"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What an encoder's layers call: query, key and value [B, H, L, D] -> [B, L, H, D], and no weights."""
    if query.device.type != "cpu" or attention_mask is not None or dropout > 0:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    return attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scaling), None


AttentionInterface.register(NAME, attend)
