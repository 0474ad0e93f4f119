"""`bench aot`: reading binaries, the list of launches, and its refusal of spills; some of it skipped without Triton."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mra_kernels
from bench import aot, aot_tables, cubin
from bench.__main__ import app
from bench.cubin import Figures, Loop, innermost
from bench.shapes import TINY
from bench.suites.kernel_cases import cases
from mra_kernels.ops import OPS
from mra_kernels.triton._support import INTERPRETED

needs_triton = pytest.mark.skipif(find_spec("triton") is None or INTERPRETED, reason="Triton is not installed")


def assembly(text: str) -> list[str]:
    """One label or instruction a line, as nvdisasm prints them."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return [line if line.startswith(".L") else f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)]


class TestInnermostLoop:
    def test_of_two_nested_loops_the_inner_one(self) -> None:
        body = assembly("""
            MOV R1, R2
            .L_x_0:
            FFMA R1, R2, R3, R1
            FFMA R1, R2, R3, R1
            .L_x_1:
            FFMA.FTZ R4, R5, R6, R4
            @!P0 FFMA R4, R5, R6, R4
            LDG.E R5, [R8]
            @P1 BRA `(.L_x_1)
            IADD3 R7, R7, 1, RZ
            @!UP0 BRA `(.L_x_0)
            EXIT
        """)
        assert innermost(body) == Loop(instructions=4, fmas=2, mmas=0, multiply_adds=2)
        assert innermost(body).fma_share == 0.5

    def test_of_two_loops_the_one_with_more_arithmetic(self) -> None:
        body = assembly("""
            .L_x_0:
            LDG.E R5, [R8]
            @P1 BRA `(.L_x_0)
            .L_x_1:
            HMMA.16816.F32.BF16 R4, R5, R6, R4
            @P1 BRA `(.L_x_1)
        """)
        assert innermost(body) == Loop(2, 0, 1, 0)

    def test_the_whole_kernel_where_loops_do_little(self) -> None:
        """Unrolled code, and the branch to itself that ends a kernel."""
        body = assembly("""
            .L_x_0:
            LDG.E R5, [R8]
            @P1 BRA `(.L_x_0)
            FFMA R1, R2, R3, R1
            EXIT
            .L_x_1:
            BRA `(.L_x_1)
            NOP
        """)
        assert innermost(body) == Loop(5, 1, 0, 1)

    def test_a_constant_is_no_arithmetic(self) -> None:
        assert innermost(assembly("HFMA2.MMA R1, -RZ, RZ, 0, 0\nHFMA2 R1, R2, R3, R1")) == Loop(2, 1, 0, 2)


def test_bodies_are_told_apart() -> None:
    text = '.section .text.one,"ax"\n.sectionflags @"X"\n/*0000*/ EXIT ;\n.section .nv.info\n.section .text.two,"ax"\n'
    assert cubin._bodies(text + "/*0000*/ NOP ;\n/*0010*/ EXIT ;\n") == {
        "one": ["/*0000*/ EXIT ;"],
        "two": ["/*0000*/ NOP ;", "/*0010*/ EXIT ;"],
    }


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(cubin.NoTools, match="nvdisasm was not found: install the CUDA toolkit"):
        cubin.find("nvdisasm")


def test_kernels_of_cuda_are_named_shortly() -> None:
    assert aot._split("void mra::cuda::(anonymous namespace)::f<float, mra::T<4, 1>, 8>(float const*, int)") == (
        "f",
        "float, mra::T<4, 1>, 8",
    )
    assert aot._split("mra::g(int)") == ("g", "")


def make_row(stack: int = 0, spills: int = 0, registers: int = 168, shared: int = 40_000) -> aot.Row:
    loop = Loop(100, 60, 0, 60)
    figures = Figures(registers, stack, shared, spills, 128, loop)
    return aot.Row("Triton", "add_norm forward", "_forward", "ROWS 1; bfloat16", 90, 4, shared, figures)


@pytest.mark.parametrize(
    ("registers", "shared", "warps"), [(168, 1_000, 12), (32, 1_000, 64), (32, 100_000, 8), (255, 1_000, 8)]
)
def test_warps_that_run_at_once(registers: int, shared: int, warps: int) -> None:
    assert make_row(registers=registers, shared=shared).warps_per_multiprocessor == warps


@pytest.mark.parametrize(
    ("kernel", "configuration", "multiply_adds", "useful"),
    [
        ("depthwise_conv7_kernel", "float, mra::cuda::DepthwiseTile<4>, 4, 4", 392, 1.0),
        ("depthwise_conv_gelu_kernel", "float, mra::cuda::DepthwiseTile<4>, 4, 4", 448, 0.875),
        ("depthwise_weight_gradient_kernel", "float, mra::cuda::WeightGradientTile<4, 4>, true, 2", 2800, 1.0),
        ("_convolve", "ROWS 8, COLUMNS 16, CHANNELS 64, 4 warps; bfloat16", 896, 0.5),
        ("_parameter_gradients", "ROWS 2, COLUMNS 4, CHANNELS 64, 4 warps; bfloat16", 392, 0.5),
        ("depthwise_conv7_mma_kernel", "__half, mra::cuda::DepthwiseMmaTile<1>", 0, 0.4375),
        ("depthwise_weight_gradient_mma_kernel", "__half, mra::cuda::DepthwiseMmaTile<1>", 0, 6400 / 14336),
        ("_layer_norm", "ROWS 8, COLUMNS 256, 8 warps; bfloat16", 38, None),
    ],
)
def test_useful_multiply_adds(kernel: str, configuration: str, multiply_adds: int, useful: float | None) -> None:
    figures = Figures(168, 0, 0, 0, 128, Loop(4000, 0, 0, multiply_adds))
    assert aot.Row("", "", kernel, configuration, 90, 4, 0, figures).useful == useful


