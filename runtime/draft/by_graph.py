"""Drafts from a static graph: the same nodes at every root, or the best-scored of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spiffy.runtime.draft.candidates import Candidates
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import Node

Ints = NDArray[np.int64]

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
        pairs = np.array(padded, dtype=np.int64).reshape(-1, width, 2)
        self.position_ranks, self.ranks_of_tokens = pairs[:, :, 0], pairs[:, :, 1]
        self.sizes = np.array([len(fill) for fill in fills], dtype=np.int64)
        # Positions to fill, masked positions and tokens of each that every node needs.
        needs = (self.sizes, self.position_ranks.max(1) + 1, self.ranks_of_tokens.max(1) + 1)
        self._needs = np.stack(needs, 1)
        self._nodes: dict[tuple[int, ...], Ints] = {}  # by what there is
        # No position has more of them than the vocabulary, the mask token left out.
        ranks = max((j for fill in fills for _, j in fill), default=0) + 1
        self.token_ranks = min(ranks, model.vocab_size - 1)

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `Drafter`; nodes that need ranks which do not exist here are left out."""
        return self._states(root, candidates, self._active(candidates, room))

    def _active(self, candidates: Candidates, room: int) -> Ints:
        """Nodes that exist here: int64 [k], in order. Blocks run out of positions alike."""
        there = (room, *candidates.tokens.shape)
        nodes = self._nodes.get(there)
        if nodes is None:
            nodes = self._nodes[there] = np.flatnonzero((self._needs <= there).all(1))
        return nodes

    def _states(self, root: Cursor, candidates: Candidates, nodes: Ints) -> Tensor:
        """The root with the tokens of each node (int64 [k]) filled in: int64 [k, length]."""
        i, j = self.position_ranks[nodes], self.ranks_of_tokens[nodes]
        states = np.repeat(root.ids.numpy()[None], len(nodes), 0)
        positions, tokens = candidates.positions.numpy(), candidates.tokens.numpy()
        states[np.arange(len(nodes))[:, None], positions[i]] = tokens[i, j]
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
        pairs = torch.tensor(steps, dtype=torch.long, device="cpu").reshape(-1, 2)
        self.parent, self.child = pairs.unbind(-1)

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `Drafter`."""
        nodes = self._active(candidates, room)
        active, sizes = torch.from_numpy(nodes), torch.from_numpy(self.sizes[nodes])
        i, j = map(torch.from_numpy, (self.position_ranks[nodes], self.ranks_of_tokens[nodes]))
        own = torch.arange(i.shape[1], device="cpu") < sizes[:, None]  # not padding
        log_p = candidates.log_p[i, j].where(own, 0.0).sum(-1) / sizes
        score = log_p.new_zeros(len(self.sizes)).index_copy(0, active, log_p.exp())
        exists = log_p.new_zeros(len(self.sizes)).index_fill(0, active, 1.0)
        total = score.index_add(0, self.parent, score[self.child])[active]
        if self.mean:
            total /= exists.index_add(0, self.parent, exists[self.child])[active]
        best = total.sort(descending=True, stable=True).indices[: self.budget]
        return self._states(root, candidates, nodes[best.numpy()])
