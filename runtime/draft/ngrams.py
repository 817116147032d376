"""Counted pairs and triples of tokens: evidence about draft tokens that costs no forward.

Bigrams of the calibration answers come with the artifact; n-grams of prompt and answer so far are
counted at every root.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


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
        seen = self.pairs[pairs_of(tokens, beside, self.vocab)] + self.prior[:, tokens]
        log_total = self.log_total[np.arange(2)[:, None], beside]
        log_p: Floats = np.log(seen) - log_total[:, :, None]
        return log_p


def pairs_of(tokens: Ints, beside: Ints, vocab: int) -> Ints:
    """Keys [2, K, J] of tokens [K, J] with their left and their right neighbours [2, K]."""
    left, right = beside[:, :, None]
    return np.array((left * vocab + tokens, tokens * vocab + right))


def triples_of(token: Ints, pair: Ints, vocab: int) -> Ints:
    """Keys of pairs with the token to their left, other than the keys of any pair."""
    return (token + 1) * vocab**2 + pair


def counted(text: Ints, vocab: int) -> Counts:
    """Bigrams and trigrams of `text` (-1 where unknown)."""
    a, b = text[:-1], text[1:]
    two = np.where(np.minimum(a, b) >= 0, a * vocab + b, -1)
    a, b = text[:-2], two[1:]
    three = np.where(np.minimum(a, b) >= 0, triples_of(a, b, vocab), -1)
    return Counts(np.concatenate((two, three)))
