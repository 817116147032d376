"""From states to one forward: rows of packed segments, and their attention masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spiffy.runtime.forward.asked import Asked, Said, numbered, on_device, read
from spiffy.runtime.models.base import DiffusionLM, KeyValues


@dataclass(frozen=True)
class Row:
    """One row of a forward's batch; all but `frozen` on the host.

    Attributes
    ----------
    ids, positions
        int64 [query].
    mask
        bool [query, frozen + query], True where the query attends; None attends to everything.
    frozen
        Keys and values put in front of the row's own.
    keep
        Whether the row's own keys and values are wanted back.
    asked
        What is to be read at once, if anything is.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None = None
    frozen: KeyValues | None = None
    keep: bool = False
    asked: Asked | None = None

    @property
    def past(self) -> int:
        """Number of frozen positions."""
        return 0 if self.frozen is None else self.frozen.length


@dataclass(frozen=True)
class RowOutput:
    """What a forward gives for a row.

    Attributes
    ----------
    hidden
        Hidden states [query, hidden], on the model's device.
    kept
        The row's own keys and values, if they were wanted.
    said
        What was asked, if anything was.
    """

    hidden: Tensor
    kept: KeyValues | None
    said: Said | None = None


class Segment(NamedTuple):
    """A run of tokens (int64 [k]) at consecutive positions from `start`."""

    ids: Tensor
    start: int


def pack(
    segments: Sequence[Segment],
    sees: Sequence[Sequence[int]],
    frozen: KeyValues | None,
    keep: bool = False,
) -> Row:
    """Put segments side by side in one row; each keeps its own positions.

    Parameters
    ----------
    sees
        For each segment the segments that it attends to (itself has to be listed). All segments
        attend to `frozen`.
    """
    ids = torch.cat([segment.ids for segment in segments])
    lengths = [len(segment.ids) for segment in segments]
    starts = [segment.start for segment in segments]
    runs = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    # Nearly all segments stand at the same positions.
    arange = {run: np.arange(*run) for run in set(runs)}
    positions = torch.from_numpy(np.concatenate([arange[run] for run in runs]))
    mask = None
    if any(len(seen) < len(segments) for seen in sees):
        # Of segments first, then widened to positions; the first column is for `frozen`.
        allowed = np.zeros((len(segments), 1 + len(segments)), dtype=np.bool_)
        allowed[:, 0] = True
        for segment, seen in enumerate(sees):
            allowed[segment, [1 + k for k in seen]] = True
        past = 0 if frozen is None else frozen.length
        allowed = allowed.repeat([past, *lengths], 1).repeat(lengths, 0)
        mask = torch.from_numpy(allowed)
    return Row(ids, positions, mask, frozen, keep)


def forward(
    model: DiffusionLM, rows: Sequence[Row], lengths: Sequence[int] | None = None
) -> list[RowOutput]:
    """Run rows, of one or of several sequences, as one batch, and read what is asked of them.

    Rows of equal shape are only stacked; others are padded on the right, out of everyone's sight.
    `lengths` are those of the whole sequences, row by row (`DiffusionLM.hidden_states`).
    """
    sizes = [len(row.ids) for row in rows]
    width, past = max(sizes), max(row.past for row in rows)
    ids, positions, at, pairs, *mask = on_device(
        [
            _stack([row.ids for row in rows], width, model.mask_token_id),
            _stack([row.positions for row in rows], width, 0),
            *numbered([row.asked for row in rows], width),
            *_mask(rows, width, past),
        ],
        model.device,
    )
    hidden, kept = model.hidden_states(
        ids,
        positions,
        mask[0] if mask else None,
        _stacked(rows, past),
        any(row.keep for row in rows),
        lengths,
    )
    asked = [row.asked for row in rows if row.asked is not None]
    said = iter(read(model, asked, hidden.flatten(0, 1), at, pairs) if asked else ())
    return [
        RowOutput(
            hidden[k, :size],
            _row_of(kept, k, size) if row.keep else None,
            None if row.asked is None else next(said),
        )
        for k, (row, size) in enumerate(zip(rows, sizes, strict=True))
    ]


def _stack(values: Sequence[Tensor], width: int, filler: int) -> Tensor:
    """Runs of numbers (int64 [k]) as the rows of int64 [n, width]."""
    if len(values) == 1:
        return values[0][None]
    return torch.stack([v if len(v) == width else _pad(v, width, filler) for v in values])


def _mask(rows: Sequence[Row], width: int, past: int) -> list[Tensor]:
    """The rows' masks, bool [n, width, past + width]; none where all attend to everything."""
    if len(rows) == 1:
        return [] if rows[0].mask is None else [rows[0].mask[None]]
    if all(row.mask is None and len(row.ids) == width and row.past == past for row in rows):
        return []
    return [torch.stack([_padded_mask(row, width, past) for row in rows])]


def _pad(values: Tensor, width: int, filler: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - len(values)), value=filler)


def _padded_mask(row: Row, width: int, past: int) -> Tensor:
    length = len(row.ids)
    mask = torch.zeros(width, past + width, dtype=torch.bool)
    among = mask[:length, past : past + length]
    if row.mask is None:
        mask[:length, : row.past] = True
        among.fill_(True)
    else:
        mask[:length, : row.past] = row.mask[:, : row.past]
        among.copy_(row.mask[:, row.past :])
    mask[length:, past] = True  # a query that sees nothing would turn into NaN
    return mask


def _stacked(rows: Sequence[Row], past: int) -> list[tuple[Tensor, Tensor]] | None:
    if past == 0:
        return None
    if len(rows) == 1 and rows[0].frozen is not None:
        return rows[0].frozen.layers
    shown = next(row.frozen for row in rows if row.frozen is not None)
    stacked = []
    for layer, pair in enumerate(shown.layers):
        both = []
        for part, sample in enumerate(pair):
            joined = sample.new_zeros(len(rows), sample.shape[1], past, sample.shape[3])
            for k, row in enumerate(rows):
                if row.frozen is not None:
                    joined[k, :, : row.past] = row.frozen.layers[layer][part][0]
            both.append(joined)
        stacked.append((both[0], both[1]))
    return stacked


def _row_of(kept: KeyValues | None, row: int, length: int) -> KeyValues:
    assert kept is not None  # the row asked for them
    return KeyValues(
        [(k[row : row + 1, :, :length], v[row : row + 1, :, :length]) for k, v in kept.layers]
    )
