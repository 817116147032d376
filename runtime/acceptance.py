"""Which future states come next: the acceptance model of an artifact.

Two small regressions, fitted by calibration on recorded decodes, look at the distribution that
produced the root (which has not seen the tokens committed since) and at a draft state:

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
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_Scalar = TypeVar("_Scalar", bound=np.generic)

#: Tokens of a position that drafts choose from.
TOKEN_RANKS = 4
_TEXT = 1024  # tokens of the text so far that n-grams are taken from
NEVER = -1e9  # score of what cannot be

#: The shared offset of threshold unmasking in units of its spread, with probabilities: three nodes
#: of Gauss-Hermite quadrature, which has the moments of a normal law up to the fifth.
OFFSETS = ((-(3**0.5), 1 / 6), (0.0, 2 / 3), (3**0.5, 1 / 6))

POSITION_FEATURES = (
    "logit",
    "log_p",
    "gap",
    "log_rank",
    "first_rank",
    "origin_log_rank",
    "below_best",
    "below_best_x_share",
    "logit_x_share",
    "logit_above_2",
    "logit_above_4",
    "logit_above_7",
    "logit_below_0",
    "left_masked",
    "right_masked",
    "both_masked",
    "left_committed",
    "right_committed",
    "left_drafted",
    "right_drafted",
    "left_committed_x_logit",
    "right_committed_x_logit",
    "left_drafted_x_logit",
    "right_drafted_x_logit",
    "both_drafted",
    "left_drafted_right_masked",
    "left_drafted_right_masked_x_logit",
    "right_drafted_left_masked",
    "left_logit",
    "right_logit",
    "left_above",
    "right_above",
    "leftmost",
    "distance",
    "nearness",
    "nearness_x_logit",
    "reranked_by",
    "reranked_by_x_left",
    "reranked_by_x_right",
    "eos",
    "eos_x_logit",
    "eos_leftmost",
    "eos_distance",
    "depth_x_logit",
    "depth_x_eos",
    "confidence",
    "origin_logit",
    "origin_gap",
    "second_left_drafted_left_masked",
    "second_right_drafted_right_masked",
    "two_left_drafted",
    "two_right_drafted",
    "depth",
)

TOKEN_FEATURES = (
    "log_p",
    "first",
    "left_bigram",
    "left_in_text",
    "left_two_in_text",
    "left_same",
    "left_log_p",
    "right_bigram",
    "right_in_text",
    "right_same",
    "right_log_p",
    "both_log_p",
)


class Counts:
    """How often keys (int64, >= 0) occurred; looks up whole arrays."""

    def __init__(self, keys: Ints, counts: Floats) -> None:
        order = np.argsort(keys)
        self.keys, self.counts = keys[order], counts[order]

    @classmethod
    def of(cls, keys: Ints) -> Counts:
        """Count equal keys."""
        unique, counts = np.unique(keys, return_counts=True)
        return cls(unique, counts.astype(np.float64))

    def __getitem__(self, keys: Ints) -> Floats:
        """Counts of `keys`, any shape; 0 for those that never occurred."""
        if not len(self.keys):
            return np.zeros(keys.shape)
        found = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        counts: Floats = np.where(self.keys[found] == keys, self.counts[found], 0.0)
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
        left, right, count = table[:, 0], table[:, 1], table[:, 2].astype(np.float64)
        self.vocab = vocab
        self.pairs = Counts(left * vocab + right, count)
        self.left = self._sums(left, count)
        self.right = self._sums(right, count)
        self.total = float(count.sum()) + 1.0

    @staticmethod
    def _sums(tokens: Ints, counts: Floats) -> Counts:
        unique, where = np.unique(tokens, return_inverse=True)
        return Counts(unique, np.bincount(where, counts, len(unique)).astype(np.float64))

    def log_p_right(self, left: Ints, token: Ints) -> Floats:
        """Log P(token | the token to its left)."""
        prior = self._PRIOR * (self.right[token] + 0.1) / self.total
        seen = self.pairs[left * self.vocab + token] + prior
        return np.log(seen / (self.left[left] + self._PRIOR))

    def log_p_left(self, token: Ints, right: Ints) -> Floats:
        """Log P(token | the token to its right)."""
        prior = self._PRIOR * (self.left[token] + 0.1) / self.total
        seen = self.pairs[token * self.vocab + right] + prior
        return np.log(seen / (self.right[right] + self._PRIOR))


@dataclass(frozen=True)
class Outlook:
    """What is known at a root, as arrays over its M masked positions in ascending order.

    Attributes
    ----------
    positions
        [M] of the sequence.
    tokens, log_p
        [M, J] most likely tokens and their log-probabilities, by rank.
    rank
        [M] rank of the position by the policy's score.
    adjacent
        bool [M - 1], whether a position and the next one in the list are neighbours.
    left, right
        [M] index (into this list) of the position beside it if that is masked too, else -1.
    left_token, right_token
        [M] token beside it, -1 where that is masked or outside the sequence.
    left_token_2
        [M] token two to the left, -1 likewise.
    left_fresh, right_fresh
        [M] whether the token beside it is one that the distribution has not seen.
    bigrams_in_text, trigrams_in_text
        Of prompt and answer so far.
    share
        Masked share of the block.
    eos
        [M] whether the most likely token ends the sequence.
    """

    positions: Ints
    tokens: Ints
    log_p: Floats
    rank: Ints
    adjacent: Bools
    left: Ints
    right: Ints
    left_token: Ints
    right_token: Ints
    left_token_2: Ints
    left_fresh: Bools
    right_fresh: Bools
    bigrams_in_text: Counts
    trigrams_in_text: Counts
    share: float
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
        block_length: int,
        mask_token_id: int,
        eos_token_ids: Sequence[int],
        vocab: int,
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
        """
        order = np.argsort(positions)
        where = positions[order]
        known = np.full(len(ids) + 3, -1, dtype=np.int64)  # two before, one behind
        known[2:-1] = np.where(ids == mask_token_id, -1, ids)
        index = np.full(len(ids) + 2, -1, dtype=np.int64)
        index[where + 1] = np.arange(len(where))
        is_fresh = np.zeros(len(ids) + 2, dtype=np.bool_)
        is_fresh[fresh + 1] = True
        stop = int(where[-1]) + 1
        text = known[2 : 2 + min(len(ids), stop + 1)][-_TEXT:]
        a, b = text[:-1], text[1:]
        both = (a >= 0) & (b >= 0)
        two = a * vocab + b
        three = both[:-1] & both[1:]
        return cls(
            positions=where,
            tokens=tokens[order],
            log_p=np.maximum(log_p[order], -30.0),
            rank=order,
            adjacent=np.diff(where) == 1,
            left=index[where],
            right=index[where + 2],
            left_token=known[where + 1],
            right_token=known[where + 3],
            left_token_2=known[where],
            left_fresh=is_fresh[where],
            right_fresh=is_fresh[where + 2],
            bigrams_in_text=Counts.of(two[both]),
            trigrams_in_text=Counts.of((two[:-1] * vocab + b[1:])[three]),
            share=len(where) / block_length,
            eos=np.isin(tokens[order][:, 0], eos_token_ids),
        )


