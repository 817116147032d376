"""From states to one forward: rows of packed segments, and what they attend to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spiffy.runtime.forward.asked import Asked, Said, numbered, on_device, read
from spiffy.runtime.models.attention import Group, KeyValues
from spiffy.runtime.models.base import DiffusionLM

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """Positions of a forward that attend to each other; all but `kept` on the host.

    Attributes
    ----------
    ids, positions
        int64 [query].
    mask
        bool [query, keys], True where the query attends; None attends to everything.
    kept
        Where the row's keys and values go, and those are that it attends to; None: to its own.
    places
        Where they go, run by run.
    keys
        Places before this one are attended to.
    asked
        What is to be read at once, if anything is.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None = None
    kept: KeyValues | None = None
    places: tuple[range, ...] = ()
    keys: int = 0
    asked: Asked | None = None


@dataclass(frozen=True)
class RowOutput:
    """What a forward gives for a row.

    Attributes
    ----------
    hidden
        Hidden states [query, hidden], on the model's device.
    said
        What was asked, if anything was.
    """

    hidden: Tensor
    said: Said | None = None


class Segment(NamedTuple):
    """A run of tokens (int64 [k]) at consecutive positions from `start`.

    Its keys and values go to as many places from `place` on.
    """

    ids: Ints
    start: int
    place: int


def pack(
    segments: Sequence[Segment], sees: Sequence[Sequence[int]], kept: KeyValues, held: int
) -> Row:
    """Put segments side by side in one row; each keeps its own positions.

    Parameters
    ----------
    sees
        For each segment the segments that it attends to (itself has to be listed).
    held
        Places before this one hold keys and values, which all segments attend to where no segment's
        own go there. Those of the segments leave no gap behind it.
    """
    lengths = [len(segment.ids) for segment in segments]
    # Nearly all segments stand at the same positions.
    spans = [(s.start, s.start + length) for s, length in zip(segments, lengths, strict=True)]
    arange = {span: np.arange(*span) for span in set(spans)}
    places = _joined([segment.place for segment in segments], lengths)
    keys = max(held, *(run.stop for run in places))
    mask = None
    if any(len(seen) < len(segments) for seen in sees):
        mask = torch.from_numpy(_mask(sees, lengths, places, keys))
    return Row(
        torch.from_numpy(np.concatenate([segment.ids for segment in segments])),
        torch.from_numpy(np.concatenate([arange[span] for span in spans])),
        mask,
        kept,
        places,
        keys,
    )


def _joined(starts: Sequence[int], lengths: Sequence[int]) -> tuple[range, ...]:
    """Runs of places, those joined that follow one another."""
    runs: list[tuple[int, int]] = []
    for start, length in zip(starts, lengths, strict=True):
        joins = bool(runs) and runs[-1][1] == start
        runs.append((runs.pop()[0] if joins else start, start + length))
    return tuple(range(*run) for run in runs)


def _mask(
    sees: Sequence[Sequence[int]], lengths: Sequence[int], places: Sequence[range], keys: int
) -> Bools:
    """Who attends to whom, [query, keys], of segments that lie one behind the other in `places`."""
    count = len(sees)
    number = np.arange(count).repeat(lengths)  # of the segment, by position in the row
    # Whose place it is; the last column of `allowed` is for what is held.
    owner = np.full(keys, count)
    owner[np.concatenate([np.arange(run.start, run.stop) for run in places])] = number
    allowed = np.zeros((count, count + 1), dtype=np.bool_)
    allowed[:, -1] = True
    seen = np.fromiter(chain.from_iterable(sees), np.int64)
    allowed[np.arange(count).repeat([len(each) for each in sees]), seen] = True
    mask: Bools = allowed.take(owner, 1).take(number, 0)
    return mask


def forward(
    model: DiffusionLM, rows: Sequence[Row], lengths: Sequence[int] | None = None
) -> list[RowOutput]:
    """Run rows, of one or of several sequences, together, and read what is asked of them.

    `lengths` are those of the whole sequences, row by row, where RoPE depends on them.
    """
    sizes = [len(row.ids) for row in rows]
    runs = [_at_once(row, model) for row in rows]
    ids, positions, at, pairs, *others = on_device(
        [
            torch.cat([row.ids for row in rows]),
            torch.cat([row.positions for row in rows]),
            *numbered([row.asked for row in rows], sizes),
            *(places for places in runs if places is not None),
            *(row.mask for row in rows if row.mask is not None),
        ],
        model.device,
    )
    there = iter(others)
    places = [None if each is None else next(there) for each in runs]
    masks = [None if row.mask is None else next(there) for row in rows]
    hidden = model.hidden_states(ids, positions, list(_groups(rows, places, masks, lengths)))
    asked = [row.asked for row in rows if row.asked is not None]
    said = iter(read(model, asked, hidden, at, pairs) if asked else ())
    return [
        RowOutput(part, None if row.asked is None else next(said))
        for row, part in zip(rows, torch.split(hidden, sizes), strict=True)
    ]


def _at_once(row: Row, model: DiffusionLM) -> Tensor | None:
    """Places of keys and values (int64 [query]), where one kernel is better than one for each run.

    On the CPU nothing is launched, and runs are copied faster.
    """
    if len(row.places) < 2 or model.device.type == "cpu":
        return None
    return torch.from_numpy(np.concatenate([np.arange(run.start, run.stop) for run in row.places]))


def _groups(
    rows: Sequence[Row],
    places: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    lengths: Sequence[int] | None,
) -> Iterator[Group]:
    """Rows that attend to themselves alone, and are equally long, attend together.

    `places` and `masks` are the rows', on the device.
    """
    wholes: Sequence[int | None] = [None] * len(rows) if lengths is None else lengths
    alike: Group | None = None
    for row, at, mask, whole in zip(rows, places, masks, wholes, strict=True):
        group = Group(1, len(row.ids), mask, row.kept, row.places, row.keys, whole, at)
        if alike is not None and mask is None and alike._replace(rows=1) == group:
            alike = alike._replace(rows=alike.rows + 1)
            continue
        if alike is not None:
            yield alike
        alike = group
    if alike is not None:
        yield alike
