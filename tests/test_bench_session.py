"""The benchmarks' engine on a CPU: steps in a worker, failures, minutes, resuming, and what other programs use."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_steps import (
    MACHINE,
    STAMP,
    burn,
    open_results,
    record_an_unknown_direction,
    record_and_die,
    record_and_hang,
    record_and_raise,
    record_failures,
    record_two,
    record_what_json_cannot,
    step,
)

from bench import machine, session
from bench.compare import Case, measure
from bench.record import DONE, FAILED, NOT_MEASURED
from bench.stamp import RESULTS, Stamp
from bench.step import Result, Run, Step
from bench.worker import StepFailed, Worker

CPU = torch.device("cpu")


@pytest.fixture
def worker(tmp_path: Path):
    worker = Worker(CPU, False, tmp_path)
    yield worker
    worker.stop()


def run_all(folder: Path, steps: list[Step], seconds: float = 60.0, force: bool = False) -> tuple[dict, list[str]]:
    """What results.json holds after the steps, and the lines that were printed."""
    results, lines = open_results(folder), []
    deadline = time.monotonic() + seconds
    session._run_all(steps, results, Worker(CPU, False, folder), deadline, force, lines.append)
    return results.data, lines


def states(data: dict[str, Any]) -> dict[str, str]:
    return {name: ended["state"] for name, ended in data["steps"].items()}


class TestSession:
    def test_a_step_that_does_not_fit_is_left_out_and_a_shorter_one_runs(self, tmp_path: Path) -> None:
        data, _ = run_all(tmp_path, [step("long", record_two, 1000), step("short", record_two)])
        assert states(data) == {"long": NOT_MEASURED, "short": DONE}
        assert {result["step"] for result in data["results"]} == {"short"}
        assert "its estimate is 1000 s" in data["steps"]["long"]["why"]

    def test_failures_cost_the_other_steps_nothing(self, tmp_path: Path) -> None:
        steps = [step("raises", record_and_raise), step("dies", record_and_die), step("works", record_two)]
        data, _ = run_all(tmp_path, steps)
        assert states(data) == {"raises": FAILED, "dies": FAILED, "works": DONE}
        assert "planted" in data["steps"]["raises"]["why"]
        assert 'File "bench/worker.py"' in data["steps"]["raises"]["why"]
        assert "exit code 7" in data["steps"]["dies"]["why"]
        assert [result["step"] for result in data["results"]] == ["raises", "dies", "works", "works"]

    def test_a_finished_step_runs_again_only_by_force(self, tmp_path: Path) -> None:
        for force, runs in ((False, True), (False, False), (True, True)):
            data, lines = run_all(tmp_path, [step("works", record_two)], force=force)
            assert len(data["results"]) == 2
            assert any("there already" in line for line in lines) == (not runs)
        assert len(data["runs"]) == 3

    def test_a_result_that_does_not_follow_the_schema_fails_its_step(self, tmp_path: Path) -> None:
        steps = [step("odd", record_what_json_cannot), step("unknown", record_an_unknown_direction)]
        data, _ = run_all(tmp_path, [*steps, step("works", record_two)])
        assert states(data) == {"odd": FAILED, "unknown": FAILED, "works": DONE}
        assert "not JSON serializable" in data["steps"]["odd"]["why"]
        assert "sideways" in data["steps"]["unknown"]["why"]

    def test_only_a_kernel_of_ours_that_is_wrong_fails_its_step(self, tmp_path: Path) -> None:
        faults = [
            ("native", "wrong: y has error 5e-2"),
            ("fused, CUDA graph", "wrong: y is not finite"),
            ("triton", "AcceleratorError: CUDA error: an illegal memory access was encountered"),
        ]
        findings = [
            ("fused", "OutOfMemoryError: CUDA out of memory"),
            ("fused", "not checked: eager gives nothing to compare with"),
            ("library: cuDNN", "RuntimeError: it refuses this shape"),
            ("eager", "not measured: needs about 40 GiB"),
        ]
        steps = [step(str(each), partial(record_failures, variants=dict([each]))) for each in (*faults, *findings)]
        data, lines = run_all(tmp_path, steps)
        assert states(data) == {str(each): FAILED for each in faults} | {str(each): DONE for each in findings}
        assert "case, native: wrong: y has error 5e-2" in data["steps"][str(faults[0])]["why"]
        assert sum("no times: " in line for line in lines) == len(steps)

    def test_the_share_of_other_programs_leaves_out_the_worker_and_its_children(self, tmp_path: Path) -> None:
        """Half of two cores are busy all the time, and none of that is another program's."""
        worker = Worker(CPU, False, tmp_path)
        leader = worker.start()
        before = machine.session_seconds(leader)
        watch = session._Watch(leader)
        worker.run(step("burn", partial(burn, seconds=1.5)), 60, lambda result: None)
        own, others = machine.session_seconds(leader) - before, watch.others()
        worker.stop()
        # Whoever else runs here, the child had a core for a while.
        assert own > 0.3
        assert others is not None
        assert 0 <= others <= 1

    def test_machines_have_folders_of_their_own(self) -> None:
        gpu = MACHINE | {"device": "NVIDIA H100 80GB HBM3", "type": "cuda"}
        folder = session.default_folder(gpu, STAMP)
        assert folder.parent == RESULTS / "nvidia-h100-80gb-hbm3"
        assert folder.name.endswith("-" + "c" * 12)
        assert session.default_folder(MACHINE, STAMP).parent == RESULTS / "a-device-2-cores"

    def test_a_run_goes_on_in_the_folder_of_an_earlier_day(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(session, "RESULTS", tmp_path)
        earlier = tmp_path / "a-device-2-cores" / f"2020-02-03-{'c' * 12}"
        earlier.mkdir(parents=True)
        assert session.default_folder(MACHINE, STAMP) == earlier
        assert session.default_folder(MACHINE, Stamp("e" * 40, "e" * 40, False)) != earlier


class TestWorker:
    def test_a_step_that_hangs_is_stopped_with_its_children(self, worker: Worker, tmp_path: Path) -> None:
        found: list[Result] = []
        pid_file = tmp_path / "pid"
        worker.run(step("start", record_two), 60, found.append)
        with pytest.raises(StepFailed, match="its limit"):
            worker.run(step("a", partial(record_and_hang, pid_file=pid_file)), 3, found.append)
        assert [result.variant for result in found] == ["first", "second", "first"]
        assert _is_gone(int(pid_file.read_text()))


def _is_gone(pid: int) -> bool:
    """Within two seconds; a process that ended and was not waited for yet counts as gone."""
    for _ in range(40):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


class TestCompare:
    def run(self, case: Case) -> dict[str, Result]:
        return measure(Run(CPU, True, Path(), lambda result: None), case)

    def case(self, allowed: float | None = 2.0, **variants: Any) -> Case:
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact = x.double() @ x.double()
        calls = {"baseline": lambda: x @ x} | {name: partial(make, x @ x) for name, make in variants.items()}
        return Case("product", calls, ("y",), lambda: exact, allowed=allowed)

    def test_right_variants_have_times_errors_and_kernels(self) -> None:
        results = self.run(self.case(ours=torch.clone))
        for result in results.values():
            assert result.failure is None
            assert set(result.times) == {"warm", "cold"}
            assert all(len(times.samples) == 1 for times in result.times.values())
            assert 0 < result.errors["y"] < 1e-2
            assert result.kernels
            assert result.launches

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda y: y * 1.05, "wrong: y has error"),
            (lambda y: torch.full_like(y, float("nan")), "not finite"),
            (lambda y: y.view(-1)[:7].view(3, 9), "RuntimeError"),
            (lambda y: y[:1], "shape (1, 64)"),
        ],
    )
    def test_a_wrong_kernel_has_no_times(self, wrong: Any, message: str) -> None:
        result = self.run(self.case(ours=wrong))["ours"]
        assert result.failure is not None
        assert message in result.failure
        assert not result.times

    def test_a_library_may_be_as_inaccurate_as_it_is(self) -> None:
        assert self.run(self.case(allowed=None, ours=lambda y: y * 1.05))["ours"].times
