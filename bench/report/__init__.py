"""The report: one HTML page of all results that needs nothing else, and the summary in the README."""

import os
from pathlib import Path

from bench.report import readme as summaries
from bench.report.data import machines
from bench.report.page import render


def write(results_root: Path, out: Path, readme: Path | None) -> Path:
    """Writes the page, and the summary in the README, from the newest results of each machine.

    Args:
        results_root: holds <machine>/<date>-<commit>/results.json.
        out: the page's file; its folder is made if missing.
        readme: whose part between the markers of `readme.py` is replaced; None for none.

    Returns:
        The page's path.

    Raises:
        ResultsMismatch: a results file of another schema, or one that does not follow it.
        NoMarkers: the README has no place for the summary; nothing was written.
    """
    found = machines(results_root)
    page = render(found)
    if readme is not None:
        link = Path(os.path.relpath(out.resolve(), readme.resolve().parent)).as_posix()
        text = summaries.replace(readme.read_text(), summaries.summarize(found, link))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    if readme is not None:
        readme.write_text(text)
    return out
