"""What is read off a forward before the host hears of it: one copy there, and one back.

Every copy to or from a device makes the host wait until the device has come that far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.step.reading import Rules, ids_of

_NOTHING = torch.empty(0, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class Asked:
    """What is read off a row in its forward.

    Attributes
    ----------
    at
        int64 [k], positions of the row that are read.
    rules
        How they are read.
    keys
        int64 [k], of their noise (`Noise.keys`); any numbers at temperature 0.
    pairs
        int64 [2, T], numbers of positions that are read, counted from this row's first one on into
        the rows behind it: wanted are logits at the second, for the likeliest tokens of the first.
    """

    at: Tensor
    rules: Rules
    keys: Tensor
    pairs: Tensor


class Said(NamedTuple):
    """What was read off a row, on the host.

    Attributes
    ----------
    table
        int64 [k, C], see `Rules.table`.
    quotes
        float64 [T, J], logits of the pairs that were asked for.
    """

    table: Tensor
    quotes: Tensor


def on_device(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on a device, in one copy; those of smaller numbers have to come last."""
    if device.type == "cpu":
        return list(parts)
    flat = torch.cat([part.flatten().view(torch.uint8) for part in parts]).to(device)
    pieces = torch.split(flat, [part.numel() * part.itemsize for part in parts])
    return [
        piece.view(part.dtype).view(part.shape) for piece, part in zip(pieces, parts, strict=True)
    ]


def numbered(rows: Sequence[Asked | None], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Positions and pairs (int64 [2, T]) of rows of some sizes, counted over all.

    Positions come with the keys of their noise: int64 [2, K].
    """
    at, pairs, before, first = [], [], 0, 0
    for asked, size in zip(rows, sizes, strict=True):
        if asked is not None:
            at.append(torch.stack((first + asked.at, asked.keys)))
            pairs.append(before + asked.pairs)
            before += len(asked.at)
        first += size
    return (torch.cat(at, 1), torch.cat(pairs, 1)) if at else (_NOTHING, _NOTHING)


def read(
    model: DiffusionLM, asked: Sequence[Asked], hidden: Tensor, at: Tensor, pairs: Tensor
) -> Iterator[Said]:
    """What is said of each row that is asked about, in one copy to the host.

    Parameters
    ----------
    hidden
        [query, hidden].
    at, pairs
        As `numbered` gives them, on the device.
    """
    rows, keys = at
    logits = model.head(hidden.index_select(0, rows))
    groups = [(rules, list(group)) for rules, group in groupby(asked, attrgetter("rules"))]
    found: list[Tensor] = []
    first = paired = 0
    for rules, group in groups:
        read, wanted = sum(len(a.at) for a in group), sum(a.pairs.shape[1] for a in group)
        mine = slice(first, first + read)
        own = logits[mine]
        table = rules.table(own, keys[mine] if rules.settings.temperature > 0 else None)
        of, by = pairs[:, paired : paired + wanted] - first
        quotes = own[by[:, None], ids_of(table)[of]].double()
        found += [table, quotes.view(torch.int64)]
        first, paired = first + read, paired + wanted
    flat = torch.cat([part.flatten() for part in found]).cpu()
    pieces = torch.split(flat, [part.numel() for part in found])
    parts = [piece.view(part.shape) for piece, part in zip(pieces, found, strict=True)]
    for (_, group), table, quotes in zip(groups, parts[::2], parts[1::2], strict=True):
        tables = torch.split(table, [len(a.at) for a in group])
        numbers = quotes.view(torch.float64)
        quoted = torch.split(numbers, [a.pairs.shape[1] for a in group])
        yield from map(Said, tables, quoted)
