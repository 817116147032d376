"""Where states live in a forward: one class per kind of cache (docs/losslessness.md).

A cache turns "evaluate the root and these drafts" into rows of a forward and back. Its `evaluate`
is a generator that yields rows and is sent their outputs, so that one driver can run the forwards
of many sequences together.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from spiffy.runtime.forward.evaluation import Evaluation, Window
from spiffy.runtime.forward.pack import Row, RowOutput, Segment, pack
from spiffy.runtime.forward.request import Place, Reader
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.slots import KeyValues, Slots
from spiffy.runtime.step.canvas import Canvas, Cursor
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


NO_EDGES = BlockEdges(complete=False, first=False, fold=False)

Forwards = Generator[list[Row], list[RowOutput], Evaluation]


class OverflowedError(Exception):
    """A draft's numbers overflowed, and took along those of the states that share its row."""


def _evaluated(
    model: DiffusionLM,
    reader: Reader,
    cursor: Cursor,
    states: Tensor,
    rows: list[Row],
    places: Sequence[Place],
) -> Forwards:
    """Yield the rows of the forward that holds the states; returns their `Evaluation`.

    Off the host, what may be read of the states is requested with the rows.

    Raises
    ------
    OverflowedError
        If there is no telling what the root's numbers are without the drafts in its row: attention
        gives no weight to what is masked, but any weight times NaN is NaN.
    """
    plan = None
    if not reader.on_host:
        plan = reader.plan(cursor, states, places)
        rows = plan.attach(rows)
    outputs = yield rows
    windows = [
        Window(outputs[row].hidden, first, start, length) for row, first, start, length in places
    ]
    results = None if plan is None else plan.collect(outputs)
    evaluation = Evaluation(model, windows, reader, results)
    if len(places) > 1 and places[1].row == places[0].row and not evaluation.knows_root():
        for row in rows:
            if isinstance(row.kv, KeyValues):
                row.kv.clear(row.slots)
        raise OverflowedError
    return evaluation


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

    def __init__(
        self,
        model: DiffusionLM,
        canvas: Canvas,
        edges: BlockEdges,
        reader: Reader,
        kv: Slots | None = None,
    ) -> None:
        self.model = model
        self.reader = reader
        self.crosses = edges.complete

    def first_only(self, cursor: Cursor) -> bool:
        """Never: every position is computed."""
        return False

    def takes_drafts(self, cursor: Cursor) -> bool:
        """Check nothing: any forward can carry more rows."""
        return True

    def evaluate(self, cursor: Cursor, states: Tensor, drafting: bool) -> Forwards:
        """See `Cache`."""
        length = states.shape[1]
        positions = torch.arange(length, device="cpu")
        rows = [Row(ids, positions) for ids in states]
        places = [Place(k, 0, 0, length) for k in range(len(rows))]
        return (yield from _evaluated(self.model, self.reader, cursor, states, rows, places))

    def settle(self, state: int, cursor: Cursor) -> None:
        """Keep nothing."""


class DualCache:
    """Fast-dLLM's dual cache: prefix and suffix are frozen while a block is decoded. Exact.

    A block starts with a full forward of the root, which also makes a denoising step; its keys and
    values outside the block are the block's cache. Then the root's block and the drafts' blocks are
    packed side by side: each attends to the frozen positions and to itself. The root's keys and
    values go to the block's slots, those of drafts behind the sequence.

    No draft crosses a block's edge: the next block's cache takes a full forward.
    """

    crosses = False

    def __init__(
        self,
        model: DiffusionLM,
        canvas: Canvas,
        edges: BlockEdges,
        reader: Reader,
        kv: Slots | None = None,
    ) -> None:
        self.model = model
        self.canvas = canvas
        self.reader = reader
        self.block = -1
        self.kv: Slots = KeyValues(canvas.length) if kv is None else kv

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
        span, length = self.canvas.span(cursor.block), self.canvas.length
        run = self._recomputed(span)
        segments = [
            Segment(ids, run.start, length + (k - 1) * len(run) if k else run.start)
            for k, ids in enumerate(states.numpy()[:, run.start : run.stop])
        ]
        rows = [pack(segments, [[k] for k in range(len(segments))], self.kv, length)]
        # They end with the block: what lies behind it rests on this block's cache, and the next
        # block has another.
        places = [Place(0, k * len(run), span.start, len(span)) for k in range(len(segments))]
        return (yield from _evaluated(self.model, self.reader, cursor, states, rows, places))

    def settle(self, state: int, cursor: Cursor) -> None:
        """Keep nothing: the block's cache does not change until the next block."""

    def _recomputed(self, span: range) -> range:
        """What a block's forwards compute anew, the block (`span`) first; the rest is frozen."""
        return span

    def _refresh(self, cursor: Cursor) -> Forwards:
        length = self.canvas.length
        everything = (range(length),)
        positions = torch.arange(length, device="cpu")
        rows = [Row(cursor.ids, positions, None, self.kv, everything, length)]
        evaluation = yield from _evaluated(
            self.model, self.reader, cursor, cursor.ids[None], rows, [Place(0, 0, 0, length)]
        )
        self.block = cursor.block
        return evaluation


