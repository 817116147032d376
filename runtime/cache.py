"""Where states live in a forward: one class per kind of cache (docs/losslessness.md).

A cache turns "evaluate the root and these drafts" into rows of a forward and back. Its `evaluate`
is a generator that yields rows and is sent their outputs, so that one driver can run the forwards
of many sequences together.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import torch
from spiffy.runtime.canvas import Canvas, Cursor
from spiffy.runtime.models.base import DiffusionLM, KeyValues, block_causal_mask
from spiffy.runtime.pack import Row, RowOutput, Segment, pack
from spiffy.runtime.policy import Distribution
from spiffy.schemas import CacheName
from torch import Tensor


class Evaluation:
    """Hidden states of some states of the sequence; logits on demand, only where needed.

    Attributes
    ----------
    hidden
        [states, window, hidden]; state 0 is the root, the drafts follow.
    first
        Position at which the window starts.
    first_only
        Whether a step from it commits the block's first masked position and nothing else.
    """

    def __init__(
        self, model: DiffusionLM, hidden: Tensor, first: int, first_only: bool = False
    ) -> None:
        self.model = model
        self.hidden = hidden
        self.first = first
        self.first_only = first_only

    def covers(self, block: range) -> bool:
        """Whether the window reaches over the block."""
        return self.first <= block.start and block.stop <= self.first + self.hidden.shape[1]

    def distribution(self, state: int, positions: Tensor) -> Distribution:
        """What one state says about the given masked positions (int64 [M])."""
        rows = self.model.rows_of(positions, self.first)
        return Distribution.of(self.model.head(self.hidden[state, rows]), positions)


Forwards = Generator[list[Row], list[RowOutput], Evaluation]


class Cache(Protocol):
    """One sequence's cache."""

    #: Whether a draft may complete its block, because its forward also covers the next block.
    crosses: bool

    def takes_drafts(self, cursor: Cursor) -> bool:
        """Whether the next forward has room for drafts, or holds the root alone."""
        ...

    def evaluate(self, cursor: Cursor, states: Tensor) -> Forwards:
        """Evaluate the root (row 0 of int64 [states, length]) and its drafts."""
        ...


class NoCache:
    """Every state is a full sequence, one row each. Exact."""

    crosses = True

    def __init__(self, model: DiffusionLM, canvas: Canvas) -> None:
        self.model = model

    def takes_drafts(self, cursor: Cursor) -> bool:
        """Check nothing: any forward can carry more rows."""
        return True

    def evaluate(self, cursor: Cursor, states: Tensor) -> Forwards:
        """See `Cache`."""
        positions = torch.arange(states.shape[1], device=states.device)
        outputs = yield [Row(ids, positions) for ids in states]
        return Evaluation(self.model, torch.stack([output.hidden for output in outputs]), 0)


class DualCache:
    """Fast-dLLM's dual cache: prefix and suffix are frozen while a block is decoded. Exact.

    A block starts with a full forward of the root, which also makes a denoising step; its keys and
    values outside the block are the block's cache. Then the root's block and the drafts' blocks are
    packed side by side: each attends to the frozen positions and to itself.
    """

    crosses = False

    def __init__(self, model: DiffusionLM, canvas: Canvas) -> None:
        self.model = model
        self.canvas = canvas
        self.block = -1
        self.frozen: KeyValues | None = None

    def takes_drafts(self, cursor: Cursor) -> bool:
        """Refuse them in the block's first forward: what they attend to is only computed in it."""
        return self.block == cursor.block

    def evaluate(self, cursor: Cursor, states: Tensor) -> Forwards:
        """See `Cache`."""
        if self.block != cursor.block:
            return (yield from self._refresh(cursor))
        span = self.canvas.span(cursor.block)
        blocks = [Segment(ids, span.start) for ids in states[:, span.start : span.stop]]
        row = pack(blocks, [[k] for k in range(len(blocks))], self.frozen)
        (output,) = yield [row]
        hidden = output.hidden.view(len(blocks), len(span), -1)
        return Evaluation(self.model, hidden, span.start)

    def _frozen_positions(self, span: range, device: torch.device) -> Tensor:
        everything = torch.arange(self.canvas.length, device=device)
        return everything[(everything < span.start) | (everything >= span.stop)]

    def _refresh(self, cursor: Cursor) -> Forwards:
        positions = torch.arange(self.canvas.length, device=cursor.ids.device)
        (output,) = yield [Row(cursor.ids, positions, keep=True)]
        assert output.kept is not None  # asked for above
        span = self.canvas.span(cursor.block)
        self.block = cursor.block
        frozen = self._frozen_positions(span, cursor.ids.device)
        self.frozen = output.kept.select(frozen) if len(frozen) else None
        # A shifted family reads a block's first token one position before the block, which later
        # forwards do not compute: this forward commits that token and nothing else (Fast-dLLM).
        first_only = self.model.family.logit_shift > 0
        return Evaluation(self.model, output.hidden[None], 0, first_only)


