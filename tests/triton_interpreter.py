"""Triton's interpreter with bfloat16 repaired, and a memory and a race check: kernels on CPU tensors, for tests.

`TRITON_INTERPRET=1 pytest tests/test_<op>.py -k triton` runs an op's suite so; `conftest.py` calls `install`.

- Arithmetic. The interpreter keeps a bfloat16 as its bits, adds and multiplies those as integers, and truncates a
  float32 to it. Here it computes in float32 and rounds to nearest, ties to even, as a GPU does. A reduction of bfloat16
  raises: kernels convert to float32 first.
- Memory. An element that is loaded or stored outside every tensor argument of the launch raises.
- Races. Programs of a launch run in any order on a GPU, so without atomics none may write an address twice in one
  store, nor write what another one reads or writes. Every element has a mark that says which program touched it, so
  that the check costs as much as the access.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle

# Marks of an element: nobody's yet, read by several programs, else 1 + the program's number.
FREE, SEVERAL = 0, -1


class OutsideError(IndexError):
    """A kernel reads or writes outside its arguments."""


class RaceError(RuntimeError):
    """The result of a kernel depends on the order of its programs or lanes."""


def install() -> None:
    """Repairs the interpreter of this process and switches the checks on; once is enough."""
    if getattr(InterpreterBuilder, "repaired", False):
        return
    InterpreterBuilder.repaired = True
    _repair_bfloat16()
    _check_accesses()
    _patch_once()


@contextmanager
def only_program(x: int, y: int = 0, z: int = 0) -> Iterator[None]:
    """A launch on grid (1,) in the block runs as program (x, y, z): the last one of a huge grid, for one."""
    builder = interpreter.interpreter_builder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    builder.set_grid_dim = lambda *_: set_dim(x + 1, y + 1, z + 1)
    builder.set_grid_idx = lambda *_: set_idx(x, y, z)
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


@contextmanager
def only_last_program() -> Iterator[None]:
    """Of every launch in the block only the last program runs: for maps too large to walk through."""
    launch = GridExecutor.__call__

    def last(self: Any, *args: Any, **named: Any) -> Any:
        x, y, z = (*self.grid, 1, 1)[:3]
        self.grid = (1,)
        with only_program(x - 1, y - 1, z - 1):
            return launch(self, *args, **named)

    GridExecutor.__call__ = last
    try:
        yield
    finally:
        GridExecutor.__call__ = launch


# Arithmetic.


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widen(handle: TensorHandle) -> np.ndarray:
    """The values: bits of bfloat16 as float32."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if _is_bfloat16(handle) else handle.data


def _round(values: np.ndarray) -> TensorHandle:
    """To the bits of bfloat16; to nearest, ties to even."""
    values = np.atleast_1d(np.asarray(values, np.float32))
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _wrap(name: str, replacement: Callable) -> None:
    """`replacement` gets the builder's method, the builder, and what the method was called with."""
    original = getattr(InterpreterBuilder, name)
    setattr(InterpreterBuilder, name, lambda self, *args, **named: replacement(original, self, *args, **named))


def _repair_bfloat16() -> None:
    for name in ("binary_op", "unary_op", "ternary_op"):
        _wrap(name, _arithmetic)
    _wrap("cast_impl", _cast)
    _wrap(
        "create_fp_to_fp",
        lambda original, self, source, kind, mode: _cast(_converter(original, mode), self, source, kind),
    )
    _wrap("create_dot", _dot)
    if not hasattr(InterpreterBuilder, "get_bf16"):
        InterpreterBuilder.get_bf16 = lambda self, value: _round(np.array([value]))
    ReduceScanOpInterface.check_tensor = _wrap_reduction(ReduceScanOpInterface.check_tensor)


def _arithmetic(original: Callable, self: Any, *args: Any) -> TensorHandle:
    *operands, function = args
    if not any(map(_is_bfloat16, operands)):
        return original(self, *args)
    result = function(*map(_widen, operands))
    return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _round(result)


def _cast(original: Callable, self: Any, source: TensorHandle, kind: Any) -> TensorHandle:
    target = kind.scalar
    if _is_bfloat16(source) and target != tl.bfloat16:
        return TensorHandle(_widen(source).astype(interpreter._get_np_dtype(target)), target)
    if target == tl.bfloat16 and not _is_bfloat16(source):
        return _round(source.data)
    return original(self, source, kind)


def _converter(original: Callable, mode: Any) -> Callable:
    return lambda self, source, kind: original(self, source, kind, mode)


def _dot(original: Callable, self: Any, a: TensorHandle, b: TensorHandle, *others: Any) -> TensorHandle:
    if _is_bfloat16(a):
        a, b = TensorHandle(_widen(a), tl.float32), TensorHandle(_widen(b), tl.float32)
    return original(self, a, b, *others)


def _wrap_reduction(original: Callable) -> Callable:
    def check(self: Any, inputs: tuple) -> None:
        if any(_is_bfloat16(value.handle) for value in inputs):
            raise TypeError("a reduction of bfloat16: convert to float32 before it, or it rounds at each step")
        original(self, inputs)

    return check


# Memory and races.


