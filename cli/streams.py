"""Standard output as a place that can fail: full disks, closed pipes, characters that it lacks.

Exit code 1 says that a token differs; libraries that print would end a command with it when they
cannot.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spiffy.schemas import SpiffyError

_FAIL = ("strict", "surrogateescape")  # how encodings treat what they lack, unless told otherwise


class OutputError(SpiffyError):
    """Standard output took no more."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror or error}")
        #: Whoever read it has enough, as `head` does: nothing went wrong.
        self.is_closed_pipe = error.errno == errno.EPIPE


class _Guarded:
    """A stream whose failures are ours to report, or, of standard error, to nobody."""

    def __init__(self, stream: Any, *, fatal: bool) -> None:
        self._stream, self._fatal = stream, fatal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def buffer(self) -> _Guarded:
        return _Guarded(self._stream.buffer, fatal=self._fatal)

    def write(self, content: Any) -> int:
        with self._reported():
            self._stream.write(content)
        return len(content)

    def flush(self) -> None:
        with self._reported():
            self._stream.flush()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._fatal:
                raise OutputError(error) from None


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Let failures of standard output raise `OutputError`, and those of standard error pass.

    Characters that the encoding of standard output lacks are replaced.

    Raises
    ------
    OutputError
        Also for what is still in a buffer at the end.
    """
    streams = sys.stdout, sys.stderr
    if isinstance(streams[0], io.TextIOWrapper) and streams[0].errors in _FAIL:
        streams[0].reconfigure(errors="replace")
    sys.stdout = _Guarded(_or_closed(streams[0]), fatal=True)
    sys.stderr = _Guarded(_or_closed(streams[1]), fatal=False)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except OutputError:
        _discard(streams[0])
        raise
    finally:
        sys.stdout, sys.stderr = streams


class _Closed:
    """In place of a stream that was closed before the command started."""

    encoding = "utf-8"
    errors = "strict"
    closed = False

    def __init__(self) -> None:
        self.buffer = self

    def isatty(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def write(self, content: Any) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _or_closed(stream: Any) -> Any:
    return _Closed() if stream is None else stream


def _discard(stream: Any) -> None:
    """Drop what a stream still holds: the interpreter would try again and complain."""
    try:
        place = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, place)
        os.close(nowhere)
    except (AttributeError, OSError, ValueError):  # no file, or closed
        return


def write(text: str) -> None:
    """Print text as it is, at once: rich would expand tabs and emoji codes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_utf8(text: str) -> None:
    """Print what programs read, JSON for one: in UTF-8, whatever the terminal has."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
