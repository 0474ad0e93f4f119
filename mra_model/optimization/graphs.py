"""CUDA graphs of a function from one tensor to one tensor: a bounded cache by key, and the capture itself."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import RLock
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]

# Libraries choose algorithms and allocate workspaces in the first calls, which a capture must not see.
WARM_UPS = 3


class Graph(Protocol):
    """A captured call: `replay` computes `output` from `inputs`, both always the same memory."""

    inputs: Tensor
    output: Tensor

    def replay(self) -> None:
        """Launches the work."""

    def turn(self) -> AbstractContextManager[Any]:
        """Around everything that touches this graph's memory: waits for the last turn."""


class GraphCache:
    """The most recently used graphs, by key.

    Args:
        limit: graphs to keep.
        capture: makes a graph of a call, given an example of its argument.
    """

    def __init__(self, limit: int, capture: Callable[[Call, Tensor], Graph]) -> None:
        self._limit = limit
        self._capture = capture
        # A call that could not be captured has the reason in its place, and is not tried again.
        self._entries: OrderedDict[Hashable, Graph | str] = OrderedDict()
        self._state: Hashable = None
        self._lock = RLock()

    def __len__(self) -> int:
        return sum(not isinstance(entry, str) for entry in self._entries.values())

    def captured(self) -> list[Hashable]:
        """Keys of the graphs, the least recently used first."""
        return [key for key, entry in self._entries.items() if not isinstance(entry, str)]

    def clear(self) -> None:
        """Forgets all graphs and frees their memory."""
        with self._lock:
            self._entries.clear()

    def run(self, call: Call, inputs: Tensor, key: Hashable, state: Hashable) -> Tensor | str:
        """What `call` makes of `inputs`, by a replay.

        Args:
            call: captured where there is no graph for `key`.
            inputs: of the shape, dtype and device that `key` stands for.
            key: equal for calls that one graph can serve.
            state: what every graph depends on; another one than at the last call drops them all.

        Returns:
            A tensor of the caller's own, or the reason why the call cannot be captured.
        """
        with self._lock:
            if state != self._state:
                self.clear()
                self._state = state
            entry = self._entries.get(key)
            if entry is None:
                entry = self._try(call, inputs)
                self._entries[key] = entry
            self._entries.move_to_end(key)
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
            if isinstance(entry, str):
                return entry
            with entry.turn():
                entry.inputs.copy_(inputs)
                entry.replay()
                return entry.output.clone()

    def _try(self, call: Call, inputs: Tensor) -> Graph | str:
        try:
            return self._capture(call, inputs)
        except RuntimeError as error:
            return f"its capture failed: {type(error).__name__}: {error}".splitlines()[0]


class CudaCapture:
    """Captures calls on one device. All its graphs share memory for intermediate results, so they take turns.

    Attributes:
        side: a second stream for the call to fork work to; it must be joined before the call returns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.side = torch.cuda.Stream()
            self._stream = torch.cuda.Stream()
            self._last = torch.cuda.Event()
        self._live: WeakSet[CudaGraph] = WeakSet()

    def __call__(self, call: Call, example: Tensor) -> "CudaGraph":
        """A graph of `call`, warmed up on the stream that is captured; nothing of it depends on inference mode."""
        with torch.inference_mode(False), torch.no_grad(), self.turn():
            inputs = example.clone()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    call(inputs)
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # The memory of graphs that are all gone cannot be captured into again.
            pool = next((live.pool for live in self._live), None)
            # Other threads may load data to the device meanwhile.
            with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                output = call(inputs)
        captured = CudaGraph(self, graph, call, inputs, output)
        self._live.add(captured)
        return captured

    @contextmanager
    def turn(self) -> Iterator[None]:
        """On the current stream of the device, after the last turn on any stream."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last)
            yield
            self._last.record(stream)


class CudaGraph:
    """A graph, and all that its kernels read: `call` holds the tensors that are no parameters."""

    def __init__(
        self, capture: CudaCapture, graph: torch.cuda.CUDAGraph, call: Call, inputs: Tensor, output: Tensor
    ) -> None:
        self.inputs = inputs
        self.output = output
        self._capture = capture
        self._graph = graph
        self._call = call

    @property
    def pool(self) -> Any:
        """PyTorch's name of its memory."""
        return self._graph.pool()

    def replay(self) -> None:
        """Launches the graph on the current stream, which may not be the one that its input was allocated on."""
        self.inputs.record_stream(torch.cuda.current_stream())
        self._graph.replay()

    def turn(self) -> AbstractContextManager[None]:
        """See `Graph`."""
        return self._capture.turn()
