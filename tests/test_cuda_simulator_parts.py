"""Parts of the CPU simulator: launches and counts, the 16-bit types, and the translation of sources."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_simulator import Order, Simulator, TranslationError, build, translate
from cuda_simulator.samples import program, run

FOLDER = Path(__file__).parent.parent / "build/cuda_simulator"


def test_blocks_and_counts() -> None:
    """The last blocks run alone; statistics count what has run."""
    library = build(program(), folder=FOLDER)
    simulator = Simulator(library)
    before = simulator.statistics()
    x, y = np.ones((5, 150), np.float32), np.zeros(5, np.float32)
    with simulator.order(Order("reverse"), last_blocks=2):
        simulator.library.run_row_sums(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), 5, 150)
    np.testing.assert_array_equal(y, [0, 0, 0, 150, 150])
    after = simulator.statistics()
    # Two blocks of two warps, each with five shuffles.
    assert (after.launches - before.launches, after.blocks - before.blocks) == (1, 2)
    assert (after.barriers - before.barriers, after.collectives - before.collectives) == (2, 20)
    assert after.atomics == before.atomics
    run(library, "atomic_sum")
    assert simulator.statistics().atomics - after.atomics == 4 * 32
    run(library, "tile_sums")
    assert simulator.statistics().copies - after.copies == 5 * 64


@pytest.mark.parametrize(
    ("kernel", "edit"),
    [
        ("increment", ("dim3((n + kThreads - 1) / kThreads), kThreads", "0, kThreads")),
        ("increment", ("dim3((n + kThreads - 1) / kThreads), kThreads", "dim3(1, 65536), kThreads")),
        ("increment", ("dim3((n + kThreads - 1) / kThreads), kThreads", "1, 1025")),
        ("reverse", ("columns / 4, bytes>>>", "columns / 4, 228 * 1024>>>")),
        ("reverse", ("MaxDynamicSharedMemorySize, bytes);\n  reverse<<<rows, columns / 4, bytes>>>",
                     "MaxDynamicSharedMemorySize, 1);\n  reverse<<<rows, columns / 4, 49 * 1024>>>")),
    ],
)  # fmt: skip
def test_an_invalid_launch_is_refused(kernel: str, edit: tuple[str, str]) -> None:
    library = build(program(edit), folder=FOLDER)
    with pytest.raises(RuntimeError, match=r"launch failed with CUDA error (1|9)$"):
        run(library, kernel)


def call(name: str, *arrays: np.ndarray) -> None:
    function = getattr(ctypes.CDLL(str(build(program(), folder=FOLDER))), name)
    function(*(ctypes.c_void_p(a.ctypes.data) for a in arrays), ctypes.c_int64(arrays[0].size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    bits = np.arange(65536, dtype=np.uint16)
    values = np.empty(65536, np.float32)
    call(f"{name}_to_float", bits, values)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits(dtype: torch.dtype) -> None:
    """Every number, the middle between it and the next one, both sides of that, and random patterns; NaN stays NaN."""
    name = str(dtype).removeprefix("torch.")
    dropped = 16 if dtype == torch.bfloat16 else 13
    kept = np.arange(2 ** (32 - dropped), dtype=np.uint64) << dropped
    middle = 1 << (dropped - 1)
    x = np.concatenate([kept + low for low in (0, middle - 1, middle, middle + 1)]).astype(np.uint32)
    # Below the smallest normal half the last place is elsewhere.
    x = np.concatenate([x, np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint32)]).view(np.float32)
    y = np.empty(x.size, np.uint16)
    call(f"{name}_from_float", x, y)
    actual = torch.from_numpy(y.view(np.int16)).view(dtype)
    expected = torch.from_numpy(x).to(dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~actual.isnan()].view(torch.int16), expected[~expected.isnan()].view(torch.int16))


def test_pairs() -> None:
    x, y = np.array([1.5, -2, 3.0078125, 0.1], np.float32), np.empty(6, np.float32)
    call("pair_operations", x, y)
    a, b = torch.from_numpy(x).bfloat16().view(2, 2)
    fused = (a.double() * b.double() + a.double()).bfloat16()
    np.testing.assert_array_equal(y, torch.cat([a + b, a * b, fused]).float())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("__shared__ float tile[8][kN + 1];", "CUDA_SIMULATOR_SHARED(tile, 1, float [8][kN + 1]);"),
        ("__shared__ __align__(16) T a[N];", "CUDA_SIMULATOR_SHARED(a, 16, T [N]);"),
        ("static __shared__ float total;", "CUDA_SIMULATOR_SHARED(total, 1, float );"),
        ("__shared__ Pair<float, 2> p[3];", "CUDA_SIMULATOR_SHARED(p, 1, Pair<float, 2> [3]);"),
        ("__shared__ float x[sizes(1, 2)];", "CUDA_SIMULATOR_SHARED(x, 1, float [sizes(1, 2)]);"),
        (
            "extern __shared__ __align__(alignof(T)) unsigned char m[];",
            "CUDA_SIMULATOR_DYNAMIC_SHARED(m, alignof(T), unsigned char);",
        ),
        ("f<<<1, 2>>>(x);", "CUDA_SIMULATOR_LAUNCH((f), 1, 2)(x);"),
        (
            "ns::f<A<3>, 4><<<dim3(1, 2), 3, n, s>>>(x);",
            "CUDA_SIMULATOR_LAUNCH((ns::f<A<3>, 4>), dim3(1, 2), 3, n, s)(x);",
        ),
        ("(f<A, 4>)<<<1, 2>>>();", "CUDA_SIMULATOR_LAUNCH((f<A, 4>), 1, 2)();"),
        ("// __shared__ float x;", "// __shared__ float x;"),
        ('"f<<<1, 2>>>(x)" \'"\' // "', '"f<<<1, 2>>>(x)" \'"\' // "'),
    ],
)  # fmt: skip
def test_translation(source: str, expected: str) -> None:
    assert translate(source, "a.cu") == f'#line 1 "a.cu"\n{expected}'


def test_translation_keeps_lines() -> None:
    source = "/* one\n two */ int a;\n\n__shared__\n  float x[3];\n// three\nint b;\n"
    lines = translate(source).splitlines()[1:]
    assert [i for i, line in enumerate(lines) if line.endswith(("a;", "b;"))] == [1, 6]


@pytest.mark.parametrize("declaration", ["float a[3], b[3];", "float a = 1;", "float (*a)(int);"])
def test_what_translation_does_not_understand(declaration: str) -> None:
    with pytest.raises(TranslationError, match=r"a\.cu:2: "):
        translate(f"\n__shared__ {declaration}", "a.cu")
