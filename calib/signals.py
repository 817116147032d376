"""Stopping when told to: by Ctrl-C, or by SIGTERM, which schedulers send at their time limit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        tell("finishing the prompts in hand; Ctrl-C again stops at once")

    with on_stop(ask):
        yield lambda: asked
