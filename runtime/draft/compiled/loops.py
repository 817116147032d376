"""What `expand` does, in loops that numba compiles.

`features` and `expand` say what is computed and why; here every function names the one that it
follows. All that is called is in this file: numba keeps what it compiled until the file changes,
and knows nothing of changes in others. So what others define comes in as arguments (`arrays`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

from spiffy.runtime.draft.compiled.arrays import Children, Level

_FAR = 1 << 30  # positions
_Function = TypeVar("_Function", bound=Callable[..., Any])
_compiled: Callable[[_Function], _Function] = njit(cache=True, nogil=True, error_model="numpy")


@_compiled
def _before(keys: Any, key: Any) -> Any:
    """How many of the ascending keys are below `key`."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high) // 2
        if keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


@_compiled
def _times(keys: Any, key: Any) -> Any:
    """How often a key occurred: `ngrams.Counts`."""
    return _before(keys, key + 1) - _before(keys, key)


@_compiled
def _rerank(model: Any, root: Any, level: Any, n: Any, m: Any) -> None:
    """Re-rank the tokens of one position of a state, in place: `features.token_features`."""
    tokens, source, weights = root.tokens[m], level.source[n], model.token
    known, new = np.empty(3, np.int64), np.zeros(3, np.bool_)
    for side in range(3):
        at = root.neighbours[side, m]
        rank = level.choice[n, at] if at >= 0 else -1
        known[side] = root.tokens[at, rank] if rank >= 0 else root.neighbour_tokens[side, m]
        if side < 2:
            new[side] = root.fresh[side, source, m] or (at >= 0 and level.unseen[n, at])
    log_p, score, most = root.log_p[source, m], np.empty(len(tokens)), -np.inf
    for j in range(len(tokens)):
        token = tokens[j]
        total = weights[0] * log_p[j] + weights[1] * (root.best[source, m] == j)
        for side in range(2):
            if not new[side]:
                continue
            beside = known[side]
            left, right = (beside, token) if side == 0 else (token, beside)
            pair = left * model.vocab + right
            first, last = _before(model.pairs, pair), _before(model.pairs, pair + 1)
            seen = model.pairs_below[last] - model.pairs_below[first] + model.prior[side, token]
            total += weights[2 + side] * (np.log(seen) - model.log_total[side, beside])
            total += weights[4 + side] * (token == beside) + weights[6 + side] * log_p[j]
            total += weights[8 + side] * np.log1p(_times(root.text, pair))
            if side == 0 and known[2] >= 0:
                triple = (known[2] + 1) * model.vocab**2 + pair
                total += weights[10] * np.log1p(_times(root.text, triple))
        if new[0] and new[1]:
            total += weights[11] * log_p[j]
        score[j], most = total, max(most, total)
    mass = 0.0
    for j in range(len(tokens)):
        mass += np.exp(score[j] - most)
    change = root.log_mass[source, m] - most - np.log(mass)
    for j in range(len(tokens)):
        level.log_p[n, m, j] = score[j] + change


@_compiled
def _logit(log_p: Any) -> Any:
    """`outlook.logit_of`."""
    log_p = min(log_p, -1e-12)
    return max(log_p - np.log(-np.expm1(log_p)), -12.0)


@_compiled
def _two_best(log_p: Any) -> Any:
    """The two largest; of one, that twice."""
    top, second = log_p[0], -np.inf
    for j in range(1, len(log_p)):
        if log_p[j] > top:
            top, second = log_p[j], top
        else:
            second = max(second, log_p[j])
    return top, second if len(log_p) > 1 else top


