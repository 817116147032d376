"""Which future states come next: the acceptance model of an artifact.

Two small regressions, fitted by calibration on recorded decodes, look at a draft state and at a
distribution that has not seen all of its tokens (of the state before the root, or of a rejected
draft):

- the token model re-ranks the most likely tokens of a position next to a token that was only just
  committed or drafted, with evidence that costs no forward (bigrams of the calibration answers,
  n-grams of the text so far);
- the position model says which masked position the next denoising step commits.

`spiffy.runtime.expand` turns them into drafts. What is drafted never changes a token. NumPy,
because many small arrays per forward cost less there than anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from spiffy.schemas import AcceptanceModel, DraftGraph

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_Scalar = TypeVar("_Scalar", bound=np.generic)

#: Tokens of a position that drafts choose from.
TOKEN_RANKS = 4
_TEXT = 1024  # tokens of the text so far that n-grams are taken from
NEVER = -1e9  # score of what cannot be
_FAR = 1 << 30  # positions

#: Left, right, two to the left, two to the right.
_AROUND = np.array([-1, 1, -2, 2])[:, None]

#: The shared offset of threshold unmasking in units of its spread, with probabilities: three nodes
#: of Gauss-Hermite quadrature, which has the moments of a normal law up to the fifth.
OFFSETS = ((-(3**0.5), 1 / 6), (0.0, 2 / 3), (3**0.5, 1 / 6))

POSITION_FEATURES = (
    "origin_log_rank",
    "origin_logit",
    "origin_gap",
    "eos",
    "left_committed",
    "right_committed",
    "depth",
    "left_drafted",
    "right_drafted",
    "second_left_drafted_left_masked",
    "second_right_drafted_right_masked",
    "left_masked",
    "right_masked",
    "both_masked",
    "nearness",
    "echo",
    "distance",
    "eos_distance",
    "left_above",
    "right_above",
    "logit",
    "below_best",
    "logit_above_2",
    "logit_above_4",
    "logit_above_7",
    "logit_below_0",
    "log_p",
    "gap",
    "confidence",
    "log_rank",
    "first_rank",
    "reranked_by",
    "twins",
    "left_committed_x_logit",
    "right_committed_x_logit",
    "left_drafted_x_logit",
    "right_drafted_x_logit",
    "nearness_x_logit",
    "echo_x_logit",
    "depth_x_logit",
    "depth_x_eos",
    "nearness_x_first_rank",
    "origin_log_rank_x_logit_above_7",
    "both_masked_x_eos_distance",
    "reranked_by_squared",
)

TOKEN_FEATURES = (
    "log_p",
    "first",
    "left_bigram",
    "right_bigram",
    "left_same",
    "right_same",
    "left_log_p",
    "right_log_p",
    "left_in_text",
    "right_in_text",
    "left_two_in_text",
    "both_log_p",
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


class Counts:
    """How often keys (int64, >= 0) occurred; looks up whole arrays.

    Parameters
    ----------
    keys, counts
        [n]; counts of equal keys add up, and each is 1 by default.
    """

    def __init__(self, keys: Ints, counts: Floats | None = None) -> None:
        if counts is None:
            self.keys, self.below = np.sort(keys), np.arange(len(keys) + 1.0)
        else:
            order = keys.argsort()
            self.keys = keys[order]
            self.below = np.concatenate(([0.0], counts[order].cumsum()))

    def __getitem__(self, keys: Ints) -> Floats:
        """Counts of `keys`, any shape; 0 for those that never occurred."""
        before, to = self.keys.searchsorted(keys), self.keys.searchsorted(keys, "right")
        counts: Floats = self.below[to] - self.below[before]
        return counts


class Bigrams:
    """Smoothed P(token | token to its left) and P(token | token to its right) from counted pairs.

    Parameters
    ----------
    pairs
        (left token, right token, count), most frequent first.
    vocab
        Size of the vocabulary.
    """

    _PRIOR = 2.0  # pairs' worth of belief in the token's overall frequency

    def __init__(self, pairs: Sequence[tuple[int, int, int]], vocab: int) -> None:
        table = np.array(pairs, dtype=np.int64).reshape(-1, 3)
        table = table[(table[:, :2] < vocab).all(1)]  # a file may name tokens of another model
        left, right, count = table[:, 0], table[:, 1], table[:, 2].astype(np.float64)
        self.vocab = vocab
        self.pairs = Counts(left * vocab + right, count)
        of_left = np.bincount(left, count, vocab)
        of_right = np.bincount(right, count, vocab)
        # Beside a token to the left stands one that is often the right one of a pair.
        self.prior = self._PRIOR * (np.stack((of_right, of_left)) + 0.1) / (count.sum() + 1)
        self.log_total = np.log(np.stack((of_left, of_right)) + self._PRIOR)

    def log_p(self, tokens: Ints, beside: Ints) -> Floats:
        """Log P(token | the one to its left) and log P(token | the one to its right).

        Parameters
        ----------
        tokens
            [K, J].
        beside
            [2, K] the tokens to the left and to the right.

        Returns
        -------
        [2, K, J].
        """
        seen = self.pairs[_pairs(tokens, beside, self.vocab)] + self.prior[:, tokens]
        log_total = self.log_total[np.arange(2)[:, None], beside]
        log_p: Floats = np.log(seen) - log_total[:, :, None]
        return log_p


def _pairs(tokens: Ints, beside: Ints, vocab: int) -> Ints:
    """Keys [2, K, J] of tokens [K, J] with their left and their right neighbours [2, K]."""
    left, right = beside[:, :, None]
    return np.array((left * vocab + tokens, tokens * vocab + right))


@dataclass(frozen=True)
class Rejected:
    """What R drafts of the last forward say that the walk has not come to, but still may.

    Attributes
    ----------
    choice
        [R, M] rank of the token that the draft holds at a masked position of the root, else -1.
    log_p
        [R, M, J] log-probabilities of the tokens by rank.
    unseen
        bool [R, k], which of the root's fresh tokens the draft does not hold.
    """

    choice: Ints
    log_p: Floats
    unseen: Bools


@dataclass(frozen=True)
class Outlook:
    """What is known at a root, as arrays over its M masked positions in ascending order.

    It is known from S *sources*: the distribution that produced the root, which comes first, and
    those of rejected drafts. Neighbours come in the order left, right, two to the left, two to the
    right.

    Attributes
    ----------
    positions
        [M] of the sequence.
    tokens
        [M, J] most likely tokens by rank, by the first source.
    kinds
        [M, J] number of the token among all different ones.
    seen
        [S, M] rank of the token that the source has seen at the position, -1 where it was masked.
    lead
        [S] how many tokens the source has seen that the first one has not.
    log_p
        [S, M, J] log-probabilities of the tokens.
    best
        [S, M] rank of the most likely one.
    log_mass
        [S, M] logarithm of what those tokens' probabilities add up to.
    neighbours
        [4, M] index (into this list) of the neighbour if that is masked too, else -1; of a second
        neighbour only if the first is masked too.
    neighbour_tokens
        [4, M] token of the neighbour, -1 where that is masked or outside the sequence.
    fresh
        bool [2, S, M], whether the token to the left, to the right is one of the root's that the
        source has not seen.
    before, behind
        [S, M] position of the neighbour if that is fresh, else one far away.
    constant
        [6, S, M] the first of `POSITION_FEATURES`, which are the same at every state.
    echo
        bool [S, M], whether the most likely token is a fresh one that the source has not seen.
    in_text
        Bigrams and trigrams of prompt and answer so far, by `_pairs` and `_triples`.
    eos
        [S, M] whether the most likely token ends the sequence.
    """

    positions: Ints
    tokens: Ints
    kinds: Ints
    seen: Ints
    lead: Ints
    log_p: Floats
    best: Ints
    log_mass: Floats
    neighbours: Ints
    neighbour_tokens: Ints
    fresh: Bools
    before: Ints
    behind: Ints
    constant: Floats
    echo: Bools
    in_text: Counts
    eos: Bools

    @classmethod
    def at(
        cls,
        ids: Ints,
        positions: Ints,
        tokens: Ints,
        log_p: Floats,
        fresh: Ints,
        *,
        mask_token_id: int,
        eos_token_ids: Ints,
        vocab: int,
        rejected: Rejected | None = None,
    ) -> Outlook:
        """Lay out a root.

        Parameters
        ----------
        ids
            [length] the root.
        positions
            [M] its masked positions, best score first.
        tokens, log_p
            [M, J] in the same order.
        fresh
            Positions whose tokens the distribution has not seen.
        rejected
            More sources, in the order of `positions`.
        """
        order = positions.argsort()  # so order[k] is the rank of the k-th position from the left
        where, tokens = positions[order], tokens[order]
        around = where + _AROUND
        known = ids.take(around, mode="clip")
        known[(known == mask_token_id) | (around < 0) | (around >= len(ids))] = -1
        neighbours = where.searchsorted(around)
        is_masked = where.take(neighbours, mode="clip") == around
        is_masked[2:] &= is_masked[:2]
        neighbours[~is_masked] = -1

        log_p, ranks = log_p[None, order], order[None]
        seen = np.full(ranks.shape, -1)
        unseen = np.ones((1, len(fresh)), dtype=np.bool_)
        if rejected is not None:
            choice, said = rejected.choice[:, order], rejected.log_p[:, order]
            shown = np.where(choice < 0, said.max(-1), NEVER)
            ranks = np.concatenate((ranks, (-shown).argsort(1, kind="stable").argsort(1)))
            log_p = np.concatenate((log_p, said))
            seen = np.concatenate((seen, choice))
            unseen = np.concatenate((unseen, rejected.unseen))
        is_fresh = ((around[:2, None, :, None] == fresh) & unseen[:, None]).any(-1)
        log_p = np.maximum(log_p, -30.0)
        best = log_p.argmax(-1)
        likely = tokens[np.arange(len(where)), best]
        eos = (likely[:, :, None] == eos_token_ids).any(-1)
        ascending = np.sort(log_p, -1)
        top, second = ascending[..., -1], ascending[..., max(-2, -ascending.shape[2])]
        constant = np.empty((6, *top.shape))
        constant[0] = np.log1p(ranks)
        constant[1] = _logit(top)
        constant[2] = np.minimum(top - second, 12.0)
        constant[3] = eos
        constant[4:] = is_fresh
        end = where[-1] + 2
        text = ids[max(0, end - _TEXT) : end]
        return cls(
            positions=where,
            tokens=tokens,
            kinds=np.unique(tokens, return_inverse=True)[1].reshape(tokens.shape),
            seen=seen,
            lead=(seen >= 0).sum(1) + len(fresh) - unseen.sum(1),
            log_p=log_p,
            best=best,
            log_mass=np.log(np.minimum(np.exp(log_p).sum(-1), 1.0)),
            neighbours=neighbours,
            neighbour_tokens=known,
            fresh=is_fresh,
            before=np.where(is_fresh[0] & (seen < 0), around[0], -_FAR),
            behind=np.where(is_fresh[1] & (seen < 0), around[1], _FAR),
            constant=constant,
            echo=((likely[:, :, None] == ids[fresh]) & unseen[:, None]).any(-1),
            in_text=_counted(np.where(text == mask_token_id, -1, text), vocab),
            eos=eos,
        )

    def sources(self, choice: Ints) -> Ints:
        """For each state (int64 [n, M]) the source that knows most of it, the first of equals."""
        if len(self.seen) == 1:
            return np.zeros(len(choice), dtype=np.int64)
        fits = ((self.seen < 0) | (self.seen == choice[:, None])).all(-1)
        sources: Ints = np.where(fits, self.lead, -1).argmax(1)
        return sources


def _counted(text: Ints, vocab: int) -> Counts:
    """Bigrams and trigrams of `text` (-1 where unknown)."""
    a, b = text[:-1], text[1:]
    two = np.where(np.minimum(a, b) >= 0, a * vocab + b, -1)
    a, b = text[:-2], two[1:]
    three = np.where(np.minimum(a, b) >= 0, _triples(a, b, vocab), -1)
    return Counts(np.concatenate((two, three)))


def _triples(token: Ints, pair: Ints, vocab: int) -> Ints:
    """Keys of pairs with the token to their left, other than the keys of any pair."""
    return (token + 1) * vocab**2 + pair


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
        beside = _next_to(new, outlook)
        (moved,) = (source != self.source[parents]).nonzero()
        if len(moved):  # another source knows nothing of what was worked out for the parent
            theirs = source[moved]
            depth[moved] = np.minimum(depth[moved], unseen[moved].sum(1))  # a token each at least
            log_p[moved] = outlook.log_p[theirs]
            beside[moved] = _next_to(unseen[moved], outlook) | outlook.fresh[:, theirs].any(0)
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


@dataclass(frozen=True)
class AcceptanceWeights:
    """The acceptance model in the form that `expand` computes with.

    Attributes
    ----------
    position
        [F] coefficients by `POSITION_FEATURES`: softmax over the masked positions.
    commit
        [F + 1] likewise with a constant: one logistic regression per position for threshold
        unmasking; None for one token per step.
    spread
        Standard deviation of an offset that the log-odds of `commit` share at one state: positions
        pass a threshold together or not at all. 0: each on its own.
    token
        [T] coefficients by `TOKEN_FEATURES`: softmax over the tokens of a position.
    bigrams
        Counted pairs.
    """

    position: Floats
    commit: Floats | None
    spread: float
    token: Floats
    bigrams: Bigrams

    @classmethod
    def of(
        cls,
        position: Mapping[str, float],
        commit: Mapping[str, float] | None,
        token: Mapping[str, float],
        pairs: Sequence[tuple[int, int, int]],
        vocab: int,
    ) -> AcceptanceWeights:
        """From coefficients by name; features that are not named count nothing."""
        return cls(
            _vector(position, POSITION_FEATURES),
            None if commit is None else _vector(commit, (*POSITION_FEATURES, "constant")),
            (commit or {}).get("spread", 0.0),
            _vector(token, TOKEN_FEATURES),
            Bigrams(pairs, vocab),
        )


def acceptance_of(graph: DraftGraph) -> AcceptanceModel | None:
    """The artifact's acceptance model, unless it names features that this version does not have.

    What is left of a regression without some of its features says little, so then its nodes draft.
    """
    model = graph.acceptance
    if model is None:
        return None
    positions = {*model.position, *(model.commit or {})}
    known = positions <= {*POSITION_FEATURES, "constant", "spread"}
    return model if known and set(model.token) <= set(TOKEN_FEATURES) else None


def _vector(coefficients: Mapping[str, float], names: Sequence[str]) -> Floats:
    return np.array([coefficients.get(name, 0.0) for name in names])


def _beside(values: NDArray[_Scalar], outlook: Outlook) -> NDArray[_Scalar]:
    """`values` [..., M] of the neighbours of each position, [..., 4, M]; 0 for those not masked."""
    padded = np.zeros((*values.shape[:-1], values.shape[-1] + 1), values.dtype)
    padded[..., :-1] = values
    return padded.take(outlook.neighbours, -1)


def _next_to(values: Bools, outlook: Outlook) -> Bools:
    """Positions [n, M] of which the left or the right neighbour is one of `values` [n, M]."""
    by = _beside(values, outlook)
    either: Bools = by[:, 0] | by[:, 1]
    return either


def changed_beside(outlook: Outlook, choice: Ints) -> Bools:
    """Masked positions [n, M] beside a token that the first source has not seen."""
    beside = _next_to(choice >= 0, outlook) | outlook.fresh[:, 0].any(0)
    changed: Bools = beside & (choice < 0)
    return changed


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
    pairs = _pairs(tokens, known[:2], bigrams.vocab)
    keys = np.concatenate((pairs, _triples(known[2, :, None], pairs[:1], bigrams.vocab)))

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


def _logit(log_p: Floats) -> Floats:
    log_p = np.minimum(log_p, -1e-12)
    logit: Floats = np.maximum(log_p - np.log(-np.expm1(log_p)), -12.0)
    return logit


def position_features(outlook: Outlook, states: States) -> tuple[Floats, Bools]:
    """Features [F, n, M] of every position, and which of them are masked, bool [n, M].

    Features of positions that are not masked mean nothing.
    """
    where, masked = outlook.positions, states.choice < 0
    ascending = np.sort(states.log_p, -1)
    log_p, second = ascending[:, :, -1], ascending[:, :, max(-2, -ascending.shape[2])]
    logit = _logit(log_p)
    shown = np.where(masked, logit, NEVER)
    order = (-shown).argsort(1, kind="stable")
    log_rank = np.empty_like(logit)
    log_rank[np.arange(len(order))[:, None], order] = np.log1p(np.arange(len(where)))
    distance = np.log1p(np.maximum(where - where[masked.argmax(1)][:, None], 0))

    facts = np.array((masked, states.unseen, masked * logit))
    by_masked, drafted, by_logit = _beside(facts, outlook).swapaxes(1, 2)  # each [4, n, M]
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
        np.minimum(log_p - second, 12.0)[None],
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
