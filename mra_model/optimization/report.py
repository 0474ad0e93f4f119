"""What `optimize` did to a model: what is faster, what was left alone, which calls took the plain forward, and why."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Optimization:
    """Kept up to date by the calls; `print` it at any time.

    Attributes:
        max_graphs: as given to `optimize`.
        faster: by part of the tower, what is computed otherwise.
        left: by part, why it was left alone.
        plain: how many calls took the plain forward, by reason.
        ungraphed: how many calls ran without a CUDA graph, by reason.
        graphs: what the CUDA graphs that exist were captured for.
        paused: set it, and calls take the plain forward, while all that was prepared stays.
    """

    max_graphs: int
    faster: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    plain: Counter[str] = field(default_factory=Counter)
    ungraphed: Counter[str] = field(default_factory=Counter)
    graphs: list[str] = field(default_factory=list)
    paused: bool = False
    _undo: Callable[[], None] = lambda: None

    def undo(self) -> None:
        """Gives the model its plain forward back, and each parameter memory of its own. Once is enough."""
        self._undo()

    def __str__(self) -> str:
        lines = [f"faster     {part}: {what}" for part, what in self.faster.items()]
        lines += [f"left alone {part}: {why}" for part, why in self.left.items()]
        lines += [f"CUDA graph {graph}" for graph in self.graphs]
        lines += [f"no graph   {_calls(count)}: {why}" for why, count in self.ungraphed.items()]
        lines += [f"plain      {_calls(count)}: {why}" for why, count in self.plain.items()]
        return "\n".join(lines)


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"
