"""Parameters that lie one after the other in memory, so that one product serves them all."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Packed:
    """Parameters of one shape as the rows of one tensor, which takes no memory beside theirs.

    Values, and so `state_dict`, optimizers and files, stay what they are; what is written into either is the other's.

    Args:
        parameters: n x [N, ...]; `why_not_together` has nothing against them.

    Attributes:
        whole: [n * N, ...].
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        # A tensor of inference mode could not be trained afterwards; DLPack exports from the current device only.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(parameters[0]):
            self.whole = torch.cat([parameter.detach() for parameter in parameters])
            for parameter, rows in zip(parameters, self._rows(), strict=True):
                # By DLPack the rows have storages of their own: safetensors refuses views of one that they share, and
                # torch.save would write all of it for each.
                parameter.data = torch.from_dlpack(rows)

    def holds(self) -> bool:
        """Whether all parameters lie here: one that is tied to another is wherever it was packed last."""
        return all(self._are_here())

    def release(self) -> None:
        """Gives each parameter that still lies here memory of its own."""
        with torch.inference_mode(False):
            for parameter, here in zip(self._parameters, self._are_here(), strict=True):
                if here:
                    parameter.data = parameter.data.clone()

    def _are_here(self) -> list[bool]:
        pairs = zip(self._parameters, self._rows(), strict=True)
        return [parameter.data_ptr() == rows.data_ptr() for parameter, rows in pairs]

    def _rows(self) -> tuple[Tensor, ...]:
        return self.whole.chunk(len(self._parameters))


def why_not_together(tensors: Sequence[Tensor | None]) -> str | None:
    """None where `Packed` can take them, otherwise the reason."""
    for tensor in tensors:
        reason = why_not_plain(tensor)
        if reason is not None:
            return f"one {reason}"
    if len({(t.dtype, t.device, t.shape) for t in tensors if t is not None}) != 1:
        return "they differ in dtype, device or shape"
    return None


def why_not_plain(tensor: Tensor | None) -> str | None:
    """None for a parameter in memory of the usual kind, otherwise the reason."""
    if tensor is None:
        return "is missing"
    if type(tensor) is not nn.Parameter or type(tensor.data) is not Tensor:
        return f"is a {type(tensor.data).__name__}, not a plain parameter"
    if tensor.is_meta:
        return "is on the meta device"
    if tensor.is_inference():
        return "was made in inference mode"
    return None
