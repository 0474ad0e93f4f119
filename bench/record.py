"""The results folder: `results.json`, which follows bench/schema.json, and `summary.md` for readers.

One folder holds the results of one commit on one machine. Opened again, it keeps the steps that are done, so that a run
which was cut off goes on where it stopped. While a step runs, its results are lines of `unfinished.jsonl`, on disk one
by one; when it ends they go into `results.json`, which is rewritten whole.
"""

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from bench.stamp import Stamp
from bench.step import Result
from bench.summary import summary

SCHEMA = 2
DONE, FAILED, NOT_MEASURED, INTERRUPTED = "done", "failed", "not measured", "interrupted"

_SCHEMA_FILE = Path(__file__).with_name("schema.json")
_UNFINISHED = "unfinished.jsonl"


class ResultsMismatch(RuntimeError):
    """Results that cannot be used: of another commit, machine or schema, or damaged; the message says what to do."""


def load(path: Path) -> dict[str, Any]:
    """What a results.json holds, with the results of a step that was cut off.

    Raises:
        ResultsMismatch: it is damaged, of another schema version, or does not follow the schema.
    """
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ResultsMismatch(
            f"{path} is damaged: {error}; delete the file and measure again, or restore it from the repository"
        ) from error
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA:
        raise ResultsMismatch(
            f"{path} follows schema {version}, but this code reads schema {SCHEMA}; read it at the commit that wrote "
            f"it, or delete the file and measure again"
        )
    _validate(data, _validator(), path)
    for result in _unfinished(path.parent):
        _validate(result, _result_validator(), path.with_name(_UNFINISHED))
        # Cut off between the two files, both have it.
        if result not in data["results"]:
            data["results"].append(result)
    return data


class Results:
    """The results of one commit on one machine.

    Args:
        folder: made if missing.
        stamp: the source.
        machine: from `machine.describe`.
        command: that is being run, kept with the date.

    Raises:
        ResultsMismatch: `folder` holds results of another commit, tree or machine, or that `load` refuses.
    """

    def __init__(self, folder: Path, stamp: Stamp, machine: dict[str, Any], command: str) -> None:
        self.folder = folder
        self._path = folder / "results.json"
        self._journal = folder / _UNFINISHED
        folder.mkdir(parents=True, exist_ok=True)
        fresh = {"schema": SCHEMA, **asdict(stamp), "machine": machine, "runs": [], "steps": {}, "results": []}
        self.data: dict[str, Any] = load(self._path) if self._path.exists() else fresh
        self._check(fresh)
        self.data["runs"].append({"date": _now(), "command": command})
        self._write()

    def is_done(self, step: str) -> bool:
        """Whether the step has finished here before."""
        return self.data["steps"].get(step, {}).get("state") == DONE

    def begin(self, step: str) -> None:
        """Forgets what an earlier run of the step left; until it ends, it counts as interrupted."""
        self.data["results"] = [result for result in self.data["results"] if result["step"] != step]
        self.data["steps"][step] = {"state": INTERRUPTED, "date": _now()}
        self._write()

    def add(self, step: str, result: Result) -> dict[str, Any]:
        """Keeps a result, on disk before this returns, and returns what is kept.

        Raises:
            ValueError, TypeError: it cannot be written as JSON.
            ResultsMismatch: it does not follow the schema.
        """
        line = json.dumps({"step": step, **asdict(result)}, allow_nan=False, separators=(",", ":"))
        kept: dict[str, Any] = json.loads(line)
        _validate(kept, _result_validator(), f"a result of {step}")
        self.data["results"].append(kept)
        with self._journal.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        return kept

    def end(self, step: str, state: str, **facts: Any) -> None:
        """Keeps how the step ended: `DONE`, `FAILED` or `NOT_MEASURED`, and why."""
        self.data["steps"][step] = {"state": state, "date": _now(), **facts}
        # Every result was validated when it came.
        _validate(self.data | {"results": []}, _validator(), self._path)
        self._write()

    def _check(self, fresh: dict[str, Any]) -> None:
        mine, theirs = _identity(fresh), _identity(self.data)
        for name in mine:
            if theirs[name] != mine[name]:
                raise ResultsMismatch(
                    f"{self._path} holds results of {name} {theirs[name]}, but this is {name} {mine[name]}; "
                    f"give another folder with --out"
                )

    def _write(self) -> None:
        _replace(self._path, _json(self.data))
        _replace(self.folder / "summary.md", summary(self.data))
        self._journal.unlink(missing_ok=True)


def _identity(data: dict[str, Any]) -> dict[str, Any]:
    """What must not change inside one folder."""
    machine = data["machine"]
    return {
        "commit": data["commit"],
        "tree": data["tree"],
        "device": machine["device"],
        "cores": machine["cpu"]["cores"],
        "threads": machine["cpu"]["threads"],
        "versions": machine["versions"],
    }


def _unfinished(folder: Path) -> list[dict[str, Any]]:
    """The results of the step that runs, or was cut off; the last line may be cut off too."""
    journal = folder / _UNFINISHED
    lines = journal.read_text().splitlines() if journal.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ResultsMismatch(f"{journal} is damaged in line {number}: {error}; delete the file") from error
    return found


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(_SCHEMA_FILE.read_text()))


@cache
def _result_validator() -> Draft202012Validator:
    definitions = _validator().schema["$defs"]
    return Draft202012Validator({"$defs": definitions, "$ref": "#/$defs/result"})


def _validate(data: dict[str, Any], validator: Draft202012Validator, what: Path | str) -> None:
    error = best_match(validator.iter_errors(data))
    if error is not None:
        raise ResultsMismatch(
            f"{what} does not follow {_SCHEMA_FILE.name}: at {error.json_path}, {error.message[:300]}; "
            f"correct what wrote it, or delete it and measure again"
        )


def _json(data: dict[str, Any]) -> str:
    """One line for each result, so that thousands of samples stay readable and a difference stays small."""
    head = json.dumps(data | {"results": []}, indent=1, allow_nan=False)
    results = ",\n".join(json.dumps(result, allow_nan=False, separators=(",", ":")) for result in data["results"])
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