@pytest.mark.skipif(not mra_kernels.build_info()["cuda"], reason="this build has no CUDA kernels")
@needs_triton
def test_every_cuda_kernel_bounds_its_block() -> None:
    """So that the table says how many warps run at once."""
    rows = aot.cuda_rows([90], [], print)
    assert rows
    assert all(row.warps_per_multiprocessor for row in rows)
    assert all(row.useful is None or 0.3 < row.useful <= 1 for row in rows)


class TestCommand:
    @pytest.fixture(autouse=True)
    def _no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = [make_row()]
        monkeypatch.setattr(aot, "triton_rows", lambda *_: self.rows)
        monkeypatch.setattr(aot, "cuda_rows", lambda *_: [])

    def test_prints_and_writes_tables(self, tmp_path: Path) -> None:
        file = tmp_path / "figures.md"
        result = CliRunner().invoke(app, ["aot", "--write", str(file)])
        assert result.exit_code == 0, result.output
        line = "| `_forward` | ROWS 1; bfloat16 | add_norm forward | sm_90 | 168 | 0 | 40,000 | 12 | 60% |  |  |"
        assert line in result.stdout
        page = file.read_text()
        assert line in page
        assert "1 kernels for sm_90; 0 use a stack" in page
        assert "depthwise_conv_norm 256x256x192, ConvNeXt-L stage 1" in page

    @pytest.mark.parametrize("spill", [{"stack": 8}, {"spills": 1}])
    def test_a_spill_fails(self, spill: dict[str, int]) -> None:
        self.rows.append(make_row(**spill))
        result = CliRunner().invoke(app, ["aot"])
        assert result.exit_code == 1
        assert "spill: Triton _forward (ROWS 1; bfloat16) on sm_90" in result.stderr

    def test_one_with_a_reason_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(aot.ALLOWED_STACK, ("Triton", "_forward", 90), "why")
        self.rows[:] = [make_row(stack=8)]
        result = CliRunner().invoke(app, ["aot"])
        assert result.exit_code == 0
        assert "| 8 (why) |" in result.stdout

    def test_nothing_read_is_no_success(self) -> None:
        self.rows.clear()
        assert CliRunner().invoke(app, ["aot"]).exit_code == 1

    def test_an_unknown_architecture(self) -> None:
        result = CliRunner().invoke(app, ["aot", "--arch", "75"])
        assert result.exit_code == 2
        assert "--arch 75 is none of 80, 90, 100" in result.stderr


def test_nothing_may_spill_on_hopper() -> None:
    assert not [key for key in aot.ALLOWED_STACK if key[2] == 90]


def test_floors_are_the_longer_of_two_times() -> None:
    for name, _, moved, flops, floor in aot.work():
        assert floor >= moved / aot.BANDWIDTH
        assert floor >= (flops or 0) / aot.TENSOR_CORES, name
    assert aot_tables.floors().count("\n") > 100


@needs_triton
class TestTriton:
    def test_every_op_launches_in_both_directions(self) -> None:
        from bench.launches import launches

        for op in OPS:
            found = launches(cases(op, [TINY]), [torch.bfloat16], 90, (1,))
            directions = {direction for launch in found for _, direction, _ in launch.users}
            has_none = isinstance(OPS[op].backends["triton"], str)
            assert directions == (set() if has_none else {"forward", "backward"}), op

    def test_architectures_differ_where_launchers_ask(self) -> None:
        from bench.launches import launches

        wanted = cases("gated_projection_add", [TINY])
        tma = {
            arch: {launch.constants.get("TMA") for launch in launches(wanted, [torch.bfloat16], arch, (1,))} - {None}
            for arch in aot.ARCHS
        }
        assert tma == {80: {False}, 90: {True}, 100: {True}}

    def test_a_spill_is_seen(self) -> None:
        """512 registers a thread, all of them needed at once; and a loop that multiplies and adds."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton_spill import spilling

        signature = {"x": "*fp32", "y": "*fp32", "count": "i32", "BLOCK": "constexpr"}
        for block, spills in ((256, False), (8192, True)):
            source = ASTSource(spilling, signature, {(3,): block})
            binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary.asm["cubin"])
                file.flush()
                figures = cubin.figures(Path(file.name))["spilling"]
            assert (figures.stack > 0) == spills
            assert (figures.spills > 0) == spills
            assert figures.loop.fmas >= 8 or spills
            assert figures.registers <= 255