@dataclass(frozen=True)
class States:
    """n draft states of one root.

    Attributes
    ----------
    choice
        int64 [n, M], rank of the token filled in, -1 where still masked.
    log_p
        float64 [n, M, J] of the tokens, re-ranked beside fresh ones.
    depth
        int64 [n], denoising steps since the root.
    """

    choice: Ints
    log_p: Floats
    depth: Ints

    @classmethod
    def of(cls, outlook: Outlook, model: AcceptanceWeights, choice: Ints, depth: Ints) -> States:
        """Any states (int64 [n, M]) of a root."""
        log_p = np.repeat(outlook.log_p[None], len(choice), 0)
        beside = changed_beside(outlook, choice)
        return cls(choice, _reranked(outlook, model, choice, log_p, beside), depth)

    def filled(
        self, outlook: Outlook, model: AcceptanceWeights, parents: Ints, choice: Ints
    ) -> States:
        """Children (int64 [k, M]) of the states `parents` (int64 [k])."""
        new = (choice >= 0) & (self.choice[parents] < 0)
        beside = (_left_of(new, outlook) | _right_of(new, outlook)) & (choice < 0)
        log_p = self.log_p[parents]
        log_p = _reranked(outlook, model, choice, log_p, beside)
        return States(choice, log_p, self.depth[parents] + 1)


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


