"""Pages in docs/ with the tables that studies measure: `--into`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from itertools import takewhile
from pathlib import Path


def add_into(parser: argparse.ArgumentParser) -> None:
    """Add the option; a page that cannot be written is refused before hours of measuring."""
    parser.add_argument("--into", type=page, nargs="*", default=[], help="Markdown files to fill")


def command() -> str:
    """The study as it was called, but for the pages that it fills: all that it was given."""
    words = [f"studies/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    if "--into" in words:
        at = words.index("--into")
        pages = 1 + len(list(takewhile(lambda word: not word.startswith("--"), words[at + 1 :])))
        words = words[:at] + words[at + pages :]
    return shlex.join(["python", *words])


def page(name: str) -> Path:
    """A page that can be filled.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is no file, or is not writable.
    """
    path = Path(name)
    if not path.is_file() or not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name} is no file that can be written")
    return path


def fill(path: Path, key: str, block: str) -> None:
    """Replace what stands between a file's markers for `key`, if it has them."""
    text = path.read_text(encoding="utf-8")
    start, end = f"<!-- {key} -->", f"<!-- /{key} -->"
    if start in text and end in text:
        head, tail = text.split(start)[0], text.split(end)[1]
        path.write_text(f"{head}{start}\n{block}\n{end}{tail}", encoding="utf-8")
