"""Stopping when told to: by Ctrl-C, or by SIGTERM, which schedulers send at their time limit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic
from typing import Any

_ONE_STOP_SECONDS = 1.0  # SIGTERM that comes twice within them was sent once
_last = -inf  # when a request to stop came


def expect_stops() -> None:
    """Take the next signal for a request of its own."""
    global _last
    _last = -inf


def is_repeated(number: int) -> bool:
    """Whether a signal that came says what one before it has said; else it is a request to stop.

    Who sends SIGTERM at a time limit sends it to a process and then to its whole group, and a
    parent may pass it on.
    """
    global _last
    now = monotonic()
    if number == signal.SIGTERM and now - _last < _ONE_STOP_SECONDS:
        return True
    _last = now
    return False


@contextmanager
def on_stop(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Call `handler` with the signal and the frame, instead of stopping."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own or signal.SIG_DFL)  # None: not Python's


@contextmanager
def until_interrupted(tell: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Turn the first of them into a request to stop; a second one stops at once."""
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if is_repeated(number):
            return
        if asked:
            raise KeyboardInterrupt
        asked = True
        tell("finishing the prompts in hand; Ctrl-C again stops at once")

    expect_stops()
    with on_stop(ask):
        yield lambda: asked
