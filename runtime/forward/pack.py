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

from spiffy.runtime.forward.readout import Readout, RowRequest, merged, on_device, read_rows
from spiffy.runtime.models.attention import Group, attention_of
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.batch import Batch, Part, batched, batches
from spiffy.runtime.models.lanes import Lane
from spiffy.runtime.models.mask import Mask, aligned
from spiffy.runtime.models.slots import KeyValues, Slots

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """Positions of a forward that attend to each other; all but `kv` on the host.

    Attributes
    ----------
    ids, positions
        int64 [query].
    mask
        Which of the slots before `kv_end` (without `kv`, of the row's own positions) each position
        attends to; None: to all.
    kv
        Where the row's keys and values go, and what it attends to lies; None: it attends to its
        own positions, whose keys and values are not kept.
    slots
        The slots of `kv` that they go to, run by run.
    kv_end
        Slots before this one are attended to.
    request
        What is to be read in the forward itself, if anything is.
    """

    ids: Tensor
    positions: Tensor
    mask: Mask | None = None
    kv: Slots | None = None
    slots: tuple[range, ...] = ()
    kv_end: int = 0
    request: RowRequest | None = None


@dataclass(frozen=True)
class RowOutput:
    """What a forward gives for a row.

    Attributes
    ----------
    hidden
        Hidden states [query, hidden], on the model's device.
    readout
        What was requested, if anything was.
    """

    hidden: Tensor
    readout: Readout | None = None


class Segment(NamedTuple):
    """A run of tokens (int64 [k]) at consecutive positions from `start`.

    Its keys and values go to as many slots from `slot` on.
    """

    ids: Ints
    start: int
    slot: int


def pack(segments: Sequence[Segment], sees: Sequence[Sequence[int]], kv: Slots, held: int) -> Row:
    """Put segments side by side in one row; each keeps its own positions.

    Parameters
    ----------
    sees
        For each segment the segments that it attends to (itself has to be listed).
    held
        Slots of `kv` before this one hold keys and values, which all segments attend to where no
        segment's own go there. Those of the segments leave no gap behind it.
    """
    lengths = [len(segment.ids) for segment in segments]
    # Nearly all segments stand at the same positions.
    spans = [(s.start, s.start + length) for s, length in zip(segments, lengths, strict=True)]
    arange = {span: np.arange(*span) for span in set(spans)}
    slots = _joined([segment.slot for segment in segments], lengths)
    kv_end = max(held, *(run.stop for run in slots))
    mask = None
    if any(len(seen) < len(segments) for seen in sees):
        mask = _mask(sees, lengths, slots, kv_end)
    return Row(
        torch.from_numpy(np.concatenate([segment.ids for segment in segments])),
        torch.from_numpy(np.concatenate([arange[span] for span in spans])),
        mask,
        kv,
        slots,
        kv_end,
    )


def _joined(starts: Sequence[int], lengths: Sequence[int]) -> tuple[range, ...]:
    """Runs of slots, those joined that follow one another."""
    runs: list[tuple[int, int]] = []
    for start, length in zip(starts, lengths, strict=True):
        joins = bool(runs) and runs[-1][1] == start
        runs.append((runs.pop()[0] if joins else start, start + length))
    return tuple(range(*run) for run in runs)


def _mask(
    sees: Sequence[Sequence[int]], lengths: Sequence[int], slots: Sequence[range], kv_end: int
) -> Mask:
    """Who attends to whom, of segments that lie one after the other in `slots`."""
    count = len(sees)
    number = np.arange(count).repeat(lengths)  # of the segment, by position in the row
    # Whose slot it is; the last column of `allowed` is for what is held.
    owner = np.full(aligned(kv_end), count)
    owner[np.concatenate([np.arange(run.start, run.stop) for run in slots])] = number
    allowed = np.zeros((count, count + 1), dtype=np.bool_)
    allowed[:, -1] = True
    seen = np.fromiter(chain.from_iterable(sees), np.int64)
    allowed[np.arange(count).repeat([len(each) for each in sees]), seen] = True
    query, key, segments = map(torch.from_numpy, (number, owner, allowed))
    return Mask(query, key, segments, kv_end)


