"""The report's numbers on made-up results: ratios, losses, what is refused or missing, the README, equal bytes."""

import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import bench_samples as samples
import pytest

from bench.record import ResultsMismatch
from bench.report import write
from bench.report.blocks import Cell, Table, names, numbers
from bench.report.cases import ceilings, compared, failures, first, kernel_cases, losses
from bench.report.data import Machine, geometric_mean, machines
from bench.report.headline import keys
from bench.report.numbers import DASH, TIMES, duration, factor, size
from bench.report.paper import equally_optimized
from bench.report.readme import BEGIN, END, NoMarkers
from bench.stamp import ROOT
from bench.step import Result

OP = "depthwise_conv_norm"
AUTO = {"facts": {"auto": "native"}}


def machine(tmp_path: Path, *results: dict[str, Any], gpu: bool = False) -> Machine:
    samples.save(tmp_path, samples.file(list(results), gpu=gpu))
    (found,) = machines(tmp_path)
    return found


def page(root: Path) -> str:
    return write(root, root / "page.html", None).read_text()


def headline(of: Machine) -> dict[str, str]:
    return {key.title: key.value for key in keys(of)}


class TestRatios:
    def test_gain_and_its_spread(self, tmp_path: Path) -> None:
        eager = samples.kernel(OP, "eager", 10.0, cold=12.0, **AUTO)
        found = machine(tmp_path, eager, samples.kernel(OP, "native", 4.0, cold=6.0))
        (case,) = kernel_cases(found)
        warm, cold = case.gain("warm"), case.gain("cold")
        assert (case.chosen, first(case)) == ("native", "warm")
        assert (warm.value, cold.value) == (2.5, 2.0)
        assert warm.low == pytest.approx(9.7 / 4.12)
        assert warm.high == pytest.approx(10.3 / 3.88)
        assert warm.is_clear

    def test_geometric_mean(self, tmp_path: Path) -> None:
        assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
        of = [
            samples.kernel(OP, variant, time, shape=shape, **more)
            for shape, ours in (("64x64x768", 5.0), ("32x32x1536", 1.25))
            for variant, time, more in (("eager", 10.0, AUTO), ("native", ours, {}))
        ]
        assert headline(machine(tmp_path, *of))[f"{OP}, forward"] == f"4.00{TIMES}"

    def test_only_what_took_turns_is_compared(self, tmp_path: Path) -> None:
        """The machine was twice as slow when torch.compile was measured: against the other eager it would win."""
        found = machine(
            tmp_path,
            samples.kernel(OP, "eager", 10.0, **AUTO),
            samples.kernel(OP, "native", 5.0),
            samples.kernel(OP, "eager", 20.0, compiled=True, **AUTO),
            samples.kernel(OP, "native", 10.0, compiled=True),
            samples.kernel(OP, "torch.compile", 8.0, compiled=True),
        )
        (case,) = kernel_cases(found)
        assert case.subject.gain("torch.compile", "eager", "warm").value == 2.5
        (loss,) = losses(found)
        assert (loss.kind, loss.gain.value) == ("torch.compile", 0.8)

    def test_share_of_the_ceilings(self, tmp_path: Path) -> None:
        work = {"bytes": 2_000_000, "flops": 10_000_000}
        eager, ours = samples.kernel(OP, "eager", 400.0, **AUTO, **work), samples.kernel(OP, "native", 200.0, **work)
        found = machine(tmp_path, *samples.ceilings(2e10, 8e11), eager, ours)
        of = ceilings(found)
        assert of.copy == pytest.approx(2e10, rel=1e-4)
        assert of.product == {"bfloat16": pytest.approx(8e11, rel=1e-4), "float32": pytest.approx(2e11, rel=1e-4)}
        html = page(tmp_path)
        # 10 GB/s of 20, and 50 GFLOP/s of 200.
        assert '<td class="n "><span>50%</span></td><td class="n "><span>25%</span></td>' in html

    def test_paper_ratio_is_equally_optimized(self, tmp_path: Path) -> None:
        answers = samples.answers()
        by_side = {(r["labels"]["side"], r["variant"]): r["times"]["first token"]["median"] for r in answers}
        found = machine(tmp_path, *answers)
        title = "First token, LLaVA-1.5 at 1022 / LLaVA-HR at 1024"
        assert headline(found)[title] == factor(by_side[1022, "eager"] / by_side[1024, "eager"])
        sides = {(r["labels"]["side"], r["variant"]): r for r in answers}
        theirs, ours = (sides[key] | {"variant": "optimized"} for key in ((1022, "eager"), (1024, "fused")))
        for alone in (theirs, ours):
            found = machine(tmp_path, *answers, alone)
            assert equally_optimized(found.subjects("e2e"), (1022, 1024)).plain == "eager"
        found = machine(tmp_path, *answers, theirs, ours)
        both = equally_optimized(found.subjects("e2e"), (1022, 1024))
        assert (both.plain, both.high) == ("optimized", "optimized")
        assert both.ratios["first token"].value == by_side[1022, "eager"] / by_side[1024, "fused"]

    def test_tokens_per_second(self, tmp_path: Path) -> None:
        answer = samples.answers()[0]
        answer["times"]["10 tokens"] |= {"median": 4e6}
        machine(tmp_path, answer)
        assert "<span>2.50</span>" in page(tmp_path)