@_compiled
def _scores(model: Any, root: Any, level: Any, n: Any, score: Any, odds: Any) -> None:
    """What the regressions say of the masked positions of a state: `features.position_features`.

    Into `score` [M], and `odds` [M] where there are coefficients of it. The features stand in the
    order of `acceptance.POSITION_FEATURES`.
    """
    count, source, choice, where = len(score), level.source[n], level.choice[n], root.positions
    logit, best, first = np.full(count, -np.inf), -np.inf, -1
    kinds = root.kinds.max() + 1
    is_new, alike = np.zeros(kinds, np.bool_), np.zeros(kinds, np.int64)
    for m in range(count):
        if choice[m] < 0:
            first = m if first < 0 else first
            logit[m] = _logit(_two_best(level.log_p[n, m])[0])
            best = max(best, logit[m])
            alike[root.kinds[m, root.best[source, m]]] += 1
        elif level.unseen[n, m]:
            is_new[root.kinds[m, choice[m]]] = True
    rank, order = np.empty(count), np.argsort(-logit, kind="mergesort")
    for r in range(count):
        rank[order[r]] = np.log1p(r)
    behind, nearest = np.empty(count, np.int64), np.int64(_FAR)
    for m in range(count - 1, -1, -1):
        nearest = min(nearest, where[m] if level.unseen[n, m] else root.behind[source, m])
        behind[m] = nearest
    nearest = np.int64(-_FAR)
    masked, drafted, theirs = np.zeros(4), np.zeros(4), np.zeros(4)
    for m in range(count):
        nearest = max(nearest, where[m] if level.unseen[n, m] else root.before[source, m])
        if choice[m] >= 0:
            continue
        for side in range(4):
            at = root.neighbours[side, m]
            masked[side] = at >= 0 and choice[at] < 0
            drafted[side] = at >= 0 and level.unseen[n, at]
            theirs[side] = logit[at] if masked[side] else 0.0
        kind, odd, depth = root.kinds[m, root.best[source, m]], logit[m], float(level.depth[n])
        top, second = _two_best(level.log_p[n, m])
        known = root.constant[:, source, m]
        origin_rank, origin, eos, left, right = known[0], known[1], known[3], known[4], known[5]
        nearness = 1.0 / (1.0 + min(where[m] - nearest, behind[m] - where[m]))
        echo = 1.0 if is_new[kind] or root.echo[source, m] else 0.0
        distance, both = np.log1p(max(where[m] - where[first], 0)), masked[0] * masked[1]
        above, is_first = max(odd - 7.0, 0.0), 1.0 if rank[m] == 0 else 0.0
        features = (
            origin_rank,
            origin,
            known[2],
            eos,
            left,
            right,
            depth,
            drafted[0],
            drafted[1],
            drafted[2] * masked[0],
            drafted[3] * masked[1],
            masked[0],
            masked[1],
            both,
            nearness,
            echo,
            distance,
            distance * eos,
            max(theirs[0] - odd, 0.0) * masked[0],
            max(theirs[1] - odd, 0.0) * masked[1],
            odd,
            odd - best,
            max(odd - 2.0, 0.0),
            max(odd - 4.0, 0.0),
            above,
            min(odd, 0.0),
            top,
            min(top - second, 12.0),
            np.exp(top),
            rank[m],
            is_first,
            odd - origin,
            float(min(alike[kind] - 1, 2)),
            left * odd,
            right * odd,
            drafted[0] * odd,
            drafted[1] * odd,
            nearness * odd,
            echo * odd,
            depth * odd,
            depth * eos,
            nearness * is_first,
            origin_rank * above,
            both * distance * eos,
            (odd - origin) * (odd - origin),
        )
        score[m] = _weighed(model.position, features)
        if len(model.commit):
            odds[m] = _weighed(model.commit, features) + model.commit[-1]


@_compiled
def _weighed(coefficients: Any, features: Any) -> Any:
    """`expand._weighed`."""
    total = 0.0
    for k in range(len(features)):
        total += coefficients[k] * features[k]
    return total


@_compiled
def _softmax(score: Any, choice: Any) -> Any:
    """Over the masked positions [M], 0 elsewhere."""
    most, total, softmax = -np.inf, 0.0, np.zeros(len(score))
    for m in range(len(score)):
        if choice[m] < 0:
            most = max(most, score[m])
    for m in range(len(score)):
        if choice[m] < 0:
            softmax[m] = np.exp(score[m] - most)
            total += softmax[m]
    return softmax / total


