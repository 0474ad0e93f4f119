"""The results folder: `results.json`, rewritten whole after every result, and `summary.md` for readers.

One folder holds the results of one commit on one machine. Opened again, it keeps the steps that are done, so that a run
which was cut off goes on where it stopped.
"""

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.stamp import Stamp
from bench.step import Result
from bench.summary import summary

SCHEMA = 1
DONE, FAILED, NOT_MEASURED = "done", "failed", "not measured"


class ResultsMismatch(RuntimeError):
    """The folder holds results of another commit or another machine."""


class Results:
    """The results of one commit on one machine.

    Args:
        folder: made if missing.
        stamp: the source.
        machine: from `machine.describe`.
        command: that is being run, kept with the date.

    Raises:
        ResultsMismatch: `folder` holds results of another commit, tree, device or schema.
    """

    def __init__(self, folder: Path, stamp: Stamp, machine: dict[str, Any], command: str) -> None:
        self.folder = folder
        self._path = folder / "results.json"
        folder.mkdir(parents=True, exist_ok=True)
        fresh = {"schema": SCHEMA, **asdict(stamp), "machine": machine, "runs": [], "steps": {}, "results": []}
        self.data: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else fresh
        self._check(fresh)
        self.data["dirty"] = self.data["dirty"] or stamp.dirty
        self.data["runs"].append({"date": _now(), "command": command})
        self._write()

    def is_done(self, step: str) -> bool:
        """Whether the step has finished here before."""
        return self.data["steps"].get(step, {}).get("state") == DONE

    def begin(self, step: str) -> None:
        """Forgets what an earlier run of the step left."""
        self.data["results"] = [result for result in self.data["results"] if result["step"] != step]

    def add(self, step: str, result: Result) -> dict[str, Any]:
        """Keeps a result, on disk before this returns, and returns what is kept."""
        kept = {"step": step, **asdict(result)}
        self.data["results"].append(kept)
        self._write()
        return kept

    def end(self, step: str, state: str, **facts: Any) -> None:
        """Keeps how the step ended: `DONE`, `FAILED` or `NOT_MEASURED`, and why."""
        self.data["steps"][step] = {"state": state, "date": _now(), **facts}
        self._write()

    def _check(self, fresh: dict[str, Any]) -> None:
        for name in ("schema", "commit", "tree"):
            if self.data[name] != fresh[name]:
                raise self._mismatch(name, self.data[name], fresh[name])
        theirs, ours = self.data["machine"]["device"], fresh["machine"]["device"]
        if theirs != ours:
            raise self._mismatch("device", theirs, ours)

    def _mismatch(self, name: str, theirs: object, ours: object) -> ResultsMismatch:
        return ResultsMismatch(
            f"{self._path} holds results of {name} {theirs}, but this is {name} {ours}; give another folder with --out"
        )

    def _write(self) -> None:
        _replace(self._path, _json(self.data))
        _replace(self.folder / "summary.md", summary(self.data))


def _json(data: dict[str, Any]) -> str:
    """One line for each result, so that thousands of samples stay readable and a difference stays small."""
    head = json.dumps(data | {"results": []}, indent=1, allow_nan=False)
    results = ",\n".join(json.dumps(result, allow_nan=False) for result in data["results"])
    return head.replace('"results": []', f'"results": [\n{results}\n]') + "\n" if results else head + "\n"


def _replace(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one and nothing between."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
