"""The CPU simulator itself: right kernels are right in every order and silent in every build; each planted bug shows.

The bugs are edits of the samples' source. A bug shows as a wrong result in one of the orders, as a broken rule that
ends the launch, or as a report of a sanitizer.
"""

from pathlib import Path

import numpy as np
import pytest
from cuda_simulator import ORDERS, SimulationError, build, run_python
from cuda_simulator.samples import SAMPLES, program, run

TESTS = Path(__file__).parent
FOLDER = TESTS.parent / "build/cuda_simulator"

Edit = tuple[str, str]


def report(kind: str, kernels: list[str], *edits: Edit) -> tuple[int, str]:
    """Exit status and report of a child process that runs the kernels in every order."""
    library = build(program(*edits), kind, FOLDER)
    result = run_python(kind, ["-m", "cuda_simulator.samples", str(library), *kernels], [TESTS])
    return result.returncode, result.stderr


@pytest.mark.parametrize("kernel", SAMPLES)
def test_right_kernels_are_right_in_every_order(kernel: str) -> None:
    library = build(program(), folder=FOLDER)
    for order in ORDERS:
        actual, expected = run(library, kernel, order)
        np.testing.assert_array_equal(actual, expected, err_msg=str(order))


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_right_kernels_have_no_reports(kind: str) -> None:
    assert report(kind, list(SAMPLES)) == (0, "")


STORE = "  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;\n"
SYNC = "  __syncthreads();\n  if (threadIdx.x == 0)"
FETCHED = "    __syncthreads();  // the tile is there\n"
ADDED = "    __syncthreads();  // the tile may be overwritten\n"
WAIT = "    __pipeline_wait_prior(1);\n"
INCREMENT = "  y[i] = x[i] + 1;"

# By name: the kernel, and the edit.
WRONG_RESULTS: dict[str, tuple[str, Edit]] = {
    "missing barrier": ("row_sums", (SYNC, "  if (threadIdx.x == 0)")),
    "barrier of the warp instead of the block": ("row_sums", (SYNC, SYNC.replace("threads", "warp"))),
    "shared memory that nobody wrote": ("row_sums", (STORE, STORE.replace("== 0", "== threadIdx.x"))),
    "missing wait for a copy": ("tile_sums", (WAIT, "")),
    "wait for too few copies": ("tile_sums", (WAIT, WAIT.replace("1", "2"))),
    "tile read before others have fetched it": ("tile_sums", (FETCHED, "")),
    "tile overwritten while others read it": ("tile_sums", (ADDED, "")),
    "blocks write one address": ("atomic_sum", ("atomicAdd(y, ", "y[0] += (blockIdx.x + 1) * (")),
    "local array without values": (
        "increment",
        (INCREMENT, "  float ones[2];\n  if (n < 0) ones[0] = ones[1] = 1;\n  y[i] = x[i] + ones[i % 2];"),
    ),
    "shuffle from a lane outside the mask": (
        "prefix_sums",
        ("__shfl_up_sync(kAll", "__shfl_up_sync(1u << threadIdx.x % 32"),
    ),
    "matrix loaded with another's rows": (
        "symmetric_sums",
        ("ldmatrix_x4(transposed, rows[threadIdx.x]", "ldmatrix_x4(transposed, rows[(threadIdx.x + 8) % 32]"),
    ),
}


@pytest.mark.parametrize("bug", WRONG_RESULTS)
def test_a_bug_makes_a_wrong_result_in_some_order(bug: str) -> None:
    kernel, edit = WRONG_RESULTS[bug]
    library = build(program(edit), folder=FOLDER)
    results = [run(library, kernel, order) for order in ORDERS]
    assert any(not np.array_equal(actual, expected) for actual, expected in results)


