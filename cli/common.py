"""What the commands share: where they print, progress, notes, errors in one line."""

from __future__ import annotations

import inspect
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Timer, current_thread, main_thread
from typing import TYPE_CHECKING, Any, Protocol

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from spiffy.calib.signals import expect_stops, is_repeated
from spiffy.cli.streams import OutputError, guarded_streams
from spiffy.cli.threads import wait_passively
from spiffy.schemas import DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.errors import is_out_of_memory, said
from spiffy.schemas.labels import ties_in_words

if TYPE_CHECKING:
    from torch import Tensor

    from spiffy.calib.prompt_files import Text
    from spiffy.calib.prompts import PromptSet
    from spiffy.calib.ranks import Ranks
    from spiffy.runtime.models import DiffusionLM

#: Results go to standard output, everything else to standard error.
console = Console(markup=False, emoji=False)
log = Console(stderr=True, highlight=False, markup=False, emoji=False)

# Loggers that complain where torchao is installed, about kernels for other machines: transformers
# imports it for all models.
_TALKATIVE = ("torchao", "torch.utils._pytree")

INTERRUPTED = 130  # exit code

_LONG_SECONDS = 5.0  # without a word, where no terminal shows a spinner
_SILENT_SECONDS = 60.0  # between two lines about progress, where no bar is drawn
_WIDE = 1000  # columns: nothing is cut or broken where no terminal has a width


class _Progress(Progress):
    """A bar; into a file, where none is drawn, a line now and then."""

    _said = 0.0  # seconds, of all lines

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        task = self._tasks[task_id]
        elapsed = task.elapsed or 0.0
        if self.console.is_interactive or elapsed - self._said < _SILENT_SECONDS:
            return
        self._said = elapsed
        done, total, left = task.completed, task.total or 0.0, ""
        if 0 < done < total:
            left = f", {timedelta(seconds=int(elapsed / done * (total - done)))} left"
        spent = timedelta(seconds=int(elapsed))
        self.console.print(f"{task.description} {done:.0f}/{total:.0f} after {spent}{left}")


def progress_bar() -> Progress:
    """Show done, total, elapsed and remaining time, on standard error."""
    return _Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=log,
    )


def note_if_inexact(settings: DecodingSettings) -> None:
    """Say so wherever the one cache shows up that is not exact."""
    if not settings.exact:
        log.print(
            "cache prefix-shared is near-lossless: drafts see the root's suffix, not their own"
        )


def note_of_ties(lm: DiffusionLM) -> None:
    """Say what may be behind an answer that is not plain decoding's, and how to tell."""
    dtype = str(lm.dtype).removeprefix("torch.")
    cause, finer = ties_in_words(dtype)
    log.print(
        f"tokens differ, in {dtype}: {cause}. Repeat with --dtype {finer}; if they still differ, "
        "please report it (docs/losslessness.md)",
        soft_wrap=True,
    )


def note_fewer(drawn: PromptSet, samples: int | None) -> None:
    """Say that a data set holds fewer prompts than were asked for."""
    if samples is not None and len(drawn.texts) < samples:
        log.print(
            f"{drawn.dataset} holds {len(drawn.texts)} prompts, fewer than --samples {samples}: "
            "all are taken",
            soft_wrap=True,
        )


def note_left_out(index: int, problem: str) -> None:
    """Say that a prompt has no answer, and why."""
    log.print(f"prompt {index} left out: {problem}", soft_wrap=True)


def note_skipped(lines: int, dataset: str) -> None:
    """Say how many lines of a file were left out."""
    if lines:
        log.print(f"{lines} broken lines of {dataset} left out", soft_wrap=True)


def decodable(
    lm: DiffusionLM,
    settings: DecodingSettings,
    texts: Sequence[Text],
    *,
    raw: bool,
    system: str | None,
) -> list[tuple[int, Tensor]]:
    """Ids of prompts that can be decoded, numbered from 0; the others are named and left out."""
    from spiffy.runtime.decode import make_task

    prompts = []
    for index, text in enumerate(texts):
        try:
            ids = lm.encode(text, raw=raw, system=system)
            make_task(lm, ids, settings)
        except SpiffyError as problem:
            if len(texts) == 1:
                raise
            note_left_out(index, str(problem))
        else:
            prompts.append((index, ids))
    if not prompts:
        raise SpiffyError(f"none of the {len(texts)} prompts can be decoded")
    return prompts