class TestLosses:
    def test_planted_ones_are_found_and_none_else(self, tmp_path: Path) -> None:
        of = [
            samples.kernel(OP, "eager", 10.0, shape="1x1x1", **AUTO),
            samples.kernel(OP, "native", 20.0, shape="1x1x1"),
            # Out of the cache only.
            samples.kernel(OP, "eager", 10.0, cold=10.0, shape="2x2x2", **AUTO),
            samples.kernel(OP, "native", 5.0, cold=12.5, shape="2x2x2"),
            # Eager is chosen, and a route of the library is faster; that our kernel is slower costs nobody anything.
            samples.kernel(OP, "eager", 10.0, shape="3x3x3", facts={"auto": "reference"}),
            samples.kernel(OP, "native", 40.0, shape="3x3x3"),
            samples.kernel(OP, "library: slow", 9.0, shape="3x3x3"),
            samples.kernel(OP, "library: fast", 7.5, shape="3x3x3"),
            samples.kernel(OP, "eager", 10.0, shape="4x4x4", **AUTO),
            samples.kernel(OP, "native", 9.0, shape="4x4x4"),
        ]
        found = machine(tmp_path, *of)
        listed = {(loss.what.split()[1][:5], loss.condition, loss.rival, loss.gain.value) for loss in losses(found)}
        assert listed == {
            ("1x1x1", "warm", "eager", 0.5),
            ("2x2x2", "cold", "eager", 0.8),
            ("3x3x3", "warm", "library: fast", 0.75),
        }
        assert compared(found) == 4
        assert headline(found)["Losing comparisons"] == "3"
        html = page(tmp_path)
        assert "3 losing comparisons" in html
        assert f'<td class="n bad"><span>0.50{TIMES}</span></td>' in html

    def test_towers_and_answers_count_too(self, tmp_path: Path) -> None:
        """In the samples torch.compile beats the fused tower."""
        assert [(loss.choice, loss.kind) for loss in losses(machine(tmp_path, *samples.vision()))] == [
            ("fused", "torch.compile")
        ]

    def test_an_optimized_tower_is_held_against_graphs(self, tmp_path: Path) -> None:
        """It is one itself, and a fused tower that is none is not."""
        labels = {"suite": "vision", "model": "tower", "direction": "forward", "batch": 1}
        seconds = {"fused": 3.0, "optimized": 2.0, "eager, CUDA graph": 1.0}
        results = [
            {"step": "vision/forward/b1", **asdict(Result("forward", v, labels, {"call": samples.times(1e6 * s)}))}
            for v, s in seconds.items()
        ]
        found = losses(machine(tmp_path, *results))
        assert [(loss.choice, loss.rival) for loss in found] == [("optimized", "eager, CUDA graph")]

    def test_none_is_said(self, tmp_path: Path) -> None:
        machine(tmp_path, samples.kernel(OP, "eager", 10.0, **AUTO), samples.kernel(OP, "native", 9.0))
        assert re.search(r"<p[^>]*>None\.\s*</p>", page(tmp_path))

    def test_a_loss_is_never_rounded_away(self) -> None:
        assert factor(0.9996) == f"0.999{TIMES}"
        assert factor(1.0004) == f"1.00{TIMES}"


