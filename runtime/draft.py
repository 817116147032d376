"""From a draft graph and a distribution to draft states.

Draft coordinates (paper section 4): take the prediction that produced the root. Position rank 0 is
its best-scored position among those the root still masks; token rank 0 is its most likely token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spiffy.runtime.canvas import Cursor
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.policy import Distribution, choose
from spiffy.schemas import DecodingSettings


@dataclass(frozen=True)
class Candidates:
    """A distribution in draft coordinates.

    Attributes
    ----------
    positions
        int64 [M], positions of the sequence by rank.
    tokens
        int64 [M, J], the most likely tokens of each position by rank.
    """

    positions: Tensor
    tokens: Tensor


def rank_candidates(
    distribution: Distribution, settings: DecodingSettings, mask_token_id: int, token_ranks: int
) -> Candidates:
    """Rank positions by score and tokens by probability; ties to the lower position, lower id."""
    _, score = choose(distribution, settings, mask_token_id)
    order = score.sort(descending=True, stable=True).indices
    log_p = distribution.log_p[order]
    log_p[:, mask_token_id] = -torch.inf
    top = log_p.topk(min(token_ranks, log_p.shape[-1] - 1), dim=-1)
    by_id = top.indices.sort(dim=-1)  # topk leaves the order of equals open
    values = top.values.gather(-1, by_id.indices)
    ranks = values.sort(dim=-1, descending=True, stable=True).indices
    return Candidates(distribution.positions[order], by_id.values.gather(-1, ranks))


class Drafter(Protocol):
    """Proposes future states; whatever it proposes, the tokens decoded stay the same."""

    def __call__(self, root: Cursor, origin: Distribution, room: int) -> Tensor:
        """Draft states int64 [n, length] for the root.

        `origin` is the distribution that produced the root, at the positions that the root still
        masks; a draft may fill at most `room` of them.
        """
        ...


class GraphDrafter:
    """Drafts the states that a static graph lists, best first, as far as `budget` goes.

    Parameters
    ----------
    fills
        Draft nodes, each a set of (position rank, token rank) pairs, ranks >= 0. Any will do: bad
        ones cost positions, never tokens.
    """

    def __init__(
        self,
        fills: Sequence[Sequence[tuple[int, int]]],
        settings: DecodingSettings,
        model: DiffusionLM,
    ) -> None:
        self.settings = settings
        self.mask_token_id = model.mask_token_id
        fills = [fill for fill in fills if fill]  # filling in nothing is the root itself
        width = max((len(fill) for fill in fills), default=1)
        # Short fills repeat their first pair: writing a token twice changes nothing.
        padded = [[*fill, *([fill[0]] * (width - len(fill)))] for fill in fills]
        pairs = torch.tensor(padded, dtype=torch.long, device=model.device)
        self.position_ranks, self.token_ranks = pairs.reshape(-1, width, 2).unbind(-1)
        self.sizes = torch.tensor([len(fill) for fill in fills], device=model.device)
        self.ranked = max((j for fill in fills for _, j in fill), default=0) + 1

    def __call__(self, root: Cursor, origin: Distribution, room: int) -> Tensor:
        """See `Drafter`; nodes that need ranks which do not exist here are left out."""
        if not len(self.sizes) or not len(origin.positions):
            return root.ids.new_empty((0, len(root.ids)))
        candidates = rank_candidates(origin, self.settings, self.mask_token_id, self.ranked)
        masked, ranked = candidates.tokens.shape
        active = (
            (self.sizes <= room)
            & (self.position_ranks.amax(1) < masked)
            & (self.token_ranks.amax(1) < ranked)
        )
        i, j = self.position_ranks[active], self.token_ranks[active]
        states = root.ids.repeat(len(i), 1)
        return states.scatter_(1, candidates.positions[i], candidates.tokens[i, j])
