"""From a draft graph and a distribution to draft states.

Draft coordinates (paper section 4): take the prediction that produced the root. Position rank 0 is
its best-scored position among those the root still masks; token rank 0 is its most likely token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from spiffy.runtime.acceptance import (
    TOKEN_RANKS,
    AcceptanceWeights,
    Floats,
    Outlook,
    expand,
)
from spiffy.runtime.canvas import Cursor
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.policy import Distribution, choose
from spiffy.schemas import DecodingSettings

#: Who chooses the drafts of a forward: the acceptance model, or the order of the graph's nodes.
Selection = Literal["model", "graph"]


@dataclass(frozen=True)
class Candidates:
    """A root's masked positions in draft coordinates, and what is known about them.

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
    """

    positions: Tensor
    tokens: Tensor
    log_p: Tensor
    fresh: Tensor


def rank_candidates(
    distribution: Distribution,
    settings: DecodingSettings,
    mask_token_id: int,
    token_ranks: int,
    fresh: Tensor | None = None,
) -> Candidates:
    """Rank positions by score and tokens by probability; ties to the lower position, lower id."""
    _, score = choose(distribution, settings, mask_token_id)
    order = score.sort(descending=True, stable=True).indices
    log_p = distribution.log_p[order]
    log_p[:, mask_token_id] = -torch.inf
    top = log_p.topk(min(token_ranks, log_p.shape[-1] - 1), dim=-1)
    by_id = top.indices.sort(dim=-1)  # topk leaves the order of equals open
    values = top.values.gather(-1, by_id.indices)
    ranked = values.sort(dim=-1, descending=True, stable=True)
    return Candidates(
        distribution.positions[order],
        by_id.values.gather(-1, ranked.indices),
        ranked.values,
        distribution.positions[:0] if fresh is None else fresh,
    )


class Drafter(Protocol):
    """Proposes future states; whatever it proposes, the tokens decoded stay the same."""

    #: How many tokens of each position it wants to know.
    token_ranks: int

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """Draft states int64 [n, length] for the root.

        `candidates` are the root's masked positions as the distribution before it saw them; a
        draft may fill at most `room` of them.
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

    def __init__(self, fills: Sequence[Sequence[tuple[int, int]]], model: DiffusionLM) -> None:
        fills = [fill for fill in fills if fill]  # filling in nothing is the root itself
        width = max((len(fill) for fill in fills), default=1)
        # Short fills repeat their first pair: writing a token twice changes nothing.
        padded = [[*fill, *([fill[0]] * (width - len(fill)))] for fill in fills]
        pairs = torch.tensor(padded, dtype=torch.long, device=model.device)
        self.position_ranks, self.ranks_of_tokens = pairs.reshape(-1, width, 2).unbind(-1)
        self.sizes = torch.tensor([len(fill) for fill in fills], device=model.device)
        self.token_ranks = max((j for fill in fills for _, j in fill), default=0) + 1

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `Drafter`; nodes that need ranks which do not exist here are left out."""
        masked, ranked = candidates.tokens.shape
        if not len(self.sizes) or not masked:
            return root.ids.new_empty((0, len(root.ids)))
        active = (
            (self.sizes <= room)
            & (self.position_ranks.amax(1) < masked)
            & (self.ranks_of_tokens.amax(1) < ranked)
        )
        i, j = self.position_ranks[active], self.ranks_of_tokens[active]
        states = root.ids.repeat(len(i), 1)
        return states.scatter_(1, candidates.positions[i], candidates.tokens[i, j])


class AcceptanceDrafter:
    """Drafts the states that an acceptance model finds most probable at the root at hand.

    Parameters
    ----------
    weights
        The acceptance model.
    budget
        Most drafts per forward.
    pays
        From the probabilities of the drafts (float64 [k], descending) to how many are worth their
        cost; all of them by default.
    """

    token_ranks = TOKEN_RANKS

    def __init__(
        self,
        weights: AcceptanceWeights,
        budget: int,
        model: DiffusionLM,
        settings: DecodingSettings,
        pays: Callable[[Floats], int] = len,
    ) -> None:
        self.weights = weights
        self.budget = budget
        self.pays = pays
        self.block_length = settings.block_length
        self.mask_token_id = model.mask_token_id
        self.eos_token_ids = sorted(model.eos_token_ids)
        self.vocab_size = model.vocab_size

    def outlook(self, root: Cursor, candidates: Candidates) -> Outlook:
        """Lay out the root for the acceptance model."""
        return Outlook.at(
            root.ids.cpu().numpy(),
            candidates.positions.cpu().numpy(),
            candidates.tokens.cpu().numpy(),
            candidates.log_p.cpu().numpy(),
            candidates.fresh.cpu().numpy(),
            block_length=self.block_length,
            mask_token_id=self.mask_token_id,
            eos_token_ids=self.eos_token_ids,
            vocab=self.vocab_size,
        )

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `Drafter`."""
        if not len(candidates.positions) or room < 1:
            return root.ids.new_empty((0, len(root.ids)))
        outlook = self.outlook(root, candidates)
        choice, p = expand(self.weights, outlook, self.budget, room)
        choice = choice[: self.pays(p)]
        device = root.ids.device
        states = root.ids.repeat(len(choice), 1)
        at, m = (choice >= 0).nonzero()
        where = torch.from_numpy(outlook.positions[m]).to(device)
        filled = torch.from_numpy(outlook.tokens[m, choice[at, m]]).to(device)
        states[torch.from_numpy(at).to(device), where] = filled
        return states
