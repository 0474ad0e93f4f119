"""The benchmarks' own machinery on a CPU: plan, worker, results file, refusals, a rehearsal of the steps."""

import json
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from bench_steps import TIMES, record_and_die, record_and_hang, record_and_raise, record_two
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from bench import session
from bench.__main__ import app
from bench.plan import STEPS
from bench.compare import Case, measure
from bench.record import DONE, FAILED, NOT_MEASURED, Results, ResultsMismatch
from bench.shapes import LARGE, TINY, gemms
from bench.stamp import ROOT, NoStamp, Stamp, from_git
from bench.step import Result, Run, Step, Times
from bench.summary import summary
from bench.worker import StepFailed, Worker
from mra_kernels import use_backend
from mra_kernels.ops import OPS
from mra_model.presets import build_model

CPU = torch.device("cpu")
STAMP = Stamp("c" * 40, "t" * 40, False)
MACHINE = {"device": "a device", "versions": {"torch": "2.13"}}


@pytest.fixture
def worker(tmp_path: Path):
    worker = Worker(CPU, True, tmp_path)
    yield worker
    worker.stop()


def open_results(folder: Path, stamp: Stamp = STAMP, device: str = "a device") -> Results:
    return Results(folder, stamp, MACHINE | {"device": device}, "a command")


