"""The commands of the benchmarks: the plan, what they refuse, and a rehearsal of every suite."""

import json
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_steps import MACHINE, STAMP, measure_a_wrong_kernel, record_and_raise, record_two, step
from click.testing import Result as Ended
from typer.testing import CliRunner

from bench import plan, session
from bench.__main__ import app
from bench.record import DONE, FAILED, load
from bench.shapes import LARGE, XXLARGE
from bench.stamp import RESULTS, ROOT, Stamp
from bench.suites.kernel_cases import cases
from bench.worker import Worker
from mra_kernels.ops import OPS

CPU = torch.device("cpu")
STAMPED = ("--commit", STAMP.commit, "--tree", STAMP.tree)


def run(*arguments: object) -> Ended:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def kept() -> list[Path]:
    return sorted(RESULTS.rglob("*"))


class TestPlan:
    def test_every_function_is_there_and_takes_its_arguments(self) -> None:
        for each in plan.STEPS:
            assert isinstance(each.run, partial)
            suite, function, arguments = each.run.args
            found = getattr(import_module(f"bench.suites.{suite}"), function)
            names = found.__code__.co_varnames[: found.__code__.co_argcount + found.__code__.co_kwonlyargcount]
            assert set(arguments) <= set(names[1:])
            assert set(each.seconds) <= {"cpu", "cuda"}
            assert each.seconds

    def test_names_are_unique_paths_of_a_command(self) -> None:
        names = [each.name for each in plan.STEPS]
        assert len(set(names)) == len(names)
        suites = {suite for suites in plan.SUITES.values() for suite in suites}
        assert {name.split("/")[0] for name in names} == suites | {"build", "tests"}

    def test_it_has_every_op_batch_and_dtype(self) -> None:
        assert set(plan.OPS) == set(OPS)
        assert len(plan.OPS) == len(OPS)
        for device, dtypes in (("cpu", ("bfloat16", "float32")), ("cuda", ("bfloat16", "float32", "float16"))):
            wanted = {f"kernels/{op}/b{b}/{d}" for op in OPS for b in (1, 2, 4, 8, 16) for d in dtypes}
            wide = {f"{name}/xxl" for name in wanted if name.split("/")[1] not in plan.SAME_IN_XXL}
            assert wanted | wide == {each.name for each in plan.select("kernels", device, ["kernels/*"])}

    def test_the_ops_without_shapes_of_xxl_have_none(self) -> None:
        models = {op: {case.model for case in cases(op, [LARGE, XXLARGE])} for op in OPS}
        assert {op for op, of in models.items() if XXLARGE.name not in of} == plan.SAME_IN_XXL

    def test_ten_minutes_of_a_cpu_reach_every_suite_that_the_report_is_about(self) -> None:
        left, suites = 600.0, set()
        for each in plan.select("all", "cpu"):
            if each.seconds["cpu"] <= left:
                left -= each.seconds["cpu"]
                suites.add(each.name.split("/")[0])
        assert {"ceilings", "kernels", "vision", "e2e"} <= suites

    def test_a_gpu_builds_and_tests_first(self) -> None:
        assert [each.name for each in plan.select("gpu", "cuda")][:3] == ["build", "ceilings", "tests"]
        assert not {"build", "tests"} & {each.name for each in plan.select("all", "cpu")}

    def test_plan_and_worker_import_nothing_that_a_gpu_builds_first(self) -> None:
        code = (
            "import sys, bench.plan, bench.worker; print([m for m in sys.modules if m.startswith(('mra_', 'bench.s'))])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "['bench.step']"


class TestRefusals:
    def test_without_a_gpu_it_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for command in (["gpu"], ["kernels", "--device", "cuda"]):
            done = run(*command, *STAMPED)
            assert done.exit_code == 2
            assert "--dry-run" in done.output

    def test_an_unknown_glob_is_refused_with_the_names(self) -> None:
        done = run("vision", "--device", "cpu", "--dry-run", "--only", "vision/forwards/*")
        assert done.exit_code == 2
        assert "vision/forwards/*" in done.output
        assert "vision/forward/b1" in done.output
        assert "kernels/" not in done.output

    @pytest.mark.parametrize(
        ("stamp", "message"),
        [
            (["--commit", "c" * 40], "--tree"),
            (["--commit", "c" * 12, "--tree", "d" * 40], "full hash"),
            ([*STAMPED, "--dirty"], "commit them first"),
        ],
    )
    def test_a_source_that_nobody_can_name(self, stamp: list[str], message: str, tmp_path: Path) -> None:
        done = run("kernels", "--device", "cpu", "--out", tmp_path / "out", *stamp)
        assert done.exit_code == 2
        assert message in done.output
        assert not (tmp_path / "out").exists()

    def test_a_dirty_tree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bench.stamp.from_git", lambda: Stamp(STAMP.commit, STAMP.tree, True))
        before = kept()
        done = run("kernels", "--device", "cpu")
        assert done.exit_code == 2
        assert "commit them first" in done.output
        assert "--scratch" in done.output
        assert kept() == before

    @pytest.mark.parametrize("flag", ["--scratch", "--dry-run"])
    def test_what_keeps_nothing_takes_no_folder(self, flag: str, tmp_path: Path) -> None:
        done = run("kernels", "--device", "cpu", flag, "--out", tmp_path)
        assert done.exit_code == 2
        assert "leave --out away" in done.output

    def test_a_backend_chosen_from_outside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MRA_BACKEND", "reference")
        done = run("kernels", "--device", "cpu", "--scratch")
        assert done.exit_code == 2
        assert "unset it" in done.output


class TestMeasure:
    """The real command with a plan of two steps."""

    @pytest.fixture(autouse=True)
    def two_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = (step("kernels/a", record_two), step("kernels/b", record_and_raise))
        monkeypatch.setattr(plan, "STEPS", steps)
        monkeypatch.setattr(session.machine, "describe", lambda device: MACHINE)

    def measure(self, out: Path, *more: object) -> Ended:
        return run("kernels", "--device", "cpu", *STAMPED, "--minutes", 5, "--out", out, *more)

    def test_a_failed_step_fails_the_command_and_is_tried_again(self, tmp_path: Path) -> None:
        first = self.measure(tmp_path / "out", "--only", "*/a")
        assert first.exit_code == 0, first.output
        assert "  case | second: warm 2 us (1 us - 3 us) warm x1.00" in first.output.splitlines()
        second = self.measure(tmp_path / "out")
        assert second.exit_code == 1
        assert "kernels/a: its results are there already" in second.output
        data = load(tmp_path / "out/results.json")
        assert {n: s["state"] for n, s in data["steps"].items()} == {"kernels/a": DONE, "kernels/b": FAILED}
        assert len(data["runs"]) == 2
        # What failed before and was not asked for now is no failure of this command.
        assert self.measure(tmp_path / "out", "--only", "*/a").exit_code == 0

    def test_results_of_another_commit_are_left_alone(self, tmp_path: Path) -> None:
        self.measure(tmp_path, "--only", "*/a")
        done = self.measure(tmp_path, "--only", "*/a", "--commit", "e" * 40)
        assert done.exit_code == 2
        assert "give another folder with --out" in done.output

    def test_scratch_measures_a_dirty_tree_and_keeps_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bench.stamp.from_git", lambda: Stamp(STAMP.commit, STAMP.tree, True))
        before = kept()
        done = run("kernels", "--device", "cpu", "--scratch", "--only", "kernels/a")
        assert done.exit_code == 0, done.output
        assert "case | second: warm 2 us" in done.output
        assert kept() == before

    def test_gpu_is_the_same_engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a worker on the CPU in place of a GPU's."""

        class OnCpu(Worker):
            def __init__(self, device: Any, rehearsal: bool, folder: Path) -> None:
                super().__init__(CPU, rehearsal, folder)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(session, "Worker", OnCpu)
        done = run("gpu", *STAMPED, "--out", tmp_path, "--only", "kernels/a")
        assert done.exit_code == 0, done.output
        assert load(tmp_path / "results.json")["steps"]["kernels/a"]["state"] == DONE

    def test_a_wrong_kernel_gets_no_speed_up_and_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel benchmark itself, around a native kernel that is 5% off."""
        monkeypatch.setattr(plan, "STEPS", (step("kernels/planted", measure_a_wrong_kernel),))
        done = self.measure(tmp_path)
        assert done.exit_code == 1
        lines = [line for line in done.output.splitlines() if "forward | native" in line]
        assert lines
        assert all("no times: wrong: y has error" in line and " x" not in line.split("|")[1] for line in lines)
        data = load(tmp_path / "results.json")
        assert data["steps"]["kernels/planted"]["state"] == FAILED
        native = [r for r in data["results"] if r["variant"] == "native" and r["labels"]["direction"] == "forward"]
        assert native
        assert not any(result["times"] for result in native)
        others = [result for result in data["results"] if result["variant"] == "eager"]
        assert all(result["times"] for result in others)


class TestReport:
    def test_results_of_another_schema_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a-machine/2026-01-01-cccccccccccc/results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"schema": 1}))
        done = run("report", "--results", tmp_path, "--out", tmp_path / "report.html")
        assert done.exit_code == 2
        assert "schema 1" in done.output
        assert not (tmp_path / "report.html").exists()


def test_rehearsal_runs_every_suite() -> None:
    """In a process as users start it, for a GPU; nothing may be left in bench/results."""
    before = kept()
    # What pytest collects for a GPU takes a while and is no measurement.
    names = [
        *("build", "ceilings", "kernels/gated_resample_add/b1/bfloat16", "compile/adapter_gate/b1/float32"),
        *("library/b1", "gemms/b1", "vision/forward/b1", "vision/training/b1", "e2e/llava-hr/7b/1024"),
        *("e2e/llava-1.5/7b/336", "train/stage1", "profile/vision"),
    ]
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
    assert kept() == before
