"""Stopping when told to: by Ctrl-C, or by SIGTERM, which schedulers send at their time limit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

ONE_STOP_SECONDS = 1.0  # SIGTERM that comes twice within them was sent once


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
    """Turn the first of them into a request to stop; a second one stops at once.

    Who sends SIGTERM at a time limit sends it to a process and then to its whole group, and a
    parent may pass it on: one right after another is the same request.
    """
    asked: float | None = None

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked is not None:
            if number == signal.SIGTERM and monotonic() - asked < ONE_STOP_SECONDS:
                return
            raise KeyboardInterrupt
        asked = monotonic()
        tell("finishing the prompts in hand; Ctrl-C again stops at once")

    with on_stop(ask):
        yield lambda: asked is not None
