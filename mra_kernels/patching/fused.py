"""How a module gets another forward: its class is exchanged for a subclass, made here.

Parameters, children and keys stay as they are. A function in the module's own `__dict__` would do for one module, but
it remembers that one: replicas that DataParallel makes, which are copied shallowly, would compute with the weights of
the first device. A method belongs to whatever it is called on, so copies are right without any care.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, ClassVar

from torch import nn

from mra_kernels.dispatch import use_backend


class Fused:
    """Stands before a module's own class, which `super()` is.

    Attributes:
        kind: for readers of a report.
        uses: the ops of this forward.
        separable: whether each of them is of use without the others.
        plain: the module's own class.
        ops: the ops that may be used.
        backend: for `use_backend`; None leaves the choice to whoever calls.
        detail: what a forward must know of the class it stands before.
    """

    kind: ClassVar[str]
    uses: ClassVar[tuple[str, ...]]
    separable: ClassVar[bool] = False
    plain: ClassVar[type[nn.Module]]
    ops: ClassVar[frozenset[str]]
    backend: ClassVar[str | None]
    detail: ClassVar[Any]

    @staticmethod
    def why_not(module: nn.Module, detail: Any) -> dict[str, str]:
        """By op or part, why it cannot be replaced; `""` stands for all of the module."""
        raise NotImplementedError

    def served(self) -> AbstractContextManager[None]:
        """Around a forward: the backend that was asked for."""
        return nullcontext() if self.backend is None else use_backend(self.backend)

    def __reduce__(self) -> tuple[Any, ...]:
        # No name leads to a class that was made at run time.
        return _rebuild, (_mixin(type(self)), self.plain, self.ops, self.backend, self.detail), self.__dict__


@cache
def fused_class(
    mixin: type[Fused], plain: type[nn.Module], ops: frozenset[str], backend: str | None, detail: Any
) -> type[nn.Module]:
    """The subclass of `plain` with the forward of `mixin`, by the name of `plain`, which tools look for."""
    attributes = {"ops": ops, "backend": backend, "detail": detail, "plain": plain}
    attributes |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (mixin, plain), attributes)


def _mixin(kind: type) -> type[Fused]:
    return next(c for c in kind.__mro__ if "plain" in vars(c)).__bases__[0]


def _rebuild(*arguments: Any) -> nn.Module:
    kind = fused_class(*arguments)
    return kind.__new__(kind)
