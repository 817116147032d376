"""Draft states of a root, and what the acceptance model sees of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiffy.runtime.draft.acceptance import POSITION_FEATURES, TOKEN_FEATURES, AcceptanceWeights
from spiffy.runtime.draft.ngrams import Bigrams, Bools, Floats, Ints, pairs_of, triples_of
from spiffy.runtime.draft.outlook import (
    MOST_GAP,
    NEVER,
    Outlook,
    changed_beside,
    logit_of,
    next_to,
    of_neighbours,
)

#: Features that are products of two others, the last ones in this order.
_PRODUCTS = (
    ("left_committed", "logit"),
    ("right_committed", "logit"),
    ("left_drafted", "logit"),
    ("right_drafted", "logit"),
    ("nearness", "logit"),
    ("echo", "logit"),
    ("depth", "logit"),
    ("depth", "eos"),
    ("nearness", "first_rank"),
    ("origin_log_rank", "logit_above_7"),
    ("both_masked", "eos_distance"),
    ("reranked_by", "reranked_by"),
)
_FACTORS = np.array([[POSITION_FEATURES.index(name) for name in pair] for pair in _PRODUCTS]).T
_ABOVE = np.array([2.0, 4.0, 7.0])[:, None, None]


@dataclass(frozen=True)
class States:
    """n draft states of one root.

    Attributes
    ----------
    choice
        int64 [n, M], rank of the token filled in, -1 where still masked.
    source
        int64 [n], whose distribution is asked about the state.
    unseen
        bool [n, M], positions filled in that the source has not seen.
    log_p
        float64 [n, M, J] of the tokens, re-ranked beside those that the source has not seen.
    depth
        int64 [n], denoising steps that the source has not seen, the root's own left out.
    """

    choice: Ints
    source: Ints
    unseen: Bools
    log_p: Floats
    depth: Ints

    @classmethod
    def of(cls, outlook: Outlook, model: AcceptanceWeights, choice: Ints, depth: Ints) -> States:
        """Any states (int64 [n, M]) of a root, by its first source."""
        source = np.zeros(len(choice), dtype=np.int64)
        states = cls(choice, source, choice >= 0, outlook.log_p[source], depth)
        return states.reranked(outlook, model, changed_beside(outlook, choice))

    def filled(
        self, outlook: Outlook, model: AcceptanceWeights, parents: Ints, choice: Ints
    ) -> States:
        """Children (int64 [k, M]) of the states `parents` (int64 [k]), each by its best source."""
        source = outlook.sources(choice)
        unseen = (choice >= 0) & (outlook.seen[source] < 0)
        new = unseen & (self.choice[parents] < 0)
        log_p, depth = self.log_p[parents], self.depth[parents] + 1
        beside = next_to(new, outlook)
        (moved,) = (source != self.source[parents]).nonzero()
        if len(moved):  # another source knows nothing of what was worked out for the parent
            theirs = source[moved]
            depth[moved] = np.minimum(depth[moved], unseen[moved].sum(1))  # a token each at least
            log_p[moved] = outlook.log_p[theirs]
            beside[moved] = next_to(unseen[moved], outlook) | outlook.fresh[:, theirs].any(0)
        states = States(choice, source, unseen, log_p, depth)
        return states.reranked(outlook, model, beside & (choice < 0))

    def reranked(self, outlook: Outlook, model: AcceptanceWeights, beside: Bools) -> States:
        """Re-rank the tokens of the positions `beside` (bool [n, M]) in place; returns itself."""
        at, m = beside.nonzero()
        if len(at):
            features = token_features(outlook, model.bigrams, self, at, m)
            score = (model.token @ features.reshape(len(features), -1)).reshape(features.shape[1:])
            change = outlook.log_mass[self.source[at], m] - np.logaddexp.reduce(score, 1)
            self.log_p[at, m] = score + change[:, None]
        return self


def token_features(outlook: Outlook, bigrams: Bigrams, states: States, at: Ints, m: Ints) -> Floats:
    """Features [T, K, J] of the tokens of positions `m` (int64 [K]) in states `at` (int64 [K])."""
    source = states.source[at]
    tokens, log_p = outlook.tokens[m], outlook.log_p[source, m]
    index = outlook.neighbours[:3, m]
    listed = index >= 0
    rank = np.where(listed, states.choice[at, index], -1)
    known = np.where(rank >= 0, outlook.tokens[index, rank], outlook.neighbour_tokens[:3, m])
    unseen = listed[:2] & states.unseen[at, index[:2]]
    new = (unseen | outlook.fresh[:, source, m])[:, :, None]
    exists = known[2, :, None] >= 0
    known = np.maximum(known, 0)
    pairs = pairs_of(tokens, known[:2], bigrams.vocab)
    keys = np.concatenate((pairs, triples_of(known[2, :, None], pairs[:1], bigrams.vocab)))

    features = np.empty((len(TOKEN_FEATURES), *tokens.shape))
    features[0] = log_p
    features[1] = outlook.best[source, m][:, None] == np.arange(tokens.shape[1])
    features[2:4] = bigrams.log_p(tokens, known[:2])
    features[4:6] = tokens == known[:2, :, None]
    features[6:8] = log_p
    np.log1p(outlook.in_text[keys], out=features[8:11])
    sides = features[2:10].reshape(4, 2, *tokens.shape)
    sides *= new
    features[10] *= new[0] & exists
    np.multiply(features[6], new[1], out=features[11])
    return features


def position_features(outlook: Outlook, states: States) -> tuple[Floats, Bools]:
    """Features [F, n, M] of every position, and which of them are masked, bool [n, M].

    Features of positions that are not masked mean nothing.
    """
    where, masked = outlook.positions, states.choice < 0
    ascending = np.sort(states.log_p, -1)
    log_p, second = ascending[:, :, -1], ascending[:, :, max(-2, -ascending.shape[2])]
    logit = logit_of(log_p)
    shown = np.where(masked, logit, NEVER)
    order = (-shown).argsort(1, kind="stable")
    log_rank = np.empty_like(logit)
    log_rank[np.arange(len(order))[:, None], order] = np.log1p(np.arange(len(where)))
    distance = np.log1p(np.maximum(where - where[masked.argmax(1)][:, None], 0))

    facts = np.array((masked, states.unseen, masked * logit))
    by_masked, drafted, by_logit = of_neighbours(facts, outlook).swapaxes(1, 2)  # each [4, n, M]
    echo, twins = _alike(outlook, states)
    known = outlook.constant[:, states.source]
    features = np.empty((len(POSITION_FEATURES), *masked.shape))
    constant = len(known)
    features[:constant] = known
    features[constant] = states.depth[:, None]
    groups: tuple[NDArray[Any], ...] = (
        drafted[:2],
        drafted[2:] * by_masked[:2],
        by_masked[:2],
        (by_masked[0] * by_masked[1])[None],
        _nearness(outlook, states)[None],
        echo[None],
        distance[None],
        (distance * known[3])[None],
        np.maximum(by_logit[:2] - logit, 0) * by_masked[:2],
        logit[None],
        (logit - shown.max(1, keepdims=True))[None],
        np.maximum(logit - _ABOVE, 0),
        np.minimum(logit, 0)[None],
        log_p[None],
        np.minimum(log_p - second, MOST_GAP)[None],
        np.exp(log_p)[None],
        log_rank[None],
        (log_rank == 0)[None],
        (logit - known[1])[None],
        twins[None],
    )
    products = len(features) - len(_PRODUCTS)
    np.concatenate(groups, out=features[constant + 1 : products])
    first, other = _FACTORS
    np.multiply(features[first], features[other], out=features[products:])
    return features, masked


def _alike(outlook: Outlook, states: States) -> tuple[Bools, Ints]:
    """Whether the most likely token is a new one, and at how many other masked positions it is too.

    Both [n, M]. New tokens are those that the source has not seen; the number is at most 2.
    """
    n, count = states.choice.shape
    kinds = outlook.kinds[np.arange(count), outlook.best]  # [S, M]
    most = outlook.kinds.size
    keys = np.arange(n)[:, None] * most + kinds[states.source]
    at, m = states.unseen.nonzero()
    new = np.zeros(n * most, dtype=np.bool_)
    new[at * most + outlook.kinds[m, states.choice[at, m]]] = True
    echo: Bools = new[keys] | outlook.echo[states.source]
    masked = np.bincount(keys[states.choice < 0], minlength=n * most)
    return echo, np.minimum(masked[keys] - 1, 2)


def _nearness(outlook: Outlook, states: States) -> Floats:
    """1 / (1 + positions to the nearest token that the source has not seen), [n, M].

    A committed one counts towards the side where a position of the list follows it at once.
    """
    where, new = outlook.positions, states.unseen
    before, behind = outlook.before[states.source], outlook.behind[states.source]
    before = np.maximum.accumulate(np.where(new, where, before), 1)
    behind = np.minimum.accumulate(np.where(new, where, behind)[:, ::-1], 1)[:, ::-1]
    nearness: Floats = 1.0 / (1.0 + np.minimum(where - before, behind - where))
    return nearness
