"""Pages in docs/ with the tables that studies measure: `--into`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def add_into(parser: argparse.ArgumentParser) -> None:
    """Add the option; a page that cannot be written is refused before hours of measuring."""
    parser.add_argument("--into", type=page, nargs="*", default=[], help="Markdown files to fill")


def at_least(least: int) -> Callable[[str], int]:
    """A type of option: a whole number that is not below another.

    Without it a study ends in the middle of what it has measured: there is no median of nothing.
    """

    def number(text: str) -> int:
        found = int(text)
        if found < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return found

    return number


def expect(parser: argparse.ArgumentParser, pages: Sequence[Path], *keys: str) -> None:
    """Refuse pages without a place for a table, and tables without a page, before measuring.

    Raises
    ------
    SystemExit
        If a page has the markers of none of the keys, or none of the pages has those of a key.
    """
    for path in pages:
        if not any(_holds(path, key) for key in keys):
            parser.error(f"--into {path}: it has no markers for {' or '.join(keys)}")
    for key in keys if pages else ():
        if not any(_holds(path, key) for path in pages):
            parser.error(f"--into: no page has the markers <!-- {key} --> and <!-- /{key} -->")


def command() -> str:
    """The study as it was called, but for the pages that it fills: all that it was given."""
    words = [f"studies/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    if "--into" in words:
        at = words.index("--into")
        pages = 1 + len(list(takewhile(lambda word: not word.startswith("--"), words[at + 1 :])))
        words = words[:at] + words[at + pages :]
    return shlex.join(["python", *words[:1], *map(_named, words[1:])])


def _named(word: str) -> str:
    """A word, but what is on this disk by its name: where that lies is no matter of a page."""
    if os.sep not in word or not Path(word).exists():
        return word
    path = Path(word).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else Path(word).name


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


def fill(pages: Sequence[Path], key: str, block: str) -> None:
    """Replace what stands between the markers for `key`, in all pages that have them.

    Raises
    ------
    SystemExit
        If there are pages, and none has them.
    """
    holding = [path for path in pages if _holds(path, key)]
    if pages and not holding:
        raise SystemExit(f"no page has the markers <!-- {key} --> and <!-- /{key} -->")
    for path in holding:
        text = path.read_text(encoding="utf-8")
        start, end = f"<!-- {key} -->", f"<!-- /{key} -->"
        head, tail = text.split(start)[0], text.split(end)[1]
        path.write_text(f"{head}{start}\n{block}\n{end}{tail}", encoding="utf-8")


def _holds(path: Path, key: str) -> bool:
    text = path.read_text(encoding="utf-8")
    return f"<!-- {key} -->" in text and f"<!-- /{key} -->" in text