@_compiled
def _one_step(model: Any, root: Any, level: Any, least: Any, most: Any) -> Any:
    """The `most` most probable children above probability `least`: `expand._one_step`."""
    count, ranks = root.tokens.shape
    joint, score = np.zeros(len(level.p) * count * ranks), np.empty(count)
    k, wanted = 0, 0
    for n in range(len(level.p)):
        _scores(model, root, level, n, score, score)
        where = _softmax(score, level.choice[n])
        for m in range(count):
            for j in range(ranks):
                joint[k] = level.p[n] * where[m] * np.exp(level.log_p[n, m, j])
                wanted += joint[k] > least
                k += 1
    if wanted > most:  # no more than these
        least = np.sort(joint)[len(joint) - most - 1]
    parent, choice = np.empty(wanted, np.int64), np.empty((wanted, count), np.int64)
    p, found = np.empty(wanted), 0
    for k in range(len(joint)):
        if joint[k] > least:
            n, m = k // (count * ranks), k // ranks % count
            parent[found], p[found], choice[found] = n, joint[k], level.choice[n]
            choice[found, m] = k % ranks
            found += 1
    return Children(parent[:found], choice[:found], p[:found])


@_compiled
def _tokens_by_rank(log_p: Any) -> Any:
    """Tokens [M, J] of every position of a state (float64 [M, J]), the most probable first."""
    by_rank = np.empty(log_p.shape, np.int64)
    for m in range(log_p.shape[0]):
        for j in range(log_p.shape[1]):
            at = j
            while at > 0 and log_p[m, by_rank[m, at - 1]] < log_p[m, j]:
                by_rank[m, at] = by_rank[m, at - 1]
                at -= 1
            by_rank[m, at] = j
    return by_rank


@_compiled
def _weakest(chosen: Any, log_p: Any, by_rank: Any, number: Any) -> Any:
    """The chosen positions of which the second token is most probable beside the first."""
    weakest, found, second = np.empty(number, np.int64), 0, min(1, log_p.shape[1] - 1)
    doubt = np.full(len(chosen), -np.inf)
    for m in range(len(chosen)):
        if chosen[m]:
            doubt[m] = log_p[m, by_rank[m, second]] - log_p[m, by_rank[m, 0]]
    order = np.argsort(-doubt, kind="mergesort")
    while found < min(number, len(order)) and chosen[order[found]]:
        weakest[found] = order[found]
        found += 1
    return weakest[:found]


@_compiled
def _one_set(model: Any, root: Any, level: Any, wanted: Any, room: Any) -> Any:
    """Children by threshold unmasking above log-probability `wanted`: `expand._one_set`."""
    (count, ranks), limits = root.tokens.shape, model.limits
    states, width = len(level.p), min(limits.uncertain, count)
    most = states * len(model.offsets) * ((1 << width) + limits.forced)
    parent, log_p = np.empty(most, np.int64), np.empty(most)
    chosen, found = np.zeros((most, count), np.bool_), 0
    score, odds, cost = np.empty(count), np.empty(count), np.empty(count)
    likely, by_rank = np.empty(count, np.bool_), np.empty((states, count, ranks), np.int64)
    for n in range(states):
        choice = level.choice[n]
        _scores(model, root, level, n, score, odds)
        by_rank[n] = _tokens_by_rank(level.log_p[n])
        where = _softmax(score, choice)
        filled = 0
        for m in range(count):
            filled += choice[m] >= 0
            where[m] = where[m] if choice[m] < 0 else -1.0
        forced = np.argsort(-where, kind="mergesort")[: limits.forced]
        for nth in range(len(model.offsets)):
            before = model.offsets[nth, 1] + np.log(level.p[n])
            none, together, number = before, before, 0
            for m in range(count):
                likely[m], cost[m] = False, np.inf
                if choice[m] < 0:
                    odd = min(max(odds[m] + model.offsets[nth, 0], -14.0), 14.0)
                    likely[m], cost[m] = odd > 0, abs(odd)
                    none -= np.log1p(np.exp(odd))
                    together -= np.log1p(np.exp(-cost[m]))
                    if likely[m]:
                        number += 1
                        together += level.log_p[n, m, by_rank[n, m, 0]]
            uncertain = np.argsort(cost, kind="mergesort")[:width]
            for flips in range(1 << width):
                total, size = together, number
                for bit in range(width):
                    if flips >> bit & 1:
                        m = uncertain[bit]
                        sign = -1 if likely[m] else 1
                        size += sign
                        total += sign * level.log_p[n, m, by_rank[n, m, 0]] - cost[m]
                if total > wanted and size > 0 and size + filled <= room:
                    parent[found], log_p[found], chosen[found] = n, total, likely
                    for bit in range(width):
                        if flips >> bit & 1:
                            chosen[found, uncertain[bit]] ^= True
                    found += 1
            for m in forced:
                total = none + np.log(where[m] + 1e-30) + level.log_p[n, m, by_rank[n, m, 0]]
                if choice[m] < 0 and total > wanted and 1 + filled <= room:
                    parent[found], log_p[found], chosen[found, m] = n, total, True
                    found += 1
    return _with_other_tokens(
        model.others, level, by_rank, parent[:found], log_p[:found], chosen[:found]
    )


