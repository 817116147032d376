"""The acceptance model of an artifact: which future states come next.

Two small regressions, fitted by calibration on recorded decodes, look at a draft state and at a
distribution that has not seen all of its tokens (of the state before the root, or of a rejected
draft):

- the token model re-ranks the most likely tokens of a position next to a token that was only just
  committed or drafted, with evidence that costs no forward (bigrams of the calibration answers,
  n-grams of the text so far);
- the position model says which masked position the next denoising step commits.

Here are their coefficients; `features` computes what they look at, `expand` turns them into drafts.
What is drafted never changes a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spiffy.runtime.draft.ngrams import Bigrams, Floats
from spiffy.schemas import AcceptanceModel, DraftGraph

#: Tokens of a position that drafts choose from.
TOKEN_RANKS = 4

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


def acceptance_weights(acceptance: AcceptanceModel, vocab: int) -> AcceptanceWeights:
    """The artifact's acceptance model as arrays."""
    return AcceptanceWeights.of(
        acceptance.position, acceptance.commit, acceptance.token, acceptance.bigrams, vocab
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