def _vector(coefficients: Mapping[str, float], names: Sequence[str]) -> Floats:
    return np.array([coefficients.get(name, 0.0) for name in names])


def _left_of(values: NDArray[_Scalar], outlook: Outlook) -> NDArray[_Scalar]:
    """`values` [n, M] of the position to the left; 0 where that is not in the list."""
    shifted = np.zeros_like(values)
    np.multiply(values[:, :-1], outlook.adjacent, out=shifted[:, 1:], casting="unsafe")
    return shifted


def _right_of(values: NDArray[_Scalar], outlook: Outlook) -> NDArray[_Scalar]:
    """`values` [n, M] of the position to the right; 0 where that is not in the list."""
    shifted = np.zeros_like(values)
    np.multiply(values[:, 1:], outlook.adjacent, out=shifted[:, :-1], casting="unsafe")
    return shifted


def changed_beside(outlook: Outlook, choice: Ints) -> Bools:
    """Masked positions [n, M] beside a token that the distribution has not seen."""
    drafted = choice >= 0
    left = outlook.left_fresh | _left_of(drafted, outlook)
    right = outlook.right_fresh | _right_of(drafted, outlook)
    changed: Bools = (left | right) & ~drafted
    return changed


def token_features(outlook: Outlook, bigrams: Bigrams, choice: Ints, at: Ints, m: Ints) -> Floats:
    """Features [K, J, T] of the tokens of positions `m` (int64 [K]) in states `at` (int64 [K])."""
    tokens = outlook.tokens[m]
    log_p = outlook.log_p[m]
    rows = np.arange(len(outlook.tokens))
    chosen = np.where(choice >= 0, outlook.tokens[rows, choice], -1)
    chosen = np.concatenate((chosen, np.full((len(choice), 1), -1)), 1)

    def beside(neighbour: Ints, token: Ints, fresh: Bools) -> tuple[Ints, Floats]:
        drafted = chosen[at, neighbour[m]]
        known = np.where(drafted >= 0, drafted, token[m])
        return known, ((drafted >= 0) | (fresh[m] & (known >= 0))).astype(np.float64)

    left, new_left = beside(outlook.left, outlook.left_token, outlook.left_fresh)
    right, new_right = beside(outlook.right, outlook.right_token, outlook.right_fresh)
    two_left = np.where(
        outlook.left[m] >= 0,
        np.where(
            outlook.left[outlook.left[m]] >= 0,
            chosen[at, outlook.left[outlook.left[m]]],
            outlook.left_token[outlook.left[m]],
        ),
        outlook.left_token_2[m],
    )
    left_, right_ = np.maximum(left, 0)[:, None], np.maximum(right, 0)[:, None]
    two_ = np.maximum(two_left, 0)[:, None]
    vocab = bigrams.vocab
    text, text_3 = outlook.bigrams_in_text, outlook.trigrams_in_text
    by_left, by_right = new_left[:, None], new_right[:, None]
    first = np.zeros_like(log_p)
    first[:, 0] = 1
    pair_left = left_ * vocab + tokens
    columns = (
        log_p,
        first,
        by_left * bigrams.log_p_right(left_, tokens),
        by_left * np.log1p(text[pair_left]),
        by_left * (two_left >= 0)[:, None] * np.log1p(text_3[two_ * vocab * vocab + pair_left]),
        by_left * (tokens == left_),
        by_left * log_p,
        by_right * bigrams.log_p_left(tokens, right_),
        by_right * np.log1p(text[tokens * vocab + right_]),
        by_right * (tokens == right_),
        by_right * log_p,
        by_left * by_right * log_p,
    )
    return np.stack(columns, -1)


def _reranked(
    outlook: Outlook, model: AcceptanceWeights, choice: Ints, log_p: Floats, beside: Bools
) -> Floats:
    """`log_p` [n, M, J] with the positions `beside` (bool [n, M]) re-ranked, in place."""
    at, m = beside.nonzero()
    if len(at):
        score = token_features(outlook, model.bigrams, choice, at, m) @ model.token
        score -= score.max(-1, keepdims=True)
        mass = np.minimum(np.exp(outlook.log_p[m]).sum(-1, keepdims=True), 1.0)
        total = np.exp(score).sum(-1, keepdims=True)
        log_p[at, m] = score + np.log(mass / total)
    return log_p


