"""Where the keys and values of one sequence live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from spiffy.schemas.errors import is_out_of_memory

_LEAST_ROOM = 64  # slots: what grows by less is copied more often than memory is worth


class KeyValues:
    """Keys and values of one sequence, a slot for each position, for every layer.

    There are slots for the sequence's positions, and behind them room for what drafts compute,
    which grows to the next power of two, or 64 slots, where a forward needs more. One that did not
    fit into memory is made again with fewer drafts: nothing grows for those that it had.

    Parameters
    ----------
    length
        Positions of the sequence.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._buffers: dict[int, list[Tensor]] = {}  # of [1, heads, slots, head_dim]
        self._slots = 0

    def reserve(self, slots: int) -> None:
        """Let the next forward have as many slots; what the sequence's own hold is kept."""
        more = max(slots - self.length, 0)
        room = max(1 << (more - 1).bit_length(), _LEAST_ROOM) if more else 0
        self._slots = self.length + room

    def put(
        self,
        layer: int,
        fresh: Sequence[Tensor],
        slots: Sequence[range],
        kv_end: int,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Put a row's keys and values into their slots, and show all before slot `kv_end`.

        Parameters
        ----------
        fresh
            Keys and values, [1, heads, query, head_dim] each.
        slots
            Where they go, run by run.
        at
            The same, int64 [query] on the device, if they go there at once and not run by run.
        """
        buffers = self._buffers.get(layer)
        if buffers is None or buffers[0].shape[2] < kv_end:
            buffers = [self._grown(k, part, buffers) for k, part in enumerate(fresh)]
            self._buffers[layer] = buffers
        for buffer, part in zip(buffers, fresh, strict=True):
            put_away(buffer, part, slots, at)
        keys, values = (buffer[:, :, :kv_end] for buffer in buffers)
        return keys, values

    def _grown(self, number: int, like: Tensor, before: list[Tensor] | None) -> Tensor:
        _, heads, _, width = like.shape
        buffer = like.new_empty(1, heads, self._slots, width)
        if before is not None:
            own = slice(min(self.length, before[number].shape[2]))
            buffer[:, :, own] = before[number][:, :, own]
        return buffer

    @torch.inference_mode()
    def move(self, run: range, to: int) -> None:
        """Copy what a run of slots holds to one that starts at `to` and does not overlap it."""
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer[:, :, to : to + len(run)] = buffer[:, :, run.start : run.stop]

    def clear(self, slots: Sequence[range]) -> None:
        """What was put into these slots is no number: nobody may come across it.

        Here each forward shows slots only that it has put something into, or one before.
        """

    @torch.inference_mode()
    def shrink(self) -> bool:
        """Give back the memory that drafts took, as far as copying leaves any; whether there was.

        Between two forwards, what they left there is not needed.
        """
        freed = False
        try:
            for layer, buffers in self._buffers.items():
                if buffers[0].shape[2] > self.length:
                    own = [buffer[:, :, : self.length].clone() for buffer in buffers]
                    self._buffers[layer] = own
                    freed = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return freed


class Slots(Protocol):
    """Where the keys and values of one sequence lie, slot by slot: `KeyValues`, or an engine's.

    What a slot holds stays until something else is put or moved there (docs/engine.md).
    """

    def move(self, run: range, to: int) -> None:
        """Copy what a run of slots holds to one that starts at `to` and does not overlap it."""
        ...


def put_away(buffer: Tensor, part: Tensor, slots: Sequence[range], at: Tensor | None) -> None:
    """Put a row's keys, or values, into their slots of [1, heads, slots, head_dim].

    `part`, `slots` and `at` are as in `KeyValues.put`.
    """
    if at is not None:
        buffer.index_copy_(2, at.to(buffer.device), part)
        return
    first = 0
    for run in slots:
        stop = first + len(run)
        buffer[:, :, run.start : run.stop] = part[:, :, first:stop]
        first = stop
