"""What the compiled loops are told, as tuples of contiguous arrays, and what they work on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spiffy.runtime.draft.acceptance import OFFSETS, AcceptanceWeights
from spiffy.runtime.draft.expand import (
    FORCED,
    HASHES,
    LEAST,
    OTHER_TOKENS,
    RARE,
    SHARE,
    SHARE_OF_SETS,
    UNCERTAIN,
)
from spiffy.runtime.draft.ngrams import Bools, Floats, Ints


class Limits(NamedTuple):
    """Constants of `expand` that depend on nothing but the unmasking policy."""

    rare: float
    share: float
    least: float
    uncertain: int
    forced: int


class Table(NamedTuple):
    """How often keys occurred: they are where they are looked for, and -1 where there is none."""

    keys: Ints
    counts: Floats


class Model(NamedTuple):
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
    def of(cls, weights: AcceptanceWeights, pairs: Table) -> Model:
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
            Limits(RARE, SHARE_OF_SETS if sets else SHARE, LEAST, UNCERTAIN, FORCED),
        )


class Facts(NamedTuple):
    """What `Outlook.at` is told of a root and rejected drafts."""

    ids: Ints
    positions: Ints
    tokens: Ints
    log_p: Floats
    fresh: Ints
    choice: Ints
    said: Floats
    unseen: Bools


class Root(NamedTuple):
    """An `Outlook`; `share` are probabilities, `ngrams` is what it counts."""

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
    share: Floats
    ngrams: Table


class Level(NamedTuple):
    """`features.States`, and their probabilities `p`.

    `share` [n, M, J] are the probabilities of `log_p`, `logit` [n, M] the log-odds of the largest.
    """

    choice: Ints
    source: Ints
    unseen: Bools
    log_p: Floats
    share: Floats
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

    `told` [F] are those of positions; `behind` [M] as in `features._nearness`, `ahead` [M] ranks;
    `alike` and `is_new` by kind of token; `logs` are of 1, 2, ...; the others are by neighbour.
    """

    told: Floats
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
