"""The tower's route at inference: packed products, kept constants; on a GPU two streams and a CUDA graph."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch
from torch import Tensor, nn

from mra_kernels import linear_gelu
from mra_kernels.dispatch import is_reference, preference
from mra_kernels.modules import resample_mean_weights
from mra_model.configuration_mra import HIGH_STRIDE, QUARTERS
from mra_model.modeling_mra import MraAdapterLayer, MraVisionModel
from mra_model.optimization.graphs import CudaCapture, GraphCache
from mra_model.optimization.layers import LayerRoute, run_layers, sharp_biases, why_not
from mra_model.optimization.packing import Packed, why_not_together
from mra_model.optimization.report import Optimization
from mra_model.optimization.structure import Structure, is_hooked

# Kinds of devices that have graphs; `CudaCapture` makes them.
GRAPH_DEVICES = ("cuda",)

# A part in the report.
ADAPTERS = "MR-Adapters"

# Sides of the picture for which constants are kept; a position embedding takes a few megabytes.
KEPT_SIDES = 8


@dataclass(frozen=True)
class Key:
    """What one CUDA graph can serve.

    Attributes:
        shape: of the pixels: (B, 3, S, S).
        dtype: of the pixels.
        backends: chosen for the ops of `mra_kernels`, see `preference`.
        attention: transformers' name of the ViT's attention.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    backends: tuple[str, ...] | None
    attention: str

    def __str__(self) -> str:
        batch, _, _, side = self.shape
        return f"B={batch}, {side} x {side}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Constants:
    """What depends on the sides of the grids alone.

    Attributes:
        positions: the position embedding at the ViT's grid: [grid * grid, C_l].
        mean_weights: see `resample_mean_weights`: [side * side] of the high-resolution map.
    """

    positions: Tensor
    mean_weights: Tensor


