"""Pages in docs/ with the tables that studies measure: `--into`, and what their heads say."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")


class Listed(list[T]):
    """Values of one option, which stand on the command line with commas between them."""

    def __str__(self) -> str:
        return ",".join(map(str, self))


def add_into(parser: argparse.ArgumentParser) -> None:
    """Add the option; a page that cannot be written is refused before hours of measuring."""
    parser.add_argument("--into", type=page, nargs="*", default=[], help="Markdown files to fill")


def start(main: Callable[[], int | None]) -> None:
    """Run a study, and leave with its exit code; what cannot be done is said in one line."""
    from spiffy.schemas import SpiffyError

    # What was started, such as servers, ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except SpiffyError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


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


def words(*choices: str) -> Callable[[str], Listed[str]]:
    """A type of option: words with commas between them; some of the choices, if there are any."""

    def listed(text: str) -> Listed[str]:
        found = Listed(word.strip() for word in text.split(","))
        for word in found:
            if choices and word not in choices:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(choices)}")
        return found

    return listed


def numbers(least: int = 1, most: int | None = None) -> Callable[[str], Listed[int]]:
    """A type of option: whole numbers with commas between them, within limits."""

    def listed(text: str) -> Listed[int]:
        found = Listed(map(at_least(least), text.split(",")))
        if most is not None and max(found) > most:
            raise argparse.ArgumentTypeError(f"{max(found)} is above {most}")
        return found

    return listed


def whole(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse pages where an option asks for a part of the table: the rest of it would be lost.

    Raises
    ------
    SystemExit
        If there are pages, and one of these options is not what it is by default.
    """
    for name in names if args.into else ():
        given, usual = getattr(args, name), parser.get_default(name)
        if isinstance(given, list) and isinstance(usual, list):
            given, usual = sorted(given), sorted(usual)
        if str(given) != str(usual):
            option = name.replace("_", "-")
            parser.error(f"--{option}: the page holds the whole table, leave out this or --into")


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


def command(args: argparse.Namespace) -> str:
    """The study with all its options, defaults too, but for the pages that it fills."""
    said = [f"studies/{Path(sys.argv[0]).name}"]
    for name, value in vars(args).items():
        if name == "into" or value is None or value is False or value == "":
            continue
        said.append(f"--{name.replace('_', '-')}")
        if value is not True:
            several = isinstance(value, list) and not isinstance(value, Listed)
            said += map(_named, map(_written, value if several else [value]))
    return shlex.join(["python", *said])


def machine(threads: int | None = None) -> str:
    """What times depend on besides the command; threads: torch's, if not given."""
    import torch  # not before a study has said how its threads wait

    from spiffy.runtime.budget.cost import device_name

    count = torch.get_num_threads() if threads is None else threads
    return (
        f"{device_name(torch.device('cpu'))}, {count} thread{'s' * (count != 1)}, torch "
        f"{torch.__version__}, Python {platform.python_version()}"
    )


def load_average() -> str:
    """How many processes wanted to run during the last minute, as far as the system tells."""
    try:
        return f"{os.getloadavg()[0]:.1f}"
    except (AttributeError, OSError):
        return "unknown"


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


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
        start, end = f"<!-- {key} -->", f"<!-- /{key} -->"
        head, _, old = path.read_text(encoding="utf-8").partition(start)
        path.write_text(f"{head}{start}\n{block}\n{end}{old.partition(end)[2]}", encoding="utf-8")


def _holds(path: Path, key: str) -> bool:
    """Whether a page has a place for a table.

    Raises
    ------
    SystemExit
        If it has another marker of the key, or the end before the start: text would be lost.
    """
    text = path.read_text(encoding="utf-8")
    start, end = f"<!-- {key} -->", f"<!-- /{key} -->"
    if start not in text or end not in text:
        return False
    if text.count(start) > 1 or text.count(end) > 1 or text.index(end) < text.index(start):
        raise SystemExit(f"{path}: {start} and {end} have to be there once, in this order")
    return True
