"""What holds for all files: short, installed, and with messages that speak to everyone."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("bench", "calib", "cli", "graphs", "integrations", "runtime", "schemas")
MOST_LINES = 500


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
    assert {name for name, count in lines.items() if count > MOST_LINES} == set()


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


def test_messages_of_the_runtime_name_options_as_python_has_them_too() -> None:
    """`schemas.errors.option` does; "--field" alone says nothing to whoever calls a function."""
    alone = []
    for path in sorted((ROOT / "runtime").rglob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        whole = [node for node in nodes if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for string in whole for part in string.values}
        whole += [n for n in nodes if isinstance(n, ast.Constant) and id(n) not in parts]
        for text in map(ast.unparse, whole):
            if re.search(r"(?<![\w-])--[a-z]", text) and "in Python" not in text:
                alone.append((path.name, text))
    assert alone == []