def forward(
    model: DiffusionLM, rows: Sequence[Row], lengths: Sequence[int] | None = None
) -> list[RowOutput]:
    """Run rows, of one or of several sequences, together, and read what they request.

    `lengths` are those of the whole sequences, row by row, where RoPE depends on them.
    """
    wholes: Sequence[int | None] = [None] * len(rows) if lengths is None else lengths
    parts = [_part(row, whole) for row, whole in zip(rows, wholes, strict=True)]
    together = _batches(model, parts)
    order = [*chain.from_iterable(together)]
    order += sorted(set(range(len(rows))) - set(order))
    apart = order[sum(map(len, together)) :]
    groups: list[Group | Batch] = [
        *(batched([part for k in batch if (part := parts[k])]) for batch in together),
        *_groups(model, [rows[k] for k in apart], [wholes[k] for k in apart]),
    ]
    ordered = [rows[k] for k in order]
    ids, positions, at, cross_pairs, *others = on_device(
        [
            torch.cat([row.ids for row in ordered]),
            torch.cat([row.positions for row in ordered]),
            *merged([row.request for row in ordered], [len(row.ids) for row in ordered]),
            *chain.from_iterable(group.tensors() for group in groups),
        ],
        model.device,
    )
    there = iter(others)
    hidden = model.hidden_states(ids, positions, [group.with_tensors(there) for group in groups])
    outputs = dict(zip(order, _outputs(model, ordered, hidden, at, cross_pairs), strict=True))
    return [outputs[k] for k in range(len(rows))]


def outputs_of(model: DiffusionLM, rows: Sequence[Row], hidden: Tensor) -> list[RowOutput]:
    """What a forward gives for rows whose hidden states an engine has computed (docs/engine.md).

    Parameters
    ----------
    hidden
        [query, hidden], of one row behind the other, on the model's device.
    """
    request = merged([row.request for row in rows], [len(row.ids) for row in rows])
    return _outputs(model, rows, hidden, *on_device(request, model.device))


def _outputs(
    model: DiffusionLM, rows: Sequence[Row], hidden: Tensor, at: Tensor, cross_pairs: Tensor
) -> list[RowOutput]:
    sizes = [len(row.ids) for row in rows]
    requests = [row.request for row in rows if row.request is not None]
    readouts = iter(read_rows(model, requests, hidden, at, cross_pairs) if requests else ())
    return [
        RowOutput(part, None if row.request is None else next(readouts))
        for row, part in zip(rows, torch.split(hidden, sizes), strict=True)
    ]


def _at_once(row: Row, model: DiffusionLM) -> Tensor | None:
    """Slots of keys and values (int64 [query]), where one kernel is better than one for each run.

    On the CPU nothing is launched, and runs are copied faster.
    """
    if len(row.slots) < 2 or model.device.type == "cpu":
        return None
    return torch.from_numpy(np.concatenate([np.arange(run.start, run.stop) for run in row.slots]))


def _batches(model: DiffusionLM, parts: Sequence[Part | None]) -> list[list[int]]:
    """Which rows attend together, in the order of their lanes; all others do for themselves."""
    own = [(k, part) for k, part in enumerate(parts) if part is not None]
    # They may change to other lanes, all of one size: the one that needs most comes first.
    for _, part in sorted(own, key=lambda each: each[1].kv.length - each[1].kv_end):
        part.kv.reserve(part.kv_end)
    if len(own) < 2 or attention_of(model.module.config) != "sdpa":
        return []
    return batches(own)


def _part(row: Row, whole: int | None) -> Part | None:
    """What a batch needs to know of a row, if its keys and values lie in a lane."""
    if not isinstance(row.kv, Lane):
        return None
    return Part(row.kv, len(row.ids), row.slots, row.kv_end, row.mask, whole)


def _groups(
    model: DiffusionLM, rows: Sequence[Row], wholes: Sequence[int | None]
) -> Iterator[Group]:
    """Rows that attend to themselves alone, and are equally long, attend together."""
    alike: Group | None = None
    for row, whole in zip(rows, wholes, strict=True):
        assert row.kv is None or isinstance(row.kv, KeyValues)  # else an engine's rows
        at = _at_once(row, model)
        group = Group(1, len(row.ids), row.mask, row.kv, row.slots, row.kv_end, whole, at)
        if alike is not None and row.mask is None and alike._replace(rows=1) == group:
            alike = alike._replace(rows=alike.rows + 1)
            continue
        if alike is not None:
            yield alike
        alike = group
    if alike is not None:
        yield alike
