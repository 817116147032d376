"""The code stays in files that can be read in one sitting, and all of it is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("bench", "calib", "cli", "graphs", "integrations", "runtime", "schemas")
MOST_LINES = 500
#: Files that are longer. The docstring of each says why.
LONGER = {"runtime/models/base.py"}


def test_no_file_of_code_is_too_long_to_read() -> None:
    found = [
        path
        for folder in (*PACKAGES, "studies", "training", "docs", ".ci")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(found) > 150
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in found
    }
    assert {name for name, count in lines.items() if count > MOST_LINES} == LONGER


def test_every_package_is_installed() -> None:
    """A folder that pyproject.toml does not name is there in a checkout, but in no wheel."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(setuptools["package-dir"].values()) == folders
    assert setuptools["package-dir"] == {
        name: name.removeprefix("spiffy.").replace(".", "/") for name in setuptools["packages"]
    }
