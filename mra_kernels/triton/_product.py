"""The library's matrix products, on rows: cuBLASLt on a GPU, with the bias in its epilogue."""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: [..., K], weight: [N, K], bias: [N] -> x W^T + b as rows, contiguous, in memory of its own: [R, N]."""
    return torch.addmm(bias.contiguous(), rows(x), weight.mT)


def gradients(grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """grad: [R, N], of x W^T -> gradients of x: [..., K] and weight: [N, K]; empty where nobody needs one."""
    empty = x.new_empty(0)
    grad_x = (grad @ weight).reshape(x.shape) if need_x else empty
    grad_weight = grad.mT @ rows(x) if need_weight else empty
    return grad_x, grad_weight


def rows(x: Tensor) -> Tensor:
    """x: [..., C] -> contiguous [R, C]; a vector is one row."""
    return x.reshape(-1, x.shape[-1]).contiguous()
