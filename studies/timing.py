"""How long calls of a function take, while it is in use."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

_TIMED: list[str] = []  # under way


@contextmanager
def timed(
    owner: Any, name: str, clock: Callable[[], float] = perf_counter
) -> Iterator[list[float]]:
    """Collect the milliseconds of each call of a function or method, of a generator to its end.

    What another one that is timed calls counts there.
    """
    function, spent = getattr(owner, name), []

    def timing(*args: Any) -> Any:
        outermost = not _TIMED
        _TIMED.append(name)
        started = clock()
        try:
            result = function(*args)
            if isinstance(result, Generator):
                result = iter(list(result))
        finally:
            _TIMED.pop()
        if outermost:
            spent.append(1000 * (clock() - started))
        return result

    setattr(owner, name, timing)
    try:
        yield spent
    finally:
        setattr(owner, name, function)
