"""What `draft.primitives` does, in loops that numba compiles: see `loops`."""

from __future__ import annotations

from typing import Any

import numpy as np

from spiffy.runtime.draft.compiled.jit import compiled


@compiled
def _place(among: Any, wanted: Any) -> Any:
    """Where ascending numbers (int64 [M]) are among others (int64 [N])."""
    places, k = np.empty(len(wanted), np.int64), 0
    for m in range(len(wanted)):
        while among[k] < wanted[m]:
            k += 1
        places[m] = k
    return places


@compiled
def rank(
    positions: Any,
    tokens: Any,
    log_p: Any,
    score: Any,
    masked: Any,
    mask_token_id: Any,
    kept: Any,
    by_token: Any,
) -> Any:
    """`primitives.rank`."""
    count, width, rows = len(masked), tokens.shape[1], _place(positions, masked)
    row_log_p, key = np.empty((count, width)), np.empty(count)
    by_rank = np.empty((count, width), np.int64)
    for m in range(count):
        row = rows[m]
        for j in range(width):
            token = tokens[row, j]
            p = -np.inf if token == mask_token_id else log_p[row, j]
            row_log_p[m, j], at = p, j
            while at > 0:  # the likelier one goes before, and of equals the lower id
                before = by_rank[m, at - 1]
                other = row_log_p[m, before]
                if other > p or (other == p and tokens[row, before] < token):
                    break
                by_rank[m, at] = before
                at -= 1
            by_rank[m, at] = j
        key[m] = -(row_log_p[m, by_rank[m, 0]] if by_token else score[row])
    order = np.argsort(key, kind="mergesort")
    where, which = np.empty(count, np.int64), np.empty((count, kept), np.int64)
    likely = np.empty((count, kept))
    for r in range(count):
        m = order[r]
        where[r] = masked[m]
        for j in range(kept):
            which[r, j], likely[r, j] = tokens[rows[m], by_rank[m, j]], row_log_p[m, by_rank[m, j]]
    return where, which, likely


@compiled
def fill_in(ids: Any, positions: Any, tokens: Any, choice: Any) -> Any:
    """`primitives.fill_in`."""
    states = np.empty((len(choice), len(ids)), np.int64)
    for n in range(len(choice)):
        states[n] = ids
        for m in range(len(positions)):
            if choice[n, m] >= 0:
                states[n, positions[m]] = tokens[m, choice[n, m]]
    return states


@compiled
def informative_drafts(
    held: Any,
    ids: Any,
    source: Any,
    positions: Any,
    tokens: Any,
    log_p: Any,
    mask_token_id: Any,
    likely: Any,
) -> Any:
    """`primitives.informative_drafts`; `likely` is its least log-probability."""
    numbers, found = np.empty(len(held), np.int64), 0
    for n in range(len(held)):
        may = True
        for b in range(held.shape[1]):
            token, theirs = held[n, b], held[source, b]
            may &= token == theirs or theirs == mask_token_id
            may &= token == ids[b] or token == mask_token_id or ids[b] == mask_token_id
        filled, total = 0, 0.0
        for m in range(len(positions)):
            token = held[n, positions[m]]
            if may and token != mask_token_id:
                filled += 1
                may = False
                for j in range(tokens.shape[1]):
                    if tokens[m, j] == token:
                        may = True
                        total += log_p[m, j]
        if may and 0 < filled < len(positions) and total > likely:
            numbers[found] = n
            found += 1
    return numbers[:found]


@compiled
def cross_logits_of(
    table: Any,
    first: Any,
    numbers: Any,
    cross_pairs: Any,
    state: Any,
    by_pair: Any,
    states: Any,
    tokens: Any,
) -> Any:
    """`primitives.cross_logits_of`."""
    (count, ranks), likeliest = tokens.shape, by_pair.shape[1]
    row, place = np.full(len(state), -1), np.full(max(state.max(), states.max()) + 1, -1)
    for m in range(count):
        row[numbers[m]] = m
    for r in range(len(states)):
        place[states[r]] = r
    logits = np.full((len(states), count, ranks), -np.inf)
    for t in range(len(by_pair)):
        m, r = row[cross_pairs[0, t]], place[state[cross_pairs[1, t]]]
        if m < 0 or r < 0:
            continue
        for j in range(ranks):
            logits[r, m, j] = by_pair[t, 0]
            for k in range(likeliest - 1, -1, -1):
                if table[numbers[m], first + k] == tokens[m, j]:
                    logits[r, m, j] = by_pair[t, k]
    return logits


@compiled
def rejected_log_p(
    held: Any,
    positions: Any,
    fresh: Any,
    tokens: Any,
    log_p: Any,
    log_total: Any,
    logits: Any,
    mask_token_id: Any,
    sure: Any,
) -> Any:
    """`primitives.rejected_log_p`; `sure` is the most that the J tokens may add up to."""
    drafts, (count, ranks), found = len(held), tokens.shape, 0
    choice, unseen = np.empty((drafts, count), np.int64), np.empty((drafts, len(fresh)), np.bool_)
    theirs, others = np.empty((drafts, count, ranks)), np.empty(count)
    for m in range(count):
        mass = 0.0
        for j in range(ranks):
            mass += np.exp(log_p[m, j])
        others[m] = log_total[m] + np.log1p(-min(mass, sure))
    for r in range(drafts):
        finite = True
        for m in range(count):
            token, choice[found, m] = held[r, positions[m]], -1
            most, mass = others[m], 0.0
            for j in range(ranks):
                most = max(most, logits[r, m, j])
            for j in range(ranks):
                mass += np.exp(logits[r, m, j] - most)
            total = most + np.log(mass + np.exp(others[m] - most))
            for j in range(ranks):
                value = logits[r, m, j] - total if token == mask_token_id else log_p[m, j]
                theirs[found, m, j] = value
                finite &= np.isfinite(value)
            if token != mask_token_id:
                choice[found, m] = 0
                for j in range(ranks - 1, -1, -1):
                    choice[found, m] = j if tokens[m, j] == token else choice[found, m]
        for k in range(len(fresh)):
            unseen[found, k] = held[r, fresh[k]] == mask_token_id
        found += finite
    return choice[:found], theirs[:found], unseen[:found]