@_compiled
def _with_other_tokens(
    others: Any, level: Any, by_rank: Any, parent: Any, log_p: Any, chosen: Any
) -> Any:
    """Sets with their most probable tokens, and with others where these are least certain."""
    sets, count = chosen.shape
    most = sets * (1 + len(others))
    parents, choices = np.empty(most, np.int64), np.empty((most, count), np.int64)
    p, deepest = np.empty(most), others[:, 0].max() + 1
    weakest = np.full((sets, deepest), -1)
    for k in range(sets):
        n = parent[k]
        parents[k], p[k], choices[k] = n, np.exp(log_p[k]), level.choice[n]
        for m in range(count):
            if chosen[k, m]:
                choices[k, m] = by_rank[n, m, 0]
        weak = _weakest(chosen[k], level.log_p[n], by_rank[n], deepest)
        weakest[k, : len(weak)] = weak
    found = sets
    for i in range(len(others)):
        nth, token = others[i]
        if token >= by_rank.shape[2]:
            continue
        for k in range(sets):
            n, m = parent[k], weakest[k, nth]
            if m >= 0:
                other, first = by_rank[n, m, token], by_rank[n, m, 0]
                change = np.exp(level.log_p[n, m, other] - level.log_p[n, m, first])
                parents[found], p[found], choices[found] = n, p[k] * change, choices[k]
                choices[found, m] = other
                found += 1
    return Children(parents[:found], choices[:found], p[:found])


@_compiled
def _taken(children: Any, kept: Any) -> Any:
    """Some of the children, by number."""
    count = children.choice.shape[1]
    parent, choice = np.empty(len(kept), np.int64), np.empty((len(kept), count), np.int64)
    p = np.empty(len(kept))
    for i in range(len(kept)):
        k = kept[i]
        parent[i], p[i], choice[i] = children.parent[k], children.p[k], children.choice[k]
    return Children(parent, choice, p)


@_compiled
def _merged(children: Any, hashes: Any, budget: Any) -> Any:
    """`expand._merged`."""
    count = children.choice.shape[1]
    keys = np.zeros(len(children.p), np.int64)
    for k in range(len(keys)):
        for m in range(count):
            if children.choice[k, m] >= 0:
                keys[k] += hashes[m % len(hashes), children.choice[k, m]]  # may overflow
    order = np.argsort(keys, kind="mergesort")
    first, p, found = np.empty(len(keys), np.int64), np.empty(len(keys)), 0
    for i in range(len(order)):
        if i == 0 or keys[order[i]] != keys[order[i - 1]]:
            first[found], p[found] = order[i], 0.0
            found += 1
        p[found - 1] += children.p[order[i]]
    best = np.argsort(-p[:found], kind="mergesort")[:budget]
    merged = _taken(children, first[best])
    for i in range(len(best)):
        merged.p[i] = p[best[i]]
    return merged


@_compiled
def _together(some: Any, more: Any) -> Any:
    """The children of both, one after the other."""
    n, count = some.choice.shape
    total = n + len(more.p)
    parent, choice = np.empty(total, np.int64), np.empty((total, count), np.int64)
    p = np.empty(total)
    parent[:n], p[:n], choice[:n] = some.parent, some.p, some.choice
    parent[n:], p[n:], choice[n:] = more.parent, more.p, more.choice
    return Children(parent, choice, p)