class TowerRoute:
    """Computes what a tower computes: pixels [B, 3, S, S] -> [B, L, C_l], or None where the plain forward must.

    Whatever it prepares depends on where the parameters lie, which every call compares with the last one.

    Args:
        tower: to compute; in evaluation mode, and without autograd.
        max_graphs: CUDA graphs to keep.
    """

    def __init__(self, tower: MraVisionModel, max_graphs: int) -> None:
        self.tower = tower
        self.report = Optimization(max_graphs, _undo=self._undo)
        self._graphs = GraphCache(max_graphs, lambda call, example: self._capture(example.device)(call, example))
        self._captures: dict[torch.device, CudaCapture] = {}
        self._lock = Lock()
        self._prepare()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """None, so that a copy of the model is a plain one."""
        return type(None), ()

    def __call__(self, pixels: Tensor, grid: int) -> Tensor | None:
        """pixels: [B, 3, S, S] of any dtype that the tower takes -> [B, grid * grid, C_l]."""
        reason = self._why_plain(pixels)
        if reason is not None:
            self.report.plain[reason] += 1
            return None
        with self._lock:
            if self._state() != self._seen:
                self._prepare()
            constants = self._constants_at(grid, pixels.shape[-1] // HIGH_STRIDE)
        reason = self._why_no_graph(pixels)
        if reason is None:
            call = partial(self._forward, grid=grid, constants=constants, side=self._capture(pixels.device).side)
            output = self._graphs.run(call, pixels, self._key(pixels), self._seen)
            self.report.graphs = [str(key) for key in self._graphs.captured()]
            if isinstance(output, Tensor):
                return output
            reason = output
        self.report.ungraphed[reason] += 1
        return self._forward(pixels, grid, constants)

    def _forward(
        self, pixels: Tensor, grid: int, constants: Constants, side: torch.cuda.Stream | None = None
    ) -> Tensor:
        """As the tower's own. On the stream `side` the high-resolution pathway runs beside the ViT's first quarter."""
        tower, low = self.tower, self.tower.low
        pixels = tower.normalize(pixels)
        if side is None:
            high, hidden = self._look_high(pixels, constants)
        else:
            # Memory that the side stream frees is only used again there, after the next wait for this stream.
            stream = torch.cuda.current_stream()
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                high, hidden = self._look_high(pixels, constants)
        tokens = low.embed(pixels, grid, constants.positions)
        biases = sharp_biases(self._layers, tokens)
        quarter = len(low.layers) // QUARTERS
        for number in range(QUARTERS):
            layers = slice(number * quarter, (number + 1) * quarter)
            tokens = run_layers(low.layers[layers], self._layers[layers], biases, tokens)
            if side is not None and number == 0:
                stream.wait_stream(side)
            if number < len(tower.adapters):
                adapter = tower.adapters[number]
                tokens = adapter(tokens.unflatten(1, (grid, grid)), high, hidden[number]).flatten(1, 2)
        return tower.merge(tokens.unflatten(1, (grid, grid)), high).flatten(1, 2)

    def _look_high(self, pixels: Tensor, constants: Constants) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
        """pixels: [B, 3, S, S] -> the map [B, H', W', C_h], and for each adapter what `MRAdapter` calls hidden."""
        high = self.tower.high(pixels.to(self.tower.low.position_embedding.dtype))
        count = len(self.tower.adapters)
        if self._adapters is None:
            return high, [None] * count
        weight, bias = (pack.whole for pack in self._adapters)
        hidden, mean = linear_gelu(high, weight, bias, constants.mean_weights)
        return high, list(zip(hidden.chunk(count, -1), mean.chunk(count, -1), strict=True))

    # What is prepared, and when anew.

    def _state(self) -> Hashable:
        """What everything prepared depends on. The position embedding was resized: there values count too."""
        positions = self.tower.low.position_embedding
        # Two conversions may end at the first address with another dtype.
        return self._structure.state(), positions.dtype, positions._version

    def _prepare(self) -> None:
        """Packs weights and drops what was kept."""
        tower, report, positions = self.tower, self.report, self.tower.low.position_embedding
        self._structure = Structure(tower)
        report.faster, report.left = {}, {}
        self._layers = [self._prepare_layer(f"ViT layer {n}", layer) for n, layer in enumerate(tower.low.layers)]
        self._adapters = self._prepare_adapters()
        self._leave_tied()
        served = sum(layer is not None for layer in self._layers)
        if served:
            report.faster["ViT"] = f"{served} of {len(self._layers)} layers have one QKV product and fused sums"
        if self._adapters is not None:
            report.faster[ADAPTERS] = "their first 1x1 convolutions are one product"
        report.faster["position embedding"] = "resized once for each side of the picture"
        if positions.device.type in GRAPH_DEVICES and report.max_graphs > 0:
            report.faster["whole tower"] = "CUDA graphs, ConvNeXt on a second stream beside the ViT's first quarter"
        self._constants: dict[tuple[int, int], Constants] = {}
        # Held, so that its address is given to no other values while an older resize of it is kept.
        self._resized = positions.detach()
        # Packing moved weights itself.
        self._seen = None if positions.is_inference() else self._state()

    def _prepare_layer(self, name: str, layer: nn.Module) -> LayerRoute | None:
        reason = why_not(layer)
        if reason is None:
            return LayerRoute(layer)
        self.report.left[name] = reason
        return None

    def _prepare_adapters(self) -> tuple[Packed, Packed] | None:
        """Weight [n * C_h, C_h] and bias [n * C_h] of the adapters' first 1x1 convolutions of the same map."""
        adapters = self.tower.adapters
        reason = "the tower has none" if len(adapters) == 0 else None
        for number, adapter in enumerate(adapters):
            if type(adapter) is not MraAdapterLayer:
                reason = f"number {number} is {type(adapter).__name__}, not MraAdapterLayer"
            elif is_hooked(adapter):
                reason = f"number {number} has hooks, or a forward of its own"
        reason = reason or self._why_not_first("weight") or self._why_not_first("bias")
        if reason is None:
            return Packed(self._first("weight")), Packed(self._first("bias"))
        self.report.left[ADAPTERS] = reason
        return None

    def _first(self, parameter: str) -> list[nn.Parameter]:
        return [getattr(adapter, f"high_conv_{parameter}") for adapter in self.tower.adapters]

    def _why_not_first(self, parameter: str) -> str | None:
        reason = why_not_together(self._first(parameter))
        return None if reason is None else f"the {parameter}s of their first 1x1 convolutions: {reason}"

    def _leave_tied(self) -> None:
        """Leaves alone what lost a parameter to another's pack."""
        reason = "shares a parameter, which can lie in one place only"
        for number, layer in enumerate(self._layers):
            if layer is not None and not all(pack.holds() for pack in layer.packs):
                _release(layer.packs)
                self._layers[number], self.report.left[f"ViT layer {number}"] = None, f"it {reason}"
        if self._adapters is not None and not all(pack.holds() for pack in self._adapters):
            _release(self._adapters)
            self._adapters, self.report.left[ADAPTERS] = None, f"one {reason}"

    def _constants_at(self, grid: int, high_side: int) -> Constants:
        key = (grid, high_side)
        if key not in self._constants:
            while len(self._constants) >= KEPT_SIDES:
                del self._constants[next(iter(self._constants))]
            positions = self.tower.low.positions_at(grid)
            wide = positions.new_empty(0, dtype=torch.promote_types(positions.dtype, torch.float32))
            weights = resample_mean_weights((high_side, high_side), (grid, grid), wide)
            if positions.is_cuda:
                # Calls on other streams read them, too.
                torch.cuda.current_stream(positions.device).synchronize()
            self._constants[key] = Constants(positions, weights)
        return self._constants[key]

    # When not.

    def _why_plain(self, pixels: Tensor) -> str | None:
        """None where this route serves the call, otherwise the reason for the plain forward."""
        weight, device = self.tower.low.position_embedding, pixels.device.type
        if self.report.paused:
            return "the optimization is paused"
        if self.tower.training:
            # They would hold memory that training wants.
            self._graphs.clear()
            return "the tower is in training mode"
        if torch.is_grad_enabled():
            return "autograd records; torch.no_grad() or torch.inference_mode() stops it"
        if is_reference():
            return "the backend reference was chosen"
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return "autocast is enabled"
        if torch.jit.is_tracing():
            return "torch.jit traces"
        if pixels.numel() == 0:
            return "there is no picture"
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            return "the stream is being captured, and what is kept must not be made in there"
        if pixels.device != weight.device:
            return f"pixels are on {pixels.device}, weights on {weight.device}"
        if weight.is_inference():
            return "the weights were made in inference mode, where changes are not counted"
        if getattr(getattr(self.tower, "_hf_hook", None), "offload", False):
            return "the weights are offloaded, and move at every call"
        return None

    def _why_no_graph(self, pixels: Tensor) -> str | None:
        if self.report.max_graphs == 0:
            return "max_graphs is 0"
        if pixels.device.type not in GRAPH_DEVICES:
            return f"CUDA graphs need a CUDA device, and this is {pixels.device.type}"
        hooked = self._structure.hooked()
        if hooked is not None:
            return f"{hooked} has hooks or a forward of its own, which a replay would not call"
        return None

    def _key(self, pixels: Tensor) -> Key:
        return Key(tuple(pixels.shape), pixels.dtype, preference(), self.tower.config.low_config._attn_implementation)

    def _capture(self, device: torch.device) -> CudaCapture:
        if device not in self._captures:
            self._captures[device] = CudaCapture(device)
        return self._captures[device]

    def _undo(self) -> None:
        if self.tower.route is not self:
            return
        self.tower.route = None
        self._graphs.clear()
        for layer in self._layers:
            if layer is not None:
                _release(layer.packs)
        if self._adapters is not None:
            _release(self._adapters)


def _release(packs: tuple[Packed, ...]) -> None:
    for pack in packs:
        pack.release()