class PrefixCache(DualCache):
    """Fast-dLLM's prefix cache: only what precedes the block is frozen. Exact.

    Every forward computes the suffix anew, and the suffix attends to the block, so it differs from
    state to state: each carries its own behind its block.
    """

    def _recomputed(self, span: range) -> range:
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
        span, length = self.canvas.span(cursor.block), self.canvas.length
        blocks = [
            Segment(ids, span.start, length + (k - 1) * len(span) if k else span.start)
            for k, ids in enumerate(states.numpy()[:, span.start : span.stop])
        ]
        suffix = Segment(cursor.ids.numpy()[span.stop :], span.stop, span.stop)
        count = len(blocks)  # the suffix, behind them, attends to the root's block and to itself
        sees = [[k, count] for k in range(count)] + [[0, count]]
        rows = [pack([*blocks, suffix], sees, self.kv, length)]
        places = [Place(0, k * len(span), span.start, len(span)) for k in range(count)]
        return (yield from _evaluated(self.model, self.reader, cursor, states, rows, places))


class BlockCache:
    """SDAR's cache: finished blocks are frozen, the current one is recomputed. Exact.

    Where blocks lie is the canvas's business. Finished blocks that are not stored yet ride in front
    of the root in the next denoising forward (`BlockEdges.fold`), or get a forward of their own. A
    state that completes its block carries the next block's masks behind it; if it comes true, the
    block is already stored. A family whose blocks begin with a token of the forward that stores the
    block before (Fast-dLLM v2) needs that forward, and no masks behind: the block's own last
    position speaks of the next one.
    """

    def __init__(
        self,
        model: DiffusionLM,
        canvas: Canvas,
        edges: BlockEdges,
        reader: Reader,
        kv: Slots | None = None,
    ) -> None:
        self.model = model
        self.canvas = canvas
        self.reader = reader
        self.crosses = edges.complete
        self.fold = edges.fold
        self.kv: Slots = KeyValues(canvas.length) if kv is None else kv
        self.stored = 0  # positions whose keys and values stay
        self.completed: dict[int, range] = {}  # state -> slots of the block that it completes
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
        self.block, self.completed = cursor.block, {}
        begins = self.first_only(cursor)
        # The forward that begins a block alone is the one that stores the block before.
        waiting = yield from self._store_apart(cursor, everything=not (self.fold or begins))
        if begins:
            rows = [self._packed(waiting, _causal(len(waiting)))]
            states, places = cursor.ids[None], [Place(0, 0, waiting[0].start, len(rows[0].ids))]
        else:
            follows = drafting and self.crosses and cursor.block + 1 < self.canvas.blocks
            segments, sees, places = self._laid_out(waiting, cursor, states, follows)
            rows = [self._packed(segments, sees)]
        evaluation = yield from _evaluated(self.model, self.reader, cursor, states, rows, places)
        self.stored = self.canvas.span(cursor.block).start
        return evaluation

    def settle(self, state: int, cursor: Cursor) -> None:
        """Store the block that the state completes, if the walk stepped on from behind it."""
        if state in self.completed and cursor.block > self.block:
            if state:  # the root's is there already
                self.kv.move(self.completed[state], self.stored)
            self.stored += len(self.completed[state])
        self.completed = {}

    def _waiting(self, cursor: Cursor) -> list[Segment]:
        """Blocks before the cursor's that are not stored yet."""
        blocks = self.canvas.attention_blocks(self.stored, self.canvas.span(cursor.block).start)
        ids = cursor.ids.numpy()
        return [Segment(ids[b.start : b.stop], b.start, b.start) for b in blocks]

    def _store_apart(
        self, cursor: Cursor, everything: bool
    ) -> Generator[list[Row], list[RowOutput], list[Segment]]:
        """Store finished blocks in forwards of their own.

        Not `everything`: only what is too long for the forward that they ride in. Returns the
        blocks that are left for that one.
        """
        waiting = self._waiting(cursor)
        # A long prompt goes in parts.
        while len(waiting) > 1 and sum(len(block.ids) for block in waiting) > _MOST_STORED:
            ends = accumulate(len(block.ids) for block in waiting)
            part = max(1, sum(end <= _MOST_STORED for end in ends))
            yield from self._store(waiting[:part])
            waiting = waiting[part:]
        if not everything:
            return waiting
        prompt = sum(block.start < self.canvas.first for block in waiting)
        if prompt:
            yield from self._store(waiting[:prompt])
        for block in waiting[prompt:]:
            yield from self._store([block])
        return []

    def _store(self, blocks: Sequence[Segment]) -> Generator[list[Row], list[RowOutput], None]:
        """Compute finished blocks' keys and values in one forward."""
        yield [self._packed(blocks, _causal(len(blocks)))]
        self.stored += sum(len(block.ids) for block in blocks)

    def _laid_out(
        self, waiting: Sequence[Segment], cursor: Cursor, states: Tensor, follows: bool
    ) -> tuple[list[Segment], list[list[int]], list[Place]]:
        """Segments of a forward over some states, what each attends to, and where the states lie.

        In front are the blocks that wait to be stored; then each state's block, with `follows` the
        next block's masks behind those that complete theirs. Notes the latter in `completed`.
        """
        span = self.canvas.span(cursor.block)
        segments, sees = list(waiting), _causal(len(waiting))
        before = list(range(len(waiting)))
        of_states = states.numpy()[:, span.start : span.stop]
        complete = (of_states != self.model.mask_token_id).all(1).tolist()
        first = sum(len(segment.ids) for segment in segments)
        slot = span.start  # the root's block goes where it belongs, what follows behind it
        places: list[Place] = []
        for state, block in enumerate(of_states):
            segments.append(Segment(block, span.start, slot))
            sees.append([*before, len(sees)])
            length = len(span)
            if complete[state] and follows:
                self.completed[state] = range(slot, slot + length)
                if not self.model.family.begins_blocks_alone:
                    following = self.canvas.span(cursor.block + 1)
                    ids = states.numpy()[state, following.start : following.stop]
                    segments.append(Segment(ids, following.start, slot + length))
                    sees.append([*before, len(sees) - 1, len(sees)])
                    length += len(following)
            places.append(Place(0, first, span.start, length))
            first, slot = first + length, slot + length
        return segments, sees, places

    def _packed(self, segments: Sequence[Segment], sees: Sequence[Sequence[int]]) -> Row:
        return pack(segments, sees, self.kv, self.stored)


def _causal(blocks: int) -> list[list[int]]:
    """Each block sees itself and those before it."""
    return [list(range(block + 1)) for block in range(blocks)]


# Beyond these many positions per forward drafts never pay, and memory may end (docs/trust.md).
_MOST_STACKED = 1 << 17  # rows of whole sequences
_MOST_PACKED = 1 << 13  # in one row: the attention mask has them times these and the prefix
_MOST_STORED = 1 << 11  # of a prompt, in blocks that see those before: their mask has the square


def most_drafts(settings: DecodingSettings, canvas: Canvas) -> int:
    """Drafts that a forward may carry, however many a graph holds; at least one.

    By the first block's forwards, which no other block's are longer than. With `BlockCache` every
    draft may complete its block, and then carries the next one too.
    """
    if settings.cache == "none":
        return max(1, _MOST_STACKED // canvas.length)
    if settings.cache == "block":
        return max(1, _MOST_PACKED // (2 * canvas.block_length))
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