class Segment:
    """A span of memory that tensor arguments of a launch cover, with the marks of its elements."""

    def __init__(self, start: int, end: int, itemsize: int) -> None:
        self.start, self.end, self.itemsize = start, end, itemsize
        # Zeros are pages that cost nothing until they are touched.
        count = -(-(end - start) // itemsize)
        self.writers = np.zeros(count, np.int32)
        self.readers = np.zeros(count, np.int32)

    def index(self, pointers: np.ndarray) -> np.ndarray:
        return (pointers - self.start) // self.itemsize


_segments: list[Segment] = []


def _set_segments(arguments: list[Any]) -> None:
    """One segment for what the arguments cover; tensors that share memory share it."""
    spans = []
    for argument in arguments:
        tensor = getattr(argument, "base", argument)
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 0:
            # Of the view, not of its whole storage.
            reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            spans.append((tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size(), tensor.element_size()))
    merged: list[list[int]] = []
    for start, end, itemsize in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
            merged[-1][2] = min(merged[-1][2], itemsize)
        else:
            merged.append([start, end, itemsize])
    _segments[:] = [Segment(*span) for span in merged]


def _touched(what: str, pointers: TensorHandle, mask: np.ndarray) -> Iterator[tuple[Segment, np.ndarray]]:
    """The segments that an access reaches, and the elements' indices there.

    Raises:
        OutsideError: an element is outside of all.
    """
    itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)].astype(np.int64).ravel()
    lost = len(addresses)
    for segment in _segments:
        inside = addresses[(addresses >= segment.start) & (addresses + itemsize <= segment.end)]
        if len(inside):
            lost -= len(inside)
            yield segment, segment.index(inside)
    if lost:
        raise OutsideError(f"{what} of {lost} elements outside every tensor argument, program {_program()[1]}")


def _program() -> tuple[int, tuple[int, int, int]]:
    """The running program's mark, and its indices in the grid."""
    builder = interpreter.interpreter_builder
    (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
    return 1 + (x * height + y) * depth + z, (x, y, z)


def _boolean(mask: TensorHandle | np.ndarray) -> TensorHandle:
    """A mask as later versions want it; descriptors come with a bare array."""
    return TensorHandle(np.asarray(mask.data if isinstance(mask, TensorHandle) else mask).astype(bool), tl.int1)


def _load(original: Callable, self: Any, pointers: TensorHandle, mask: TensorHandle, *others: Any, **named: Any) -> Any:
    mask = _boolean(mask)
    mark, program = _program()
    for segment, index in _touched("a load", pointers, mask.data):
        written = segment.writers[index]
        if ((written != FREE) & (written != mark)).any():
            raise RaceError(f"program {program} reads what another program writes")
        before = segment.readers[index]
        segment.readers[index] = np.where((before == FREE) | (before == mark), mark, SEVERAL)
    return original(self, pointers, mask, *others, **named)


def _store(
    original: Callable,
    self: Any,
    pointers: TensorHandle,
    value: TensorHandle,
    mask: TensorHandle,
    *others: Any,
    **named: Any,
) -> Any:
    mask = _boolean(mask)
    mark, program = _program()
    for segment, index in _touched("a store", pointers, mask.data):
        written, read = segment.writers[index], segment.readers[index]
        if ((written != FREE) & (written != mark)).any():
            raise RaceError(f"program {program} writes what another program writes")
        if ((read != FREE) & (read != mark)).any():
            raise RaceError(f"program {program} writes what another program reads")
        # Lanes with one address overwrite each other's number.
        lanes = np.arange(len(index), dtype=np.int32)
        segment.writers[index] = lanes
        if (segment.writers[index] != lanes).any():
            raise RaceError(f"lanes of program {program} write one address")
        segment.writers[index] = mark
    return original(self, pointers, value, mask, *others, **named)


def _atomic(
    original: Callable, self: Any, operation: Any, pointer: TensorHandle, value: Any, mask: Any, *others: Any
) -> Any:
    for _ in _touched("an atomic", pointer, _boolean(mask).data):
        pass
    return original(self, operation, pointer, value, _boolean(mask), *others)


def _check_accesses() -> None:
    _wrap("create_masked_load", _load)
    _wrap("create_masked_store", _store)
    _wrap("create_atomic_rmw", _atomic)
    launch = GridExecutor.__call__

    def checked(self: Any, *args: Any, **named: Any) -> Any:
        _set_segments([*args, *named.values()])
        return launch(self, *args, **named)

    GridExecutor.__call__ = checked


# Speed.


def _patch_once() -> None:
    """A module of the language is patched once a launch; Triton does it anew for each call of a helper."""
    patch = interpreter._patch_lang
    patched: set[Any] = set()

    class Nothing:
        def restore(self) -> None: ...

    def patch_lang(function: Any) -> Any:
        modules = {m for m in (tl, tl.core) if any(m is value for value in function.__globals__.values())} - patched
        if not modules:
            return Nothing()
        scope = patch(function)
        restore = scope.restore

        def restored() -> None:
            patched.difference_update(modules)
            restore()

        patched.update(modules)
        scope.restore = restored
        return scope

    interpreter._patch_lang = patch_lang
