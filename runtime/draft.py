"""From a draft graph and a distribution to draft states.

Draft coordinates (paper section 4): take the prediction that produced the root. Position rank 0 is
its best-scored position among those the root still masks; token rank 0 is its most likely token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from spiffy.runtime.acceptance import TOKEN_RANKS, AcceptanceWeights, Floats, Outlook, Rejected
from spiffy.runtime.cache import Evaluation
from spiffy.runtime.canvas import Cursor
from spiffy.runtime.expand import expand
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.policy import Distribution, choose
from spiffy.schemas import DecodingSettings, Node

#: Who chooses the drafts of a forward: the acceptance model, or the order of the graph's nodes.
Selection = Literal["model", "graph"]

_LIKELY = np.log(0.05)  # least log-probability of what an asked draft holds more
_MOST_ASKED = 16  # rejected drafts
_MOST_HEARD = 1 << 13  # positions of all of them: 64 MB of hidden states of 4,096 bfloat16
_SURE = 1 - 1e-12


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
    rejected
        What drafts say that the walk has not come to; None where none is asked.
    """

    positions: Tensor
    tokens: Tensor
    log_p: Tensor
    fresh: Tensor
    rejected: Rejected | None = None


def rank_candidates(
    distribution: Distribution,
    settings: DecodingSettings,
    mask_token_id: int,
    token_ranks: int,
    masked: Tensor | None = None,
    fresh: Tensor | None = None,
) -> Candidates:
    """Rank positions by score and tokens by probability; ties to the lower position, lower id.

    `masked` (int64 [M], ascending, default: all) are those of the distribution's positions that the
    root still masks; `fresh` those whose tokens the distribution has not seen. Sorted on the CPU:
    the arrays are small.
    """
    log_p, tokens = (part.cpu().numpy() for part in distribution.top(token_ranks + 1))
    positions = distribution.positions.cpu().numpy()
    log_p = np.where(tokens == mask_token_id, -np.inf, log_p)  # never drafted
    rows = np.arange(len(positions))[:, None]
    ranked = np.lexsort((tokens, -log_p))
    log_p, tokens = log_p[rows, ranked], tokens[rows, ranked]
    if settings.policy != "sequential" and settings.score == "confidence":
        score = torch.from_numpy(log_p[:, 0]).exp()  # `choose` without passing over all tokens
    else:
        score = choose(distribution, settings, mask_token_id)[1].cpu()
    order = (-score.numpy()).argsort(kind="stable")
    if masked is not None:
        left = np.zeros(len(positions), dtype=np.bool_)
        left[positions.searchsorted(masked.cpu().numpy())] = True
        order = order[left[order]]
    kept = min(token_ranks, distribution.log_p.shape[-1] - 1)
    device = distribution.positions.device
    return Candidates(
        torch.from_numpy(positions[order]).to(device),
        torch.from_numpy(tokens[order, :kept]).to(device),
        torch.from_numpy(log_p[order, :kept]).to(device),
        distribution.positions[:0] if fresh is None else fresh,
    )


