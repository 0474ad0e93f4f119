"""The benchmarks' results folder: on disk at once, opened again, refused; the schema; the summary; the stamp."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_steps import STAMP, TIMES, open_results

from bench.record import DONE, FAILED, INTERRUPTED, NOT_MEASURED, ResultsMismatch, load
from bench.stamp import NoStamp, Stamp, from_git, from_options
from bench.step import Result, Times
from bench.summary import duration, line, summary

RESULT = Result("case", "variant", {"suite": "kernels"}, {"warm": TIMES})


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


class TestResults:
    def test_every_result_is_on_disk_at_once(self, tmp_path: Path) -> None:
        results = open_results(tmp_path)
        results.begin("step")
        for count in (1, 2):
            results.add("step", RESULT)
            assert len((tmp_path / "unfinished.jsonl").read_text().splitlines()) == count
        results.end("step", DONE)
        kept = load(tmp_path / "results.json")
        assert kept["schema"] == 2
        assert kept["commit"] == STAMP.commit
        assert [result["labels"] for result in kept["results"]] == [{"suite": "kernels"}] * 2
        assert kept["results"][0]["times"]["warm"] == {
            "median": 2.0,
            "p20": 1.0,
            "p80": 3.0,
            "samples": [1.0, 2.0, 3.0],
        }
        assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "summary.md"]

    def test_what_a_cut_off_step_left_is_read_and_kept(self, tmp_path: Path) -> None:
        results = open_results(tmp_path)
        results.begin("step")
        results.add("step", RESULT)
        with (tmp_path / "unfinished.jsonl").open("a") as file:
            file.write('{"step": "st')
        assert len(load(tmp_path / "results.json")["results"]) == 1
        again = open_results(tmp_path)
        assert not again.is_done("step")
        assert again.data["steps"]["step"]["state"] == INTERRUPTED
        assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 1
        again.begin("step")
        again.end("step", FAILED, why="tried again")
        assert load(tmp_path / "results.json")["results"] == []

    def test_cut_off_between_the_two_files_a_result_is_there_once(self, tmp_path: Path) -> None:
        results = open_results(tmp_path)
        results.begin("step")
        results.add("step", RESULT)
        journal = (tmp_path / "unfinished.jsonl").read_text()
        results.end("step", DONE)
        (tmp_path / "unfinished.jsonl").write_text(journal)
        assert len(load(tmp_path / "results.json")["results"]) == 1

    def test_a_step_begun_again_drops_only_its_own_results(self, tmp_path: Path) -> None:
        results = open_results(tmp_path)
        for step in ("a", "b"):
            results.add(step, RESULT)
            results.end(step, DONE)
        again = open_results(tmp_path)
        assert again.is_done("a")
        again.begin("a")
        assert not again.is_done("a")
        again.add("a", Result("case", "other"))
        assert [(r["step"], r["variant"]) for r in again.data["results"]] == [("b", "variant"), ("a", "other")]

    @pytest.mark.parametrize(
        ("stamp", "machine"),
        [
            (Stamp("e" * 40, STAMP.tree, False), {}),
            (Stamp(STAMP.commit, "e" * 40, False), {}),
            (STAMP, {"device": "another"}),
            (STAMP, {"versions": {"torch": "2.14"}}),
        ],
    )
    def test_another_commit_tree_machine_or_version_is_refused(
        self, tmp_path: Path, stamp: Stamp, machine: dict[str, Any]
    ) -> None:
        open_results(tmp_path).end("step", DONE)
        before = (tmp_path / "results.json").read_text()
        with pytest.raises(ResultsMismatch, match="--out"):
            open_results(tmp_path, stamp, **machine)
        assert (tmp_path / "results.json").read_text() == before


class TestSchema:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        results = open_results(tmp_path)
        results.begin("step")
        results.add("step", RESULT)
        results.end("step", DONE, why=None, seconds=1.0, others=0.01, gpu=None)
        return tmp_path / "results.json"

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda data: data.update(schema=1), "follows schema 1, but this code reads schema 2"),
            (lambda data: data.update(commit="abc"), "commit"),
            (lambda data: data.pop("tree"), "tree"),
            (lambda data: data.update(host="mine"), "host"),
            (lambda data: data["machine"].update(path="/home"), "path"),
            (lambda data: data["steps"]["step"].update(state="fine"), "fine"),
            (lambda data: data["results"][0].pop("labels"), "labels"),
            (lambda data: data["results"][0]["times"]["warm"].update(median="2"), "median"),
            (lambda data: data["results"][0]["times"]["warm"].update(samples=[]), "samples"),
            (lambda data: data["results"][0].update(failure="wrong: y"), "times"),
        ],
    )
    def test_what_does_not_follow_it_is_refused(self, path: Path, edit: Callable, message: str) -> None:
        change(path, edit)
        for read in (load, lambda path: open_results(path.parent)):
            with pytest.raises(ResultsMismatch, match=message) as caught:
                read(path)
            assert str(path) in str(caught.value)
            assert "measure again" in str(caught.value)

    def test_a_damaged_file_is_refused(self, path: Path) -> None:
        path.write_text(path.read_text()[:-20])
        with pytest.raises(ResultsMismatch, match=r"results\.json is damaged"):
            load(path)

    def test_a_step_that_ends_otherwise_is_not_written(self, path: Path) -> None:
        before = path.read_text()
        with pytest.raises(ResultsMismatch, match="a state"):
            open_results(path.parent).end("step", "a state")
        assert json.loads(path.read_text())["steps"] == json.loads(before)["steps"]


class TestSummary:
    def test_it_shows_gains_errors_and_what_was_refused(self, tmp_path: Path) -> None:
        results = open_results(tmp_path)
        half = Times(1.0, 1.0, 1.0, [1.0])
        results.begin("s")
        results.add(
            "s", Result("case", "eager", times={"warm": TIMES}, errors={"y": 1e-3}, bytes=4_000_000, flops=8_000_000)
        )
        results.add("s", Result("case", "ours", times={"warm": half}, errors={"y": 2e-3}, parts={"stem": 1500.0}))
        results.add("s", Result("case", "broken", errors={"y": 0.5}, failure="wrong: y"))
        results.end("s", DONE, seconds=1.0, others=0.25)
        results.end("t", NOT_MEASURED, why="no time")
        text = summary(results.data)
        assert "warm x2.00" in text
        assert "2 TB/s, 4 TFLOP/s" in text
        assert "no times: wrong: y" in text
        assert "| s | done | 1.0 | 25% |  |" in text
        assert "| t | not measured |  |  | no time |" in text
        assert "- case, ours: stem 1.5 ms" in text
        refused = results.data["results"][2]
        assert line(refused, results.data["results"][0]) == "case | broken: no times: wrong: y y 5.0e-01"

    def test_durations_have_the_unit_that_suits_them(self) -> None:
        assert [duration(t) for t in (0.5, 12.34, 8100.0, 2.35e6)] == ["0.5 us", "12.34 us", "8.1 ms", "2.35 s"]


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

    def test_only_full_hashes_are_taken(self) -> None:
        assert from_options(STAMP.commit, STAMP.tree, False) == STAMP
        with pytest.raises(NoStamp, match="--tree d is no full hash"):
            from_options(STAMP.commit, "d", False)
