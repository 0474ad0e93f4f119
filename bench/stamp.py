"""Which source was measured: the commit, its tree, and whether the files differ from it.

A machine with a GPU may hold a copy of the files without their repository. Then the stamp comes from the command line:
`python -m bench stamp`, run where the repository is, prints the options to pass.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# Results are written beside the sources and change nothing about what was measured.
_SOURCES = (".", ":!bench/results")


class NoStamp(RuntimeError):
    """Nobody can say which source this is."""


@dataclass(frozen=True)
class Stamp:
    """commit and tree: full hashes; dirty: whether the files differ from the commit."""

    commit: str
    tree: str
    dirty: bool

    def options(self) -> str:
        """The same on a command line."""
        return f"--commit {self.commit} --tree {self.tree}" + (" --dirty" if self.dirty else "")


def from_git(root: Path = ROOT) -> Stamp:
    """The stamp of the repository at `root`.

    Raises:
        NoStamp: there is no git or no repository.
    """
    return Stamp(
        commit=_git(root, "rev-parse", "HEAD"),
        tree=_git(root, "rev-parse", "HEAD^{tree}"),
        dirty=bool(_git(root, "status", "--porcelain", "--", *_SOURCES)),
    )


def from_options(commit: str, tree: str, dirty: bool) -> Stamp:
    """The stamp that `options` printed.

    Raises:
        NoStamp: a hash is not a full one.
    """
    for name, value in (("commit", commit), ("tree", tree)):
        if not re.fullmatch("[0-9a-f]{40}", value):
            raise NoStamp(f"--{name} {value} is no full hash of 40 digits; `python -m bench stamp` prints both")
    return Stamp(commit, tree, dirty)


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NoStamp(_remedy("git is not installed")) from error
    if done.returncode != 0:
        raise NoStamp(_remedy(f"git says: {done.stderr.strip()}"))
    return done.stdout.strip()


def _remedy(why: str) -> str:
    return (
        f"which commit is measured is unknown ({why}). Where the repository is, run `python -m bench stamp`, "
        f"and pass what it prints: --commit HASH --tree HASH"
    )
