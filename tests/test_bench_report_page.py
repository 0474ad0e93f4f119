"""The report in a browser without a window: it asks for nothing, complains of nothing, and forbids what would."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import bench_samples as samples
import pytest

from bench.report import write

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=1280,2000",
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PLANTS = {
    "image": '<img src="http://planted.invalid/picture.png">',
    "script": '<script src="http://planted.invalid/script.js"></script>',
    "style": '<link rel="stylesheet" href="http://planted.invalid/style.css">',
}

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser, one of {', '.join(BROWSERS)}")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("report")
    samples.save(root, samples.cpu())
    return write(root, root / "page.html", None).read_text()


def visit(folder: Path, html: str) -> tuple[list[str], list[str], str]:
    """Opens a page.

    Returns:
        The browser's complaints about it, the addresses on the network that it asked for, and its text as laid out.
    """
    file, log = folder / "page.html", folder / "net.json"
    file.write_text(html)
    assert BROWSER is not None
    profile = (f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}")
    command = [BROWSER, *FLAGS, *profile, "--dump-dom", "--virtual-time-budget=5000", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return complaints, _requested(json.loads(log.read_text())), done.stdout


def _requested(log: dict[str, Any]) -> list[str]:
    """Addresses that a page asked for; those that the browser asks for on its own behalf have no page as initiator."""
    found = []
    for event in log["events"]:
        parameters = event.get("params", {})
        url = str(parameters.get("url", ""))
        if url.startswith(("http:", "https:")) and parameters.get("initiator", "not an origin") != "not an origin":
            found.append(url)
    return found


def test_no_complaint_and_no_request(tmp_path: Path, page: str) -> None:
    complaints, requested, shown = visit(tmp_path, page)
    assert complaints == []
    assert requested == []
    assert shown.count("<svg") == page.count("<svg") > 10
    assert "Losing cases" in shown


@pytest.mark.parametrize("what", PLANTS)
def test_the_page_itself_forbids_what_is_planted(tmp_path: Path, page: str, what: str) -> None:
    assert page.count(POLICY) == 1
    complaints, requested, _ = visit(tmp_path, page.replace("</header>", f"{PLANTS[what]}</header>"))
    assert any("Content Security Policy" in line for line in complaints)
    assert requested == []


@pytest.mark.parametrize("what", PLANTS)
def test_a_request_would_be_seen(tmp_path: Path, page: str, what: str) -> None:
    """The check above can fail: without the page's own policy, what is planted is asked for."""
    open_page = page.replace(POLICY, "default-src *").replace("</header>", f"{PLANTS[what]}</header>")
    _, requested, _ = visit(tmp_path, open_page)
    assert any("planted.invalid" in url for url in requested)
