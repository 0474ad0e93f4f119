"""What `apply_mra_kernels` did to a model, and the way back."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from mra_kernels.patching.fused import Fused


@dataclass(frozen=True)
class Replacement:
    """A module whose forward is another one.

    Attributes:
        kind: block, stem, downsample, MR-Adapter or merge.
        ops: what it runs on.
    """

    kind: str
    ops: tuple[str, ...]


@dataclass(eq=False)
class PatchReport:
    """Print it.

    Attributes:
        model: the model's class.
        replaced: by path in the model.
        left: by path, and by op or part, why it was left alone; `""` stands for all of the module.
    """

    model: str
    replaced: dict[str, Replacement] = field(default_factory=dict)
    left: dict[str, dict[str, str]] = field(default_factory=dict)
    _modules: list[nn.Module] = field(default_factory=list, repr=False)

    @property
    def counts(self) -> Counter[str]:
        """Modules that were replaced, by kind."""
        return Counter(replacement.kind for replacement in self.replaced.values())

    def undo(self) -> None:
        """Gives every module its own forward back; once is enough.

        Raises:
            RuntimeError: a module was wrapped in yet another class since; the others have theirs back.
        """
        wrapped = []
        for module in self._modules:
            kind = type(module)
            if "plain" in vars(kind):
                module.__class__ = kind.plain  # type: ignore[attr-defined]
            elif isinstance(module, Fused):
                wrapped.append(kind)
        if wrapped:
            raise RuntimeError(
                f"{len(wrapped)} modules became {wrapped[0].__name__} since they were patched, as fully_shard and "
                f"parametrizations do it; take that away first, then call undo() again"
            )

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return f"nothing recognised: {self.model} has no ConvNeXt stem, block or downsample, MR-Adapter or merge"
        groups: dict[str, list[str]] = defaultdict(list)
        for path, replacement in self.replaced.items():
            groups[f"{replacement.kind}: {', '.join(replacement.ops)}"].append(path)
        lines = [f"replaced   {len(paths)} x {what}" for what, paths in groups.items()]
        groups.clear()
        for path, reasons in self.left.items():
            for what, reason in reasons.items():
                groups[f"{what}: {reason}" if what else reason].append(path)
        return "\n".join(lines + [f"left alone {_paths(paths)}: {reason}" for reason, paths in groups.items()])


def _paths(paths: Iterable[str]) -> str:
    first, *others = (path or "the model" for path in paths)
    return f"{first} and {len(others)} more" if others else first