class PrefixCache(DualCache):
    """Fast-dLLM's prefix cache: only what precedes the block is frozen. Near-lossless.

    Every forward recomputes the suffix. In a packed forward that happens once, from the root, and
    the drafts attend to the root's suffix: a draft's logits are not exactly those that its own
    forward would give. The root's are exact.
    """

    def _frozen_positions(self, span: range, device: torch.device) -> Tensor:
        return torch.arange(span.start, device=device)

    def evaluate(self, cursor: Cursor, states: Tensor) -> Forwards:
        """See `Cache`."""
        if self.block != cursor.block:
            return (yield from self._refresh(cursor))
        span = self.canvas.span(cursor.block)
        blocks = [Segment(ids, span.start) for ids in states[:, span.start : span.stop]]
        suffix = Segment(cursor.ids[span.stop :], span.stop)
        last = len(blocks)
        sees = [[k, last] for k in range(last)] + [[0, last]]
        (output,) = yield [pack([*blocks, suffix], sees, self.frozen)]
        hidden = output.hidden[: last * len(span)].view(last, len(span), -1)
        return Evaluation(self.model, hidden, span.start)


class BlockCache:
    """SDAR's cache: finished blocks are frozen, each stored by one forward of its own. Exact.

    Blocks count from position 0 of the prompt. Prefill covers the prompt's whole blocks; the rest
    of the prompt opens the first decoded block.
    """

    crosses = False

    def __init__(self, model: DiffusionLM, canvas: Canvas) -> None:
        self.model = model
        self.canvas = canvas
        self.frozen: KeyValues | None = None
        self.stored = 0  # positions that `frozen` covers

    def takes_drafts(self, cursor: Cursor) -> bool:
        """Check nothing: drafts ride behind the frozen prefix in every denoising forward."""
        return True

    def evaluate(self, cursor: Cursor, states: Tensor) -> Forwards:
        """See `Cache`."""
        span = self.canvas.span(cursor.block)
        while self.stored < span.start:
            first = self.stored == 0 and self.canvas.first > 0
            stop = self.canvas.first if first else self.stored + self.canvas.block_length
            yield from self._store(cursor.ids[self.stored : stop])
        blocks = [Segment(ids, span.start) for ids in states[:, span.start : span.stop]]
        (output,) = yield [pack(blocks, [[k] for k in range(len(blocks))], self.frozen)]
        hidden = output.hidden.view(len(blocks), len(span), -1)
        return Evaluation(self.model, hidden, span.start)

    def _store(self, ids: Tensor) -> Generator[list[Row], list[RowOutput], None]:
        positions = torch.arange(self.stored, self.stored + len(ids), device=ids.device)
        among = block_causal_mask(positions, self.canvas.block_length)
        mask = torch.cat((among.new_ones(len(ids), self.stored), among), 1)
        (output,) = yield [Row(ids, positions, mask, self.frozen, keep=True)]
        assert output.kept is not None  # asked for above
        self.frozen = output.kept if self.frozen is None else self.frozen.append(output.kept)
        self.stored += len(ids)


CACHES: dict[CacheName, type[NoCache] | type[DualCache] | type[BlockCache]] = {
    "none": NoCache,
    "dual": DualCache,
    "prefix": PrefixCache,
    "block": BlockCache,
}
