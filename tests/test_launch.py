"""`mra exec`: other programs find the model registered, and are otherwise as they were."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mra_model.cli import app
from mra_model.launch import STARTUP, prepare

KNOWS_THE_TOWER = "import transformers, sys; print(transformers.AutoConfig.for_model('mra_vision').model_type)"
HERE = Path(sys.executable).parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`mra exec -- COMMAND` in a process of its own."""
    return subprocess.run(
        [HERE / "mra", "exec", "--", *command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python as `mra exec` starts it."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=prepare(os.environ | environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


class TestRegistration:
    def test_in_the_program(self) -> None:
        done = run("python", "-c", KNOWS_THE_TOWER)
        assert done.stdout.split() == ["mra_vision"], done.stderr

    def test_without_it_transformers_does_not_know_the_tower(self) -> None:
        done = subprocess.run([sys.executable, "-c", KNOWS_THE_TOWER], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "mra_vision" in done.stderr

    def test_in_processes_that_the_program_starts(self) -> None:
        inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {KNOWS_THE_TOWER!r}], check=True)"
        done = python(inner)
        assert done.stdout.split() == ["mra_vision"], done.stderr

    def test_whoever_imports_mra_model_first(self) -> None:
        done = python(f"import mra_model; {KNOWS_THE_TOWER}")
        assert done.stdout.split() == ["mra_vision"], done.stderr

    def test_a_program_without_transformers_loads_neither(self) -> None:
        loaded = "import sys, json; print(sorted({'torch', 'transformers', 'mra_model'} & sys.modules.keys()))"
        assert python(loaded).stdout.strip() == "[]"


class TestProgram:
    def test_options_status_and_streams_are_its_own(self) -> None:
        code = "import sys; print(sys.argv[1:]); print('said', file=sys.stderr); sys.exit(7)"
        done = run("python", "-c", code, "--help", "-x", "--", "a b")
        assert done.returncode == 7
        assert done.stdout.strip() == "['--help', '-x', '--', 'a b']"
        assert done.stderr.strip() == "said"

    def test_the_two_dashes_can_be_left_out(self) -> None:
        command = [HERE / "mra", "exec", "python", "-c", "import sys; print(sys.argv[1])", "--json"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "--json"

    def test_signals_reach_it(self) -> None:
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
        with subprocess.Popen([HERE / "mra", "exec", "--", "python", "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert int(process.stdout.readline()) == process.pid
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            assert process.wait(60) == -signal.SIGTERM
            assert time.monotonic() - started < 60

    def test_what_is_beside_this_python_comes_first(self, tmp_path: Path) -> None:
        other = tmp_path / "python"
        other.write_text("#!/bin/sh\necho other\n")
        other.chmod(0o755)
        done = run("python", "-c", "print('ours')", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert done.stdout.strip() == "ours"

    def test_a_shadowed_sitecustomize_runs_too(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text("import os; os.environ['SHADOWED'] = __file__\n")
        code = f"import os; print(os.environ.get('SHADOWED')); {KNOWS_THE_TOWER}"
        done = python(code, PYTHONPATH=str(tmp_path))
        assert done.stdout.split() == [str(tmp_path / "sitecustomize.py"), "mra_vision"], done.stderr


class TestErrors:
    def test_no_such_program(self) -> None:
        result = CliRunner().invoke(app, ["exec", "--", "no-such-program", "serve"])
        assert result.exit_code == 1
        assert "no program 'no-such-program'" in result.stderr
        assert "install it" in result.stderr

    def test_no_command(self) -> None:
        result = CliRunner().invoke(app, ["exec"])
        assert result.exit_code == 2
        assert "COMMAND" in result.stderr


@pytest.mark.parametrize("given", [None, "", "/elsewhere"])
def test_python_path_keeps_what_was_there(given: str | None) -> None:
    environment = {} if given is None else {"PYTHONPATH": given}
    expected = [str(STARTUP), *([given] if given else [])]
    assert prepare(environment)["PYTHONPATH"].split(os.pathsep) == expected
