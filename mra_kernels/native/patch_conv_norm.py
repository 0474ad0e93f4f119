"""Native `patch_conv_norm`: C++ on a CPU; its backward is the norm's, between the library's matrix products."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mra_kernels.dispatch import Backend
from mra_kernels.native._extension import extension, place, pointer, unsupported
from mra_kernels.native._product import linear


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float32 or bfloat16 pixels on a CPU, otherwise the reason."""
    return unsupported(device, dtype, (torch.float32, torch.bfloat16))


def forward(
    pixels: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """pixels: [B, P, S1, S2] -> y: [B, S1 // k, S2 // k, C], mean and rstd of the convolution: [B, ...], float32."""
    inputs = [t.contiguous() for t in (pixels, weight, bias, norm_weight, norm_bias)]
    batch, planes, height, width = pixels.shape
    channels, patch = weight.shape[0], weight.shape[3]
    grid = (batch, height // patch, width // patch)
    y = pixels.new_empty((*grid, channels))
    mean, rstd = (pixels.new_empty(grid, dtype=torch.float32) for _ in range(2))
    extension.patch_conv_norm_forward(
        *map(pointer, (*inputs, y, mean, rstd)),
        *(batch, planes, height, width, channels, patch),
        eps,
        *place(pixels),
    )
    return y, mean, rstd


def backward(
    grad_y: Tensor,
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of pixels, weight, bias, norm_weight and norm_bias; empty where `needs` says no.

    Patches do not overlap: the convolution is a product of patch rows with the weight, and so are its gradients. It is
    computed again, rounded to the dtype, so the statistics are those of the rounded values.
    """
    channels, patch = weight.shape[0], weight.shape[3]
    rows = _patch_rows(pixels, patch)
    flat = weight.reshape(channels, -1)
    conv = linear(rows, flat, bias)
    grad_y, norm_weight = grad_y.contiguous(), norm_weight.contiguous()
    grad_conv = torch.empty_like(conv)
    vectors = [torch.empty_like(bias) if need else bias.new_empty(0) for need in needs[2:]]
    extension.patch_conv_norm_backward(
        *map(pointer, (grad_y, conv, norm_weight, grad_conv, *vectors)),
        *conv.shape,
        eps,
        *place(conv),
    )
    grad_pixels = _pixels(grad_conv @ flat, pixels, patch) if needs[0] else pixels.new_empty(0)
    grad_weight = (grad_conv.mT @ rows).reshape(weight.shape) if needs[1] else pixels.new_empty(0)
    return grad_pixels, grad_weight, *vectors


def _patch_rows(pixels: Tensor, patch: int) -> Tensor:
    """pixels: [B, P, S1, S2] -> [B * (S1 // k) * (S2 // k), P * k * k]."""
    batch, planes, height, width = pixels.shape
    whole = pixels[:, :, : height // patch * patch, : width // patch * patch]
    split = whole.reshape(batch, planes, height // patch, patch, width // patch, patch)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(-1, planes * patch * patch)


def _pixels(rows: Tensor, like: Tensor, patch: int) -> Tensor:
    """The inverse: rows of patches -> [B, P, S1, S2], zero past the last whole patch."""
    batch, planes, height, width = like.shape
    split = rows.reshape(batch, height // patch, width // patch, planes, patch, patch).permute(0, 3, 1, 4, 2, 5)
    whole = split.reshape(batch, planes, height // patch * patch, width // patch * patch)
    if whole.shape == like.shape:
        return whole
    return torch.nn.functional.pad(whole, (0, width % patch, 0, height % patch))


BACKEND = Backend(forward, backward, supports)