class TestPlan:
    def test_names_are_unique_and_every_function_is_there(self) -> None:
        assert len({step.name for step in STEPS}) == len(STEPS)
        for step in STEPS:
            assert isinstance(step.run, partial)
            room, function, _ = step.run.args
            assert callable(getattr(import_module(f"bench.suites.{room}"), function))

    def test_without_a_gpu_it_says_what_to_do(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        done = CliRunner().invoke(app, ["gpu", "--minutes", "1", "--commit", "a", "--tree", "b"])
        assert done.exit_code == 2
        assert "--dry-run" in done.output

    def test_unknown_step_is_refused_with_the_names(self) -> None:
        done = CliRunner().invoke(app, ["gpu", "--dry-run", "--only", "depthwise"])
        assert done.exit_code == 2
        assert "depthwise-b8" in done.output

    def test_commit_and_tree_go_together(self) -> None:
        done = CliRunner().invoke(app, ["gpu", "--commit", "a"])
        assert done.exit_code == 2
        assert "--tree" in done.output

    def test_a_step_that_does_not_fit_is_left_out_and_a_shorter_one_runs(self, tmp_path: Path, worker: Worker) -> None:
        results, lines = open_results(tmp_path), []
        steps = [Step("long", "", 1000, record_two), Step("short", "", 1, record_two)]
        session._run_all(steps, results, worker, time.monotonic() + 60, False, lines.append)
        assert results.data["steps"]["long"]["state"] == NOT_MEASURED
        assert results.data["steps"]["short"]["state"] == DONE
        assert {result["step"] for result in results.data["results"]} == {"short"}

    def test_failures_cost_the_other_steps_nothing(self, tmp_path: Path, worker: Worker) -> None:
        results = open_results(tmp_path)
        steps = [
            Step("raises", "", 1, record_and_raise),
            Step("dies", "", 1, record_and_die),
            Step("works", "", 1, record_two),
        ]
        session._run_all(steps, results, worker, time.monotonic() + 60, False, lambda line: None)
        states = {name: step["state"] for name, step in results.data["steps"].items()}
        assert states == {"raises": FAILED, "dies": FAILED, "works": DONE}
        assert "planted" in results.data["steps"]["raises"]["why"]
        assert [result["step"] for result in results.data["results"]] == ["raises", "dies", "works", "works"]

    def test_a_finished_step_runs_again_only_by_force(self, tmp_path: Path, worker: Worker) -> None:
        step = Step("works", "", 1, record_two)
        for force, runs in ((False, True), (False, False), (True, True)):
            results, lines = open_results(tmp_path), []
            session._run_all([step], results, worker, time.monotonic() + 60, force, lines.append)
            assert len(results.data["results"]) == 2
            assert any("there already" in line for line in lines) == (not runs)
        assert len(results.data["runs"]) == 3


class TestMeasure:
    """The real command, with a worker on the CPU in place of a GPU's."""

    @pytest.fixture(autouse=True)
    def pretend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(session.machine, "describe", lambda device: MACHINE)
        monkeypatch.setattr(session, "Worker", lambda device, rehearsal, folder: Worker(CPU, rehearsal, folder))
        monkeypatch.setattr(session, "STEPS", (Step("a", "", 1, record_two), Step("b", "", 1, record_and_raise)))

    def measure(self, out: Path, lines: list[str], *more: str) -> int:
        stamped = ["--commit", STAMP.commit, "--tree", STAMP.tree, "--minutes", "1", "--out", str(out)]
        done = CliRunner().invoke(app, ["gpu", *stamped, *more])
        lines += done.output.splitlines()
        return done.exit_code

    def test_a_failed_step_fails_the_command_and_is_tried_again(self, tmp_path: Path) -> None:
        lines: list[str] = []
        assert self.measure(tmp_path / "out", lines, "--only", "a") == 0
        assert "  case | second: warm 2.0 (1.0-3.0) warm x1.00" in lines
        assert self.measure(tmp_path / "out", lines) == 1
        assert "a: its results are there already" in lines
        kept = json.loads((tmp_path / "out/results.json").read_text())
        assert {name: step["state"] for name, step in kept["steps"].items()} == {"a": DONE, "b": FAILED}
        assert len(kept["runs"]) == 2

    def test_results_of_another_commit_are_left_alone(self, tmp_path: Path) -> None:
        lines: list[str] = []
        self.measure(tmp_path, lines, "--only", "a")
        assert self.measure(tmp_path, lines, "--only", "a", "--commit", "another") == 2
        assert "give another folder with --out" in lines[-1]

    def test_machines_have_folders_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        folder = session._default_folder(torch.device("cuda", 0), STAMP)
        assert folder.parent == ROOT / "bench/results/nvidia-h100-80gb-hbm3"
        assert folder.name.endswith("-" + "c" * 12)


class TestWorker:
    def test_a_step_that_hangs_is_stopped_with_its_children(self, worker: Worker, tmp_path: Path) -> None:
        found: list[Result] = []
        pid_file = tmp_path / "pid"
        worker.run(Step("start", "", 1, record_two), 60, found.append)
        with pytest.raises(StepFailed, match="its limit"):
            worker.run(Step("a", "", 1, partial(record_and_hang, pid_file=pid_file)), 3, found.append)
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


class TestResults:
    def test_every_result_is_on_disk_at_once(self, tmp_path: Path) -> None:
        results = open_results(tmp_path)
        for count in (1, 2):
            results.add("step", Result("case", "variant", {"warm": TIMES}))
            kept = json.loads((tmp_path / "results.json").read_text())
            assert len(kept["results"]) == count
        assert kept["schema"] == 1
        assert kept["commit"] == STAMP.commit
        assert kept["results"][0]["times"]["warm"] == {
            "median": 2.0,
            "p20": 1.0,
            "p80": 3.0,
            "samples": [1.0, 2.0, 3.0],
        }
        assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "summary.md"]

    def test_a_step_begun_again_drops_only_its_own_results(self, tmp_path: Path) -> None:
        results = open_results(tmp_path)
        for step in ("a", "b"):
            results.add(step, Result("case", "variant"))
            results.end(step, DONE)
        again = open_results(tmp_path)
        assert again.is_done("a")
        again.begin("a")
        again.add("a", Result("case", "other"))
        assert [(r["step"], r["variant"]) for r in again.data["results"]] == [("b", "variant"), ("a", "other")]

    @pytest.mark.parametrize(
        ("stamp", "device"),
        [(Stamp("d" * 40, "t" * 40, False), "a device"), (Stamp("c" * 40, "u" * 40, False), "a device"), (STAMP, "b")],
    )
    def test_another_commit_tree_or_machine_is_refused(self, tmp_path: Path, stamp: Stamp, device: str) -> None:
        open_results(tmp_path).add("step", Result("case", "variant"))
        before = (tmp_path / "results.json").read_text()
        with pytest.raises(ResultsMismatch, match="--out"):
            open_results(tmp_path, stamp, device)
        assert (tmp_path / "results.json").read_text() == before

    def test_a_dirty_run_stains_the_folder(self, tmp_path: Path) -> None:
        open_results(tmp_path)
        open_results(tmp_path, Stamp(STAMP.commit, STAMP.tree, True))
        assert open_results(tmp_path).data["dirty"]

    def test_summary_shows_gains_errors_and_what_was_refused(self, tmp_path: Path) -> None:
        results = open_results(tmp_path)
        half = Times(1.0, 1.0, 1.0, [1.0])
        results.add("s", Result("case", "eager", {"warm": TIMES}, {"y": 1e-3}, bytes=4_000_000, flops=8_000_000))
        results.add("s", Result("case", "ours", {"warm": half}, {"y": 2e-3}))
        results.add("s", Result("case", "broken", errors={"y": 0.5}, failure="wrong: y"))
        results.end("s", DONE, seconds=1.0)
        results.end("t", NOT_MEASURED, why="no time")
        text = summary(results.data)
        assert "warm x2.00" in text
        assert "2 TB/s, 4 TFLOP/s" in text
        assert "no times: wrong: y" in text
        assert "| t | not measured |  | no time |" in text