def warn_of_differences(artifact: DraftGraph, settings: DecodingSettings) -> None:
    """Say what of the artifact does not hold here: settings, an acceptance model it cannot read."""
    from spiffy.runtime.draft.acceptance import acceptance_of

    if artifact.acceptance is not None and acceptance_of(artifact) is None:
        log.print(
            "the graph's acceptance model was fitted by another version, with features that this "
            "one does not have: its nodes are the drafts; calibrate again",
            soft_wrap=True,
        )
    if different := artifact.differences(settings):
        log.print(
            f"other settings than the graph's: {', '.join(different)}; its expected steps do not "
            "hold, and drafts are accepted less often: calibrate with these",
            soft_wrap=True,
        )


class Doing(Protocol):
    """Says what goes on."""

    def update(self, status: str, /) -> None:
        """Something else goes on from now on."""
        ...


class _Lines:
    """`Doing` where no terminal shows a spinner: a line about what takes long."""

    def __init__(self) -> None:
        self._timer: Timer | None = None

    def update(self, status: str, /) -> None:
        self.stop()
        self._timer = Timer(_LONG_SECONDS, log.print, (f"{status} ...",))
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


@contextmanager
def doing(what: str) -> Iterator[Doing]:
    """Say what goes on: by a spinner, or where no terminal shows one by a line if it takes long."""
    if log.is_terminal:
        with log.status(what) as status:
            yield status
        return
    lines = _Lines()
    lines.update(what)
    try:
        yield lines
    finally:
        lines.stop()


def compile_search(status: Doing) -> None:
    """Compile what searches for drafts while `status` says so, not amid the first prompt."""
    from spiffy.runtime.draft import fastest_search

    status.update("compiling the search for drafts: half a minute or more, the first time")
    fastest_search()


def ready_to_draft(artifact: DraftGraph, status: Doing) -> None:
    """`compile_search` for an artifact that needs it."""
    if artifact.acceptance is not None:
        compile_search(status)


@contextmanager
def resumable(folder: Path | None, ranks: Ranks) -> Iterator[None]:
    """Let only rank 0 talk, name the rank of an error, and say how to go on after Ctrl-C.

    `folder` is where the same command goes on from, if it can.
    """
    log.quiet = console.quiet = ranks.rank > 0
    try:
        yield
    except KeyboardInterrupt:
        if folder is None:
            raise
        log.print(f"interrupted: the same command goes on from {folder}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except SpiffyError as error:
        named = ranks.world == 1 or str(error).startswith("rank ")
        raise error if named else SpiffyError(f"rank {ranks.rank}: {error}") from None
    finally:
        log.quiet = console.quiet = False


def hush() -> None:
    """Keep libraries from talking about kernels of other machines."""
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)


def run_app(app: Callable[[], None]) -> None:
    """Run a typer app; bad input and failed output end in one line and exit code 2."""
    wait_passively()
    hush()
    if isinstance(app, typer.Typer):
        for command in app.registered_commands:
            command.help = paragraphs(inspect.getdoc(command.callback) or "")
    try:
        with guarded_streams(), _sigterm_as_ctrl_c():
            for out in (console, log):
                if not out.file.isatty():
                    out.width = _WIDE
            _run(app)
    except OutputError as error:
        if not error.is_closed_pipe:
            _complain(str(error))
        sys.exit(2)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """What a scheduler sends at its time limit keeps as much as Ctrl-C does, also if sent twice."""

    def stop(number: int, _: object) -> None:
        if not is_repeated(number):
            raise KeyboardInterrupt

    expect_stops()
    ours = current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def paragraphs(text: str) -> str:
    """A docstring with a line for each paragraph: its own breaks are not those of a terminal."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _run(app: Callable[[], None]) -> None:
    try:
        app()
    except OutputError:
        raise
    except KeyboardInterrupt:  # typer's own, but for a command that is none of its
        sys.exit(INTERRUPTED)
    except SpiffyError as error:
        _complain(str(error))
        sys.exit(2)
    except OSError as error:  # a disk that is full, a folder that is gone
        _complain(str(SpiffyError(str(error))))
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _complain(  # not fewer drafts: those are halved until they fit
            f"out of memory: {said(error, 200) or type(error).__name__}; take shorter prompts, a "
            "smaller --gen-length, fewer prompts at a time (a smaller --batch-size or --max-batch, "
            "where there is one), --dtype bfloat16, or another device"
        )
        sys.exit(2)


def _complain(problem: str) -> None:
    with suppress(OSError):
        log.print(f"error: {problem}", soft_wrap=True)
