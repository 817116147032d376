"""Keys and values of sequences that share forwards, side by side, so that they attend together.

Attention of one sequence after the other launches its kernels for each of them, in every layer. On
an accelerator a forward of many sequences then waits for the host. So there each sequence has a
lane of a common buffer, and those whose forwards are about as long attend in one call, queries
filled up to those of the longest. Keys and values stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from spiffy.runtime.models.slots import KeyValues, put_away
from spiffy.schemas.errors import is_out_of_memory

_LEAST_SLOTS = 64  # of a lane
_ROOMY = 1024  # slots up to which lanes come in powers of two; longer ones in quarters of these


class Lanes:
    """Buffers of every layer with lanes of equally many slots.

    Parameters
    ----------
    slots
        Of a lane.
    most
        Lanes that there will be at most.
    """

    def __init__(self, slots: int, most: int) -> None:
        self.slots, self.most = slots, most
        self._used: WeakValueDictionary[int, Lane] = WeakValueDictionary()
        self._count = 0  # lanes that buffers need to have
        self._buffers: dict[int, list[Tensor]] = {}  # of [lanes, slots, heads, head_dim]

    def __len__(self) -> int:
        """Number of lanes that are used."""
        return len(self._used)

    @property
    def layers(self) -> list[int]:
        """Those that something was put into."""
        return [*self._buffers]

    @torch.inference_mode()
    def take(self, lane: Lane) -> int:
        """The lowest number that is free.

        Its slots hold zeros: those that are not attended to count nothing only if they are finite,
        and what was there before may not be.
        """
        number = next(k for k in range(len(self._used) + 1) if k not in self._used)
        for buffer in chain.from_iterable(self._buffers.values()):
            buffer[number : number + 1].zero_()
        self._used[number] = lane
        self._count = max(self._count, number + 1)
        return number

    def leave(self, number: int) -> None:
        """Nobody uses it any more; a lane that is garbage has left by itself."""
        del self._used[number]
        self._count = max(self._used.keys(), default=-1) + 1
        if not self._used:
            self._buffers.clear()

    def of(self, layer: int, like: Sequence[Tensor]) -> list[Tensor]:
        """A layer's keys and values [lanes, slots, heads, head_dim], made or grown if need be.

        `like` are some, [1, heads, query, head_dim].
        """
        before = self._buffers.get(layer)
        if before is None or len(before[0]) < self._count:
            lanes = min(1 << (self._count - 1).bit_length(), max(self.most, self._count))
            grown = []
            for k, part in enumerate(like):
                buffer = part.new_zeros(lanes, self.slots, part.shape[1], part.shape[3])
                if before is not None:
                    buffer[: len(before[k])] = before[k]
                grown.append(buffer)
            self._buffers[layer] = grown
        return self._buffers[layer]

    def known(self, layer: int) -> list[Tensor]:
        """A layer's keys and values, as they are."""
        return self._buffers[layer]

    @torch.inference_mode()
    def trim(self) -> bool:
        """Give back the memory of lanes that nobody uses, as far as copying leaves any.

        Returns whether there was any.
        """
        lanes = [lane for _, lane in sorted(self._used.items())]
        for to, lane in enumerate(lanes):
            for buffer in chain.from_iterable(self._buffers.values()) if to != lane.number else ():
                if lane.number < len(buffer):
                    buffer[to] = buffer[lane.number]
                else:  # nothing has been put there yet
                    buffer[to : to + 1].zero_()
        for to, lane in enumerate(lanes):
            lane.number = to
        self._used = WeakValueDictionary(enumerate(lanes))
        self._count = len(lanes)
        if not lanes:
            freed = bool(self._buffers)
            self._buffers.clear()
            return freed
        freed = False
        try:
            for layer, buffers in self._buffers.items():
                if len(buffers[0]) > len(lanes):
                    self._buffers[layer] = [buffer[: len(lanes)].clone() for buffer in buffers]
                    freed = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return freed


