"""What a module is made of, compared between calls in a few dozen microseconds."""

from collections.abc import Hashable
from itertools import chain

from torch import Tensor, nn


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: forward hooks, or a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


class Structure:
    """The modules inside `root` and the memory of its parameters.

    A change of values in place is none: who computes from the same memory sees it.
    """

    def __init__(self, root: nn.Module) -> None:
        # Held, so that no module that is replaced leaves its identity to another one.
        self._modules = dict(root.named_modules())
        self._children = [module._modules for module in self._modules.values()]
        self._parameters = [module._parameters for module in self._modules.values()]

    def state(self) -> Hashable:
        """Equal to an earlier one as long as no module was replaced and every parameter lies where it did."""
        children = tuple(map(id, chain.from_iterable(map(dict.values, self._children))))
        parameters = [p for p in chain.from_iterable(map(dict.values, self._parameters)) if p is not None]
        try:
            addresses = tuple(map(Tensor.data_ptr, parameters))
        except RuntimeError:
            # Subclasses, such as quantized weights, need not have one.
            addresses = tuple(map(id, parameters))
        # The same address with another dtype is possible after two conversions.
        return children, addresses, frozenset([p.dtype for p in parameters])

    def hooked(self) -> tuple[str, ...]:
        """Names of the modules inside `root` that are hooked; those of `root` itself run outside its forward."""
        return tuple([name for name, module in self._modules.items() if name and is_hooked(module)])
