"""What the compiled loops take and work on, as tuples of contiguous arrays.

Those that are named like a class of the NumPy reference hold the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spiffy.runtime.draft.acceptance import OFFSETS, AcceptanceWeights
from spiffy.runtime.draft.expand import (
    FORCED,
    HASHES,
    LEAST,
    OTHER_TOKENS,
    PATH_SHARE,
    PATH_SHARE_OF_SETS,
    RARE,
    UNCERTAIN,
)
from spiffy.runtime.draft.ngrams import Bools, Floats, Ints


class Limits(NamedTuple):
    """Constants of `expand` that depend on nothing but the unmasking policy."""

    rare: float
    path_share: float
    least: float
    uncertain: int
    forced: int


class Table(NamedTuple):
    """How often keys occurred: they are where they are looked for, and -1 where there is none."""

    keys: Ints
    counts: Floats


class Weights(NamedTuple):
    """An `AcceptanceWeights`, and tables of `expand`.

    `commit` is [0] for one token per step; `offsets` [n, 2] are those of the log-odds and the
    logarithms of their shares.
    """

    position: Floats
    commit: Floats
    offsets: Floats
    token: Floats
    pairs: Table
    prior: Floats
    log_total: Floats
    vocab: int
    hashes: Ints
    others: Ints
    limits: Limits

    @classmethod
    def of(cls, weights: AcceptanceWeights, pairs: Table) -> Weights:
        """The weights as arrays, with the table of what their bigrams count."""
        sets, bigrams = weights.commit is not None, weights.bigrams
        offsets = OFFSETS if weights.spread else ((0.0, 1.0),)
        return cls(
            weights.position,
            np.empty(0) if weights.commit is None else weights.commit,
            np.array([(offset * weights.spread, np.log(share)) for offset, share in offsets]),
            weights.token,
            pairs,
            bigrams.prior,
            bigrams.log_total,
            bigrams.vocab,
            HASHES,
            np.array(OTHER_TOKENS),
            Limits(RARE, PATH_SHARE_OF_SETS if sets else PATH_SHARE, LEAST, UNCERTAIN, FORCED),
        )


class Facts(NamedTuple):
    """What `Outlook.at` lays out: a root, and R rejected drafts (none: R is 0)."""

    ids: Ints
    positions: Ints
    tokens: Ints
    log_p: Floats
    fresh: Ints
    rejected_choice: Ints
    rejected_log_p: Floats
    rejected_unseen: Bools


class Outlook(NamedTuple):
    """An `outlook.Outlook`, and `token_p` [S, M, J], the probabilities of `log_p`."""

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
    token_p: Floats
    in_text: Table


class States(NamedTuple):
    """`features.States`, and their probabilities `p` [n].

    `token_p` [n, M, J] are the probabilities of `log_p`, `logit` [n, M] the log-odds of the most
    likely token.
    """

    choice: Ints
    source: Ints
    unseen: Bools
    log_p: Floats
    token_p: Floats
    logit: Floats
    depth: Ints
    p: Floats


class Children(NamedTuple):
    """`expand._Children`."""

    parent: Ints
    choice: Ints
    p: Floats


class Work(NamedTuple):
    """Where features are worked out, of one position after the other.

    `features` [F] are those of a position; `behind` [M] as in `features._nearness`, `ahead` [M]
    ranks; `alike` and `is_new` by kind of token; `logs` are of 1, 2, ...; the others are by
    neighbour.
    """

    features: Floats
    behind: Ints
    ahead: Ints
    alike: Ints
    is_new: Bools
    logs: Floats
    masked: Floats
    drafted: Floats
    theirs: Floats
    beside: Ints
    new: Bools
