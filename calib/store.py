"""Traces on disk: an append-only file of records that check themselves.

A record is a magic word, the length of its payload (8 bytes, little endian), the SHA-256 of length
and payload, and the payload: a safetensors file of one trace. Whatever a crash leaves behind is no
record: the end of a file that was being written is cut off when it is opened again, and a record
damaged elsewhere is passed over, so that its prompt is decoded again.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from spiffy.calib.record import Root, Trace
from spiffy.runtime.draft import Candidates
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import SpiffyError

_MAGIC = b"\x93SPTRACE"
_HEADER = len(_MAGIC) + 8 + 32


@dataclass(frozen=True)
class About:
    """What a record says of its trace.

    Attributes
    ----------
    prompt
        Number of the prompt in its data set, of those that can be decoded.
    tokens
        SHA-256 of the prompt's token ids.
    nfe, positions_computed
        What decoding it cost.
    run
        Digest of the manifest it was recorded under.
    """

    prompt: int
    tokens: str
    nfe: int
    positions_computed: int
    run: str


@dataclass(frozen=True)
class Place:
    """Where a record's payload lies, and what it is about."""

    path: Path
    offset: int
    length: int
    about: About


def tokens_digest(ids: torch.Tensor) -> str:
    """SHA-256 of prompt ids (int64 [prompt])."""
    return hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def encode(trace: Trace, about: About) -> bytes:
    """A trace as a safetensors file; states as differences from the one before."""
    states = np.stack([cursor.ids.cpu().numpy() for cursor in trace.path])
    step, position = (states[1:] != states[:-1]).nonzero()
    roots = [root for root in trace.roots if root is not None]
    candidates = [root.candidates for root in roots]
    arrays = {
        "start": states[0],
        "cursors": np.array(
            [[c.block, c.block_step, c.step, c.finished, c.post_steps] for c in trace.path],
            dtype=np.int32,
        ),
        "changed": np.stack((step, position, states[step + 1, position])).astype(np.int32),
        "room": np.array([-1 if r is None else r.room for r in trace.roots], dtype=np.int32),
        "masked": np.array([len(c.positions) for c in candidates], dtype=np.int32),
        "unseen": np.array([len(c.fresh) for c in candidates], dtype=np.int32),
        "positions": _joined([c.positions for c in candidates]).astype(np.int32),
        "fresh": _joined([c.fresh for c in candidates]).astype(np.int32),
        "tokens": _joined([c.tokens for c in candidates]).astype(np.int32),
        "log_p": _joined([c.log_p for c in candidates]),
    }
    return save(arrays, {"about": json.dumps(asdict(about))})


def _joined(tensors: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
    return np.concatenate([t.cpu().numpy() for t in tensors]) if tensors else np.zeros(0)


def decode(payload: bytes) -> Trace:
    """The trace that was encoded, bit for bit, on the CPU."""
    arrays = load(payload)
    ids = torch.from_numpy(arrays["start"].copy())
    cursors = arrays["cursors"].tolist()
    path = [_cursor(ids, cursors[0])]
    step, position, token = arrays["changed"].astype(np.int64)
    bounds = np.searchsorted(step, np.arange(len(cursors)))
    for k, facts in enumerate(cursors[1:]):
        these = slice(bounds[k], bounds[k + 1])
        ids = ids.clone()
        ids[torch.from_numpy(position[these])] = torch.from_numpy(token[these])
        path.append(_cursor(ids, facts))
    columns = [
        _split(arrays[name], arrays[sizes])
        for name, sizes in (
            ("positions", "masked"),
            ("tokens", "masked"),
            ("log_p", "masked"),
            ("fresh", "unseen"),
        )
    ]
    candidates = map(Candidates, *columns)
    rooms = arrays["room"].tolist()
    roots = [None if room < 0 else Root(next(candidates), room) for room in rooms]
    return Trace(path, roots)


def _split(joined: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> Iterator[torch.Tensor]:
    wide = joined if joined.dtype.kind == "f" else joined.astype(np.int64)
    start = 0
    for size in sizes.tolist():
        yield torch.from_numpy(wide[start : start + size].copy())
        start += size


def _cursor(ids: torch.Tensor, facts: Sequence[int]) -> Cursor:
    block, block_step, step, finished, *post_steps = facts  # older records have none
    return Cursor(ids, block, block_step, step, bool(finished), sum(post_steps))


def _frame(payload: bytes) -> bytes:
    length = len(payload).to_bytes(8, "little")
    return _MAGIC + length + hashlib.sha256(length + payload).digest() + payload


def _about(payload: bytes) -> About:
    size = int.from_bytes(payload[:8], "little")  # safetensors: length of its JSON header, header
    return About(**json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["about"]))


@dataclass(frozen=True)
class Scan:
    """The good records of a file, the byte after the last, and how many stretches are damaged."""

    places: tuple[Place, ...]
    end: int
    damaged: int


def scan(path: Path) -> Scan:
    """Find and check all records of a file.

    Raises
    ------
    SpiffyError
        If it cannot be read.
    """
    places: list[Place] = []
    end = position = damaged = 0
    try:
        if not path.stat().st_size:
            return Scan((), 0, 0)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            while (at := data.find(_MAGIC, position)) >= 0:
                header = data[at + len(_MAGIC) : at + _HEADER]
                length = int.from_bytes(header[:8], "little")
                payload = data[at + _HEADER : at + _HEADER + length]
                whole = len(header) == _HEADER - len(_MAGIC) and len(payload) == length
                if not whole or hashlib.sha256(header[:8] + payload).digest() != header[8:]:
                    position = at + 1
                    continue
                damaged += at > end
                places.append(Place(path, at + _HEADER, length, _about(payload)))
                end = position = at + _HEADER + length
    except OSError as error:
        raise SpiffyError(f"{path}: cannot be read ({error.strerror})") from None
    return Scan(tuple(places), end, damaged)


def read(place: Place) -> Trace:
    """Read one trace back, checked again.

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
    return decode(framed[_HEADER:])


class Stored(Sequence[Trace]):
    """Traces that are read from disk whenever they are asked for."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, k: Any) -> Any:
        """One trace, or those of a slice (not read yet)."""
        return Stored(self.places[k]) if isinstance(k, slice) else read(self.places[k])

    def __iter__(self) -> Iterator[Trace]:
        return map(read, self.places)


class TraceFile:
    """The file that one process appends to; nobody else can, as long as it lives.

    Attributes
    ----------
    dropped
        Bytes that were cut off on opening: a record that was being written when its process died.

    Raises
    ------
    SpiffyError
        If another process has it open, or the folder is full or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import fcntl  # not on Windows, where all but this works
        except ImportError:
            raise SpiffyError(
                f"{path}: work directories need POSIX file locks, which this system lacks: leave "
                "out --workdir"
            ) from None
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SpiffyError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            # The kernel lets go of it when the process ends, however it ends.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = scan(path)
            self.end, self.damaged = found.end, found.damaged
            self.dropped = os.fstat(self._file).st_size - found.end
            if self.dropped:
                os.ftruncate(self._file, found.end)
        except BlockingIOError:
            self.close()
            raise SpiffyError(
                f"{path.parent}: another process is recording there: wait for it, or give another "
                "--workdir"
            ) from None
        except OSError as error:
            self.close()
            raise SpiffyError(f"{path}: cannot be written ({error.strerror})") from None

    def append(self, payload: bytes) -> None:
        """Write one record behind the others; `sync` makes it last.

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
            f"{self.path}: cannot be written ({error.strerror}): traces recorded before are safe; "
            "make room and run the same command again"
        )
