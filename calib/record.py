"""Recording plain decodes: every true state, and what was known at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from spiffy.graphs import Chain, Fill, Prompt
from spiffy.runtime.decode import Task
from spiffy.runtime.draft import Candidates
from spiffy.runtime.draft.acceptance import TOKEN_RANKS
from spiffy.runtime.draft.ngrams import Ints
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas.records import MAX_RANK

# Deeper futures are never worth a draft (docs/calibration.md).
MAX_DEPTH = 12


def spread(count: int, most: int) -> Sequence[int]:
    """Up to `most` of the numbers below `count`, evenly."""
    return range(count) if count <= most else [k * count // most for k in range(most)]


@dataclass(frozen=True)
class Root:
    """What a drafter was told at a root: see `spiffy.runtime.draft.Drafter`."""

    candidates: Candidates
    room: int


def narrowed(candidates: Candidates, token_ranks: int) -> Candidates:
    """As many tokens of each position as a drafter asks for."""
    return Candidates(
        candidates.positions,
        candidates.tokens[:, :token_ranks],
        candidates.log_p[:, :token_ranks],
        candidates.fresh,
    )


class Recorder:
    """A drafter that drafts nothing and remembers what it was told."""

    asks_rejected = False

    def __init__(self, token_ranks: int = TOKEN_RANKS) -> None:
        self.token_ranks = token_ranks
        self.roots: dict[int, Root] = {}  # by number of denoising steps made before the root

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `spiffy.runtime.draft.Drafter`."""
        self.roots[root.step] = Root(candidates, room)
        return root.ids.new_empty((0, len(root.ids)))


@dataclass(frozen=True)
class Trace:
    """A plain decode.

    Attributes
    ----------
    path
        The states that a forward was spent on, the first one (prompt and masks) included, and the
        last one. A step that changes nothing (Dream's timesteps, the end of a block that is edited)
        needs none, if a forward tells about the state as it is after it.
    roots
        For every state that a forward was spent on (all but the last) what a drafter was told
        there, or None where a forward has no drafts.
    """

    path: Sequence[Cursor]
    roots: Sequence[Root | None]

    @classmethod
    def of(cls, task: Task) -> Trace:
        """The trace of a finished plain decode whose drafter was a `Recorder`."""
        recorder = task.drafter
        assert isinstance(recorder, Recorder)
        sequence = [task.canvas.start(task.prompt, task.model.mask_token_id), *task.path]
        path = [*(sequence[step] for step in task.roots), sequence[-1]]
        return cls(path, [recorder.roots.get(step) for step in task.roots])

    @classmethod
    def of_failed(cls, task: Task) -> Trace:
        """The trace of a decode that failed: the state that it started from, and no forward."""
        return cls([task.canvas.start(task.prompt, task.model.mask_token_id)], [])

    def narrowed(self, token_ranks: int) -> Trace:
        """As if fewer tokens of each position had been asked for."""
        roots = [
            root and Root(narrowed(root.candidates, token_ranks), root.room) for root in self.roots
        ]
        return Trace(self.path, roots)

    @cached_property
    def chains(self) -> Prompt:
        """The chain of every forward, in draft coordinates."""
        states = np.stack([cursor.ids.cpu().numpy() for cursor in self.path])
        return [_chain(root, states, step) for step, root in enumerate(self.roots)]


def _chain(root: Root | None, states: Ints, step: int) -> Chain | None:
    """From states int64 [states, positions], of which the root is number `step`."""
    if root is None:
        return None
    ranks = {position: rank for rank, position in enumerate(root.candidates.positions.tolist())}
    tokens = root.candidates.tokens.tolist()
    chain: list[Fill] = []
    before: Fill = ()
    for state in states[step + 1 : step + 1 + MAX_DEPTH]:
        fill = _fill(ranks, tokens, states[step], state)
        if fill is None or len(fill) > root.room or not set(before) < set(fill):
            break  # no draft node, or a token of it is replaced
        chain.append(fill)
        before = fill
    return tuple(chain)


def _fill(ranks: dict[int, int], tokens: list[list[int]], before: Ints, after: Ints) -> Fill | None:
    """What was filled in since the root, or None if no draft node can say it."""
    pairs = []
    changed = np.flatnonzero(before != after)  # few, where prompts are long
    for position, new in zip(changed.tolist(), after[changed].tolist(), strict=True):
        rank = ranks.get(position)
        if rank is None or rank > MAX_RANK or new not in tokens[rank]:
            return None
        pairs.append((rank, tokens[rank].index(new)))
    return tuple(sorted(pairs))