BROKEN_RULES: dict[str, tuple[str, Edit, str]] = {
    "matrix row that is not aligned": (
        "symmetric_sums",
        ("ldmatrix_x4(plain, rows[threadIdx.x]", "ldmatrix_x4(plain, rows[threadIdx.x] + 1"),
        "a row of ldmatrix does not start at a multiple of 16 bytes.*kernel symmetric_sums",
    ),
    "divergent barrier": (
        "row_sums",
        (SYNC, "  if (threadIdx.x < 32) __syncthreads();\n  else\n  " + SYNC),
        r"different barriers: thread \(0,0,0\) in __syncthreads at \S+samples.cu:\d+, thread \(32,0,0\) in __sync.*"
        r"kernel row_sums, block \(\d,0,0\)",
    ),
    "barrier that some threads never reach": (
        "row_sums",
        (SYNC, "  if (threadIdx.x == 9) return;\n" + SYNC),
        "1 threads have returned before the others' barrier",
    ),
    "shuffle that some lanes never reach": (
        "prefix_sums",
        ("  float total = x[threadIdx.x];", "  if (threadIdx.x == 40) return;\n  float total = x[threadIdx.x];"),
        "(deadlock: thread|names a lane that has returned)",
    ),
    "lanes in different shuffles": (
        "prefix_sums",
        ("    const float before", "    if (threadIdx.x == 3) __shfl_sync(kAll, total, 0);\n    const float before"),
        "lanes of one mask meet in different operations",
    ),
    "lane that is not in its mask": ("prefix_sums", ("_up_sync(kAll", "_up_sync(kAll - 1"), "not in its mask"),
    "mask of lanes that are not there": (
        "row_sums",
        ("row_sums<<<rows, kThreads>>>", "row_sums<<<rows, 40>>>"),
        "names lanes that the warp does not have",
    ),
    "misaligned copy": (
        "tile_sums",
        (
            "__pipeline_memcpy_async(&buffer[0][threadIdx.x], x + threadIdx.x, sizeof(float))",
            "__pipeline_memcpy_async(&buffer[0][threadIdx.x], x + threadIdx.x, 16)",
        ),
        "copy of 16 bytes has a misaligned address",
    ),
    "more static shared memory than there is": (
        "row_sums",
        ("warps[kThreads / 32]", "warps[12300]"),
        "static shared memory of 49200 bytes exceeds 49152",
    ),
    "two alignments of the dynamic shared memory": (
        "reverse",
        (
            "  const int n = blockDim.x;",
            "  const int n = blockDim.x;\n  { extern __shared__ __align__(64) char other[]; other[0] = 0; }",
        ),
        "alignment 16 and 64|alignment 64 and 16",
    ),
}


@pytest.mark.parametrize("bug", BROKEN_RULES)
def test_a_broken_rule_ends_the_launch(bug: str) -> None:
    kernel, edit, message = BROKEN_RULES[bug]
    library = build(program(edit), folder=FOLDER)
    for order in ORDERS:
        with pytest.raises(SimulationError, match=message):
            run(library, kernel, order)
    # The engine is as good as new.
    actual, expected = run(library, "increment")
    np.testing.assert_array_equal(actual, expected)


REPORTED: dict[str, tuple[str, str, Edit, str]] = {
    "read past the end": ("address", "increment", ("if (i >= n)", "if (i > n)"), "heap-buffer-overflow"),
    "write past the end": (
        "address", "increment", (INCREMENT, "  y[i + (i == n - 1)] = x[i] + 1;"), "heap-buffer-overflow"
    ),
    "read past static shared memory": (
        "address", "row_sums", ("+ warps[1]", "+ warps[threadIdx.x + 2]"), "index 2 out of bounds"
    ),
    "write past static shared memory, through a pointer": (
        "address", "row_sums", (STORE, STORE.replace("warps[", "(&warps[0])[2 + ")), "heap-buffer-overflow"
    ),
    "write past dynamic shared memory": (
        "address", "reverse", ("  stretch[threadIdx.x] =", "  stretch[threadIdx.x + 1] ="), "heap-buffer-overflow"
    ),
    "copy from past the end": (
        "address", "tile_sums", ("if (i + 1 < tiles)", "if (i < tiles)"), "heap-buffer-overflow"
    ),
    "vector access that shared memory is not aligned for": (
        "address", "row_sums",
        ("y[blockIdx.x] = warps[0] + warps[1]", "y[blockIdx.x] = reinterpret_cast<float2*>(warps)->x + warps[1]"),
        "misaligned address",
    ),
    "overflow of an index": (
        "address", "increment", (INCREMENT, "  y[i] = x[i] + (n * 100000000 != i);"), "signed integer overflow"
    ),
    "missing barrier, as a race": ("thread", "row_sums", (SYNC, "  if (threadIdx.x == 0)"), "data race"),
    "tile overwritten while others read it, as a race": ("thread", "tile_sums", (ADDED, ""), "data race"),
    "shuffle taken for a barrier": (
        "thread", "row_sums", (SYNC, SYNC.replace("__syncthreads()", "__shfl_sync(kAll, total, 0)")), "data race"
    ),
    "matrices loaded before others have written their rows": (
        "thread", "symmetric_sums", ("  __syncwarp();\n  uint32_t plain", "  uint32_t plain"), "data race"
    ),
    "blocks write one address": ("thread", "atomic_sum", ("atomicAdd(y, ", "y[0] = ("), "data race"),
    "threads write one address": ("thread", "increment", (INCREMENT, "  y[i / 2] = x[i] + 1;"), "data race"),
}  # fmt: skip


@pytest.mark.parametrize("bug", REPORTED)
def test_a_sanitizer_reports_a_bug(bug: str) -> None:
    kind, kernel, edit, message = REPORTED[bug]
    status, text = report(kind, [kernel], edit)
    assert status != 0
    assert message in text
    assert "samples.cu" in text
