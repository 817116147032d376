"""What is known at a root before its drafts are chosen, laid out as arrays.

NumPy, because many small arrays per forward cost less there than anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from spiffy.runtime.draft.ngrams import Bools, Counts, Floats, Ints, counted

_Scalar = TypeVar("_Scalar", bound=np.generic)

TEXT = 1024  # tokens of the text so far that n-grams are taken from
NEVER = -1e9  # score of what cannot be
_FAR = 1 << 30  # positions
#: Within these bounds are log-probabilities, and what features make of them, in calibration too.
LEAST_LOG_P, MOST_GAP, LEAST_LOGIT = -30.0, 12.0, -12.0

#: Left, right, two to the left, two to the right.
_AROUND = np.array([-1, 1, -2, 2])[:, None]


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
        Bigrams and trigrams of prompt and answer so far, by `pairs_of` and `triples_of`.
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
        neighbours, known = _neighbours(where, ids, mask_token_id)
        log_p, ranks = log_p[None, order], order[None]
        seen = np.full(ranks.shape, -1)
        unseen = np.ones((1, len(fresh)), dtype=np.bool_)
        if rejected is not None:
            choice, theirs = rejected.choice[:, order], rejected.log_p[:, order]
            ranks = np.concatenate((ranks, _ranks(theirs, choice)))
            log_p = np.concatenate((log_p, theirs))
            seen = np.concatenate((seen, choice))
            unseen = np.concatenate((unseen, rejected.unseen))
        beside = where + _AROUND[:2]
        is_fresh = ((beside[:, None, :, None] == fresh) & unseen[:, None]).any(-1)
        log_p = np.maximum(log_p, LEAST_LOG_P)
        best = log_p.argmax(-1)
        likely = tokens[np.arange(len(where)), best]
        ascending = np.sort(log_p, -1)
        top, second = ascending[..., -1], ascending[..., max(-2, -ascending.shape[2])]
        constant = np.empty((6, *top.shape))
        constant[0] = np.log1p(ranks)
        constant[1] = logit_of(top)
        constant[2] = np.minimum(top - second, MOST_GAP)
        constant[3] = (likely[:, :, None] == eos_token_ids).any(-1)
        constant[4:] = is_fresh
        return cls(
            positions=where,
            tokens=tokens,
            kinds=_kinds(tokens),
            seen=seen,
            lead=(seen >= 0).sum(1) + len(fresh) - unseen.sum(1),
            log_p=log_p,
            best=best,
            log_mass=np.log(np.minimum(np.exp(log_p).sum(-1), 1.0)),
            neighbours=neighbours,
            neighbour_tokens=known,
            fresh=is_fresh,
            before=np.where(is_fresh[0] & (seen < 0), beside[0], -_FAR),
            behind=np.where(is_fresh[1] & (seen < 0), beside[1], _FAR),
            constant=constant,
            echo=((likely[:, :, None] == ids[fresh]) & unseen[:, None]).any(-1),
            in_text=ngrams_before(ids, where[-1], mask_token_id, vocab),
        )

    def sources(self, choice: Ints) -> Ints:
        """For each state (int64 [n, M]) the source that knows most of it, the first of equals."""
        if len(self.seen) == 1:
            return np.zeros(len(choice), dtype=np.int64)
        fits = ((self.seen < 0) | (self.seen == choice[:, None])).all(-1)
        sources: Ints = np.where(fits, self.lead, -1).argmax(1)
        return sources


def _neighbours(where: Ints, ids: Ints, mask_token_id: int) -> tuple[Ints, Ints]:
    """Masked neighbours of positions and tokens of the others, both [4, M]: see `Outlook`."""
    around = where + _AROUND
    known = ids.take(around, mode="clip")
    known[(known == mask_token_id) | (around < 0) | (around >= len(ids))] = -1
    neighbours = where.searchsorted(around)
    is_masked = where.take(neighbours, mode="clip") == around
    is_masked[2:] &= is_masked[:2]
    neighbours[~is_masked] = -1
    return neighbours, known


def _ranks(log_p: Floats, seen: Ints) -> Ints:
    """Ranks [R, M] of the positions that sources ([R, M, J], [R, M]) have seen masked.

    By their most probable token, ties to the lower position; the others come last.
    """
    shown = np.where(seen < 0, log_p.max(-1), NEVER)
    ranks: Ints = (-shown).argsort(1, kind="stable").argsort(1)
    return ranks


def _kinds(tokens: Ints) -> Ints:
    """Number of every token [M, J] among all different ones, in ascending order."""
    return np.unique(tokens, return_inverse=True)[1].reshape(tokens.shape)


def ngrams_before(ids: Ints, last: int, mask_token_id: int, vocab: int) -> Counts:
    """Bigrams and trigrams of the text up to the token behind position `last`."""
    end = last + 2
    text = ids[max(0, end - TEXT) : end]
    return counted(np.where(text == mask_token_id, -1, text), vocab)


def of_neighbours(values: NDArray[_Scalar], outlook: Outlook) -> NDArray[_Scalar]:
    """`values` [..., M] of the neighbours of each position, [..., 4, M]; 0 for those not masked."""
    padded = np.zeros((*values.shape[:-1], values.shape[-1] + 1), values.dtype)
    padded[..., :-1] = values
    return padded.take(outlook.neighbours, -1)


def next_to(values: Bools, outlook: Outlook) -> Bools:
    """Positions [n, M] of which the left or the right neighbour is one of `values` [n, M]."""
    by = of_neighbours(values, outlook)
    either: Bools = by[:, 0] | by[:, 1]
    return either


def changed_beside(outlook: Outlook, choice: Ints) -> Bools:
    """Masked positions [n, M] beside a token that the first source has not seen."""
    beside = next_to(choice >= 0, outlook) | outlook.fresh[:, 0].any(0)
    changed: Bools = beside & (choice < 0)
    return changed


def logit_of(log_p: Floats) -> Floats:
    """Log-odds of log-probabilities, any shape, at least `LEAST_LOGIT` and finite."""
    log_p = np.minimum(log_p, -1e-12)
    logit: Floats = np.maximum(log_p - np.log(-np.expm1(log_p)), LEAST_LOGIT)
    return logit
