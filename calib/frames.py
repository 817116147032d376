"""Append-only files of records that check themselves.

A record is a magic word, the length of its payload (8 bytes, little endian), the SHA-256 of length
and payload, and the payload. Whatever a crash leaves behind is no record: the end of a file that
was being written is cut off when it is opened again, and a record damaged elsewhere is passed over.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Generic, TypeVar

from safetensors import SafetensorError

from spiffy.schemas import SpiffyError

About = TypeVar("About")

_MAGIC = b"\x93SPTRACE"
_HEADER = len(_MAGIC) + 8 + 32
_SEARCHED = 1 << 20  # bytes at once, where a record is damaged


@dataclass(frozen=True)
class Place(Generic[About]):
    """Where a record's payload lies, and what it is about."""

    path: Path
    offset: int
    length: int
    about: About


@dataclass(frozen=True)
class Scan(Generic[About]):
    """The good records of a file, the byte after the last, and how many stretches are damaged."""

    places: tuple[Place[About], ...]
    end: int
    damaged: int


def _frame(payload: bytes) -> bytes:
    length = len(payload).to_bytes(8, "little")
    return _MAGIC + length + hashlib.sha256(length + payload).digest() + payload


def scan_records(path: Path, about: Callable[[bytes], About]) -> Scan[About]:
    """Find and check all records of a file; `about` tells from a payload what it is about.

    Raises
    ------
    SpiffyError
        If it cannot be read, or holds whole records that say nothing of what they are about.
    """
    places: list[Place[About]] = []
    end = position = damaged = 0
    try:
        # Read, not mapped: its owner may cut off its end meanwhile.
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while (at := _next_magic(file, position)) >= 0:
                file.seek(at + len(_MAGIC))
                header = file.read(_HEADER - len(_MAGIC))
                length = int.from_bytes(header[:8], "little")
                payload = file.read(min(length, max(0, size - at - _HEADER)))
                whole = len(header) == _HEADER - len(_MAGIC) and len(payload) == length
                if not whole or hashlib.sha256(header[:8] + payload).digest() != header[8:]:
                    position = at + 1
                    continue
                damaged += at > end
                with readable(path, at + _HEADER):
                    places.append(Place(path, at + _HEADER, length, about(payload)))
                end = position = at + _HEADER + length
    except OSError as error:
        raise SpiffyError(f"{path}: cannot be read ({error.strerror})") from None
    return Scan(tuple(places), end, damaged)


@contextmanager
def readable(path: Path, offset: int) -> Iterator[None]:
    """Refuse a record that is whole, but holds something else than this version writes.

    Raises
    ------
    SpiffyError
        If what reads it fails.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, RecursionError, SafetensorError):
        raise SpiffyError(
            f"{path}: the record at byte {offset} was written by another version: record again "
            "into another folder"
        ) from None


def _next_magic(file: BinaryIO, position: int) -> int:
    """Where the next magic word stands, from `position` on; -1 if there is none."""
    file.seek(position)
    if file.read(len(_MAGIC)) == _MAGIC:  # as behind every good record
        return position
    file.seek(position)
    before = b""
    while piece := file.read(_SEARCHED):
        found = (before + piece).find(_MAGIC)
        if found >= 0:
            return position - len(before) + found
        position += len(piece)
        before = (before + piece)[1 - len(_MAGIC) :]
    return -1


def read_record(place: Place[About]) -> bytes:
    """Read one payload back, checked again.

    Raises
    ------
    SpiffyError
        If it has changed since it was found.
    """
    try:
        with place.path.open("rb") as file:
            file.seek(place.offset - _HEADER)
            framed = file.read(_HEADER + place.length)
    except OSError as error:
        raise SpiffyError(f"{place.path}: cannot be read ({error.strerror})") from None
    if _frame(framed[_HEADER:]) != framed:
        raise SpiffyError(f"{place.path}: the record at byte {place.offset} changed while in use")
    return framed[_HEADER:]


#: Of file systems that have no such locks: whoever works there sees to it.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def _lock(file: int) -> None:
    """Lock a file for this process; the kernel lets go when it ends, however it ends.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    """
    import fcntl  # not on Windows, where all but this works

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


class AppendFile:
    """The file that one process appends to; nobody else can, as long as it lives.

    Parameters
    ----------
    scan
        Finds the records that are there.

    Attributes
    ----------
    found
        What was there on opening.
    dropped
        Bytes that were cut off on opening: a record that was being written when its process died.

    Raises
    ------
    SpiffyError
        If another process has it open, or the folder is full or not writable.
    """

    #: What is recorded there, and the option that asks for it.
    records: ClassVar[str] = "records"
    option: ClassVar[str] = "--workdir"

    def __init__(
        self, path: Path, scan: Callable[[Path], Scan[Any]] = lambda path: scan_records(path, len)
    ) -> None:
        self.path = path
        if find_spec("fcntl") is None:
            raise SpiffyError(
                f"{path}: work directories need POSIX file locks, which this system lacks: leave "
                f"out {self.option}"
            )
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SpiffyError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            _lock(self._file)
            self.found = scan(path)
            self.end, self.damaged = self.found.end, self.found.damaged
            self.dropped = os.fstat(self._file).st_size - self.end
            if self.dropped:
                os.ftruncate(self._file, self.end)
        except BlockingIOError:
            self.close()
            raise SpiffyError(
                f"{path.parent}: another process is recording there: wait for it, or give another "
                f"{self.option}"
            ) from None
        except OSError as error:
            self.close()
            raise SpiffyError(f"{path}: cannot be written ({error.strerror})") from None
        except BaseException:
            self.close()
            raise

    def append(self, payload: bytes) -> int:
        """Write one record behind the others; `sync` makes it last. Returns where its payload lies.

        Raises
        ------
        SpiffyError
            If there is no room; the records before are as they were.
        """
        left = memoryview(_frame(payload))
        at = self.end
        try:
            while left:
                written = os.pwrite(self._file, left, at)
                left, at = left[written:], at + written
        except OSError as error:
            self._cut()
            raise self._unwritable(error) from None
        self.end = at
        return at - len(payload)

    def sync(self) -> None:
        """Wait until the disk holds everything.

        Raises
        ------
        SpiffyError
            If it cannot.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Let others append."""
        os.close(self._file)

    def _cut(self) -> None:
        with suppress(OSError):  # half a record is also cut off when the file is opened again
            os.ftruncate(self._file, self.end)

    def _unwritable(self, error: OSError) -> SpiffyError:
        return SpiffyError(
            f"{self.path}: cannot be written ({error.strerror}): {self.records} recorded before "
            "are safe; make room and run the same command again"
        )
