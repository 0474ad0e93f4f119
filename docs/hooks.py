"""What mkdocs does beyond its plugins: tables from bench/results, equations as MathML, and nothing from the network.

A page writes `<!-- measured: OP -->` where the newest measurements of an op belong, and `<!-- measured -->` for the
summary of every machine: no number is copied by hand.
"""

import re
import sys
from functools import cache
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.report.data import Machine, Subject, is_library, machines  # noqa: E402
from bench.report.readme import summarize  # noqa: E402

RESULTS = ROOT / "bench/results"
REPORT = "report.html"

_MEASURED = re.compile(r"<!-- measured: (\w+) -->")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_FETCHED = re.compile(r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//|<link[^>]*\shref="(?:https?:)?//')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the benchmarks' own page beside the documentation."""
    files.append(File.generated(config, REPORT, abs_src_path=str(RESULTS / REPORT)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes the tables of measurements."""
    markdown = markdown.replace("<!-- measured -->", summarize(_machines(), REPORT))
    return _MEASURED.sub(lambda match: measured(match[1]), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns each equation into MathML, which browsers render without a script."""

    def mathml(match: re.Match[str]) -> str:
        return convert(unescape(match[3]).strip(), display="block" if match[2] == "[" else "inline")

    return _MATH.sub(mathml, html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuses a page that would fetch anything from another host.

    Raises:
        PluginError: names the page and the element.
    """
    found = _FETCHED.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} fetches from another host: {found[0]}")
    return output


def measured(op: str) -> str:
    """The newest measurements of an op, a tab for each machine.

    Raises:
        PluginError: no such op was measured anywhere.
    """
    tabs = [tab for machine in _machines() if (tab := _tab(machine, op))]
    if not tabs:
        raise PluginError(f"no results of {op!r} under {RESULTS}: write that it was not measured")
    return "\n".join(tabs)


@cache
def _machines() -> list[Machine]:
    return machines(RESULTS)


def _tab(machine: Machine, op: str) -> str:
    subjects = [subject for subject in machine.subjects("kernels") if subject.labels.get("op") == op]
    if not subjects:
        return ""
    ours = [name for name in ("native", "triton") if any(subject.result(name) for subject in subjects)]
    header = ["case", "", "eager", *ours, "fastest library route"]
    dtypes = " and ".join(sorted({str(subject.labels["dtype"]) for subject in subjects}))
    rows = [header, ["---", "---", *["---:"] * (len(header) - 3), "---"]]
    rows += [_row(subject, ours, " and " in dtypes) for subject in subjects]
    lines = [
        f'=== "{machine.name}"',
        "",
        *(f"    | {' | '.join(row)} |" for row in rows),
        "",
        f"    Microseconds in {dtypes}, median, warm; in brackets, how many times faster than eager. "
        f"Commit `{machine.commit}`, {machine.date}.",
        "",
    ]
    return "\n".join(lines)


def _row(subject: Subject, ours: list[str], with_dtype: bool) -> list[str]:
    labels = subject.labels
    what = f"{labels['shape']}, {labels.get('place') or labels.get('model')}"
    how = f"{labels['direction']}, {labels['dtype']}" if with_dtype else str(labels["direction"])
    library = subject.fastest("warm", is_library)
    found = f"{_time(subject, library)}, {library.partition(':')[2].strip()}" if library else ""
    return [what, how, *(_time(subject, name) for name in ("eager", *ours)), found]


def _time(subject: Subject, variant: str) -> str:
    time = subject.time(variant, "warm")
    if time is None:
        return "not measured"
    value = f"{time.median:,.0f}" if time.median >= 100 else f"{time.median:.1f}"
    gain = None if variant == "eager" else subject.gain(variant, "eager", "warm")
    return f"{value} ({gain.value:.2f}×)" if gain else value  # noqa: RUF001 (a sign of multiplication)
