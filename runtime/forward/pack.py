"""From states to one forward: rows of packed segments, and their attention masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spiffy.runtime.models.base import DiffusionLM, KeyValues


@dataclass(frozen=True)
class Row:
    """One row of a forward's batch.

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
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None = None
    frozen: KeyValues | None = None
    keep: bool = False

    @property
    def past(self) -> int:
        """Number of frozen positions."""
        return 0 if self.frozen is None else self.frozen.length


@dataclass(frozen=True)
class RowOutput:
    """Hidden states [query, hidden] of a row and, if kept, its keys and values."""

    hidden: Tensor
    kept: KeyValues | None


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
    device = segments[0].ids.device
    ids = torch.cat([segment.ids for segment in segments])
    lengths = [len(segment.ids) for segment in segments]
    starts = [segment.start for segment in segments]
    runs = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    # Nearly all segments stand at the same positions.
    arange = {run: np.arange(*run) for run in set(runs)}
    positions = torch.from_numpy(np.concatenate([arange[run] for run in runs])).to(device)
    mask = None
    if any(len(seen) < len(segments) for seen in sees):
        # Of segments first, then widened to positions; the first column is for `frozen`.
        allowed = np.zeros((len(segments), 1 + len(segments)), dtype=np.bool_)
        allowed[:, 0] = True
        for segment, seen in enumerate(sees):
            allowed[segment, [1 + k for k in seen]] = True
        past = 0 if frozen is None else frozen.length
        allowed = allowed.repeat([past, *lengths], 1).repeat(lengths, 0)
        mask = torch.from_numpy(allowed).to(device)
    return Row(ids, positions, mask, frozen, keep)


def forward(
    model: DiffusionLM, rows: Sequence[Row], lengths: Sequence[int] | None = None
) -> list[RowOutput]:
    """Run rows, of one or of several sequences, as one batch.

    Rows of equal shape are only stacked; others are padded on the right, out of everyone's sight.
    `lengths` are those of the whole sequences, row by row (`DiffusionLM.hidden_states`).
    """
    sizes = [len(row.ids) for row in rows]
    width, past = max(sizes), max(row.past for row in rows)
    keep = any(row.keep for row in rows)
    if len(rows) == 1:
        row = rows[0]
        mask = None if row.mask is None else row.mask[None]
        frozen = None if row.frozen is None else row.frozen.layers
        hidden, kept = model.hidden_states(
            row.ids[None], row.positions[None], mask, frozen, keep, lengths
        )
        return [RowOutput(hidden[0], kept)]
    ids = torch.stack([_pad(row.ids, width, model.mask_token_id) for row in rows])
    positions = torch.stack([_pad(row.positions, width, 0) for row in rows])
    uniform = min(sizes) == width and past == 0 and all(row.mask is None for row in rows)
    batch_mask = None if uniform else torch.stack([_padded_mask(r, width, past) for r in rows])
    hidden, kept = model.hidden_states(
        ids, positions, batch_mask, _stacked(rows, past), keep, lengths
    )
    return [
        RowOutput(hidden[k, :size], _row_of(kept, k, size) if rows[k].keep else None)
        for k, size in enumerate(sizes)
    ]


def _pad(values: Tensor, width: int, filler: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - len(values)), value=filler)


def _padded_mask(row: Row, width: int, past: int) -> Tensor:
    length = len(row.ids)
    mask = torch.zeros(width, past + width, dtype=torch.bool, device=row.ids.device)
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
