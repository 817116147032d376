"""Where states live in a forward: one class per kind of cache (docs/losslessness.md).

A cache turns "evaluate the root and these drafts" into rows of a forward and back. Its `evaluate`
is a generator that yields rows and is sent their outputs, so that one driver can run the forwards
of many sequences together.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spiffy.runtime.forward.pack import Row, RowOutput, Segment, pack
from spiffy.runtime.models.base import DiffusionLM, KeyValues
from spiffy.runtime.step.canvas import Canvas, Cursor
from spiffy.runtime.step.policy import Distribution
from spiffy.schemas import CacheName, DecodingSettings


@dataclass(frozen=True)
class BlockEdges:
    """What may happen where one block ends and the next begins; never a matter of tokens.

    Attributes
    ----------
    complete
        Drafts may complete their block, where a forward can then also tell about the next one.
    first
        A block's first forward may carry drafts, where something is known about the block: with
        `NoCache` always but at the very start, with `BlockCache` from a rejected draft that
        completed the block before (so it needs `complete` there), with the others never.
    fold
        Finished blocks (and the prompt's) are stored by the next denoising forward instead of one
        of their own, as the official loop does. Only `BlockCache` stores blocks.
    """

    complete: bool = True
    first: bool = True
    fold: bool = True


class Window(NamedTuple):
    """Hidden states [positions, hidden] of one state, from position `start` on."""

    hidden: Tensor
    start: int

    def covers(self, span: range) -> bool:
        """Whether it reaches over all positions of `span`."""
        return self.start <= span.start and span.stop <= self.start + len(self.hidden)


@dataclass(frozen=True)
class Evaluation:
    """What a forward says about the root (state 0) and the drafts; logits only on demand.

    Attributes
    ----------
    foreseen
        Positions and logits [M, vocab] by state, of those passed through the head beforehand.
    """

    model: DiffusionLM
    windows: Sequence[Window]
    foreseen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def distribution(self, state: int, positions: Tensor) -> Distribution:
        """What one state says about the given masked positions (int64 [M])."""
        known = self.foreseen.get(state)
        if known is not None and torch.equal(known[0], positions):
            return Distribution.of(known[1], positions)
        return Distribution.of(self.model.head(self._hidden(state, positions)), positions)

    def foresee(self, asked: Mapping[int, Tensor]) -> None:
        """Pass several states through the output head at once, because they may be asked about.

        Reading a large head costs more than multiplying a few rows more with it.

        Parameters
        ----------
        asked
            Masked positions (int64 [M]) by state.
        """
        hidden = [self._hidden(state, positions) for state, positions in asked.items()]
        logits = torch.split(self.model.head(torch.cat(hidden)), [len(part) for part in hidden])
        for (state, positions), part in zip(asked.items(), logits, strict=True):
            self.foreseen[state] = positions, part

    def _hidden(self, state: int, positions: Tensor) -> Tensor:
        """Hidden states [M, hidden] that speak of positions."""
        window = self.windows[state]
        return window.hidden[self.model.rows_of(positions, window.start)]

    def logits_of(
        self, states: Sequence[int], positions: Tensor, tokens: Tensor
    ) -> NDArray[np.float64] | None:
        """What states say about some tokens (int64 [M, J]) of positions (int64 [M]).

        Returns
        -------
        [states, M, J], or None where the model has no such short way.
        """
        windows = [self.windows[state] for state in states]
        rows = {start: self.model.rows_of(positions, start) for _, start in windows}
        hidden = torch.stack([window.hidden[rows[window.start]] for window in windows])
        logits = self.model.head_of(hidden, tokens)
        return None if logits is None else logits.double().cpu().numpy()


Forwards = Generator[list[Row], list[RowOutput], Evaluation]


class Cache(Protocol):
    """One sequence's cache."""

    #: Whether a draft may complete its block, because its forward then tells about the next one.
    crosses: bool

    def first_only(self, cursor: Cursor) -> bool:
        """Whether the next step commits the block's first position and nothing else."""
        ...

    def takes_drafts(self, cursor: Cursor) -> bool:
        """Whether the next forward has room for drafts, or holds the root alone."""
        ...

    def evaluate(self, cursor: Cursor, states: Tensor, drafting: bool) -> Forwards:
        """Evaluate the root (row 0 of int64 [states, length]) and its drafts.

        Only with `drafting` may a forward compute more than these states need, to tell what follows
        one that completes its block.
        """
        ...

    def settle(self, state: int, cursor: Cursor) -> None:
        """Learn at which of the evaluated states the walk ended: the last one it stepped from."""
        ...


class NoCache:
    """Every state is a full sequence, one row each. Exact."""

    def __init__(self, model: DiffusionLM, canvas: Canvas, edges: BlockEdges) -> None:
        self.model = model
        self.crosses = edges.complete

    def first_only(self, cursor: Cursor) -> bool:
        """Never: every position is computed."""
        return False

    def takes_drafts(self, cursor: Cursor) -> bool:
        """Check nothing: any forward can carry more rows."""
        return True

    def evaluate(self, cursor: Cursor, states: Tensor, drafting: bool) -> Forwards:
        """See `Cache`."""
        positions = torch.arange(states.shape[1], device=states.device)
        outputs = yield [Row(ids, positions) for ids in states]
        return Evaluation(self.model, [Window(output.hidden, 0) for output in outputs])

    def settle(self, state: int, cursor: Cursor) -> None:
        """Keep nothing."""


class DualCache:
    """Fast-dLLM's dual cache: prefix and suffix are frozen while a block is decoded. Exact.

    A block starts with a full forward of the root, which also makes a denoising step; its keys and
    values outside the block are the block's cache. Then the root's block and the drafts' blocks are
    packed side by side: each attends to the frozen positions and to itself.

    No draft crosses a block's edge: the next block's cache takes a full forward.
    """

    crosses = False

    def __init__(self, model: DiffusionLM, canvas: Canvas, edges: BlockEdges) -> None:
        self.model = model
        self.canvas = canvas
        self.block = -1
        self.frozen: KeyValues | None = None

    def first_only(self, cursor: Cursor) -> bool:
        """Whether a shifted family begins a block (Fast-dLLM).

        It reads the block's first token one position before the block, which only the block's first
        forward computes.
        """
        return self.model.family.logit_shift > 0 and cursor.block_step == 0

    def takes_drafts(self, cursor: Cursor) -> bool:
        """Refuse them in the block's first forward: what they attend to is only computed in it."""
        return self.block == cursor.block

    def evaluate(self, cursor: Cursor, states: Tensor, drafting: bool) -> Forwards:
        """See `Cache`."""
        if self.block != cursor.block:
            return (yield from self._refresh(cursor))
        span = self.canvas.span(cursor.block)
        anew = self._anew(span)
        own = [Segment(ids, anew.start) for ids in states[:, anew.start : anew.stop]]
        (output,) = yield [pack(own, [[k] for k in range(len(own))], self.frozen)]
        # Windows end with the block: what lies behind it rests on this block's cache, and the next
        # block has another.
        hidden = output.hidden.view(len(own), len(anew), -1)[:, : len(span)]
        return Evaluation(self.model, [Window(h, span.start) for h in hidden])

    def settle(self, state: int, cursor: Cursor) -> None:
        """Keep nothing: the block's cache does not change until the next block."""

    def _anew(self, span: range) -> range:
        """What a block's forwards compute anew, the block (`span`) first; the rest is frozen."""
        return span

    def _refresh(self, cursor: Cursor) -> Forwards:
        positions = torch.arange(self.canvas.length, device=cursor.ids.device)
        (output,) = yield [Row(cursor.ids, positions, keep=True)]
        assert output.kept is not None  # asked for above
        self.block = cursor.block
        anew = self._anew(self.canvas.span(cursor.block))
        frozen = positions[(positions < anew.start) | (positions >= anew.stop)]
        self.frozen = output.kept.select(frozen) if len(frozen) else None
        return Evaluation(self.model, [Window(output.hidden, 0)])


class PrefixCache(DualCache):
    """Fast-dLLM's prefix cache: only what precedes the block is frozen. Exact.

    Every forward computes the suffix anew, and the suffix attends to the block, so it differs from
    state to state: each carries its own behind its block.
    """

    def _anew(self, span: range) -> range:
        return range(span.start, self.canvas.length)


class PrefixSharedCache(PrefixCache):
    """The prefix cache with one suffix for all states. Near-lossless.

    The suffix is computed once, from the root, and the drafts attend to the root's: a draft's
    logits are not exactly those that its own forward would give. The root's are exact. A draft
    costs its block alone.
    """

    def evaluate(self, cursor: Cursor, states: Tensor, drafting: bool) -> Forwards:
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
        return Evaluation(self.model, [Window(h, span.start) for h in hidden])


class BlockCache:
    """SDAR's cache: finished blocks are frozen, the current one is recomputed. Exact.

    Where blocks lie is the canvas's business. Finished blocks that are not stored yet ride in front
    of the root in the next denoising forward (`BlockEdges.fold`), or get a forward of their own. A
    state that completes its block carries the next block's masks behind it; if it comes true, the
    block is already stored. A family whose blocks begin with a token of the forward that stores the
    block before (Fast-dLLM v2) needs that forward, and no masks behind: the block's own last
    position speaks of the next one.
    """

    def __init__(self, model: DiffusionLM, canvas: Canvas, edges: BlockEdges) -> None:
        self.model = model
        self.canvas = canvas
        self.crosses = edges.complete
        self.fold = edges.fold
        self.frozen: KeyValues | None = None
        self.stored = 0  # positions that `frozen` covers
        self.kept: KeyValues | None = None  # of the last forward's segments
        self.completed: dict[int, range] = {}  # state -> where `kept` holds the block it completes
        self.block = 0  # of the last forward's root

    def first_only(self, cursor: Cursor) -> bool:
        """Whether the family begins the block, and not the prompt's tail."""
        begins = cursor.block_step == 0 and self.model.family.begins_blocks_alone
        return begins and self.canvas.span(cursor.block).start >= self.canvas.prompt_length

    def takes_drafts(self, cursor: Cursor) -> bool:
        """Allow them in all forwards that hold the block: they ride behind the frozen prefix."""
        return not self.first_only(cursor)

    def evaluate(self, cursor: Cursor, states: Tensor, drafting: bool) -> Forwards:
        """See `Cache`."""
        span = self.canvas.span(cursor.block)
        waiting = self._waiting(cursor)
        self.block, self.completed = cursor.block, {}
        if self.first_only(cursor):
            (output,) = yield [pack(waiting, _causal(len(waiting)), self.frozen, keep=True)]
            self._store(output.kept, range(len(output.hidden)))
            return Evaluation(self.model, [Window(output.hidden, waiting[0].start)])
        if not self.fold:
            prompt = sum(block.start < self.canvas.first for block in waiting)
            for blocks in (waiting[:prompt], *([b] for b in waiting[prompt:])):
                if blocks:
                    (output,) = yield [pack(blocks, _causal(len(blocks)), self.frozen, keep=True)]
                    self._store(output.kept, range(len(output.hidden)))
            waiting = []

        segments, sees = list(waiting), _causal(len(waiting))
        before = list(range(len(waiting)))
        of_states = states[:, span.start : span.stop]
        complete = (of_states != self.model.mask_token_id).all(-1).tolist()
        follows = drafting and self.crosses and cursor.block + 1 < self.canvas.blocks
        start = sum(len(segment.ids) for segment in segments)
        runs: list[range] = []  # where each state's positions lie in the row
        for state, block in enumerate(of_states.unbind()):
            segments.append(Segment(block, span.start))
            sees.append([*before, len(sees)])
            stop = start + len(span)
            if complete[state] and follows:
                self.completed[state] = range(start, stop)
                if not self.model.family.begins_blocks_alone:
                    following = self.canvas.span(cursor.block + 1)
                    ids = states[state, following.start : following.stop]
                    segments.append(Segment(ids, following.start))
                    sees.append([*before, len(sees) - 1, len(sees)])
                    stop += len(following)
            runs.append(range(start, stop))
            start = stop

        keep = bool(waiting or self.completed)
        (output,) = yield [pack(segments, sees, self.frozen, keep)]
        self.kept = output.kept
        if waiting:
            self._store(output.kept, range(sum(len(block.ids) for block in waiting)))
        hidden = [output.hidden[run.start : run.stop] for run in runs]
        return Evaluation(self.model, [Window(part, span.start) for part in hidden])

    def settle(self, state: int, cursor: Cursor) -> None:
        """Store the block that the state completes, if the walk stepped on from behind it."""
        if state in self.completed and cursor.block > self.block:
            self._store(self.kept, self.completed[state])
        self.kept = None
        self.completed = {}

    def _waiting(self, cursor: Cursor) -> list[Segment]:
        """Blocks before the cursor's that are not stored yet."""
        blocks = self.canvas.attention_blocks(self.stored, self.canvas.span(cursor.block).start)
        return [Segment(cursor.ids[block.start : block.stop], block.start) for block in blocks]

    def _store(self, kept: KeyValues | None, positions: range) -> None:
        assert kept is not None  # the row asked for them
        ours = kept.narrow(positions)
        self.frozen = ours if self.frozen is None else self.frozen.append(ours)
        self.stored += len(positions)


def _causal(blocks: int) -> list[list[int]]:
    """Each block sees itself and those before it."""
    return [list(range(block + 1)) for block in range(blocks)]


# Beyond these many positions per forward drafts never pay, and memory may end (docs/trust.md).
_MOST_STACKED = 1 << 17  # rows of whole sequences
_MOST_PACKED = 1 << 13  # in one row: the attention mask has the square of it


def most_drafts(settings: DecodingSettings, canvas: Canvas) -> int:
    """Drafts that a forward may carry, however many a graph holds; at least one.

    By the first block's forwards, which no other block's are longer than.
    """
    if settings.cache == "none":
        return max(1, _MOST_STACKED // canvas.length)
    suffix = canvas.length - canvas.span(0).stop
    if settings.cache == "prefix":
        return max(1, _MOST_PACKED // (canvas.block_length + suffix))
    shared = suffix if settings.cache == "prefix-shared" else 0
    return max(1, (_MOST_PACKED - shared) // canvas.block_length)


CACHES: dict[CacheName, type[NoCache] | type[DualCache] | type[BlockCache]] = {
    "none": NoCache,
    "dual": DualCache,
    "prefix": PrefixCache,
    "prefix-shared": PrefixSharedCache,
    "block": BlockCache,
}
