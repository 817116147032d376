"""What `outlook` does, in loops that numba compiles: see `loops` for how."""

from __future__ import annotations

from typing import Any

import numpy as np

from spiffy.runtime.draft.compiled.arrays import Outlook, Table
from spiffy.runtime.draft.compiled.jit import compiled

_FAR = 1 << 30  # positions
_SCATTER = -7046029254386353131  # 2**64 over the golden ratio, in two's complement
_LEAST_LOG_P, _MOST_GAP, _LEAST_LOGIT = -30.0, 12.0, -12.0  # as in `outlook`


@compiled
def _slot(keys: Any, key: Any) -> Any:
    """Where a key is among those of a table, or would be: -1 stands where there is none."""
    last = len(keys) - 1
    at = (key * _SCATTER >> 32) & last  # may overflow
    while keys[at] >= 0 and keys[at] != key:
        at = (at + 1) & last
    return at


@compiled
def tabled(keys: Any, counts: Any) -> Any:
    """A table of how often keys (int64 [n], >= 0) occurred; counts (float64 [n]) add up."""
    size = 2
    while size < 2 * len(keys):
        size *= 2
    table = Table(np.full(size, -1), np.zeros(size))
    for k in range(len(keys)):
        at = _slot(table.keys, keys[k])
        table.keys[at] = keys[k]
        table.counts[at] += counts[k]
    return table


@compiled
def _ngrams(text: Any, vocab: Any) -> Any:
    """Bigrams and trigrams of a text (-1 where unknown): `ngrams.counted`."""
    keys, found = np.empty(2 * len(text), np.int64), 0
    for k in range(1, len(text)):
        if text[k - 1] >= 0 and text[k] >= 0:
            pair = text[k - 1] * vocab + text[k]
            keys[found] = pair
            found += 1
            if k > 1 and text[k - 2] >= 0:
                keys[found] = (text[k - 2] + 1) * vocab**2 + pair
                found += 1
    return tabled(keys[:found], np.ones(found))


@compiled
def _neighbours(where: Any, ids: Any, mask_token_id: Any) -> Any:
    """Masked neighbours of positions and tokens of the others, both [4, M]."""
    count = len(where)
    neighbours, known = np.full((4, count), -1), np.full((4, count), -1)
    for m in range(count):
        for side in range(4):
            step = (-1, 1, -2, 2)[side]
            at, next_masked = m + step, where[m] + step
            beside = side < 2 or neighbours[side - 2, m] >= 0
            if beside and 0 <= at < count and where[at] == next_masked:
                neighbours[side, m] = at
            if 0 <= next_masked < len(ids) and ids[next_masked] != mask_token_id:
                known[side, m] = ids[next_masked]
    return neighbours, known


@compiled
def _kinds(tokens: Any) -> Any:
    """Number of every token [M, J] among all different ones, in ascending order."""
    flat = np.sort(tokens.ravel())
    kinds, different = np.empty(tokens.shape, np.int64), 1
    for k in range(1, len(flat)):
        if flat[k] != flat[k - 1]:
            flat[different] = flat[k]
            different += 1
    for m in range(tokens.shape[0]):
        for j in range(tokens.shape[1]):
            kinds[m, j] = np.searchsorted(flat[:different], tokens[m, j])
    return kinds


@compiled
def _ranks(log_p: Any, seen: Any, ranks: Any) -> None:
    """Rank positions that a source (float64 [M, J], int64 [M]) has seen masked, into `ranks` [M].

    By their most probable token, ties to the lower position; the others come last.
    """
    shown = np.full(len(seen), np.inf)
    for m in range(len(seen)):
        if seen[m] < 0:
            shown[m] = -log_p[m].max()
    order = np.argsort(shown, kind="mergesort")
    for r in range(len(order)):
        ranks[order[r]] = r


@compiled
def _is_one_of(number: Any, numbers: Any) -> Any:
    found = False
    for k in range(len(numbers)):
        found |= numbers[k] == number
    return found


