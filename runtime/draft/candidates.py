"""From the distribution that produced a root to draft coordinates, and what a drafter is.

Draft coordinates (paper section 4): take the prediction that produced the root. Position rank 0 is
its best-scored position among those the root still masks; token rank 0 is its most likely token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from spiffy.runtime.draft.outlook import Rejected
from spiffy.runtime.draft.search import IN_NUMPY, Search, fastest_search
from spiffy.runtime.step.canvas import Cursor
from spiffy.runtime.step.reading import Reading
from spiffy.schemas import DecodingSettings
from spiffy.schemas.records import MAX_NODES

#: Who chooses the drafts of a forward: the acceptance model, or the order of the graph's nodes.
Selection = Literal["model", "graph"]


@dataclass(frozen=True)
class Candidates:
    """A root's masked positions in draft coordinates, and what is known about them; on the host.

    Attributes
    ----------
    positions
        int64 [M], positions of the sequence by rank.
    tokens
        int64 [M, J], the most likely tokens of each position by rank.
    log_p
        float64 [M, J], their log-probabilities.
    fresh
        int64 [k], positions whose tokens in the root the distribution has not seen: it comes from
        a state before the root.
    rejected
        What drafts say that the walk has not come to; None where none is asked.
    """

    positions: Tensor
    tokens: Tensor
    log_p: Tensor
    fresh: Tensor
    rejected: Rejected | None = None


def rank_candidates(
    reading: Reading,
    settings: DecodingSettings,
    mask_token_id: int,
    token_ranks: int,
    masked: Tensor | None = None,
    fresh: Tensor | None = None,
    search: Search = IN_NUMPY,
) -> Candidates:
    """Rank positions by score and tokens by probability; ties to the lower position, lower id.

    `masked` (int64 [M], ascending, default: all) are those of the reading's positions that the
    root still masks; `fresh` those whose tokens the distribution has not seen.
    """
    log_p, tokens = reading.top(token_ranks + 1)
    # The score may be a drawn token's.
    by_token = (
        settings.policy in ("static", "threshold", "joint") and settings.score == "confidence"
    )
    ranked = search.rank(
        reading.positions.numpy(),
        tokens.numpy(),
        log_p.numpy(),
        reading.score.numpy(),
        (reading.positions if masked is None else masked).numpy(),
        mask_token_id,
        min(token_ranks, tokens.shape[1] - 1),
        by_token,
    )
    where, which, likely = map(torch.from_numpy, ranked)
    return Candidates(where, which, likely, reading.positions[:0] if fresh is None else fresh)


class Drafter(Protocol):
    """Proposes future states; whatever it proposes, the tokens decoded stay the same."""

    #: How many tokens of each position it wants to know.
    token_ranks: int
    #: Whether it wants to know what rejected drafts say.
    asks_rejected: bool

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """Draft states int64 [n, length] for the root.

        `candidates` are the root's masked positions as the distribution before it saw them; a
        draft may fill at most `room` of them.
        """
        ...


def search_of(drafter: Drafter) -> Search:
    """What ranks a drafter's candidates: nothing is compiled for one that needs nothing else of it.

    That goes by `asks_rejected`, because whoever asks needs compiled functions for the asking.
    """
    return fastest_search() if drafter.asks_rejected else IN_NUMPY


@dataclass(frozen=True)
class Walk:
    """A walk, and what its drafter was told; on the host.

    Attributes
    ----------
    led
        Who drafted.
    root, candidates, room
        What it was told: see `Drafter`.
    drafts
        int64 [n, length] that were verified.
    reached
        int64 [s, length], the true states that followed, each once; no walk knows of more.
    most
        Drafts that memory allowed.
    """

    led: Drafter
    root: Cursor
    candidates: Candidates
    room: int
    drafts: Tensor
    reached: Tensor
    most: int = MAX_NODES


@runtime_checkable
class Chooser(Drafter, Protocol):
    """A drafter that leaves every forward to another one, and learns from walks to which."""

    @property
    def leader(self) -> Drafter:
        """Who is to draft the next forward, from candidates that this one asks for."""
        ...

    def learn(self, walk: Walk) -> None:
        """Take in what came true."""
        ...
