"""Who attends to whom in a row of a forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_ALIGNED = 8  # elements


class Mask(NamedTuple):
    """Query i attends to key j where `allowed[query[i], key[j]]`.

    A forward packs whole segments, whose positions attend alike and are attended to alike. So the
    square of all queries and keys follows from that of the segments, and is made where attention
    needs it: on the device, once for all layers.

    Attributes
    ----------
    query
        int64 [queries], number of each one's row of `allowed`.
    key
        int64, of each key's column; filled up with any to a multiple of eight.
    allowed
        bool [rows, columns].
    keys
        How many there are.
    """

    query: Tensor
    key: Tensor
    allowed: Tensor
    keys: int

    @classmethod
    def of(cls, dense: Tensor) -> Mask:
        """From bool [queries, keys], each a segment of its own."""
        queries, keys = (torch.arange(size, device=dense.device) for size in dense.shape)
        return cls(queries, pad(keys, (0, aligned(len(keys)) - len(keys))), dense, len(keys))

    @property
    def shape(self) -> tuple[int, int]:
        """Queries, keys."""
        return len(self.query), self.keys

    def dense(self) -> Tensor:
        """Bool [queries, keys]."""
        return self.allowed.index_select(1, self.key[: self.keys]).index_select(0, self.query)

    def added(self, dtype: torch.dtype) -> Tensor:
        """What is added to scores: 0 where a query attends, -inf elsewhere; [queries, keys].

        Its rows begin at multiples of eight elements: any other mask torch's memory-efficient
        attention copies to such a place, in every layer.
        """
        scores = self.allowed.to(dtype).log()  # 0 of 1, -inf of 0
        return scores.index_select(1, self.key).index_select(0, self.query)[:, : self.keys]

    def repeated(self, times: int) -> Mask:
        """The same for queries that stand there so often, one after the other."""
        if times == 1:
            return self
        return self._replace(query=self.query[:, None].expand(-1, times).flatten())

    def to(self, device: torch.device) -> Mask:
        """The same on a device."""
        query, key, allowed = (part.to(device) for part in (self.query, self.key, self.allowed))
        return Mask(query, key, allowed, self.keys)


def aligned(keys: int) -> int:
    """So many columns of keys or, filled up, a few more."""
    return -(-keys // _ALIGNED) * _ALIGNED
