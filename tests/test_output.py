"""Standard output as people have it: full, closed, in any encoding; never exit code 1 for that."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
from rich.table import Table

from spiffy.calib.ranks import Ranks
from spiffy.cli import bench, calibrate, common, decode, graph
from spiffy.cli.decode_runs import print_json
from spiffy.cli.streams import write
from spiffy.runtime import Output
from spiffy.runtime.decode import Stats
from spiffy.schemas import SpiffyError

COMMANDS: dict[str, Any] = {
    "calibrate": calibrate,
    "decode": decode,
    "graph": graph,
    "bench": bench,
}
LOUD = "caf\u00e9 \u65e5\u672c \U0001f34e \u2028 \ufffd"


def full_disk() -> Any:
    return open("/dev/full", "w", encoding="utf-8")


def closed_pipe() -> Any:
    read, writing = os.pipe()
    os.close(read)
    return open(writing, "w", encoding="utf-8")


PLACES: dict[str, tuple[Callable[[], Any], str]] = {
    "full disk": (full_disk, "No space left on device"),
    "closed pipe": (closed_pipe, ""),
    "closed": (lambda: None, "Bad file descriptor"),
}


def ended(main: Callable[[], None]) -> int:
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_cannot_be_printed_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    place: str,
) -> None:
    opened, problem = PLACES[place]
    stream = opened()
    for arguments in (["--help"], ["--version"]):
        monkeypatch.setattr(sys, "argv", [f"spiffy-{command}", *arguments])
        monkeypatch.setattr(sys, "stdout", stream)
        assert ended(COMMANDS[command].main) == 2
        assert sys.stdout is stream
        log = capsys.readouterr().err
        assert log == (f"error: standard output: {problem}\n" if problem else "")
        stream = opened()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("printing", [write, lambda text: common.console.print(text)])
def test_answers_and_tables_that_cannot_be_printed_too(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    printing: Callable[[str], None],
) -> None:
    monkeypatch.setattr(sys, "stdout", PLACES[place][0]())
    assert ended(lambda: common.run_app(lambda: printing("text\n"))) == 2
    assert len(capsys.readouterr().err.splitlines()) == (place != "closed pipe")


def test_other_failures_of_files_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise OSError(28, "No space left on device", "a\nb")

    assert ended(lambda: common.run_app(fails)) == 2
    log = capsys.readouterr().err
    assert log.startswith("error: ")
    assert len(log.splitlines()) == 1


def test_standard_error_that_is_full_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", full_disk())
    assert ended(lambda: common.run_app(lambda: common.log.print("note"))) == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-16"])
def test_answers_print_in_any_encoding_and_json_in_utf_8(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    def printed(action: Callable[[], None]) -> bytes:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert ended(lambda: common.run_app(action)) == 0
        stream.flush()
        return raw.getvalue()

    replaced = LOUD.encode(encoding, "replace")
    assert printed(lambda: write(LOUD)) == replaced
    record = printed(lambda: print_json(0, Output(LOUD, [1], Stats())))
    assert json.loads(record.decode("utf-8"))["text"] == LOUD
    table = Table(title=LOUD)
    table.add_row("1")
    assert printed(lambda: common.console.print(table)).decode(encoding)


def test_tables_and_notes_are_whole_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    table = Table(title="A title of many words")
    cells = [f"column number {k}" for k in range(12)]
    for cell in cells:
        table.add_column(cell)
    table.add_row(*cells)
    note = "a note " * 30

    def shows() -> None:
        common.console.print(table)
        common.log.print(note)

    assert ended(lambda: common.run_app(shows)) == 0
    printed = capsys.readouterr()
    assert all(printed.out.count(cell) >= 2 for cell in cells)
    assert printed.err == note + "\n"


@pytest.mark.parametrize(
    ("ranks", "problem", "said"),
    [
        (Ranks(), "no room", "no room"),
        (Ranks(0, 0, 8), "no room", "rank 0: no room"),
        (Ranks(3, 3, 8), "no room", "rank 3: no room"),
        (Ranks(3, 3, 8), "rank 3: the ranks did not meet", "rank 3: the ranks did not meet"),
    ],
)
def test_of_many_ranks_the_one_that_fails_says_which_it_is(
    ranks: Ranks, problem: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing else, but the first."""

    def fails() -> None:
        with common.resumable(None, ranks):
            common.log.print("a note")
            raise SpiffyError(problem)

    assert ended(lambda: common.run_app(fails)) == 2
    note = "" if ranks.rank else "a note\n"
    assert capsys.readouterr().err == f"{note}error: {said}\n"
