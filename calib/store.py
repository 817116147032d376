"""Traces on disk: records of which each is a safetensors file of one trace.

A record that a crash has damaged is passed over (`frames`), so that its prompt is decoded again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from spiffy.calib.frames import AppendFile, Place, Scan, read_record, readable, scan_records
from spiffy.calib.record import Root, Trace
from spiffy.runtime.draft import Candidates
from spiffy.runtime.step.canvas import Cursor


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
        What decoding it cost; 0 if that failed.
    run
        Digest of the manifest it was recorded under.
    """

    prompt: int
    tokens: str
    nfe: int
    positions_computed: int
    run: str

    @property
    def number(self) -> int:
        """The prompt's."""
        return self.prompt

    @property
    def is_decoded(self) -> bool:
        """Whether the decode came to its end."""
        return self.nfe > 0


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


def _about(payload: bytes) -> About:
    size = int.from_bytes(payload[:8], "little")  # safetensors: length of its JSON header, header
    return About(**json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["about"]))


def scan(path: Path) -> Scan[About]:
    """Find and check all traces of a file.

    Raises
    ------
    SpiffyError
        If it cannot be read.
    """
    return scan_records(path, _about)


def read(place: Place[About]) -> Trace:
    """Read one trace back, checked again.

    Raises
    ------
    SpiffyError
        If it has changed since it was found, or another version wrote it.
    """
    payload = read_record(place)
    with readable(place.path, place.offset):
        return decode(payload)


class Stored(Sequence[Trace]):
    """Traces that are read from disk whenever they are asked for."""

    def __init__(self, places: Sequence[Place[About]]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, k: Any) -> Any:
        """One trace, or those of a slice (not read yet)."""
        return Stored(self.places[k]) if isinstance(k, slice) else read(self.places[k])

    def __iter__(self) -> Iterator[Trace]:
        return map(read, self.places)


class TraceFile(AppendFile):
    """A file of traces that one process appends to."""

    records = "traces"