class TestRefused:
    def test_a_wrong_kernel_shows_no_speedup(self, tmp_path: Path) -> None:
        found = machine(tmp_path, *samples.refused())
        (case,) = kernel_cases(found)
        assert case.gain("warm") is None
        assert compared(found) == 0
        assert [result["variant"] for result in failures(found)] == ["native"]
        html = page(tmp_path)
        assert not re.search(rf'(<span>|"value">)[\d.]+{TIMES}<', html)
        assert "refused, see below" in html
        assert "wrong: y has error 5.00e-01" in html
        assert headline(found)[f"{OP}, forward"] == "not measured"

    def test_times_beside_a_failure_are_ignored(self, tmp_path: Path) -> None:
        """No file may hold them; if one does, they must not show."""
        found = machine(tmp_path, *samples.refused())
        ours = found.data["results"][1]
        ours["times"] = {"warm": {"median": 1.0, "p20": 1.0, "p80": 1.0, "samples": [1.0]}}
        assert ours["failure"]
        assert kernel_cases(found)[0].gain("warm") is None

    def test_steps_that_failed_or_were_left_out(self, tmp_path: Path) -> None:
        machine(tmp_path, *samples.vision())
        html = page(tmp_path)
        assert "12 s were left, it takes 200 s" in html
        assert "<span>planted</span>" in html

    def test_another_schema_is_refused(self, tmp_path: Path) -> None:
        samples.save(tmp_path, samples.file([]) | {"schema": 1})
        with pytest.raises(ResultsMismatch, match="schema 1"):
            write(tmp_path, tmp_path / "page.html", None)
        assert not (tmp_path / "page.html").exists()


class TestMissing:
    def test_without_results(self, tmp_path: Path) -> None:
        html = page(tmp_path)
        assert "Nothing measured yet" in html
        assert "no results of a GPU" in html

    def test_only_kernels(self, tmp_path: Path) -> None:
        found = machine(tmp_path, samples.kernel(OP, "eager", 10.0, **AUTO), samples.kernel(OP, "native", 5.0))
        assert sum(value == "not measured" for value in headline(found).values()) == 4
        html = page(tmp_path)
        for command in ("vision", "e2e", "train", "profile"):
            assert f"<code>python -m bench {command}</code>" in html
        assert "no results of a GPU" in html

    def test_where_the_choice_was_not_kept_nothing_is_claimed_for_users(self, tmp_path: Path) -> None:
        found = machine(tmp_path, samples.kernel(OP, "eager", 10.0), samples.kernel(OP, "native", 5.0))
        assert set(headline(found).values()) == {"not measured"}
        assert "not recorded" in page(tmp_path)

    @pytest.mark.parametrize("suite", ["kernels", "vision", "e2e", "train", "profile", "ceilings", "news"])
    def test_results_without_labels_or_times(self, tmp_path: Path, suite: str) -> None:
        bare = samples.kernel(OP, "eager", None) | {"labels": {"suite": suite}, "case": "bare", "flops": None}
        machine(tmp_path, bare, bare | {"case": "barer", "labels": {}, "facts": {"something": {"kept": 1}}})
        html = page(tmp_path)
        assert "something, kept 1" in html
        assert "bare" in html

    def test_no_memory_for_a_case(self, tmp_path: Path) -> None:
        failure = "not measured: needs about 90 GiB, and 14 GiB are available"
        found = machine(tmp_path, samples.kernel(OP, "eager", None, failure=failure))
        assert compared(found) == 0
        assert page(tmp_path).count(failure) >= 2


class TestMachines:
    def test_newest_of_each_the_newest_first(self, tmp_path: Path) -> None:
        for folder, device, date in (
            ("a", "device A", "2026-01-01T00:00:00+00:00"),
            ("a", "device A", "2026-03-01T00:00:00+00:00"),
            ("b", "device B", "2026-02-01T00:00:00+00:00"),
            ("c", "device C", "2026-04-01T00:00:00+00:00"),
        ):
            samples.save(tmp_path, samples.file(samples.ceilings(), device, gpu=folder == "c", date=date), folder)
        found = machines(tmp_path)
        assert [(one.name, one.date) for one in found] == [
            ("device C", "2026-04-01"),
            ("device A", "2026-03-01"),
            ("device B", "2026-02-01"),
        ]
        assert [path.parent.name[:10] for path in found[1].older] == ["2026-01-01"]
        html = page(tmp_path)
        assert "no results of a GPU" not in html
        assert f"does not show: 2026-01-01-{samples.COMMIT[:12]}" in html

    def test_every_link_of_the_contents_has_its_place_once(self, tmp_path: Path) -> None:
        samples.save(tmp_path, samples.cpu())
        samples.save(tmp_path, samples.file(samples.kernels(Random(1)), "another"), "another")
        html = page(tmp_path)
        places = re.findall(r'<(?:section|main) id="([^"]*)"', html)
        assert len(places) == len(set(places))
        assert set(re.findall(r'<a href="#([^"]*)"', html)) <= set(places)

    def test_texts_of_results_are_escaped(self, tmp_path: Path) -> None:
        evil = "<script>alert(1)</script>$x$"
        kinds = {"model": evil, "place": evil}
        results = [
            samples.kernel(evil, "eager", 10.0, shape=evil, **AUTO, **kinds),
            samples.kernel(evil, "native", 20.0, shape=evil, **kinds),
            samples.kernel(evil, evil, None, shape=evil, failure=evil, **kinds),
        ]
        samples.save(tmp_path, samples.file(results, device=evil))
        html = page(tmp_path)
        assert "<script" not in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt;$x$" in html
        readme = tmp_path / "README.md"
        readme.write_text(f"{BEGIN}{END}")
        write(tmp_path, tmp_path / "page.html", readme)
        assert "<script" not in readme.read_text()


