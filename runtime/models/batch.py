"""Rows of a forward that attend together: one call of attention for several sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spiffy.runtime.models.lanes import Lane, Lanes
from spiffy.runtime.models.mask import Mask, aligned

_SHORT = 64  # queries up to which filling up costs hardly anything
_LONG = 256  # queries beyond which a mask costs more than a call


class Batch(NamedTuple):
    """Rows of a forward that attend together, each within its lane: one call for all of them.

    Attributes
    ----------
    lanes, first, rows
        Theirs are the lanes from the first on; some of these may have no part in the forward.
    length
        Queries of each, filled up.
    kv_end
        Slots before this one are attended to.
    wholes
        Row by row, the length of the sequence where RoPE depends on it, and positions.
    at
        int64 [positions], the slots of all lanes that their keys and values go to.
    taken, back
        int64 [rows * length], whose query each one is, among the positions; int64 [2, positions],
        row and query of each position. None: queries are the positions as they are.
    mask
        Who attends to whom; None: all do to all slots before `kv_end`.
    """

    lanes: Lanes
    first: int
    rows: int
    length: int
    kv_end: int
    wholes: tuple[tuple[int | None, int], ...]
    at: Tensor
    taken: Tensor | None
    back: Tensor | None
    mask: BatchMask | None

    @property
    def positions(self) -> int:
        """How many there are, of all rows."""
        return len(self.at)

    def tensors(self) -> Iterator[Tensor]:
        """What has to be on the device: numbers, and at last what is none."""
        yield self.at
        if self.taken is not None and self.back is not None:
            yield from (self.taken, self.back)
        if self.mask is not None:
            yield from self.mask

    def with_tensors(self, tensors: Iterator[Tensor]) -> Batch:
        """The same with the tensors that `tensors` has, on a device."""
        found = self._replace(at=next(tensors))
        if self.taken is not None:
            found = found._replace(taken=next(tensors), back=next(tensors))
        if self.mask is not None:
            found = found._replace(mask=BatchMask(*(next(tensors) for _ in self.mask)))
        return found

    def put(self, layer: int, fresh: Sequence[Tensor]) -> list[Tensor]:
        """Put keys and values [1, heads, positions, head_dim] away, and show those attended to.

        Returns
        -------
        [rows, heads, kv_end, head_dim] each
        """
        found = []
        for buffer, part in zip(self.lanes.of(layer, fresh), fresh, strict=True):
            buffer.flatten(0, 1).index_copy_(0, self.at.to(buffer.device), part[0].transpose(0, 1))
            rows = buffer[self.first : self.first + self.rows, : self.kv_end]
            found.append(rows.transpose(1, 2))
        return found

    def queries(self, query: Tensor, shared: int) -> Tensor:
        """From [1, heads, shared * positions, head_dim] to [rows, heads, shared * length, .].

        `shared` heads with the same keys lie below each other, position by position.
        """
        _, heads, _, width = query.shape
        apart = query.view(heads, self.positions, shared, width)
        if self.taken is not None:
            apart = apart.index_select(1, self.taken.to(query.device))
        return apart.view(heads, self.rows, self.length * shared, width).transpose(0, 1)

    def outputs(self, out: Tensor, shared: int) -> Tensor:
        """From what attention gives for `queries` to [positions, heads, shared, head_dim]."""
        rows, heads, _, width = out.shape
        apart = out.view(rows, heads, self.length, shared, width).permute(0, 2, 1, 3, 4)
        if self.back is None:
            return apart.flatten(0, 1)
        row, query = self.back.to(out.device)
        return apart[row, query]


class BatchMask(NamedTuple):
    """`Mask`s of several rows, filled up.

    Attributes
    ----------
    query, key
        int64 [rows, length] and [rows, keys]: row and column of `allowed`.
    allowed
        bool [rows, segments, columns].
    """

    query: Tensor
    key: Tensor
    allowed: Tensor

    def added(self, dtype: torch.dtype, kv_end: int, times: int) -> Tensor:
        """What is added to scores, [rows, 1, times * length, kv_end].

        For queries that stand there so many times, one after the other. Its rows begin at multiples
        of eight elements, see `Mask.added`.
        """
        query = self.query
        if times > 1:
            query = query[:, :, None].expand(-1, -1, times).flatten(1)
        scores = self.allowed.to(dtype).log()
        row = torch.arange(len(query), device=query.device)[:, None, None]
        return scores[row, query[:, :, None], self.key[:, None]][:, None, :, :kv_end]


class Part(NamedTuple):
    """A row of a forward as `batches` and `batched` see it; `whole` as in `Batch.wholes`."""

    kv: Lane
    length: int
    slots: Sequence[range]
    kv_end: int
    mask: Mask | None
    whole: int | None


def batches(parts: Sequence[tuple[int, Part]]) -> list[list[int]]:
    """Which rows (by number) attend together: their lanes are as long, queries nearly as many.

    Long rows that need no mask do so with their like only: filled up, they would need one. A row
    that would be alone is left out. Lanes that have no part in a batch are computed along, but no
    more of them than others.
    """
    alike: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for row, part in parts:
        shape: tuple[int, ...] = (max(part.length - 1, _SHORT - 1).bit_length(),)
        if part.mask is None and part.length > _LONG:
            shape = (part.length, part.kv_end)
        alike.setdefault((part.kv.lanes, shape), []).append((part.kv.number, row))
    found: list[list[int]] = []
    for members in alike.values():
        batch: list[int] = []
        first = 0
        for number, row in sorted(members):
            if batch and number - first - len(batch) > len(batch):
                found.append(batch)
                batch = []
            first = first if batch else number
            batch.append(row)
        found.append(batch)
    return [batch for batch in found if len(batch) > 1]


def batched(parts: Sequence[Part]) -> Batch:
    """The batch of some rows, in the order of their lanes."""
    lanes = parts[0].kv.lanes
    first = parts[0].kv.number
    numbers = [part.kv.number - first for part in parts]
    rows, lengths = numbers[-1] + 1, [part.length for part in parts]
    length, kv_end = max(lengths), max(part.kv_end for part in parts)
    at = [
        np.arange(run.start, run.stop) + part.kv.number * lanes.slots
        for part in parts
        for run in part.slots
    ]
    taken = back = None
    if rows > len(parts) or min(lengths) < length:
        place = np.arange(sum(lengths))
        row = np.repeat(numbers, lengths)
        query = place - np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
        taken = np.zeros(rows * length, np.int64)
        taken[row * length + query] = place
        back = np.stack((row, query))
    return Batch(
        lanes,
        first,
        rows,
        length,
        kv_end,
        tuple((part.whole, part.length) for part in parts),
        torch.from_numpy(np.concatenate(at)),
        None if taken is None else torch.from_numpy(taken),
        None if back is None else torch.from_numpy(back),
        _mask_of(parts, numbers, rows, length, kv_end),
    )


def _mask_of(
    parts: Sequence[Part], numbers: Sequence[int], rows: int, length: int, kv_end: int
) -> BatchMask | None:
    """Their masks as one; the last column of `allowed` is what lies behind a row's own slots."""
    if all(part.mask is None and part.kv_end == kv_end for part in parts):
        return None
    masks = [part.mask for part in parts if part.mask is not None]
    segments = max((len(mask.allowed) for mask in masks), default=1)
    columns = max((mask.allowed.shape[1] for mask in masks), default=1)
    allowed = np.zeros((rows, segments, columns + 1), np.bool_)
    allowed[:, 0, 0] = True  # of rows without a part in it, which must not attend to nothing
    query = np.zeros((rows, length), np.int64)
    key = np.zeros((rows, aligned(kv_end)), np.int64)
    for row, part in zip(numbers, parts, strict=True):
        key[row, part.kv_end :] = columns
        if part.mask is None:
            continue
        query[row, : part.length] = part.mask.query.numpy()
        key[row, : part.kv_end] = part.mask.key[: part.kv_end].numpy()
        own = part.mask.allowed.numpy()
        allowed[row, : len(own), : own.shape[1]] = own
    return BatchMask(*map(torch.from_numpy, (query, key, allowed)))
