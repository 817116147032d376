"""What is read off a forward while it is on the device: one copy there, and one back.

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
class RowRequest:
    """What is to be read off a row in its forward.

    Attributes
    ----------
    at
        int64 [k], positions of the row that are read.
    rules
        How they are read.
    keys
        int64 [k], of their noise (`Noise.keys`); any numbers at temperature 0.
    cross_pairs
        int64 [2, T], numbers of positions that are read, counted from this row's first one on into
        the rows behind it: wanted are logits at the second, for the likeliest tokens of the first.
        So a draft says what it thinks of tokens that its source finds likely.
    """

    at: Tensor
    rules: Rules
    keys: Tensor
    cross_pairs: Tensor


class Readout(NamedTuple):
    """What was read off a row, on the host.

    Attributes
    ----------
    table
        int64 [k, C], see `Rules.table`.
    cross_logits
        float64 [T, J], of the cross pairs.
    """

    table: Tensor
    cross_logits: Tensor


def on_device(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on a device, in one copy."""
    if device.type == "cpu":
        return list(parts)
    # Each has to begin at a multiple of its numbers' size: the widest dtype comes first.
    order = sorted(range(len(parts)), key=lambda k: -parts[k].itemsize)
    flat = torch.cat([parts[k].flatten().view(torch.uint8) for k in order]).to(device)
    pieces = torch.split(flat, [parts[k].numel() * parts[k].itemsize for k in order])
    found = dict(zip(order, pieces, strict=True))
    return [found[k].view(part.dtype).view(part.shape) for k, part in enumerate(parts)]


def merged(requests: Sequence[RowRequest | None], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The requests of rows of some sizes as one, counted over all rows.

    Returns
    -------
    Positions and the keys of their noise, int64 [2, K]; cross pairs, int64 [2, T].
    """
    at, cross_pairs, before, first = [], [], 0, 0
    for request, size in zip(requests, sizes, strict=True):
        if request is not None:
            at.append(torch.stack((first + request.at, request.keys)))
            cross_pairs.append(before + request.cross_pairs)
            before += len(request.at)
        first += size
    return (torch.cat(at, 1), torch.cat(cross_pairs, 1)) if at else (_NOTHING, _NOTHING)


def read_rows(
    model: DiffusionLM,
    requests: Sequence[RowRequest],
    hidden: Tensor,
    at: Tensor,
    cross_pairs: Tensor,
) -> Iterator[Readout]:
    """What each request asks for, in one copy to the host.

    Parameters
    ----------
    hidden
        [query, hidden].
    at, cross_pairs
        As `merged` gives them, on the device.
    """
    rows, keys = at
    logits = model.head(hidden.index_select(0, rows))
    groups = [(rules, list(group)) for rules, group in groupby(requests, attrgetter("rules"))]
    found: list[Tensor] = []
    first = first_pair = 0
    for rules, group in groups:
        count = sum(len(request.at) for request in group)
        pairs = sum(request.cross_pairs.shape[1] for request in group)
        mine = slice(first, first + count)
        own = logits[mine]
        table = rules.table(own, keys[mine] if rules.settings.temperature > 0 else None)
        of, by = cross_pairs[:, first_pair : first_pair + pairs] - first
        cross_logits = own[by[:, None], ids_of(table)[of]].double()
        found += [table, cross_logits.view(torch.int64)]
        first, first_pair = first + count, first_pair + pairs
    flat = torch.cat([part.flatten() for part in found]).cpu()
    pieces = torch.split(flat, [part.numel() for part in found])
    parts = [piece.view(part.shape) for piece, part in zip(pieces, found, strict=True)]
    for (_, group), table, bits in zip(groups, parts[::2], parts[1::2], strict=True):
        tables = torch.split(table, [len(request.at) for request in group])
        pairs_of_each = [request.cross_pairs.shape[1] for request in group]
        yield from map(Readout, tables, torch.split(bits.view(torch.float64), pairs_of_each))
