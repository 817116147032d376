"""Drafts by whichever of several ways would have had most of them accepted lately.

The acceptance model knows what it was fitted to. On other texts it can have fewer drafts accepted
than the graph's nodes, or than the likeliest tokens of the most confident positions. After a walk
it is known which states came true, so of every way it can be said how many of its drafts the walk
would have hopped to, whoever drafted. The way that had most of them drafts next. What is drafted
never changes a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import ne
from threading import Lock

from torch import Tensor

from spiffy.runtime.draft.by_graph import FillSet, GraphDrafter
from spiffy.runtime.draft.candidates import Candidates, Drafter, Walk
from spiffy.runtime.step.canvas import Cursor

_MEMORY = 0.995  # what a comparison keeps of those before it: some 200 count
# Accepted drafts.
_LEAD = 2.0  # by which a way has to be ahead of the one that drafts, to draft itself
_FAR_BEHIND = 4.0  # by which it has to be behind, to be compared more seldom if that is expensive
_MOST_BEHIND = 16.0  # beyond it nothing counts: texts may change, and a way come back
_SELDOM = 4  # walks, of which such a way is compared after one


Filled = list[int]  # tokens [M] at the candidates' positions, by rank


@dataclass
class Standing:
    """Who drafts, by what each way would have had accepted.

    Attributes
    ----------
    ahead
        By way: accepted drafts more than those of the one that drafts, slowly forgotten, and
        never fewer than `_MOST_BEHIND` fewer.
    leader
        Which one that is; at first the first one.
    walks
        Seen so far.
    """

    ahead: list[float]
    leader: int = 0
    walks: int = 0
    lock: Lock = field(default_factory=Lock, compare=False, repr=False)  # threads share it

    def is_due(self, way: int) -> bool:
        """Whether a way that is expensive to compare is compared after the next walk."""
        return self.ahead[way] > -_FAR_BEHIND or (self.walks + 1) % _SELDOM == 0

    def observe(self, accepted: Sequence[int | None]) -> None:
        """Take in how many drafts of a walk each way would have had accepted; None: not compared.

        The walk ends where the leader's drafts do, so no other way can be seen to have more than
        one more accepted.
        """
        self.walks += 1
        led = accepted[self.leader]
        assert led is not None  # the leader has drafted
        self.ahead = [
            before if new is None else max(_MEMORY * before + new - led, -_MOST_BEHIND)
            for before, new in zip(self.ahead, accepted, strict=True)
        ]
        most = max(self.ahead)
        if most > _LEAD:
            self.leader = self.ahead.index(most)
            self.ahead = [ahead - most for ahead in self.ahead]


@dataclass
class BestOfDrafter:
    """Leaves every forward to the way that has done best: a `Chooser`.

    What it has learned holds for all sequences that it drafts for.

    Parameters
    ----------
    ways
        Who may draft; the first one begins. Those by a graph are compared at nearly no cost and do
        with any number of token ranks; others have to draft for that, and say how many there are.
    """

    ways: Sequence[Drafter]
    standing: Standing = field(init=False)

    def __post_init__(self) -> None:
        own = [way.token_ranks for way in self.ways if type(way) is not GraphDrafter]
        self.token_ranks = min(own or [max(way.token_ranks for way in self.ways)])
        self.asks_rejected = any(way.asks_rejected for way in self.ways)
        self.standing = Standing([0.0 for _ in self.ways])

    @property
    def leader(self) -> Drafter:
        """The way that drafts now."""
        return self.ways[self.standing.leader]

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `Drafter`."""
        return self.leader(root, candidates, room)

    def learn(self, walk: Walk) -> None:
        """See `Chooser`."""
        filled = filled_of(walk)
        fills = fills_of(walk, filled)
        with self.standing.lock:
            self.standing.observe(
                [self._accepted(number, walk, filled, fills) for number in range(len(self.ways))]
            )

    def _accepted(
        self, number: int, walk: Walk, filled: Sequence[Filled], fills: Sequence[FillSet]
    ) -> int | None:
        """How many drafts of a way the walk would have come to; None if that is too expensive."""
        way = self.ways[number]
        # Not one that chooses among its nodes, nor one with more of them than a forward carries.
        if type(way) is GraphDrafter and len(way.fills) <= walk.most:
            return _leading(fill in way.fills for fill in fills)
        drafts = walk.drafts
        if way is not walk.led:
            if number != self.standing.leader and not self.standing.is_due(number):
                return None
            drafts = way(walk.root, walk.candidates, walk.room)[: walk.most]
        known = drafts.numpy().take(walk.candidates.positions.numpy(), 1).tolist()
        return _leading(tokens in known for tokens in filled)


def filled_of(walk: Walk) -> list[Filled]:
    """What the states that came true hold at the candidates' positions.

    Up to the first one that changes anything else, or more than a draft may.
    """
    positions = walk.candidates.positions.numpy()
    reached, ids = walk.reached.numpy(), walk.root.ids.numpy()
    others = reached != ids
    others[:, positions] = False
    filled: list[Filled] = reached.take(positions, 1).tolist()
    masked, changed = ids.take(positions).tolist(), others.any(1).tolist()
    sizes = (sum(map(ne, state, masked)) for state in filled)
    few = _leading(
        size <= walk.room and not other for size, other in zip(sizes, changed, strict=True)
    )
    return filled[:few]


def fills_of(walk: Walk, filled: Sequence[Filled]) -> list[FillSet]:
    """Those states in draft coordinates, up to the first one with a token that has none."""
    masked = walk.root.ids.numpy().take(walk.candidates.positions.numpy()).tolist()
    known, fills = walk.candidates.tokens.tolist(), []
    for state in filled:
        fill = [(i, token) for i, token in enumerate(state) if token != masked[i]]
        if any(token not in known[i] for i, token in fill):
            break
        fills.append(frozenset((i, known[i].index(token)) for i, token in fill))
    return fills


def _leading(true: Iterable[bool]) -> int:
    """How many are true before the first that is not."""
    return sum(takewhile(bool, true))