class Lane(KeyValues):
    """`KeyValues` of a sequence in a lane; it takes another one where its slots do not suffice."""

    def __init__(self, pool: Pool, length: int) -> None:
        super().__init__(length)
        self.lanes = pool.lanes(length + pool.shared_room(length))
        self.number = self.lanes.take(self)
        self._pool = pool

    def reserve(self, slots: int) -> None:
        """See `KeyValues`. Nothing has changed if memory does not suffice.

        As much room as others needed is reserved where there is memory: so all come to one size.
        """
        wished = max(slots, self.length + self._pool.shared_room(self.length))
        if wished == slots or not self._has(wished):
            self._change(slots)
        self._pool.room = max(self._pool.room, slots - self.length)

    def _has(self, slots: int) -> bool:
        """Whether it has so many slots now; else memory does not suffice."""
        try:
            self._change(slots)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._pool.is_short = True
            return False
        return True

    @torch.inference_mode()
    def _change(self, slots: int) -> None:
        """Go to another lane if this one is too short."""
        if slots > self.lanes.slots:
            self._go_to(self._pool.lanes(slots))

    def _go_to(self, lanes: Lanes) -> None:
        """Go to another lane, with what the sequence's own slots hold, or stay as it is."""
        before, number = self.lanes, self.number
        to = lanes.take(self)
        try:
            for layer in before.layers:
                own = [part for buffer in before.known(layer) for part in buffer[number:][:1]]
                if own:  # else nothing has been put there yet
                    like = [part.transpose(0, 1)[None] for part in own]
                    for buffer, part in zip(lanes.of(layer, like), own, strict=True):
                        buffer[to, : self.length] = part[: self.length]
        except BaseException:
            lanes.leave(to)
            raise
        self.lanes, self.number = lanes, to
        before.leave(number)

    def put(
        self,
        layer: int,
        fresh: Sequence[Tensor],
        slots: Sequence[range],
        kv_end: int,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `KeyValues`."""
        found = []
        for buffer, part in zip(self.lanes.of(layer, fresh), fresh, strict=True):
            own = buffer[self.number].transpose(0, 1)[None]
            put_away(own, part, slots, at)
            found.append(own[:, :, :kv_end])
        keys, values = found
        return keys, values

    @torch.inference_mode()
    def move(self, run: range, to: int) -> None:
        """See `Slots`."""
        for layer in self.lanes.layers:
            for buffer in self.lanes.known(layer):
                own = buffer[self.number]
                own[to : to + len(run)] = own[run.start : run.stop]

    @torch.inference_mode()
    def clear(self, slots: Sequence[range]) -> None:
        """See `KeyValues`: in a batch others' forwards show what is beyond this one's, masked."""
        for layer in self.lanes.layers:
            for buffer in self.lanes.known(layer):
                for run in slots:
                    buffer[self.number, run.start : run.stop] = 0

    @torch.inference_mode()
    def shrink(self) -> bool:
        """See `KeyValues`: by a shorter lane."""
        if roomy(self.length) >= self.lanes.slots:
            return False
        try:
            self._go_to(self._pool.lanes(self.length))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


class Pool:
    """Lanes of all sizes, for sequences that share forwards; for one thread.

    Parameters
    ----------
    most
        So many sequences are there at most, at a time.

    Attributes
    ----------
    room
        Slots behind a sequence that drafts needed so far.
    is_short
        Whether there was no memory for a sequence to get as much: until others come, none does.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.room = 0
        self.is_short = False
        self._lanes: dict[int, Lanes] = {}

    def open(self, length: int) -> Lane:
        """A lane for a sequence of so many positions."""
        lane = Lane(self, length)  # without room if that is short: it may wish for it once
        self.is_short = False
        return lane

    def lanes(self, slots: int) -> Lanes:
        """Those with at least so many slots; forgets others that nobody uses."""
        size = roomy(slots)
        self._lanes = {s: lanes for s, lanes in self._lanes.items() if len(lanes) or s == size}
        return self._lanes.setdefault(size, Lanes(size, self.most))

    def shared_room(self, length: int) -> int:
        """What a sequence gets of it from the first: at most as much again as it is long."""
        return 0 if self.is_short else min(self.room, length)

    def forget_unused(self) -> None:
        """Give back the memory of sizes that nobody uses."""
        self._lanes = {size: lanes for size, lanes in self._lanes.items() if len(lanes)}

    def trim(self) -> bool:
        """Give back the memory that nobody uses: it is short. Returns whether there was any."""
        self.room = 0
        freed = [lanes.trim() for lanes in self._lanes.values()]
        return any(freed)


def roomy(slots: int) -> int:
    """A size of lanes for so many slots, such that sequences of like length have the same one."""
    power = max(1 << (slots - 1).bit_length(), _LEAST_SLOTS)
    step = power if power <= _ROOMY else power // 8
    return -(-slots // step) * step
