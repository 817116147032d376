"""What `expand` does, in loops that numba compiles.

`features` and `expand` say what is computed and why; here every function names the one that it
follows. All that is called is in this file: numba keeps what it compiled until the file changes,
and knows nothing of changes in others. So what others define comes in as arguments (`arrays`).
Inner loops take arrays out of their tuples once: each time counts a reference, which takes longer
than to read a number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spiffy.runtime.draft.compiled.arrays import Children, Level, Work
from spiffy.runtime.draft.compiled.jit import compiled, compiled_sum

_FAR = 1 << 30  # positions
_FEW = 64  # positions that are sooner compared than sorted
_SCATTER = -7046029254386353131  # 2**64 over the golden ratio, in two's complement


@compiled
def _slot(keys: Any, key: Any) -> Any:
    """Where a key is in a table, or would be: `layout._slot`."""
    last = len(keys) - 1
    at = (key * _SCATTER >> 32) & last  # may overflow
    while keys[at] >= 0 and keys[at] != key:
        at = (at + 1) & last
    return at


@compiled
def _times(table: Any, key: Any) -> Any:
    """How often a key occurred: `ngrams.Counts`."""
    return table.counts[_slot(table.keys, key)]


@compiled
def _rerank(model: Any, root: Any, level: Any, n: Any, m: Any, work: Any) -> None:
    """Re-rank the tokens of one position of a state, in place: `features.token_features`."""
    source, ranks, vocab, tokens = level.source[n], root.tokens.shape[1], model.vocab, root.tokens
    beside, new, weights = work.beside, work.new, model.token
    pairs, prior = model.pairs, model.prior
    law, score, share, most, mass = root.log_p, level.log_p, level.share, -np.inf, 0.0
    best, ngrams = root.best[source, m], root.ngrams
    for side in range(3):
        at = root.neighbours[side, m]
        rank = level.choice[n, at] if at >= 0 else -1
        beside[side] = tokens[at, rank] if rank >= 0 else root.neighbour_tokens[side, m]
        if side < 2:
            new[side] = root.fresh[side, source, m] or (at >= 0 and level.unseen[n, at])
    for j in range(ranks):
        token, log_p = tokens[m, j], law[source, m, j]
        total = weights[0] * log_p + weights[1] * (best == j)
        for side in range(2):
            if not new[side]:
                continue
            known = beside[side]
            pair = known * vocab + token if side == 0 else token * vocab + known
            seen = _times(pairs, pair) + prior[side, token]
            total += weights[2 + side] * (np.log(seen) - model.log_total[side, known])
            total += weights[4 + side] * (token == known) + weights[6 + side] * log_p
            total += weights[8 + side] * np.log1p(_times(ngrams, pair))
            if side == 0 and beside[2] >= 0:
                triple = (beside[2] + 1) * vocab**2 + pair
                total += weights[10] * np.log1p(_times(ngrams, triple))
        if new[0] and new[1]:
            total += weights[11] * log_p
        score[n, m, j], most = total, max(most, total)
    for j in range(ranks):
        share[n, m, j] = np.exp(score[n, m, j] - most)
        mass += share[n, m, j]
    change = root.log_mass[source, m] - most - np.log(mass)
    largest = np.exp(most + change)
    for j in range(ranks):
        score[n, m, j] += change
        share[n, m, j] *= largest
    level.logit[n, m] = _logit(most + change)


@compiled
def _logit(log_p: Any) -> Any:
    """`outlook.logit_of`."""
    log_p = min(log_p, -1e-12)
    return max(log_p - np.log(-np.expm1(log_p)), -12.0)


@compiled
def _work(root: Any, features: Any) -> Any:
    """Room for what `_scores` and `_rerank` work out."""
    count, kinds = len(root.positions), root.kinds.max() + 1
    logs = np.empty(max(root.positions[-1] - root.positions[0] + 1, count))
    for k in range(len(logs)):
        logs[k] = np.log1p(k)
    told, behind = np.empty(features), np.empty(count, np.int64)
    alike, is_new = np.zeros(kinds, np.int64), np.zeros(kinds, np.bool_)
    beside, new = np.empty(3, np.int64), np.empty(2, np.bool_)
    sides = np.empty(4), np.empty(4), np.empty(4)
    ahead = np.empty(count, np.int64)
    return Work(told, behind, ahead, alike, is_new, logs, *sides, beside, new)


@compiled
def _rank(choice: Any, logit: Any, ahead: Any) -> None:
    """How many masked positions are likelier than each one (of equals, the first), into `ahead`."""
    if len(choice) > _FEW:
        shown = np.where(choice < 0, -logit, np.inf)
        ahead[np.argsort(shown, kind="mergesort")] = np.arange(len(choice))
        return
    for m in range(len(choice)):
        ahead[m] = 0
        for k in range(len(choice)):
            first = logit[k] > logit[m] or (logit[k] == logit[m] and k < m)
            ahead[m] += choice[k] < 0 and first


@compiled
def _scores(model: Any, root: Any, level: Any, n: Any, work: Any, score: Any, odds: Any) -> None:
    """What the regressions say of the masked positions of a state: `features.position_features`.

    Into `score` [M], and `odds` [M] where there are coefficients of it. The features stand in the
    order of `acceptance.POSITION_FEATURES`.
    """
    source, choice, where = level.source[n], level.choice[n], root.positions
    unseen, logit, log_p, share = level.unseen[n], level.logit[n], level.log_p[n], level.share[n]
    constant, neighbours, kinds, likely = root.constant, root.neighbours, root.kinds, root.best
    told, masked, drafted, theirs = work.told, work.masked, work.drafted, work.theirs
    is_new, alike, behind, logs = work.is_new, work.alike, work.behind, work.logs
    (count, ranks), depth, best, first = root.tokens.shape, level.depth[n], -np.inf, -1
    is_new[:], alike[:] = False, 0
    _rank(choice, logit, work.ahead)
    for m in range(count):
        if choice[m] < 0:
            first, best = (m if first < 0 else first), max(best, logit[m])
            alike[kinds[m, likely[source, m]]] += 1
        elif unseen[m]:
            is_new[kinds[m, choice[m]]] = True
    nearest = np.int64(_FAR)
    for m in range(count - 1, -1, -1):
        nearest = min(nearest, where[m] if unseen[m] else root.behind[source, m])
        behind[m] = nearest
    nearest = np.int64(-_FAR)
    for m in range(count):
        nearest = max(nearest, where[m] if unseen[m] else root.before[source, m])
        if choice[m] >= 0:
            continue
        for side in range(4):
            at = neighbours[side, m]
            masked[side] = at >= 0 and choice[at] < 0
            drafted[side] = at >= 0 and unseen[at]
            theirs[side] = logit[at] if masked[side] else 0.0
        kind, odd, ahead = kinds[m, likely[source, m]], logit[m], work.ahead[m]
        top, second, confidence = -np.inf, -np.inf, 0.0
        for j in range(ranks):
            top, second = max(top, log_p[m, j]), max(second, min(top, log_p[m, j]))
            confidence = max(confidence, share[m, j])
        gap = min(top - second, 12.0) if ranks > 1 else 0.0
        nearness = 1.0 / (1.0 + min(where[m] - nearest, behind[m] - where[m]))
        echo = 1.0 if is_new[kind] or root.echo[source, m] else 0.0
        distance, both = logs[max(where[m] - where[first], 0)], masked[0] * masked[1]
        above, is_first = max(odd - 7.0, 0.0), 1.0 if ahead == 0 else 0.0
        for k in range(6):
            told[k] = constant[k, source, m]
        change, eos = odd - told[1], told[3]
        told[6], told[7], told[8] = depth, drafted[0], drafted[1]
        told[9], told[10] = drafted[2] * masked[0], drafted[3] * masked[1]
        told[11], told[12], told[13] = masked[0], masked[1], both
        told[14], told[15], told[16], told[17] = nearness, echo, distance, distance * eos
        for side in range(2):
            told[18 + side] = max(theirs[side] - odd, 0.0) * masked[side]
        told[20], told[21], told[22] = odd, odd - best, max(odd - 2.0, 0.0)
        told[23], told[24], told[25] = max(odd - 4.0, 0.0), above, min(odd, 0.0)
        told[26], told[27], told[28], told[29] = top, gap, confidence, logs[ahead]
        told[30], told[31], told[32] = is_first, change, min(alike[kind] - 1, 2)
        told[33], told[34] = told[4] * odd, told[5] * odd
        told[35], told[36], told[37] = drafted[0] * odd, drafted[1] * odd, nearness * odd
        told[38], told[39], told[40] = echo * odd, depth * odd, depth * eos
        told[41], told[42] = nearness * is_first, told[0] * above
        told[43], told[44] = both * told[17], change * change
        score[m] = _weighed(model.position, told)
        if len(model.commit):
            odds[m] = _weighed(model.commit, told) + model.commit[-1]


@compiled_sum
def _weighed(coefficients: Any, told: Any) -> Any:
    """`expand._weighed`."""
    total = 0.0
    for k in range(len(told)):
        total += coefficients[k] * told[k]
    return total


@compiled
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


@compiled
def _one_step(model: Any, root: Any, level: Any, work: Any, least: Any, most: Any) -> Any:
    """The `most` most probable children above probability `least`: `expand._one_step`."""
    (count, ranks), held, share = root.tokens.shape, level.choice, level.share
    joint, score = np.zeros((len(held), count, ranks)), np.empty(count)
    found, wanted = 0, 0
    for n in range(len(held)):
        _scores(model, root, level, n, work, score, score)
        where, before = _softmax(score, held[n]), level.p[n]
        for m in range(count):
            for j in range(ranks):
                p = before * where[m] * share[n, m, j]
                joint[n, m, j] = p
                wanted += p > least
    if wanted > most:  # no more than these
        least = np.sort(joint.ravel())[joint.size - most - 1]
    parent, choice = np.empty(wanted, np.int64), np.empty((wanted, count), np.int64)
    likely = np.empty(wanted)
    for n in range(len(held)):
        for m in range(count):
            for j in range(ranks):
                if joint[n, m, j] > least:
                    parent[found], likely[found], choice[found] = n, joint[n, m, j], held[n]
                    choice[found, m] = j
                    found += 1
    return Children(parent[:found], choice[:found], likely[:found])


@compiled
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


@compiled
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


@compiled
def _one_set(model: Any, root: Any, level: Any, work: Any, wanted: Any, room: Any) -> Any:
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
        _scores(model, root, level, n, work, score, odds)
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


@compiled
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


@compiled
def _taken(children: Any, kept: Any) -> Any:
    """Some of the children, by number."""
    count = children.choice.shape[1]
    parent, choice = np.empty(len(kept), np.int64), np.empty((len(kept), count), np.int64)
    p = np.empty(len(kept))
    for i in range(len(kept)):
        k = kept[i]
        parent[i], p[i], choice[i] = children.parent[k], children.p[k], children.choice[k]
    return Children(parent, choice, p)


@compiled
def _merged(children: Any, hashes: Any, budget: Any) -> Any:
    """`expand._merged`."""
    choice, p, count = children.choice, children.p, children.choice.shape[1]
    keys, first = np.zeros(len(p), np.int64), np.empty(len(p), np.int64)
    for k in range(len(p)):
        for m in range(count):
            if choice[k, m] >= 0:
                keys[k] += hashes[m % len(hashes), choice[k, m]]  # may overflow
    order, total, found = np.argsort(keys, kind="mergesort"), np.zeros(len(p)), 0
    for i in range(len(p)):
        if i == 0 or keys[order[i]] != keys[order[i - 1]]:
            first[found] = order[i]
            found += 1
        total[first[found - 1]] += p[order[i]]
    best = first[:found][np.argsort(-total[first[:found]], kind="mergesort")[:budget]]
    return _taken(Children(children.parent, choice, total), best)


@compiled
def _together(some: Any, more: Any) -> Any:
    """The children of both, one after the other."""
    parent, choice = (some.parent, more.parent), (some.choice, more.choice)
    p = np.concatenate((some.p, more.p))
    return Children(np.concatenate(parent), np.concatenate(choice), p)


@compiled
def _filled(model: Any, root: Any, level: Any, children: Any, work: Any) -> Any:
    """The children as states: `features.States.filled`."""
    parent, choice, seen, leads = children.parent, children.choice, root.seen, root.lead
    (states, count), ranks, neighbours = choice.shape, root.tokens.shape[1], root.neighbours
    source, depth = np.zeros(states, np.int64), np.empty(states, np.int64)
    unseen, new = np.empty((states, count), np.bool_), np.empty((states, count), np.bool_)
    log_p, share = np.empty((states, count, ranks)), np.empty((states, count, ranks))
    logit, held, fresh = np.empty((states, count)), level.choice, root.fresh
    filled = Level(choice, source, unseen, log_p, share, logit, depth, children.p)
    for n in range(states):
        above, best, lead = parent[n], 0, leads[0]
        for s in range(1, len(leads)):
            if leads[s] > lead:
                fits = True
                for m in range(count):
                    fits &= seen[s, m] < 0 or seen[s, m] == choice[n, m]
                if fits:
                    best, lead = s, leads[s]
        moved, drafted, source[n] = best != level.source[above], 0, best
        for m in range(count):
            unseen[n, m] = choice[n, m] >= 0 and seen[best, m] < 0
            new[n, m] = unseen[n, m] and (moved or held[above, m] < 0)
            drafted += unseen[n, m]
        depth[n] = level.depth[above] + 1
        if moved:
            depth[n] = min(depth[n], drafted)
            log_p[n], share[n], logit[n] = (
                root.log_p[best],
                root.share[best],
                root.constant[1, best],
            )
        else:
            log_p[n], share[n], logit[n] = (
                level.log_p[above],
                level.share[above],
                level.logit[above],
            )
        for m in range(count):
            left, right = neighbours[0, m], neighbours[1, m]
            beside = (left >= 0 and new[n, left]) or (right >= 0 and new[n, right])
            if moved:
                beside |= fresh[0, best, m] or fresh[1, best, m]
            if beside and choice[n, m] < 0:
                _rerank(model, root, filled, n, m, work)
    return filled


@compiled
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


@compiled
def expand(model: Any, root: Any, budget: Any, room: Any, deepest: Any) -> Any:
    """`expand.expand`."""
    count, limits = len(root.positions), model.limits
    mass, sets = np.zeros(count), len(model.commit) > 0
    none = (np.full((1, count), -1), np.zeros(1, np.int64), np.zeros((1, count), np.bool_))
    known = (root.log_p[:1].copy(), root.share[:1].copy(), root.constant[1, :1].copy())
    level = Level(*none, *known, np.zeros(1, np.int64), np.ones(1))
    work = _work(root, len(model.position))
    for m in range(count):
        for s in range(len(root.lead)):
            mass[m] = max(mass[m], np.exp(root.log_mass[s, m]))
        if root.fresh[0, 0, m] or root.fresh[1, 0, m]:
            _rerank(model, root, level, 0, m, work)
    best = Children(np.empty(0, np.int64), np.empty((0, count), np.int64), np.empty(0))
    limit = 0.0
    for depth in range(1, deepest + 1):
        if sets:
            wanted = np.log(max(limit * limits.share, limits.least))
            children = _one_set(model, root, level, work, wanted, room)
        else:
            children = _one_step(model, root, level, work, limit * limits.share, 4 * budget)
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
        level = _filled(model, root, level, _taken(children, worth), work)
    return best.choice, best.p
