"""Drafts by an order network: a tree of states, grown best first by cumulative probability."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spiffy.bench.order import OrderNetwork, Scene, drafted, scene_of
from spiffy.runtime.draft import Candidates, Vocabulary
from spiffy.runtime.draft.acceptance import TOKEN_RANKS
from spiffy.runtime.step.canvas import Cursor

_DEPTH = 16  # steps that drafts look ahead
_RARE = 1e-5  # probability below which a state is not expanded
_MORE = 4  # paths per wanted state that are looked at: several may lead to the same one


class Grown(NamedTuple):
    """Draft states, most probable first.

    Attributes
    ----------
    choice
        int64 [n, B], rank of the token that was filled in, else -1.
    when
        int64 [n, B], at which step of the likeliest path there; 0 where nothing was filled in.
    p
        float64 [n].
    """

    choice: Tensor
    when: Tensor
    p: Tensor

    def best(self, count: int) -> Grown:
        """The first `count` by probability."""
        kept = self.p.sort(descending=True, stable=True).indices[:count]
        return Grown(*(part[kept] for part in self))


@torch.inference_mode()
def grow(network: OrderNetwork, scene: Scene, budget: int, room: int) -> Grown:
    """The most probable future states of a root: at most `budget`, of at most `room` fills.

    States as many steps ahead are scored together, and paths that lead to the same one add up, so
    the tree has no state twice. A state is expanded while it is among the best.
    """
    size = len(scene.masked)
    nothing = torch.full((1, size), -1)
    level = Grown(nothing, torch.zeros_like(nothing), torch.ones(1, dtype=torch.float64))
    found = Grown(nothing[:0], nothing[:0], level.p[:0])
    for depth in range(1, min(_DEPTH, room, int(scene.masked.sum())) + 1):
        level = _children(network, scene, level, depth, budget)
        both = zip(found, level, strict=True)
        found = Grown(*(torch.cat(parts) for parts in both)).best(budget)
        limit = max(float(found.p[-1]) if len(found.p) == budget else 0.0, _RARE)
        level = Grown(*(part[level.p >= limit] for part in level))
        if not len(level.p):
            break
    return found


def _children(network: OrderNetwork, scene: Scene, level: Grown, depth: int, budget: int) -> Grown:
    """The most probable states one step further, each once."""
    n = len(level.choice)
    log_p = scene.log_p.expand(n, -1, -1)
    draft = drafted(level.choice, level.when, log_p)
    score, tokens = network(scene.seen.expand(n, -1, -1), draft, log_p)
    score = score.masked_fill(~scene.masked | (level.choice >= 0), -torch.inf)
    tokens = tokens[:, :, :TOKEN_RANKS].masked_fill(scene.tokens < 0, -torch.inf)
    joint = score.double().log_softmax(-1)[:, :, None] + tokens.double()
    flat = (joint.exp() * level.p[:, None, None]).flatten()
    p, index = flat.topk(min(_MORE * budget, len(flat)))
    index, p = index[p > 0], p[p > 0]
    parent, place, rank = torch.unravel_index(index, joint.shape)
    rows = torch.arange(len(index))
    choice, when = level.choice[parent], level.when[parent]
    choice[rows, place], when[rows, place] = rank, depth
    # Paths come likeliest first: the first one to a state says when what was filled in.
    _, first, which = np.unique(choice.numpy(), axis=0, return_index=True, return_inverse=True)
    total = torch.from_numpy(np.bincount(which.reshape(-1), p.numpy()))
    return Grown(choice[first], when[first], total).best(budget)


class OrderDrafter:
    """Drafts what an order network finds most probable: see `spiffy.runtime.draft.Drafter`.

    Parameters
    ----------
    network
        Trained on decodes of the same model.
    budget
        Most drafts per forward.
    """

    asks_rejected = False

    def __init__(self, network: OrderNetwork, budget: int, model: Vocabulary) -> None:
        self.network = network.eval()
        self.budget = budget
        self.mask_token_id = model.mask_token_id
        # No position has more of them than the vocabulary, the mask token left out.
        self.token_ranks = min(network.shape.ranks, model.vocab_size - 1)

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `Drafter`."""
        if not len(candidates.positions) or room < 1:
            return root.ids.new_empty((0, len(root.ids)))
        scene = scene_of(root, candidates, self.network.shape, self.mask_token_id)
        choice = grow(self.network, scene, self.budget, room).choice
        states = root.ids.repeat(len(choice), 1)
        at, place = (choice >= 0).nonzero(as_tuple=True)
        states[at, scene.start + place] = scene.tokens[place, choice[at, place]]
        return states
