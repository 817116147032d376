"""Array primitives of drafting, from a forward's read-out to candidates and back to states.

This is the NumPy reference; `compiled.primitives` is its twin in loops, where numba is installed.
"""

from __future__ import annotations

import numpy as np

from spiffy.runtime.draft.ngrams import Bools, Floats, Ints

#: A draft that is less probable than 5% beyond its source is not worth asking.
LIKELY = float(np.log(0.05))
#: The most that the likeliest tokens add up to: log1p(-mass) stays finite.
SURE = 1 - 1e-12


def rank(
    positions: Ints,
    tokens: Ints,
    log_p: Floats,
    score: Floats,
    masked: Ints,
    mask_token_id: int,
    kept: int,
    by_token: bool,
) -> tuple[Ints, Ints, Floats]:
    """Rank positions by score and tokens by probability; ties to the lower position, lower id.

    Parameters
    ----------
    positions
        [N] ascending.
    tokens, log_p, score
        [N, K], [N, K] and [N]; of the mask token, which is never drafted, there may be one in K.
    masked
        [M], those of the positions that are wanted, ascending.
    kept
        How many tokens of each, J < K.
    by_token
        Whether their likeliest token ranks positions, and not `score`.

    Returns
    -------
    Positions [M], tokens [M, J] and log-probabilities [M, J].
    """
    left = positions.searchsorted(masked)
    log_p, tokens, score = log_p[left], tokens[left], score[left]
    log_p = np.where(tokens == mask_token_id, -np.inf, log_p)
    order = (-(log_p.max(1) if by_token else score)).argsort(kind="stable")
    by_rank = np.lexsort((tokens, -log_p))[order, :kept]
    rows = order[:, None]
    return masked[order], tokens[rows, by_rank], log_p[rows, by_rank]


def fill_in(ids: Ints, positions: Ints, tokens: Ints, choice: Ints) -> Ints:
    """A root's ids [length] with tokens ([M, J] by rank) filled in at positions [M]: [n, length].

    `choice` [n, M] are their ranks, -1 for none.
    """
    states = np.repeat(ids[None], len(choice), 0)
    at, m = (choice >= 0).nonzero()
    states[at, positions[m]] = tokens[m, choice[at, m]]
    return states


def informative_drafts(
    held: Ints,
    ids: Ints,
    source: int,
    positions: Ints,
    tokens: Ints,
    log_p: Floats,
    mask_token_id: int,
) -> Ints:
    """Which drafts may still come true, in part, and tell more than the source of the candidates.

    Those that hold all that the source does, nothing else than the root, and besides something that
    is likely there: one of the tokens at some of the root's masked positions, but not at all.

    Parameters
    ----------
    held
        [n, B] tokens of the last forward's states in the root's block.
    ids
        [B] the root's.
    source
        Number of the state whose distribution the candidates come from.
    positions, tokens, log_p
        [M] in the block, [M, J], [M, J] the root's masked ones, as that distribution has them.

    Returns
    -------
    [k] numbers of states, ascending.
    """
    masked = held == mask_token_id
    may = ((held == held[source]) | masked[source]).all(1)
    may &= ((held == ids) | masked | (ids == mask_token_id)).all(1)
    filled = ~masked[:, positions]
    same = (tokens == held[:, positions, None]) & filled[:, :, None]
    may &= (same.any(-1) | ~filled).all(1) & filled.any(1) & ~filled.all(1)
    may &= np.where(same, log_p, 0.0).sum((1, 2)) > LIKELY
    numbers: Ints = may.nonzero()[0]
    return numbers


def cross_logits_of(
    table: Ints,
    first: int,
    numbers: Ints,
    cross_pairs: Ints,
    state: Ints,
    by_pair: Floats,
    states: Ints,
    tokens: Ints,
) -> Floats:
    """Logits [R, M, J] of tokens, as states say them; -infinity where they were not read.

    Parameters
    ----------
    table, first
        [K, C] and the first of the columns that hold the likeliest tokens: see `Rules.table`.
    numbers
        [M] rows of it that speak of the tokens' positions.
    cross_pairs, state
        [2, T] and [K], see `ReadPlan`.
    by_pair
        [T, k], logits at the second of each pair, of the first one's likeliest tokens.
    states
        [R] whose logits are wanted.
    tokens
        [M, J], among the likeliest.
    """
    likeliest = table[numbers, first : first + by_pair.shape[1]]
    column = (likeliest[:, None] == tokens[:, :, None]).argmax(-1)
    index, which = np.full(len(state), -1), np.full(max(state.max(), states.max()) + 1, -1)
    index[numbers], which[states] = np.arange(len(numbers)), np.arange(len(states))
    m, r = index[cross_pairs[0]], which[state[cross_pairs[1]]]
    wanted = (m >= 0) & (r >= 0)
    m, r = m[wanted], r[wanted]
    logits = np.full((len(states), *tokens.shape), -np.inf)
    logits[r, m] = np.take_along_axis(by_pair[wanted], column[m], 1)
    return logits


def rejected_log_p(
    held: Ints,
    positions: Ints,
    fresh: Ints,
    tokens: Ints,
    log_p: Floats,
    log_total: Floats,
    logits: Floats,
    mask_token_id: int,
) -> tuple[Ints, Floats, Bools]:
    """From logits of informative drafts to log-probabilities; left out are drafts that overflow.

    All tokens that are not among the J have the weight (the sum of exponentiated logits) that they
    have at the source of the candidates.

    Parameters
    ----------
    held
        [R, B] what the drafts hold in the root's block.
    positions, fresh
        [M] the root's masked ones, and [k] those whose tokens the source has not seen; both in the
        block.
    tokens, log_p
        [M, J] and [M, J], as the source's distribution has them.
    log_total, logits
        [M], the logarithm of all tokens' weights there; [R, M, J], what the drafts say, any numbers
        where they are not masked: see `Evaluation.cross_logits`.

    Returns
    -------
    (choice [R', M], log_p [R', M, J], unseen [R', k]), R' <= R: the fields of `Rejected`.
    """
    others = log_total + np.log1p(-np.minimum(np.exp(log_p).sum(-1), SURE))
    theirs = logits - np.logaddexp(np.logaddexp.reduce(logits, -1), others)[:, :, None]
    filled, same = held[:, positions] != mask_token_id, tokens == held[:, positions, None]
    theirs = np.where(filled[:, :, None], log_p, theirs)  # of those no logits were read
    numbers = np.isfinite(theirs).all((1, 2))  # a draft may overflow where the truth does not
    choice = np.where(filled, same.argmax(-1), -1)
    unseen = held[:, fresh] == mask_token_id
    return choice[numbers], theirs[numbers], unseen[numbers]