class TestReadme:
    def test_only_what_is_between_the_markers_changes_and_only_once(self, tmp_path: Path) -> None:
        samples.save(tmp_path / "bench/results", samples.cpu())
        readme = tmp_path / "README.md"
        readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nmore\n")
        out = tmp_path / "bench/results/index.html"
        write(tmp_path / "bench/results", out, readme)
        text = readme.read_text()
        assert text.startswith(f"# Title\n\n{BEGIN}\n")
        assert text.endswith(f"\n{END}\n\nmore\n")
        assert "old" not in text
        assert f"**{samples.CPU_NAME}**, 2026-11-25, commit `c0ffeec0ffee`:" in text
        assert "**GPU**: not measured" in text
        assert "| Losing comparisons |" in text
        assert "(bench/results/index.html)" in text
        write(tmp_path / "bench/results", out, readme)
        assert readme.read_text() == text

    def test_with_a_gpu_nothing_is_missing(self, tmp_path: Path) -> None:
        samples.save(tmp_path, samples.file(samples.vision(1e-3), "NVIDIA H200", gpu=True))
        readme = tmp_path / "README.md"
        readme.write_text(f"{BEGIN}\n{END}\n")
        write(tmp_path, tmp_path / "page.html", readme)
        assert "**GPU**" not in readme.read_text()
        assert "**NVIDIA H200**" in readme.read_text()

    @pytest.mark.parametrize("text", ["# Title\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{END}{BEGIN}{END}"])
    def test_without_its_place_nothing_is_written(self, tmp_path: Path, text: str) -> None:
        readme = tmp_path / "README.md"
        readme.write_text(text)
        with pytest.raises(NoMarkers, match="bench:begin"):
            write(tmp_path, tmp_path / "page.html", readme)
        assert readme.read_text() == text
        assert not (tmp_path / "page.html").exists()


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    """In another process too, where sets and dictionaries hash strings in another way."""
    samples.save(tmp_path, samples.cpu())
    here = write(tmp_path, tmp_path / "here.html", None).read_bytes()
    again = write(tmp_path, tmp_path / "again.html", None).read_bytes()
    assert here == again
    program = "import sys; from pathlib import Path; from bench.report import write; root = Path(sys.argv[1]);"
    command = [sys.executable, "-c", f"{program} write(root, root / 'there.html', None)", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert here == (tmp_path / "there.html").read_bytes()


def test_a_full_page_holds_every_section(tmp_path: Path) -> None:
    samples.save(tmp_path, samples.cpu())
    html = page(tmp_path)
    titles = re.findall(r"<h3>([^<]*)</h3>", html)
    assert titles == [
        "GPU",
        "Kernels",
        "Roofline",
        "Losing cases",
        "Vision tower",
        "The paper&#39;s table",
        "Training",
        "Profiles",
        "Other measurements",
        "Environment",
    ]
    assert html.count("<svg") == 2 * 5 + 2 + 2 + 1
    assert "http:" not in html
    assert "https:" not in html
    assert "hours, an estimate" in html
    assert "Launches, B=1, bfloat16" in html
    assert "439 aten::addmm" in html
    # A color that the page's style does not define would be black.
    assert set(re.findall(r"var\((--\w+)\)", html)) == set(re.findall(r"(--\w+): #", html))
    assert "#0" not in "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL)).replace("#0072b2", "").replace(
        "#009e73", ""
    )


def test_cells_that_span_rows_shift_the_others() -> None:
    table = Table(
        [*names("a"), *numbers("b", "c")], [[[Cell("1", rows=2), Cell("2"), Cell("3")], [Cell("4"), Cell("5")]]]
    )
    ((one, two),) = table.placed()
    assert [column.title for _, column in one] == ["a", "b", "c"]
    assert [(cell.text, column.title) for cell, column in two] == [("4", "b"), ("5", "c")]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        Table(names("a"), [[[Cell("1"), Cell("2")]]]).placed()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (duration(0.5), "0.500 µs"),
        (duration(999.0), "999 µs"),
        (duration(12_345.0), "12.3 ms"),
        (duration(7.69e6), "7.69 s"),
        (duration(None), "not measured"),
        (size(1536), "1.50 KiB"),
        (size(None), "not measured"),
        (DASH, "\u2013"),
    ],
)
def test_numbers_for_readers(shown: str, expected: str) -> None:
    assert shown == expected