def _logit(log_p: Floats) -> Floats:
    log_p = np.minimum(log_p, -1e-12)
    return np.clip(log_p - np.log(-np.expm1(log_p)), -12.0, 28.0)


def position_features(outlook: Outlook, states: States) -> tuple[Floats, Bools]:
    """Features [F, n, M] of every position, and which of them are masked, bool [n, M]."""
    choice = states.choice
    drafted = choice >= 0
    masked = ~drafted
    two = np.sort(states.log_p, -1)[:, :, -2:] if states.log_p.shape[2] > 1 else None
    log_p = states.log_p[:, :, 0] if two is None else two[:, :, 1]
    gap = np.zeros_like(log_p) if two is None else np.minimum(log_p - two[:, :, 0], 12.0)
    logit = _logit(log_p)
    shown = np.where(masked, logit, NEVER)
    best = shown.max(1, keepdims=True)
    order = np.argsort(-shown, axis=1, kind="stable")
    rank = order.argsort(axis=1)
    share = masked.mean(1, keepdims=True) * outlook.share

    left_masked, right_masked = _left_of(masked, outlook), _right_of(masked, outlook)
    left_drafted, right_drafted = _left_of(drafted, outlook), _right_of(drafted, outlook)
    left_logit = np.where(left_masked, _left_of(logit, outlook), 0.0)
    right_logit = np.where(right_masked, _right_of(logit, outlook), 0.0)
    left_new, right_new = outlook.left_fresh, outlook.right_fresh
    leftmost = np.zeros_like(masked)
    first = masked.argmax(1)
    leftmost[np.arange(len(masked)), first] = True
    where = outlook.positions
    distance = np.log1p(np.maximum(where - where[first][:, None], 0))
    near = _nearness(drafted, left_new, right_new, where)
    origin = _logit(outlook.log_p[:, 0])
    origin_gap = np.minimum(outlook.log_p[:, 0] - outlook.log_p[:, 1 % outlook.log_p.shape[1]], 12)
    moved = logit - origin
    second_left = _left_of(left_drafted, outlook)
    second_right = _right_of(right_drafted, outlook)
    eos, depth = outlook.eos, states.depth[:, None]
    columns = (
        logit,
        log_p,
        gap,
        np.log1p(rank),
        rank == 0,
        np.log1p(outlook.rank),
        logit - best,
        (logit - best) * share,
        logit * share,
        np.maximum(logit - 2, 0),
        np.maximum(logit - 4, 0),
        np.maximum(logit - 7, 0),
        np.minimum(logit, 0),
        left_masked,
        right_masked,
        left_masked & right_masked,
        left_new,
        right_new,
        left_drafted,
        right_drafted,
        left_new * logit,
        right_new * logit,
        left_drafted * logit,
        right_drafted * logit,
        left_drafted & right_drafted,
        left_drafted & right_masked,
        (left_drafted & right_masked) * logit,
        right_drafted & left_masked,
        left_logit,
        right_logit,
        np.where(left_masked, np.maximum(left_logit - logit, 0), 0),
        np.where(right_masked, np.maximum(right_logit - logit, 0), 0),
        leftmost,
        distance,
        near,
        near * logit,
        moved,
        moved * left_drafted,
        moved * right_drafted,
        eos,
        eos * logit,
        eos & leftmost,
        eos * distance,
        depth * logit,
        depth * eos,
        np.exp(log_p),
        origin,
        origin_gap,
        second_left & left_masked,
        second_right & right_masked,
        second_left & left_drafted,
        second_right & right_drafted,
        depth,
    )
    features = np.empty((len(columns), *masked.shape))
    for row, column in zip(features, columns, strict=True):
        row[:] = column
    return features, masked


def _nearness(drafted: Bools, left_new: Bools, right_new: Bools, where: Ints) -> Floats:
    """1 / (1 + positions to the nearest token that the distribution has not seen), [n, M]."""
    far = 1 << 30
    before = np.where(drafted, where, np.where(left_new, where - 1, -far))
    behind = np.where(drafted, where, np.where(right_new, where + 1, far))
    before = np.maximum.accumulate(before, 1)
    behind = np.minimum.accumulate(behind[:, ::-1], 1)[:, ::-1]
    return 1.0 / (1.0 + np.minimum(where - before, behind - where))
