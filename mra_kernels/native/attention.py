"""Native `attention`: C++ on a CPU. A GPU has the library's flash attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mra_kernels.dispatch import Backend
from mra_kernels.native._extension import extension, place, pointer, unsupported


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float32 and bfloat16 on a CPU, otherwise the reason."""
    if device.type == "cuda":
        return "no native CUDA kernel: the library has flash attention there"
    return unsupported(device, dtype, (torch.float32, torch.bfloat16))


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """[B, L, H, D] and twice [B, M, H, D] -> y: [B, L, H, D] and logsumexp: [B, H, L], float32."""
    query, key, value = map(_in_rows, (query, key, value))
    batch, queries, heads, _ = query.shape
    y = query.new_empty(query.shape)
    logsumexp = query.new_empty((batch, heads, queries), dtype=torch.float32)
    extension.attention_forward(
        *map(pointer, (query, key, value, y, logsumexp)), *_sizes(query, key, value), _scale(query, scale), *place(y)
    )
    return y, logsumexp


def backward(
    grad_y: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    logsumexp: Tensor,
    scale: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value; empty where `needs` says no. What was not kept is computed again."""
    query, key, value = map(_in_rows, (query, key, value))
    if logsumexp.numel() == 0:
        y, logsumexp = forward(query, key, value, scale)
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    inputs = (grad_y.contiguous(), query, key, value, y.contiguous(), logsumexp.contiguous())
    extension.attention_backward(
        *map(pointer, (*inputs, *grads)), *_sizes(query, key, value), _scale(query, scale), *place(y)
    )
    return tuple(grad if need else query.new_empty(0) for grad, need in zip(grads, needs, strict=True))


def _in_rows(tensor: Tensor) -> Tensor:
    """[B, L, H, D] with heads side by side in rows that are all one stride apart, as in a product of q, k and v."""
    batch, rows, heads, channels = tensor.shape
    stride = tensor.stride(1)
    adjoining = tensor.stride(3) == 1 or channels == 1
    adjoining &= tensor.stride(2) == channels or heads == 1
    adjoining &= tensor.stride(0) == rows * stride or batch == 1
    return tensor if adjoining and stride >= heads * channels else tensor.contiguous()


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    batch, queries, heads, channels = query.shape
    return batch, queries, key.shape[1], heads, channels, *(tensor.stride(1) for tensor in (query, key, value))


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[3] ** -0.5 if scale is None else scale


BACKEND = Backend(forward, backward, supports)
