"""`mra exec`: another program with LLaVA-HR registered, in it and in every Python process that it starts."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

STARTUP = Path(__file__).parent / "startup"


class CommandError(ValueError):
    """There is no such command."""


def launch(command: Sequence[str]) -> NoReturn:
    """Becomes `command`: same process, so that signals reach it and its exit status is the caller's.

    A program is looked for beside the running Python first, where `pip install` put it, then on the PATH.

    Args:
        command: a program and its arguments, not empty.

    Raises:
        CommandError: no such program.
    """
    environment = prepare(os.environ)
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        raise CommandError(
            f"there is no program {command[0]!r} beside {sys.executable} or on the PATH; "
            f"install it, or give its path after `mra exec --`"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, [program, *command[1:]], environment)


def prepare(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which Python processes register the model as soon as they import transformers.

    `startup/sitecustomize.py` comes first on PYTHONPATH, which every Python reads but one with `-I`, `-E` or `-S`.
    """
    here = str(Path(sys.executable).parent)
    return {
        **environment,
        "PATH": os.pathsep.join([here, environment.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([str(STARTUP), *filter(None, [environment.get("PYTHONPATH")])]),
    }
