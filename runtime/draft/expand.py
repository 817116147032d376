"""From an acceptance model to drafts: expand the most probable future states, best first.

Probabilities multiply along paths, and paths that lead to the same state add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from spiffy.runtime.draft.acceptance import OFFSETS, AcceptanceWeights
from spiffy.runtime.draft.features import States, position_features
from spiffy.runtime.draft.ngrams import Bools, Floats, Ints
from spiffy.runtime.draft.outlook import NEVER, Outlook

DEPTH = 16  # steps that drafts look ahead
_MOST = 1 << 16  # positions of all states of a level: some 30 MB of features
RARE = 1e-5  # probability below which a state is not expanded
LEAST = 1e-6  # probability below which no set of positions is drafted
#: Part of the least probable draft's probability that a path to a new state has to bring along:
#: static unmasking, and sets of positions.
PATH_SHARE, PATH_SHARE_OF_SETS = 1 / 4, 1 / 12


def _softmax(score: Floats) -> Floats:
    weights = np.exp(score - score.max(-1, keepdims=True))
    softmax: Floats = weights / weights.sum(-1, keepdims=True)
    return softmax


def _weighed(coefficients: Floats, features: Floats) -> Floats:
    """Sum [n, M] of features [F, n, M] times coefficients [F]."""
    score = coefficients @ features.reshape(len(features), -1)
    return score.reshape(features.shape[1:])


@dataclass(frozen=True)
class _Children:
    """Possible next states: parent [k], choice [k, M], probability [k]."""

    parent: Ints
    choice: Ints
    p: Floats


def _static_children(
    model: AcceptanceWeights,
    outlook: Outlook,
    states: States,
    p: Floats,
    limit: float,
    budget: int,
) -> _Children:
    """Children by static unmasking with one token per step."""
    features, masked = position_features(outlook, states)
    where = _softmax(np.where(masked, _weighed(model.position, features), NEVER))
    joint = p[:, None, None] * where[:, :, None] * np.exp(states.log_p)
    flat = joint.ravel()
    # Several paths may add up to one state, so look at more of them than states are wanted.
    (wanted,) = (flat > limit * PATH_SHARE).nonzero()
    if len(wanted) > 4 * budget:
        wanted = wanted[np.sort(np.argpartition(-flat[wanted], 4 * budget)[: 4 * budget])]
    parent, m, j = np.unravel_index(wanted, joint.shape)
    choice = states.choice[parent]
    choice[np.arange(len(parent)), m] = j
    return _Children(parent, choice, flat[wanted])


UNCERTAIN = 6  # positions per state of which every subset is tried
OTHER_TOKENS = ((0, 1), (0, 2), (0, 3), (1, 1))  # n-th least certain position, token rank
FORCED = 4  # positions tried where none reaches the threshold
_MOST_ODDS = 14  # log-odds beyond it are as good as sure: e**-14 is less than `LEAST`
_ROUNDING = 1e-9


class _Sets(NamedTuple):
    """Sets of positions that a step from some states may commit.

    By number of the state [k], bool [k, M], with log-probabilities [k]. Those of a state stand in
    the order of `order` [k].
    """

    parent: Ints
    chosen: Bools
    log_p: Floats
    order: Ints


@cache
def _subsets(width: int) -> Bools:
    """All subsets of so many things, [2**width, width]."""
    subsets: Bools = (np.arange(1 << width)[:, None] >> np.arange(width) & 1).astype(np.bool_)
    return subsets


def _likely_sets(odds: Floats, masked: Bools, least: Floats) -> _Sets:
    """Sets that are not empty, each position on its own, but those below log-probability `least`.

    `odds` are log-odds of being committed; they and `masked` are [n, M], `least` is [n].
    """
    likely = (odds > 0) & masked
    # log P(exactly the likely ones), and what flipping a position costs.
    together = -np.where(masked, np.log1p(np.exp(-np.abs(odds))), 0).sum(1)
    cost = np.where(masked, np.abs(odds), np.inf)
    width = min(UNCERTAIN, odds.shape[1])
    uncertain = np.argsort(cost, axis=1, kind="stable")[:, :width]
    flips = _subsets(width)
    flip_cost = np.take_along_axis(cost, uncertain, 1)
    log_p = together[:, None] - np.where(flips, flip_cost[:, None, :], 0.0).sum(-1)
    parent, flip = (log_p >= least[:, None]).nonzero()
    sets = likely[parent]
    sets[np.arange(len(parent))[:, None], uncertain[parent]] ^= flips[flip]
    some = sets.any(1)
    parent, flip = parent[some], flip[some]
    return _Sets(parent, sets[some], log_p[parent, flip], order=flip)


def _forced_sets(masked: Bools, score: Floats) -> _Sets:
    """Where none is above the threshold the most confident one is committed all the same.

    `score` [n, M] says which one that is; what is not masked has the lowest.
    """
    forced = np.argsort(-score, axis=1, kind="stable")[:, : min(FORCED, score.shape[1])]
    parent, nth = masked[np.arange(len(score))[:, None], forced].nonzero()
    m = forced[parent, nth]
    log_p = np.log(_softmax(score)[parent, m] + 1e-30)  # the log of 0 stays finite
    chosen = np.arange(score.shape[1]) == m[:, None]
    return _Sets(parent, chosen, log_p, order=(1 << UNCERTAIN) + nth)


def _commit_sets(
    model: AcceptanceWeights, odds: Floats, masked: Bools, score: Floats, least: Floats
) -> _Sets:
    """Sets of positions that one step may commit, by every offset that their log-odds share."""
    forced, found = _forced_sets(masked, score), []
    for nth, (offset, share) in enumerate(OFFSETS if model.spread else ((0.0, 1.0),)):
        shifted = np.clip(odds + offset * model.spread, -_MOST_ODDS, _MOST_ODDS)
        part = np.log(share)
        none = -np.where(masked, np.log1p(np.exp(shifted)), 0).sum(1)
        for sets in (
            _likely_sets(shifted, masked, least - part),
            forced._replace(log_p=none[forced.parent] + forced.log_p),
        ):
            order = sets.order + nth * (2 << UNCERTAIN)  # one offset after the other
            found.append(sets._replace(log_p=sets.log_p + part, order=order))
    # Equal sets of several offsets add up where equal states do, in `_merged`.
    together = _Sets._make(map(np.concatenate, zip(*found, strict=True)))
    by_state = np.lexsort((together.order, together.parent))
    return _Sets._make(part[by_state] for part in together)


def _threshold_children(
    model: AcceptanceWeights, outlook: Outlook, states: States, p: Floats, limit: float, room: int
) -> _Children:
    """Children by threshold unmasking: sets of positions that share an offset of their log-odds."""
    assert model.commit is not None  # fitted for threshold unmasking
    features, masked = position_features(outlook, states)
    odds = _weighed(model.commit[:-1], features) + model.commit[-1]
    score = np.where(masked, _weighed(model.position, features), NEVER)

    by_rank = np.argsort(-states.log_p, axis=-1, kind="stable")
    top = np.take_along_axis(states.log_p, by_rank, -1)
    # Several paths and offsets may add up to one state, so look further than what is wanted.
    wanted, log_parent = np.log(max(limit * PATH_SHARE_OF_SETS, LEAST)), np.log(p)
    # The most that there can be with any tokens, but for rounding.
    most = log_parent + np.maximum(top[:, :, 0], 0.0).sum(1)
    sets = _commit_sets(model, odds, masked, score, wanted - most - _ROUNDING)
    parent, chosen = sets.parent, sets.chosen
    log_p = sets.log_p + (chosen * top[parent, :, 0]).sum(-1) + log_parent[parent]
    small = chosen.sum(-1) + (states.choice >= 0).sum(1)[parent] <= room
    kept = small & (log_p > wanted)
    return _with_other_tokens(states, by_rank, top, parent[kept], log_p[kept], chosen[kept])


def _with_other_tokens(
    states: States, by_rank: Ints, top: Floats, parent: Ints, log_p: Floats, chosen: Bools
) -> _Children:
    """Sets with their most probable tokens, and with others where these are least certain.

    Parameters
    ----------
    by_rank, top
        [n, M, J] tokens of the states, the most probable first, and their log-probabilities.
    parent, log_p, chosen
        [k], [k] and [k, M], the sets.
    """
    choice = np.where(chosen, by_rank[parent, :, 0], states.choice[parent])
    p = np.exp(log_p)
    second = top[:, :, min(1, top.shape[-1] - 1)]
    doubt = np.where(chosen, second[parent] - top[parent, :, 0], -np.inf)
    weakest = np.argsort(-doubt, axis=1, kind="stable")
    lines = np.arange(len(parent))
    found = [(parent, choice, p)]
    for nth, token in OTHER_TOKENS:
        if nth >= chosen.shape[1] or token >= top.shape[-1]:
            continue
        k = np.flatnonzero(chosen[lines, weakest[:, nth]])
        m = weakest[k, nth]
        other = choice[k]
        other[np.arange(len(k)), m] = by_rank[parent[k], m, token]
        change = np.exp(top[parent[k], m, token] - top[parent[k], m, 0])
        found.append((parent[k], other, p[k] * change))
    return _Children(*map(np.concatenate, zip(*found, strict=True)))


#: Of a token at a position: [position, token rank]. Two states of one sum are taken for one, which
#: costs an acceptance at most. The seed is the paper's arXiv number.
HASHES = np.random.default_rng(2509_18085).integers(1, 1 << 62, size=(4096, 16), dtype=np.int64)


def _merged(children: _Children, budget: int) -> _Children:
    """Equal states once, with the sum of their probabilities; the `budget` most probable."""
    rows = np.arange(children.choice.shape[1]) % len(HASHES)
    key = np.where(children.choice >= 0, HASHES[rows, children.choice], 0).sum(1)  # may overflow
    order = key.argsort(kind="stable")
    key = key[order]
    is_first = np.ones(len(key), dtype=np.bool_)
    np.not_equal(key[1:], key[:-1], out=is_first[1:])
    (first,) = is_first.nonzero()
    p = np.add.reduceat(children.p[order], first)
    best = (-p).argsort(kind="stable")[:budget]
    kept = order[first[best]]
    return _Children(children.parent[kept], children.choice[kept], p[best])


def expand(
    model: AcceptanceWeights, outlook: Outlook, budget: int, room: int
) -> tuple[Ints, Floats]:
    """The most probable future states of a root.

    Level by level: all states that lie the same number of steps ahead are expanded together, so
    paths to the same state have met before it is looked at.

    Parameters
    ----------
    budget
        The most states.
    room
        The most positions that a state may fill.

    Returns
    -------
    choice int64 [k, M] (token rank per masked position, -1 where masked) and probability [k],
    k <= `budget`, most probable first; no state fills more than `room` positions.
    """
    count = outlook.tokens.shape[0]
    budget = min(budget, most_states(count))
    nothing = np.full((1, count), -1, dtype=np.int64)
    states = States.of(outlook, model, nothing, np.zeros(1, dtype=np.int64))
    p = np.ones(1)
    # Their parents, of several levels, mean nothing.
    best = _Children(np.zeros(0, np.int64), np.zeros((0, count), np.int64), np.zeros(0))
    limit = 0.0
    share = PATH_SHARE if model.commit is None else PATH_SHARE_OF_SETS
    for depth in range(1, min(DEPTH, room) + 1):
        if model.commit is None:
            children = _static_children(model, outlook, states, p, limit, budget)
        else:
            children = _threshold_children(model, outlook, states, p, limit, room)
        if not len(children.p):
            break
        children = _merged(children, budget)
        found = _Children(
            np.concatenate((best.parent, children.parent)),
            np.concatenate((best.choice, children.choice)),
            np.concatenate((best.p, children.p)),
        )
        # Under threshold unmasking a state may lie at several depths.
        best = _merged(found, budget) if model.commit is not None else _top(found, budget)
        limit = float(best.p[-1]) if len(best.p) == budget else 0.0
        if depth == min(DEPTH, room):
            break
        reach = _reach(outlook, children)
        worth = (children.p >= max(limit, RARE)) & (reach > limit * share)
        if not worth.any():
            break
        parent, choice, p = children.parent[worth], children.choice[worth], children.p[worth]
        states = states.filled(outlook, model, parent, choice)
    return best.choice, best.p


def most_states(count: int) -> int:
    """How many states of `count` positions memory is taken for."""
    return max(1, _MOST // count)


def _reach(outlook: Outlook, children: _Children) -> Floats:
    """What no state after these is more probable than: [k], 0 if there is none.

    The next step fills a position, with a token that is at most as probable as all of them.
    """
    mass = np.exp(outlook.log_mass.max(0))
    reach: Floats = children.p * np.where(children.choice < 0, mass, 0.0).max(1)
    return reach


def _top(children: _Children, budget: int) -> _Children:
    """The `budget` most probable of states that are all different."""
    best = (-children.p).argsort(kind="stable")[:budget]
    return _Children(children.parent[best], children.choice[best], children.p[best])
