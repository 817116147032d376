"""What made an artifact: versions, the tool's own commit, the command line."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from spiffy.schemas import Provenance
from spiffy.schemas.errors import printable

_PACKAGES = ("spiffy-dllm", "torch", "transformers")
_PLACES = ("--out", "--report", "--workdir")
_LONGEST = 1000  # characters of one argument


def provenance(command: Sequence[str] = ()) -> Provenance:
    """What is running now; `command` is the program and its arguments."""
    versions = {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    return Provenance(versions=versions, git=_commit(), command=tuple(portable(command)))


def portable(command: Sequence[str]) -> list[str]:
    """A command line as far as it decides the artifact.

    Where it is written does not, and where files lie on this machine is nobody else's business.
    """
    kept: list[str] = []
    arguments = iter(command)
    for argument in arguments:
        option, given, value = argument.partition("=")
        if option in _PLACES:
            if not given:
                next(arguments, None)
            continue
        if given and option.startswith("--"):
            argument = f"{option}={_name(value)}"
        else:
            argument = _name(argument)
        kept.append(printable(argument)[:_LONGEST])
    return kept[:256]


def _name(argument: str) -> str:
    """The name of what a path leads to; any other argument as it is."""
    path = Path(argument)
    try:
        return path.resolve().name if path.exists() else argument
    except (OSError, ValueError):  # longer than a path may be, or with a NUL
        return argument


def _commit() -> str | None:
    """Commit of the source tree that this file belongs to, if any."""
    here = Path(__file__).resolve()
    try:
        # An installed package may lie inside another project's tree, which does not track it.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        commit = _git(here.parent, "rev-parse", "HEAD")
        changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()
