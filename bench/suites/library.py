"""What the library needs for a depthwise 7x7 convolution at the four stage shapes: forward and both gradients.

Maps are channels last, as the package keeps them. cuDNN takes them as they are; PyTorch's own kernel wants channels
first, so it is timed with the copies that it costs a channels-last model, and without.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare import Case, measure
from bench.shapes import LARGE, TINY
from bench.step import Run
from bench.timing import Call

conv_backward = torch.ops.aten.convolution_backward.default


def run(run: Run, *, batch: int) -> None:
    """Forward, input gradient and weight gradient at each stage's shape, for pictures of 1024 x 1024."""
    for side, channels in run.pick(LARGE, TINY).stages():
        x, grad = (torch.randn(batch, side, side, channels, device=run.device, dtype=torch.bfloat16) for _ in range(2))
        weight = torch.randn(channels, 1, 7, 7, device=run.device, dtype=torch.bfloat16) / 7
        bias = torch.randn(channels, device=run.device, dtype=torch.bfloat16)
        shape = f"{side}x{side}x{channels}"
        flops = 98 * x.numel()
        for name, case in _cases(x, grad, weight, bias).items():
            variants, output, exact = case
            title = f"depthwise 7x7 {name} {shape} B={batch}"
            labels: dict[str, str | int | bool] = {"suite": "library", "what": f"depthwise 7x7, {name}"}
            labels |= {"shape": shape, "batch": batch, "dtype": "bfloat16"}
            measure(run, Case(title, variants, (output,), exact, 2 * x.nbytes, flops, labels=labels))


def _cases(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> dict[str, tuple[dict[str, Call], str, Call]]:
    """x, grad: [B, H, W, C], weight: [C, 1, 7, 7], bias: [C] -> variants, output and exact value of each direction."""
    last, grad_last = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
    first, grad_first = last.contiguous(), grad_last.contiguous()
    groups = len(weight)

    def forward(x: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
        return F.conv2d(x, weight, bias, padding=3, groups=groups)

    def backward(grad: Tensor, x: Tensor, weight: Tensor, want: int) -> Tensor:
        mask = [index == want for index in range(3)]
        grads = conv_backward(grad, x, weight, None, [1, 1], [3, 3], [1, 1], False, [0, 0], groups, mask)
        return grads[want]

    def copied(x: Tensor) -> Tensor:
        return x.contiguous()

    def back(y: Tensor) -> Tensor:
        return y.contiguous(memory_format=torch.channels_last)

    return {
        "forward": (
            {
                "cuDNN NHWC": partial(_cudnn, False, lambda: forward(last)),
                "cuDNN NHWC, benchmark": partial(_cudnn, True, lambda: forward(last)),
                "native NCHW with copies": partial(_native, lambda: back(forward(copied(last)))),
                "native NCHW": partial(_native, lambda: forward(first)),
            },
            "y",
            lambda: forward(last.double(), weight.double(), bias.double()),
        ),
        "input gradient": (
            {
                "cuDNN NHWC": partial(_cudnn, False, lambda: backward(grad_last, last, weight, 0)),
                "cuDNN NHWC, benchmark": partial(_cudnn, True, lambda: backward(grad_last, last, weight, 0)),
                "native NCHW with copies": partial(
                    _native, lambda: back(backward(copied(grad_last), first, weight, 0))
                ),
                "native NCHW": partial(_native, lambda: backward(grad_first, first, weight, 0)),
            },
            "grad_x",
            lambda: backward(grad_last.double(), last.double(), weight.double(), 0),
        ),
        "weight gradient": (
            {
                "cuDNN NHWC": partial(_cudnn, False, lambda: backward(grad_last, last, weight, 1)),
                "cuDNN NHWC, benchmark": partial(_cudnn, True, lambda: backward(grad_last, last, weight, 1)),
                "native NCHW with copies": partial(
                    _native, lambda: backward(copied(grad_last), copied(last), weight, 1)
                ),
                "native NCHW": partial(_native, lambda: backward(grad_first, first, weight, 1)),
            },
            "grad_weight",
            lambda: backward(grad_last.double(), last.double(), weight.double(), 1),
        ),
    }


def _cudnn(benchmark: bool, call: Call) -> Tensor:
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark):
        return call()


def _native(call: Call) -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        return call()