def with_rejected(
    candidates: Candidates,
    evaluation: Evaluation,
    root: Cursor,
    states: Tensor,
    seen: int,
    span: range,
    mask_token_id: int,
) -> Candidates:
    """Ask those of the last forward's states that hold more than the source of the candidates.

    A draft of the root before may turn out true yet, in part: once the root's new tokens, which it
    does not hold, are joined by its own. What it says then reaches further than the distribution
    that produced the root. Only the candidates' tokens are asked about; all others together are
    taken to have the weight (the sum of exponentiated logits) that they have there.

    Parameters
    ----------
    root
        The new root.
    states
        int64 [n, length], evaluated by `evaluation`.
    seen
        The state that the candidates are of.
    span
        Positions of the root's block.
    """
    log_p = candidates.log_p.cpu().numpy()
    if len(states) == 1 or log_p.max() <= _LIKELY:
        return candidates
    block = slice(span.start, span.stop)
    ids, held = root.ids[block].cpu().numpy(), states[:, block].cpu().numpy()
    tokens = candidates.tokens.cpu().numpy()
    positions = candidates.positions.cpu().numpy() - span.start
    fresh = candidates.fresh.cpu().numpy() - span.start
    masked = held == mask_token_id
    # In this block they hold all that the candidates' source does, and nothing else than the root.
    may = ((held == held[seen]) | masked[seen]).all(1)
    may &= ((held == ids) | masked | (ids == mask_token_id)).all(1)
    filled = ~masked[:, positions]
    same = tokens == held[:, positions, None]
    may &= (same.any(-1) | ~filled).all(1) & filled.any(1) & ~filled.all(1)
    may &= np.where(same, log_p, 0.0).sum((1, 2)) > _LIKELY
    may &= [window.covers(span) for window in evaluation.windows]
    most = min(_MOST_ASKED, max(1, _MOST_HEARD // len(positions)))
    asked = may.nonzero()[0][:most]
    if not len(asked):
        return candidates
    logits = evaluation.logits_of([seen, *asked.tolist()], candidates.positions, candidates.tokens)
    if logits is None:
        return candidates
    quoted = _log_p_of(logits[1:], logits[0], log_p)
    numbers = np.isfinite(quoted).all((1, 2))  # a draft may overflow where the truth does not
    asked, quoted = asked[numbers], quoted[numbers]
    choice = np.where(filled[asked], same[asked].argmax(-1), -1)
    return replace(candidates, rejected=Rejected(choice, quoted, masked[asked][:, fresh]))


def _log_p_of(logits: Floats, known_logits: Floats, known_log_p: Floats) -> Floats:
    """Log-probabilities of some tokens' logits [R, M, J], where those of other logits are known.

    All tokens that are not among the J have the weight that they have there ([M, J] both).
    """
    others = np.log1p(-np.minimum(np.exp(known_log_p).sum(-1), _SURE))
    others += known_logits[:, 0] - known_log_p[:, 0]
    log_p: Floats = logits - np.logaddexp(np.logaddexp.reduce(logits, -1), others)[:, :, None]
    return log_p


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


class GraphDrafter:
    """Drafts the states that a static graph lists, best first, as far as `budget` goes.

    Parameters
    ----------
    fills
        Draft nodes, each a set of (position rank, token rank) pairs, ranks >= 0. Any will do: bad
        ones cost positions, never tokens.
    """

    asks_rejected = False

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
        return self._states(root, candidates, self._active(candidates, room))

    def _active(self, candidates: Candidates, room: int) -> Tensor:
        """Nodes that exist here: int64 [k], in order."""
        masked, ranked = candidates.tokens.shape
        active = (
            (self.sizes <= room)
            & (self.position_ranks.amax(1) < masked)
            & (self.ranks_of_tokens.amax(1) < ranked)
        )
        return active.nonzero()[:, 0]

    def _states(self, root: Cursor, candidates: Candidates, nodes: Tensor) -> Tensor:
        """The root with the tokens of each node (int64 [k]) filled in: int64 [k, length]."""
        i, j = self.position_ranks[nodes], self.ranks_of_tokens[nodes]
        states = root.ids.repeat(len(nodes), 1)
        return states.scatter_(1, candidates.positions[i], candidates.tokens[i, j])


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
        self.parent, self.child = (
            torch.tensor(steps, dtype=torch.long, device=model.device).reshape(-1, 2).unbind(-1)
        )

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


class Vocabulary(Protocol):
    """What choosing drafts by an acceptance model has to know of a model."""

    @property
    def mask_token_id(self) -> int:
        """Token id of the mask."""
        ...

    @property
    def eos_token_ids(self) -> Collection[int]:
        """Token ids that end an answer."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of logits per position."""
        ...


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
    asks_rejected
        Whether rejected drafts are asked too.
    """

    token_ranks = TOKEN_RANKS

    def __init__(
        self,
        weights: AcceptanceWeights,
        budget: int,
        model: Vocabulary,
        pays: Callable[[Floats], int] = len,
        asks_rejected: bool = True,
    ) -> None:
        self.weights = weights
        self.budget = budget
        self.pays = pays
        self.asks_rejected = asks_rejected
        self.mask_token_id = model.mask_token_id
        self.eos_token_ids = np.array(sorted(model.eos_token_ids), dtype=np.int64)
        self.vocab_size = model.vocab_size

    def outlook(self, root: Cursor, candidates: Candidates) -> Outlook:
        """Lay out the root for the acceptance model."""
        return Outlook.at(
            root.ids.cpu().numpy(),
            candidates.positions.cpu().numpy(),
            candidates.tokens.cpu().numpy(),
            candidates.log_p.cpu().numpy(),
            candidates.fresh.cpu().numpy(),
            mask_token_id=self.mask_token_id,
            eos_token_ids=self.eos_token_ids,
            vocab=self.vocab_size,
            rejected=candidates.rejected,
        )

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        """See `Drafter`."""
        if not len(candidates.positions) or room < 1:
            return root.ids.new_empty((0, len(root.ids)))
        outlook = self.outlook(root, candidates)
        choice, p = expand(self.weights, outlook, self.budget, room)
        choice = choice[: self.pays(p)]
        states = np.repeat(root.ids.cpu().numpy()[None], len(choice), 0)
        at, m = (choice >= 0).nonzero()
        states[at, outlook.positions[m]] = outlook.tokens[m, choice[at, m]]
        return torch.from_numpy(states).to(root.ids.device)