class TestCompare:
    def run(self, case: Case) -> dict[str, Result]:
        return measure(Run(CPU, True, Path(), lambda result: None), case)

    def case(self, allowed: float | None = 2.0, **variants) -> Case:
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact = x.double() @ x.double()
        calls = {"baseline": lambda: x @ x} | {name: partial(make, x @ x) for name, make in variants.items()}
        return Case("product", calls, ("y",), lambda: exact, allowed=allowed)

    def test_right_variants_have_times_errors_and_kernels(self) -> None:
        results = self.run(self.case(ours=torch.clone))
        for result in results.values():
            assert result.failure is None
            assert set(result.times) == {"warm", "cold"}
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
    def test_a_wrong_kernel_has_no_times(self, wrong, message: str) -> None:
        result = self.run(self.case(ours=wrong))["ours"]
        assert message in result.failure
        assert not result.times

    def test_a_library_may_be_as_inaccurate_as_it_is(self) -> None:
        assert self.run(self.case(allowed=None, ours=lambda y: y * 1.05))["ours"].times


class TestShapes:
    def test_products_are_those_of_the_model(self) -> None:
        """Counted on the model itself, without data; the gate's products have one row a picture and are left out."""
        tower = build_model("llava-hr-cpu", device="meta").model.vision_tower
        pixels = torch.empty(2, 3, LARGE.side, LARGE.side, device="meta")
        with torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
            tower(pixels)
        counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
        gate = 3 * 2 * 2 * (2 * LARGE.width * LARGE.width // 2 + LARGE.width // 2)
        ours = [g for g in gemms(LARGE, 2) if g.name != "stem" and not g.name.startswith("projector")]
        assert sum(g.calls * g.flops for g in ours) == counts["aten.mm"] + counts["aten.addmm"] - gate
        stem = next(g for g in gemms(LARGE, 2) if g.name == "stem").flops
        depthwise = sum(98 * 2 * s * s * c * d for (s, c), d in zip(LARGE.stages(), LARGE.depths, strict=True))
        adapters = 3 * 98 * 2 * LARGE.grid**2 * LARGE.width
        assert stem + depthwise + adapters == counts["aten.convolution"]

    def test_every_op_has_cases_that_it_takes(self) -> None:
        from bench.suites.kernels import CASES, _call, make_inputs

        assert set(CASES) == set(OPS)
        for op, cases in CASES.items():
            for dims in cases(TINY, 2).values():
                assert _call(op, "reference", make_inputs(op, *dims))


class TestStamp:
    @pytest.fixture
    def repository(self, tmp_path: Path) -> Path:
        (tmp_path / "bench/results").mkdir(parents=True)
        (tmp_path / "source.py").write_text("x = 1\n")
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
            identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
            subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
        return tmp_path

    def test_clean_dirty_and_results(self, repository: Path) -> None:
        stamp = from_git(repository)
        assert len(stamp.commit) == len(stamp.tree) == 40
        assert not stamp.dirty
        (repository / "bench/results/results.json").write_text("{}")
        assert not from_git(repository).dirty
        (repository / "source.py").write_text("x = 2\n")
        changed = from_git(repository)
        assert changed.dirty
        assert changed.options() == f"--commit {stamp.commit} --tree {stamp.tree} --dirty"

    def test_without_a_repository_it_says_what_to_pass(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        with pytest.raises(NoStamp, match="--commit HASH --tree HASH"):
            from_git(tmp_path)
        monkeypatch.setenv("PATH", "")
        with pytest.raises(NoStamp, match="git is not installed"):
            from_git(tmp_path)


def test_rehearsal_runs_the_steps() -> None:
    """One batch of each kind, in a process as users start it; nothing may be left in bench/results."""
    before = sorted((ROOT / "bench/results").rglob("*"))
    names = ["build", "ceilings", "depthwise-b1", "kernels-b1", "gemm-b1", "vision-b1", "compile-b1", "training-b1"]
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run"]
    done = subprocess.run(
        [*command, *(part for name in names for part in ("--only", name))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        assert f"{name}: done" in done.stdout
    assert "no times" not in done.stdout
    assert sorted((ROOT / "bench/results").rglob("*")) == before
