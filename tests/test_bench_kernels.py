"""The kernel benchmarks on a CPU with tiny towers: cases, float64, library routes, refusals, and pytest-benchmark."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import depthwise_conv_gelu, depthwise_conv_norm
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import conftest
from bench.compare import check
from bench.exact import exact_op
from bench.memory import peak
from bench.shapes import LARGE, TINY, TINY_WIDE, XXLARGE, Tower, gemms
from bench.stamp import ROOT
from bench.step import Result, Run
from bench.suites import kernels
from bench.suites.kernel_cases import BACKWARD, DIRECTIONS, FORWARD, OpCase, as_list, cases, least_work, wanted
from bench.suites.kernel_problems import DISTINCT, PER_PICTURE, make_problem, served_by
from bench.suites.library_routes import Route, has_onednn, routes
from mra_kernels import use_backend
from mra_kernels.ops import OPS
from mra_kernels.testing import SHAPES, make_inputs, relative_error
from mra_model.configuration_mra import MraVisionConfig, convnext_large, convnext_xxlarge
from mra_model.presets import build_model, preset_config

CPU = torch.device("cpu")
TINY_CASES = [case for op in OPS for case in cases(op, [TINY])]


def measured(function: Callable[..., None], **arguments: object) -> list[Result]:
    """What a suite's function records in a rehearsal."""
    found: list[Result] = []
    function(Run(CPU, True, Path(), found.append), **arguments)
    return found


def first_case(op: str) -> OpCase:
    return cases(op, [TINY])[0]


class TestCases:
    @pytest.mark.parametrize("op", OPS)
    def test_every_op_has_cases_of_both_towers_that_it_takes(self, op: str) -> None:
        found = cases(op, [TINY, TINY_WIDE])
        on_vit = all(case.model == "ViT-L" for case in found)
        assert on_vit or {TINY.name, TINY_WIDE.name} <= {case.model for case in found}
        for case in found:
            inputs = make_inputs(op, *case.sizes(2), eps=case.eps)
            assert all(output.shape[0] == 2 for output in served_by(op, "reference")(inputs))

    @pytest.mark.parametrize("op", OPS)
    def test_labels_tell_cases_apart(self, op: str) -> None:
        found = cases(op, [LARGE, XXLARGE])
        assert len({case.name for case in found}) == len(found)
        assert len({(case.model, case.place, case.shape) for case in found}) == len(found)

    def test_the_stages_are_those_of_the_paper(self) -> None:
        found = cases("depthwise_conv_norm", [LARGE, XXLARGE])
        large = ["256x256x192", "128x128x384", "64x64x768", "32x32x1536"]
        huge = ["256x256x384", "128x128x768", "64x64x1536", "32x32x3072"]
        assert [case.shape for case in found] == large + huge
        assert {case.eps for case in found if case.model == "ConvNeXt-XXL"} == {1e-5}

    @pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
    def test_least_work(self, case: OpCase) -> None:
        """Bytes of a batch grow by the maps alone, twice the bytes for twice the width; FLOPs as PyTorch counts."""
        for direction in DIRECTIONS:
            narrow, flops = least_work(case, 2, torch.bfloat16, direction)
            wide, _ = least_work(case, 2, torch.float32, direction)
            assert narrow < wide <= 2 * narrow
            shapes = SHAPES[case.op](*case.sizes(2))
            assert narrow >= max(torch.Size(shape).numel() for shape in shapes.values()) * 2 * (direction == FORWARD)
            problem = make_problem(case, 2, torch.float32, CPU)
            # Of attention PyTorch counts no products but those of its plainest way.
            with sdpa_kernel(SDPBackend.MATH):
                call = problem.call(direction, served_by(case.op, "reference"))
                call()
                with FlopCounterMode(display=False) as counter:
                    call()
            # PyTorch counts a grouped convolution's weight gradient as if it had no groups.
            # It also counts a weighted mean as a product with one column.
            mean = problem.inputs.get("mean_weights")
            more = 0 if mean is None else 2 * problem.grads[0].numel()
            if direction == FORWARD or not case.op.startswith("depthwise"):
                assert counter.get_total_flops() == (flops or 0) + more


