"""What a forward says about a root, in draft coordinates: NumPy, on the host.

`compiled.told` does the same in loops, where numba is installed.
"""

from __future__ import annotations

import numpy as np

from spiffy.runtime.draft.ngrams import Bools, Floats, Ints

LIKELY = float(np.log(0.05))  # least log-probability of what an asked draft holds more
SURE = 1 - 1e-12


def ranked(
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


def filled(ids: Ints, positions: Ints, tokens: Ints, choice: Ints) -> Ints:
    """A root's ids [length] with tokens ([M, J] by rank) filled in at positions [M]: [n, length].

    `choice` [n, M] are their ranks, -1 for none.
    """
    states = np.repeat(ids[None], len(choice), 0)
    at, m = (choice >= 0).nonzero()
    states[at, positions[m]] = tokens[m, choice[at, m]]
    return states


def asked(
    held: Ints,
    ids: Ints,
    seen: int,
    positions: Ints,
    tokens: Ints,
    log_p: Floats,
    mask_token_id: int,
) -> Ints:
    """Which drafts may still turn out true, in part, and tell more than their parent does.

    Those that hold all that the parent does, nothing else than the root, and besides something that
    is likely there: one of the tokens at some of the root's masked positions, but not at all.

    Parameters
    ----------
    held
        [n, B] tokens of the last forward's states in the root's block.
    ids
        [B] the root's.
    seen
        The parent, which the root's distribution is of.
    positions, tokens, log_p
        [M] in the block, [M, J], [M, J] the root's masked ones, as its distribution has them.

    Returns
    -------
    [k] numbers of states, ascending.
    """
    masked = held == mask_token_id
    may = ((held == held[seen]) | masked[seen]).all(1)
    may &= ((held == ids) | masked | (ids == mask_token_id)).all(1)
    filled = ~masked[:, positions]
    same = (tokens == held[:, positions, None]) & filled[:, :, None]
    may &= (same.any(-1) | ~filled).all(1) & filled.any(1) & ~filled.all(1)
    may &= np.where(same, log_p, 0.0).sum((1, 2)) > LIKELY
    numbers: Ints = may.nonzero()[0]
    return numbers


def quotes_of(
    table: Ints,
    first: int,
    numbers: Ints,
    pairs: Ints,
    state: Ints,
    quotes: Floats,
    states: Ints,
    tokens: Ints,
) -> Floats:
    """Logits [R, M, J] of tokens, as states say them; -infinity where nobody asked.

    Parameters
    ----------
    table, first
        [K, C] and the first of the columns that hold the likeliest tokens: see `Rules.table`.
    numbers
        [M] rows of it that speak of the tokens' positions.
    pairs, state
        [2, T] and [K], of the question.
    quotes
        [T, k], what was quoted of each pair.
    states
        [R] who is to be quoted.
    tokens
        [M, J], among the likeliest.
    """
    likeliest = table[numbers, first : first + quotes.shape[1]]
    column = (likeliest[:, None] == tokens[:, :, None]).argmax(-1)
    index, which = np.full(len(state), -1), np.full(max(state.max(), states.max()) + 1, -1)
    index[numbers], which[states] = np.arange(len(numbers)), np.arange(len(states))
    m, r = index[pairs[0]], which[state[pairs[1]]]
    wanted = (m >= 0) & (r >= 0)
    m, r = m[wanted], r[wanted]
    logits = np.full((len(states), *tokens.shape), -np.inf)
    logits[r, m] = np.take_along_axis(quotes[wanted], column[m], 1)
    return logits


def heard(
    there: Ints,
    positions: Ints,
    fresh: Ints,
    tokens: Ints,
    log_p: Floats,
    log_total: Floats,
    logits: Floats,
    mask_token_id: int,
) -> tuple[Ints, Floats, Bools]:
    """What drafts that were asked say; those left out whose numbers overflow where others do not.

    All tokens that are not among the J have the weight (the sum of exponentiated logits) that they
    have at the source of the candidates.

    Parameters
    ----------
    there
        [R, B] what the drafts hold in the root's block.
    positions, fresh
        [M] the root's masked ones, and [k] those whose tokens their distribution has not seen; both
        in the block.
    tokens, log_p
        [M, J] and [M, J], as that distribution has them.
    log_total, logits
        [M], the logarithm of all tokens' weights there; [R, M, J], what the drafts say, any numbers
        where they are not masked.

    Returns
    -------
    The fields of `Rejected`.
    """
    others = log_total + np.log1p(-np.minimum(np.exp(log_p).sum(-1), SURE))
    quoted = logits - np.logaddexp(np.logaddexp.reduce(logits, -1), others)[:, :, None]
    filled, same = there[:, positions] != mask_token_id, tokens == there[:, positions, None]
    quoted = np.where(filled[:, :, None], log_p, quoted)  # nobody asks of those
    numbers = np.isfinite(quoted).all((1, 2))  # a draft may overflow where the truth does not
    choice = np.where(filled, same.argmax(-1), -1)
    unseen = there[:, fresh] == mask_token_id
    return choice[numbers], quoted[numbers], unseen[numbers]
