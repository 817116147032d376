"""An answer's text while it is decoded: block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spiffy.runtime.decode import Task, run
from spiffy.runtime.generate import Output, TaskMaker, answer, collect, settled
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.text import Prompt
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import SpiffyError

_LAST = 64  # tokens of an unfinished answer that are turned into text again, or twice as many
_SPELLING = 8  # tokens that one character may take


def stream(model: DiffusionLM, prompt: Prompt, **options: Any) -> Stream:
    """Decode one prompt and yield its text piece by piece, whenever a block is finished.

        pieces = stream(model, prompt, graph=graph)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(pieces.output.stats.nfe)

    Together the pieces are the text that `generate` returns. They end where that does, so nothing
    of a stop string is yielded, and no half characters.

    Parameters
    ----------
    options
        As for `generate`.

    Raises
    ------
    SpiffyError
        As `generate`, before decoding begins, and if the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise SpiffyError(f"{model.name} ships no tokenizer, so its answers have no text to stream")
    maker = TaskMaker(model, **options)
    return Stream(maker.one(prompt), maker.trace)


class Stream(Iterator[str]):
    """The text of an answer, piece by piece (`stream`)."""

    def __init__(self, task: Task, trace: bool = False) -> None:
        self._task, self._trace = task, trace
        self._output: Output | None = None
        self._pieces = self._decoded()

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def output(self) -> Output:
        """The whole answer, and what it cost.

        Raises
        ------
        SpiffyError
            If there are pieces left.
        """
        if self._output is None:
            raise SpiffyError("the answer is not whole yet: its output comes with its last piece")
        return self._output

    def _decoded(self) -> Iterator[str]:
        new = NewText(self._task)
        for _ in run(self._task.model, [self._task]):
            if self._task.path and self._task.path[-1].finished:
                self._output = collect(self._task, self._trace)
            if piece := new.more():
                yield piece


class NewText:
    """What of a task's answer is new, whenever a block of it is finished.

    Until the answer is whole its last tokens alone are turned into text: to do so with all of a
    long answer for every block of it would hold up whoever shares the thread.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._block = task, 0
        self._told = 0  # characters
        self._tokens, self._spelled = 0, 0  # that are left behind, and the characters they spell

    def more(self) -> str:
        """The text that came since the last call; empty if no block was finished."""
        cursor = self._task.path[-1] if self._task.path else None
        if cursor is None:
            return ""
        if cursor.block < self._block:  # begun anew: other tokens may have come
            self._tokens = self._spelled = 0
        if cursor.block <= self._block and not cursor.finished:
            return ""
        self._block = cursor.block
        if cursor.finished:
            text, _ = answer(self._task)
            new = text[self._told :]
        else:
            new = self._unfinished(cursor)
        self._told += len(new)
        return new

    def _unfinished(self, cursor: Cursor) -> str:
        task, canvas = self._task, self._task.canvas
        stop = min(canvas.span(cursor.block).start, canvas.prompt_length + canvas.gen_length)
        ids = cursor.ids[canvas.prompt_length + self._tokens : stop].tolist()
        text = task.model.decode_text(ids)
        if any(word in text for word in task.stop):  # special tokens kept it from ending
            return answer(task)[0][self._told :]
        new = settled(text, task.stop)[self._told - self._spelled :]
        if len(ids) > 2 * _LAST:
            self._leave_behind(ids, text, self._told + len(new) - self._spelled)
        return new

    def _leave_behind(self, ids: list[int], text: str, told: int) -> None:
        """Leave behind all but some `_LAST` tokens, where these spell the end of the text.

        That is where they do not begin amid a character. `told` characters of it are told.
        """
        for first in range(len(ids) - _LAST, len(ids) - _LAST - _SPELLING, -1):
            last = self._task.model.decode_text(ids[first:])
            spelled = len(text) - len(last)
            begins = bool(last) and not last.startswith("\ufffd")
            if begins and spelled <= told and text.endswith(last):
                self._tokens, self._spelled = self._tokens + first, self._spelled + spelled
                return