class TestShapes:
    @pytest.mark.parametrize(("tower", "high"), [(LARGE, convnext_large), (XXLARGE, convnext_xxlarge)])
    def test_products_are_those_of_the_model(self, tower: Tower, high: Callable) -> None:
        """Counted on the model itself, without data; the gate's products have one row a picture and are left out."""
        config = preset_config("llava-hr-cpu")
        config.vision_config = MraVisionConfig(image_size=tower.side, high_config=high())
        model = build_model(config, device="meta").model.vision_tower
        pixels = torch.empty(2, 3, tower.side, tower.side, device="meta")
        with torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
            model(pixels)
        counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
        gate = 3 * 2 * 2 * (2 * tower.width * tower.width // 2 + tower.width // 2)
        ours = [g for g in gemms(tower, 2) if g.name != "stem" and not g.name.startswith("projector")]
        assert sum(g.calls * g.flops for g in ours) == counts["aten.mm"] + counts["aten.addmm"] - gate
        stem = next(g for g in gemms(tower, 2) if g.name == "stem").flops
        depthwise = sum(98 * 2 * s * s * c * d for (s, c), d in zip(tower.stages(), tower.depths, strict=True))
        adapters = 3 * 98 * 2 * tower.grid**2 * tower.width
        assert stem + depthwise + adapters == counts["aten.convolution"]


class TestExact:
    @pytest.mark.parametrize("op", OPS)
    def test_it_is_the_reference_in_float64(self, op: str) -> None:
        """The depthwise convolution is computed another way; here its rows are cut into several bands, too."""
        case = replace(first_case(op), dims=(13, 9, 5)) if op.startswith("depthwise") else first_case(op)
        problem = make_problem(case, 2, torch.float64, CPU)
        for direction in DIRECTIONS:
            ours = problem.call(direction, lambda given: as_list(exact_op(op)(*given.values())))()
            theirs = problem.call(direction, served_by(op, "reference"))()
            for name, value, truth in zip(problem.names(direction), ours, theirs, strict=True):
                assert relative_error(value, truth) < 1e-13, name

    def test_bands_do_not_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = make_problem(replace(first_case("depthwise_conv_norm"), dims=(13, 9, 5)), 2, torch.float64, CPU)
        whole = problem.exact(BACKWARD)
        monkeypatch.setattr("bench.exact.BAND", 3 * 9 * 5)
        for value, truth in zip(problem.exact(BACKWARD), whole, strict=True):
            assert relative_error(value, truth) < 1e-13

    @pytest.mark.parametrize("op", ["depthwise_conv_norm", "depthwise_conv_gelu"])
    def test_it_is_the_op_as_written_out(self, op: str) -> None:
        inputs = make_inputs(op, 2, 8, 9, 5, dtype=torch.float64)
        written = {"depthwise_conv_norm": depthwise_conv_norm, "depthwise_conv_gelu": depthwise_conv_gelu}[op]
        for value, truth in zip(
            as_list(exact_op(op)(*inputs.values())), as_list(written(*inputs.values())), strict=True
        ):
            assert relative_error(value, truth) < 1e-13

    @pytest.mark.parametrize("batch", [1, 2, 3, 5])
    @pytest.mark.parametrize("op", ["linear_gelu", "gated_projection_add", "adapter_gate", "project_mean"])
    def test_a_batch_of_repeated_pictures_is_solved_whole(self, op: str, batch: int) -> None:
        """What is put together from three pictures is what the whole batch gives at once."""
        problem = make_problem(cases(op, [TINY])[-1], batch, torch.float64, CPU)
        data = next(value for name, value in problem.inputs.items() if name in PER_PICTURE)
        assert len(data) == batch
        assert batch <= DISTINCT or torch.equal(data[0], data[DISTINCT])
        assert batch == 1 or not torch.equal(data[0], data[1])
        for direction in DIRECTIONS:
            whole = problem.checked(direction, problem.call(direction, served_by(op, "reference"))())
            for value, truth in zip(problem.exact(direction), whole, strict=True):
                assert relative_error(value, truth) < 1e-13


def broken(function: Callable, position: int = 0) -> Callable:
    """The function, one of its outputs off by 5%."""

    def wrong(inputs: dict) -> list[Tensor]:
        outputs = list(function(inputs))
        outputs[position] = outputs[position] * 1.05
        return outputs

    return wrong


class TestRoutes:
    @pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_they_compute_the_op(self, case: OpCase, dtype: torch.dtype) -> None:
        problem = make_problem(case, 2, dtype, CPU)
        limit = {torch.float32: 1e-5, torch.bfloat16: 1e-1}[dtype]
        for direction in DIRECTIONS:
            exact = problem.exact(direction)
            for route in routes(case.op, problem.inputs):
                if direction == BACKWARD and not route.differentiable:
                    continue
                results = problem.checked(direction, problem.call(direction, route.function)())
                for name, value, truth in zip(problem.names(direction), results, exact, strict=True):
                    assert relative_error(value, truth) < limit, f"{route.name}: {name}"

    def test_they_are_named_and_there(self) -> None:
        found = {op: [route.name for route in routes(op, make_inputs(op, *first_case(op).sizes(1)))] for op in OPS}
        assert all(name.startswith("library: ") for names in found.values() for name in names)
        assert all(len(set(names)) == len(names) for names in found.values())
        eager_is_best = {"adapter_gate", "add_norm", "attention", "depthwise_conv_norm", "project_mean"}
        assert {op for op, names in found.items() if not names} <= eager_is_best | (
            set() if has_onednn() else {"depthwise_conv_gelu", "linear_gelu"}
        )

    def test_the_epilogue_of_cublaslt_is_the_approximation(self) -> None:
        """On a CPU the same call has the exact GELU, and what the route returns can be checked."""
        from bench.suites.library_routes import _linear_gelu_cublaslt

        for case in cases("linear_gelu", [TINY]):
            problem = make_problem(case, 2, torch.float32, CPU)
            (route,) = _linear_gelu_cublaslt(problem.inputs)
            for value, truth in zip(route.function(problem.inputs), problem.exact(FORWARD), strict=True):
                assert relative_error(value, truth) < 1e-3
        assert not route.differentiable


class TestRun:
    @pytest.mark.parametrize("op", OPS)
    def test_every_variant_is_right_and_labels_are_complete(self, op: str) -> None:
        results = measured(kernels.run, op=op, batch=2, dtype="float32")
        assert {result.failure for result in results} == {None}
        keys = Counter((*sorted(result.labels.items()), result.variant) for result in results)
        assert set(keys.values()) == {1}
        for result in results:
            labels = result.labels
            assert labels["suite"] == "kernels"
            assert (labels["op"], labels["batch"], labels["dtype"]) == (op, 2, "float32")
            assert labels["direction"] in DIRECTIONS
            assert str(labels["shape"]) in result.case
            assert str(labels["model"]) in result.case
            assert result.times
            assert result.bytes
            assert result.kernels
        assert {result.labels["direction"] for result in results} == set(DIRECTIONS)
        eager = [result for result in results if result.variant == "eager"]
        assert len(eager) == 2 * len(cases(op, [TINY, TINY_WIDE]))
        for result in eager:
            chosen = result.facts["auto"]
            variants = {other.variant for other in results if other.case == result.case}
            assert chosen == "reference" or chosen in variants
            assert not set(result.facts["refused"]) & variants

    def test_compiled(self) -> None:
        results = measured(kernels.run_compiled, op="gated_resample_add", batch=1, dtype="bfloat16")
        assert {result.failure for result in results} == {None}
        assert {"eager", "torch.compile"} <= {result.variant for result in results}
        assert all(result.labels["compiled"] and result.case.endswith(", compiled") for result in results)
        assert {result.labels["direction"] for result in results} == set(DIRECTIONS)

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_a_planted_wrong_kernel_has_no_times(self, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A kernel that is 5% off, and a library route that is: both are refused, the others are timed."""
        op = "linear_scale_residual"
        right = kernels.routes

        def with_wrong(op: str, inputs: dict) -> list[Route]:
            return [*right(op, inputs), Route("library: planted", broken(served_by(op, "reference")))]

        monkeypatch.setattr(kernels, "routes", with_wrong)
        results = measured(kernels.run, op=op, batch=1, dtype="float32")
        planted = [r for r in results if r.variant == "library: planted" and r.labels["direction"] == direction]
        assert planted
        for result in planted:
            assert result.failure is not None
            assert "wrong" in result.failure
            assert not result.times
            assert result.memory is None
        assert all(result.times for result in results if result.variant != "library: planted")

    def test_a_wrong_picture_at_the_end_of_a_batch_is_seen(self) -> None:
        """The last picture computed as if it were the first: what an address that wraps around gives."""
        op = "linear_gelu"
        problem = make_problem(first_case(op), 8, torch.float32, CPU)

        def wrapped(inputs: dict) -> list[Tensor]:
            return [torch.cat([y[:4], y[:4]]) for y in served_by(op, "reference")(inputs)]

        variants = [*kernels.automatic(op, CPU, torch.float32)[:1], Route("wrapped", wrapped)]
        for direction in DIRECTIONS:
            _, failures = check(kernels.build(problem, torch.float32, direction, variants))
            assert set(failures) == {"wrapped"}

    def test_too_little_memory_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "available_memory", lambda device: 1 << 10)
        results = measured(kernels.run, op="norm_patchify", batch=2, dtype="float32")
        assert len(results) == 2 * len(cases("norm_patchify", [TINY, TINY_WIDE]))
        assert all(result.failure and "GiB" in result.failure and not result.times for result in results)

    def test_backward_does_not_run_the_forward_again(self) -> None:
        problem = make_problem(first_case("linear_gelu"), 1, torch.float32, CPU)
        calls = []

        def counted(inputs: dict) -> list[Tensor]:
            calls.append(1)
            return served_by("linear_gelu", "reference")(inputs)

        backward = problem.call(BACKWARD, counted)
        first, second = backward(), backward()
        assert len(calls) == 1
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert wanted(problem.inputs) == ["x", "weight", "bias"]


class TestMemory:
    def test_a_call_needs_what_it_holds_at_once(self) -> None:
        # In a process of its own, whose allocator has no holes from earlier tests.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found, nothing = pool.submit(_peaks, size := 64 << 20).result()
        if found is None or nothing is None:
            pytest.skip("this system keeps no high-water mark of memory")
        # The old tensor lives until the new one is made.
        assert 1.8 * size < found < 2.3 * size
        assert nothing < 8 << 20


def _peaks(size: int) -> tuple[int | None, int | None]:
    """What three tensors in turn need, and what nothing needs."""

    def call() -> Tensor:
        for _ in range(3):
            kept = torch.ones(size, dtype=torch.uint8)
        return kept

    call()
    return peak(call, CPU), peak(lambda: None, CPU)


class TestPytestBenchmark:
    """`pytest bench/` as users start it."""

    def start(self, *options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        # Nothing is timed beside other workers of pytest-xdist; this one is none of them.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def test_it_times_compares_and_names_no_host(self, tmp_path: Path) -> None:
        file = tmp_path / "results.json"
        chosen = ["-k", "adapter_gate and forward"]
        saved = [f"--benchmark-storage={tmp_path.as_uri()}", "--benchmark-save=base", "--benchmark-only"]
        done = self.start("bench", *chosen, *saved, f"--benchmark-json={file}")
        assert done.returncode == 0, done.stdout + done.stderr
        kept = json.loads(file.read_text())
        assert len(kept["benchmarks"]) == 4
        assert kept["commit_info"]["project"] == "mra-kernels"
        assert set(kept["machine_info"]) <= {
            *("cpu", "device", "machine", "python_implementation", "python_version", "system", "threads", "torch"),
        }
        again = self.start("bench", *chosen, *saved[::2], "--benchmark-compare", "--benchmark-columns=median")
        assert again.returncode == 0, again.stdout + again.stderr
        assert "0001_base" in again.stdout
        assert "WARNING" not in again.stdout

    @pytest.mark.parametrize("given", ["file://./.benchmarks", "file:///elsewhere"])
    def test_the_baseline_is_the_default_storage(self, given: str) -> None:
        config = SimpleNamespace(option=SimpleNamespace(benchmark_storage=given), getoption=lambda name, default: given)
        conftest.pytest_configure(config)
        expected = (ROOT / "bench/baseline").as_uri() if given == conftest._DEFAULT_STORAGE else given
        assert config.option.benchmark_storage == expected

    def test_pytest_benchmark_still_has_that_default(self, request: pytest.FixtureRequest) -> None:
        """`bench/conftest.py` tells by it whether somebody named a storage."""
        if not request.config.pluginmanager.hasplugin("benchmark"):
            pytest.skip("pytest-benchmark is switched off")
        assert request.config.getoption("benchmark_storage") == conftest._DEFAULT_STORAGE

    def test_the_tests_do_not_collect_it(self, request: pytest.FixtureRequest) -> None:
        assert request.config.getini("testpaths") == ["tests"]
        assert not any(item.path.is_relative_to(ROOT / "bench") for item in request.session.items)

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_a_wrong_kernel_fails_and_is_not_timed(self, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from bench import test_kernels

        def automatic(op: str, device: torch.device, dtype: torch.dtype) -> list[Route]:
            eager = served_by(op, "reference")
            return [Route("eager", eager), Route("native", broken(eager))]

        class Timer:
            extra_info: dict = {}  # noqa: RUF012

            def pedantic(self, *args: object, **options: object) -> None:
                pytest.fail("timed")

        monkeypatch.setattr(test_kernels, "automatic", automatic)
        monkeypatch.setattr(test_kernels, "DEVICE", CPU)
        case = first_case("gated_resample_add")
        with pytest.raises(AssertionError, match="wrong"):
            test_kernels.test_kernel(Timer(), case, "float32", direction, "automatic")