@compiled
def _logit(log_p: Any) -> Any:
    """`outlook.logit_of`."""
    log_p = min(log_p, -1e-12)
    return max(log_p - np.log(-np.expm1(log_p)), _LEAST_LOGIT)


@compiled
def lay_out(facts: Any, mask_token_id: Any, eos_token_ids: Any, most: Any, vocab: Any) -> Any:
    """`Outlook.at`; `most` tokens of the text so far count."""
    ids, positions, tokens, log_p, fresh, choice, theirs, unseen_by = facts
    (count, width), sources = tokens.shape, 1 + len(choice)
    order = np.argsort(positions)
    where, by_place = np.empty(count, np.int64), np.empty((count, width), np.int64)
    seen, lead = np.full((sources, count), -1), np.zeros(sources, np.int64)
    source_log_p, token_p = np.empty((sources, count, width)), np.empty((sources, count, width))
    best, log_mass = np.zeros((sources, count), np.int64), np.empty((sources, count))
    is_fresh = np.zeros((2, sources, count), np.bool_)
    before, behind = np.full((sources, count), -_FAR), np.full((sources, count), _FAR)
    constant, echo = np.zeros((6, sources, count)), np.zeros((sources, count), np.bool_)
    ranks, unseen = np.empty(count, np.int64), np.ones((sources, len(fresh)), np.bool_)
    for m in range(count):
        where[m], by_place[m], ranks[m] = positions[order[m]], tokens[order[m]], order[m]
    for s in range(sources):
        for m in range(count):
            source_log_p[s, m] = log_p[order[m]] if s == 0 else theirs[s - 1, order[m]]
            if s > 0:
                seen[s, m] = choice[s - 1, order[m]]
            lead[s] += seen[s, m] >= 0
        if s > 0:
            _ranks(source_log_p[s], seen[s], ranks)
            unseen[s] = unseen_by[s - 1]
        for k in range(len(fresh)):
            lead[s] += not unseen[s, k]
        for m in range(count):
            mass, top, second = 0.0, -np.inf, -np.inf
            for j in range(width):
                value = max(source_log_p[s, m, j], _LEAST_LOG_P)
                source_log_p[s, m, j] = value
                token_p[s, m, j] = np.exp(value)
                mass += token_p[s, m, j]
                if value > top:
                    best[s, m], top, second = j, value, top
                else:
                    second = max(second, value)
            second = top if width == 1 else second
            log_mass[s, m] = np.log(min(mass, 1.0))
            likely = by_place[m, best[s, m]]
            for k in range(len(fresh)):
                if unseen[s, k]:
                    is_fresh[0, s, m] |= fresh[k] == where[m] - 1
                    is_fresh[1, s, m] |= fresh[k] == where[m] + 1
                    echo[s, m] |= ids[fresh[k]] == likely
            if is_fresh[0, s, m] and seen[s, m] < 0:
                before[s, m] = where[m] - 1
            if is_fresh[1, s, m] and seen[s, m] < 0:
                behind[s, m] = where[m] + 1
            constant[4, s, m], constant[5, s, m] = is_fresh[0, s, m], is_fresh[1, s, m]
            constant[0, s, m], constant[1, s, m] = np.log1p(ranks[m]), _logit(top)
            constant[2, s, m] = min(top - second, _MOST_GAP)
            constant[3, s, m] = _is_one_of(likely, eos_token_ids)
    neighbours, known = _neighbours(where, ids, mask_token_id)
    end = where[-1] + 2
    text = ids[max(0, end - most) : end].copy()
    for k in range(len(text)):
        if text[k] == mask_token_id:
            text[k] = -1
    return Outlook(
        where,
        by_place,
        _kinds(by_place),
        seen,
        lead,
        source_log_p,
        best,
        log_mass,
        neighbours,
        known,
        is_fresh,
        before,
        behind,
        constant,
        echo,
        token_p,
        _ngrams(text, vocab),
    )
