"""Drafts from a static graph: the same nodes at every root, or the best-scored of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spiffy.runtime.draft.candidates import Candidates
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import Node

#: A fill without the order of its pairs.
FillSet = frozenset[tuple[int, int]]


def confidence_chain(length: int) -> list[list[tuple[int, int]]]:
    """Fills of a confidence chain: the most confident position, the two most confident, ...

    The lossless drafting of FreeDave and SSD, as a graph: all tokens are the most likely ones.
    """
    return [[(rank, 0) for rank in range(depth)] for depth in range(1, length + 1)]


class GraphDrafter:
    """Drafts the states that a static graph lists, best first, as far as `budget` goes.

    Parameters
    ----------
    fills
        Draft nodes, each a set of (position rank, token rank) pairs, ranks >= 0. Any will do: bad
        ones cost positions, never tokens.

    Attributes
    ----------
    fills
        The same, without any order.
    """

    asks_rejected = False

    def __init__(self, fills: Sequence[Sequence[tuple[int, int]]], model: DiffusionLM) -> None:
        fills = [fill for fill in fills if fill]  # filling in nothing is the root itself
        self.fills = frozenset(map(frozenset, fills))
        width = max((len(fill) for fill in fills), default=1)
        # Short fills repeat their first pair: writing a token twice changes nothing.
        padded = [[*fill, *([fill[0]] * (width - len(fill)))] for fill in fills]
        pairs = torch.tensor(padded, dtype=torch.long)
        self.position_ranks, self.ranks_of_tokens = pairs.reshape(-1, width, 2).unbind(-1)
        self.sizes = torch.tensor([len(fill) for fill in fills])
        # Positions to fill, masked positions and tokens of each that every node needs.
        needs = (self.sizes, self.position_ranks.amax(1) + 1, self.ranks_of_tokens.amax(1) + 1)
        self._needs = torch.stack(needs, 1).numpy()
        # No position has more of them than the vocabulary, the mask token left out.
        ranks = max((j for fill in fills for _, j in fill), default=0) + 1
        self.token_ranks = min(ranks, model.vocab_size - 1)

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `Drafter`; nodes that need ranks which do not exist here are left out."""
        return self._states(root, candidates, self._active(candidates, room))

    def _active(self, candidates: Candidates, room: int) -> Tensor:
        """Nodes that exist here: int64 [k], in order."""
        there = np.array((room, *candidates.tokens.shape))
        return torch.from_numpy(np.flatnonzero((self._needs <= there).all(1)))

    def _states(self, root: Cursor, candidates: Candidates, nodes: Tensor) -> Tensor:
        """The root with the tokens of each node (int64 [k]) filled in: int64 [k, length]."""
        which = nodes.numpy()
        i, j = self.position_ranks.numpy()[which], self.ranks_of_tokens.numpy()[which]
        states = np.repeat(root.ids.numpy()[None], len(which), 0)
        positions, tokens = candidates.positions.numpy(), candidates.tokens.numpy()
        states[np.arange(len(which))[:, None], positions[i]] = tokens[i, j]
        return torch.from_numpy(states)


class GeometricMeanDrafter(GraphDrafter):
    """Keeps the best-scored nodes of a larger graph: the paper's pruning (v4), as a baseline.

    The score of a node is the geometric mean of its tokens' probabilities under the distribution
    that produced the root. Nodes are kept by score alone (ties to the earlier one), whether or not
    one that leads to them is kept.

    Parameters
    ----------
    nodes
        The larger graph.
    budget
        Most drafts per forward.
    children
        "mean" and "sum" score a node by the mean or sum over itself and those of its children that
        exist at this root.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        model: DiffusionLM,
        budget: int,
        children: Literal["ignored", "mean", "sum"] = "ignored",
    ) -> None:
        super().__init__([node.fill for node in nodes], model)
        self.budget = budget
        self.mean = children == "mean"
        steps = [
            (parent - 1, child)  # number 0 is the root
            for child, node in enumerate(nodes)
            for parent in node.parents
            if children != "ignored" and parent > 0
        ]
        self.parent, self.child = torch.tensor(steps, dtype=torch.long).reshape(-1, 2).unbind(-1)

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `Drafter`."""
        active = self._active(candidates, room)
        i, j = self.position_ranks[active], self.ranks_of_tokens[active]
        own = torch.arange(i.shape[1], device=i.device) < self.sizes[active, None]  # not padding
        log_p = candidates.log_p[i, j].where(own, 0.0).sum(-1) / self.sizes[active]
        score = log_p.new_zeros(len(self.sizes)).index_copy(0, active, log_p.exp())
        exists = log_p.new_zeros(len(self.sizes)).index_fill(0, active, 1.0)
        total = score.index_add(0, self.parent, score[self.child])[active]
        if self.mean:
            total /= exists.index_add(0, self.parent, exists[self.child])[active]
        best = total.sort(descending=True, stable=True).indices[: self.budget]
        return self._states(root, candidates, active[best])