@_compiled
def _filled(model: Any, root: Any, level: Any, children: Any) -> Any:
    """The children as states: `features.States.filled`."""
    states, count = children.choice.shape
    ranks, parent, choice = root.tokens.shape[1], children.parent, children.choice
    source, depth = np.zeros(states, np.int64), np.empty(states, np.int64)
    unseen, new = np.empty((states, count), np.bool_), np.empty((states, count), np.bool_)
    filled = Level(choice, source, unseen, np.empty((states, count, ranks)), depth, children.p)
    for n in range(states):
        above, lead = parent[n], root.lead[0]
        for s in range(1, len(root.lead)):
            if root.lead[s] > lead:
                fits = True
                for m in range(count):
                    fits &= root.seen[s, m] < 0 or root.seen[s, m] == choice[n, m]
                if fits:
                    source[n], lead = s, root.lead[s]
        moved, drafted = source[n] != level.source[above], 0
        for m in range(count):
            unseen[n, m] = choice[n, m] >= 0 and root.seen[source[n], m] < 0
            new[n, m] = unseen[n, m] and (moved or level.choice[above, m] < 0)
            drafted += unseen[n, m]
        depth[n] = level.depth[above] + 1
        if moved:
            depth[n] = min(depth[n], drafted)
        filled.log_p[n] = root.log_p[source[n]] if moved else level.log_p[above]
        for m in range(count):
            left, right = root.neighbours[0, m], root.neighbours[1, m]
            beside = (left >= 0 and new[n, left]) or (right >= 0 and new[n, right])
            if moved:
                beside |= root.fresh[0, source[n], m] or root.fresh[1, source[n], m]
            if beside and choice[n, m] < 0:
                _rerank(model, root, filled, n, m)
    return filled


@_compiled
def _worth(children: Any, mass: Any, least: Any, share: Any) -> Any:
    """Numbers of those whose own children may be drafts: `expand._reach`."""
    worth, found = np.empty(len(children.p), np.int64), 0
    for k in range(len(children.p)):
        reach = 0.0
        for m in range(len(mass)):
            if children.choice[k, m] < 0:
                reach = max(reach, children.p[k] * mass[m])
        if children.p[k] >= least and reach > share:
            worth[found] = k
            found += 1
    return worth[:found]


@_compiled
def expand(model: Any, root: Any, budget: Any, room: Any, deepest: Any) -> Any:
    """`expand.expand`."""
    count, limits = len(root.positions), model.limits
    mass, sets = np.zeros(count), len(model.commit) > 0
    none = (np.full((1, count), -1), np.zeros(1, np.int64), np.zeros((1, count), np.bool_))
    level = Level(*none, root.log_p[:1].copy(), np.zeros(1, np.int64), np.ones(1))
    for m in range(count):
        for s in range(len(root.lead)):
            mass[m] = max(mass[m], np.exp(root.log_mass[s, m]))
        if root.fresh[0, 0, m] or root.fresh[1, 0, m]:
            _rerank(model, root, level, 0, m)
    best = Children(np.empty(0, np.int64), np.empty((0, count), np.int64), np.empty(0))
    limit = 0.0
    for depth in range(1, deepest + 1):
        if sets:
            wanted = np.log(max(limit * limits.share, limits.least))
            children = _one_set(model, root, level, wanted, room)
        else:
            children = _one_step(model, root, level, limit * limits.share, 4 * budget)
        if not len(children.p):
            break
        children = _merged(children, model.hashes, budget)
        together = _together(best, children)
        if sets:
            best = _merged(together, model.hashes, budget)
        else:
            best = _taken(together, np.argsort(-together.p, kind="mergesort")[:budget])
        limit = best.p[-1] if len(best.p) == budget else 0.0
        worth = _worth(children, mass, max(limit, limits.rare), limit * limits.share)
        if depth == deepest or not len(worth):
            break
        level = _filled(model, root, level, _taken(children, worth))
    return best.choice, best.p
