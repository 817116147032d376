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

from spiffy.runtime.draft.compiled.arrays import Children, States, Work
from spiffy.runtime.draft.compiled.jit import compiled, compiled_sum

_FAR = 1 << 30  # positions
_MOST_GAP, _LEAST_LOGIT = 12.0, -12.0  # as in `outlook`
_MOST_ODDS = 14.0  # as in `expand`
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
def _rerank(model: Any, outlook: Any, states: Any, n: Any, m: Any, work: Any) -> None:
    """Re-rank the tokens of one position of a state, in place: `features.token_features`."""
    source, tokens, vocab = states.source[n], outlook.tokens, model.vocab
    beside, new, weights = work.beside, work.new, model.token
    pairs, prior = model.pairs, model.prior
    source_log_p, score, token_p = outlook.log_p, states.log_p, states.token_p
    best, in_text, ranks = outlook.best[source, m], outlook.in_text, tokens.shape[1]
    most, mass = -np.inf, 0.0
    for side in range(3):
        at = outlook.neighbours[side, m]
        rank = states.choice[n, at] if at >= 0 else -1
        beside[side] = tokens[at, rank] if rank >= 0 else outlook.neighbour_tokens[side, m]
        if side < 2:
            new[side] = outlook.fresh[side, source, m] or (at >= 0 and states.unseen[n, at])
    for j in range(ranks):
        token, log_p = tokens[m, j], source_log_p[source, m, j]
        total = weights[0] * log_p + weights[1] * (best == j)
        for side in range(2):
            if not new[side]:
                continue
            known = beside[side]
            pair = known * vocab + token if side == 0 else token * vocab + known
            seen = _times(pairs, pair) + prior[side, token]
            total += weights[2 + side] * (np.log(seen) - model.log_total[side, known])
            total += weights[4 + side] * (token == known) + weights[6 + side] * log_p
            total += weights[8 + side] * np.log1p(_times(in_text, pair))
            if side == 0 and beside[2] >= 0:
                triple = (beside[2] + 1) * vocab**2 + pair
                total += weights[10] * np.log1p(_times(in_text, triple))
        if new[0] and new[1]:
            total += weights[11] * log_p
        score[n, m, j], most = total, max(most, total)
    for j in range(ranks):
        token_p[n, m, j] = np.exp(score[n, m, j] - most)
        mass += token_p[n, m, j]
    change = outlook.log_mass[source, m] - most - np.log(mass)
    largest = np.exp(most + change)
    for j in range(ranks):
        score[n, m, j] += change
        token_p[n, m, j] *= largest
    states.logit[n, m] = _logit(most + change)


@compiled
def _logit(log_p: Any) -> Any:
    """`outlook.logit_of`."""
    log_p = min(log_p, -1e-12)
    return max(log_p - np.log(-np.expm1(log_p)), _LEAST_LOGIT)


@compiled
def _work(outlook: Any, number: Any) -> Any:
    """Room for what `_score` and `_rerank` work out."""
    count, kinds = len(outlook.positions), outlook.kinds.max() + 1
    logs = np.empty(max(outlook.positions[-1] - outlook.positions[0] + 1, count))
    for k in range(len(logs)):
        logs[k] = np.log1p(k)
    features, behind = np.empty(number), np.empty(count, np.int64)
    alike, is_new = np.zeros(kinds, np.int64), np.zeros(kinds, np.bool_)
    beside, new = np.empty(3, np.int64), np.empty(2, np.bool_)
    sides, ahead = (np.empty(4), np.empty(4), np.empty(4)), np.empty(count, np.int64)
    return Work(features, behind, ahead, alike, is_new, logs, *sides, beside, new)


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
def _score(model: Any, outlook: Any, states: Any, n: Any, work: Any, score: Any, odds: Any) -> None:
    """What the regressions say of the masked positions of a state: `features.position_features`.

    Into `score` [M], and `odds` [M] where there are coefficients of it. The features stand in the
    order of `acceptance.POSITION_FEATURES`, whose names numba would not look up again.
    """
    source, choice, where = states.source[n], states.choice[n], outlook.positions
    unseen, logit = states.unseen[n], states.logit[n]
    log_p, token_p, constant = states.log_p[n], states.token_p[n], outlook.constant
    neighbours, kinds, likely = outlook.neighbours, outlook.kinds, outlook.best
    f, masked, drafted, theirs = work.features, work.masked, work.drafted, work.theirs
    is_new, alike, behind, logs = work.is_new, work.alike, work.behind, work.logs
    (count, ranks), depth, best, first = outlook.tokens.shape, states.depth[n], -np.inf, -1
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
        nearest = min(nearest, where[m] if unseen[m] else outlook.behind[source, m])
        behind[m] = nearest
    nearest = np.int64(-_FAR)
    for m in range(count):
        nearest = max(nearest, where[m] if unseen[m] else outlook.before[source, m])
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
            confidence = max(confidence, token_p[m, j])
        gap = min(top - second, _MOST_GAP) if ranks > 1 else 0.0
        nearness = 1.0 / (1.0 + min(where[m] - nearest, behind[m] - where[m]))
        echo = 1.0 if is_new[kind] or outlook.echo[source, m] else 0.0
        distance, both_masked = logs[max(where[m] - where[first], 0)], masked[0] * masked[1]
        above_7, first_rank = max(odd - 7.0, 0.0), 1.0 if ahead == 0 else 0.0
        for k in range(6):  # origin_log_rank, origin_logit, origin_gap, eos, left_, right_committed
            f[k] = constant[k, source, m]
        reranked_by, eos = odd - f[1], f[3]
        f[6], f[7], f[8] = depth, drafted[0], drafted[1]
        f[9] = drafted[2] * masked[0]  # second_left_drafted_left_masked
        f[10] = drafted[3] * masked[1]  # second_right_drafted_right_masked
        f[11], f[12], f[13] = masked[0], masked[1], both_masked
        f[14], f[15], f[16], f[17] = nearness, echo, distance, distance * eos
        for side in range(2):  # left_above, right_above
            f[18 + side] = max(theirs[side] - odd, 0.0) * masked[side]
        f[20], f[21] = odd, odd - best  # logit, below_best
        f[22], f[23] = max(odd - 2.0, 0.0), max(odd - 4.0, 0.0)  # logit_above_2, logit_above_4
        f[24], f[25] = above_7, min(odd, 0.0)  # logit_above_7, logit_below_0
        f[26], f[27], f[28] = top, gap, confidence  # log_p, gap, confidence
        f[29], f[30], f[31] = logs[ahead], first_rank, reranked_by  # log_rank, ...
        f[32] = min(alike[kind] - 1, 2)  # twins
        f[33], f[34] = f[4] * odd, f[5] * odd  # left_, right_committed_x_logit
        f[35], f[36] = drafted[0] * odd, drafted[1] * odd  # left_, right_drafted_x_logit
        f[37], f[38], f[39] = nearness * odd, echo * odd, depth * odd  # nearness_x_logit, ...
        f[40], f[41] = depth * eos, nearness * first_rank
        f[42] = f[0] * above_7  # origin_log_rank_x_logit_above_7
        f[43], f[44] = both_masked * f[17], reranked_by * reranked_by
        score[m] = _weighed(model.position, f)
        if len(model.commit):
            odds[m] = _weighed(model.commit, f) + model.commit[-1]


@compiled_sum
def _weighed(coefficients: Any, features: Any) -> Any:
    """`expand._weighed`."""
    total = 0.0
    for k in range(len(features)):
        total += coefficients[k] * features[k]
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
def _static_children(model: Any, outlook: Any, states: Any, work: Any, least: Any, top: Any) -> Any:
    """The `top` most probable children above probability `least`: `expand._static_children`."""
    (count, ranks), held, token_p = outlook.tokens.shape, states.choice, states.token_p
    joint, score = np.zeros((len(held), count, ranks)), np.empty(count)
    found, wanted = 0, 0
    for n in range(len(held)):
        _score(model, outlook, states, n, work, score, score)
        where, before = _softmax(score, held[n]), states.p[n]
        for m in range(count):
            for j in range(ranks):
                p = before * where[m] * token_p[n, m, j]
                joint[n, m, j] = p
                wanted += p > least
    if wanted > top:  # no more than these
        least = np.sort(joint.ravel())[joint.size - top - 1]
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
def _threshold_children(
    model: Any, outlook: Any, states: Any, work: Any, wanted: Any, room: Any
) -> Any:
    """Children above log-probability `wanted`: `expand._threshold_children`."""
    (count, ranks), limits = outlook.tokens.shape, model.limits
    n_states, width = len(states.p), min(limits.uncertain, count)
    most = n_states * len(model.offsets) * ((1 << width) + limits.forced)
    parent, log_p = np.empty(most, np.int64), np.empty(most)
    chosen, found = np.zeros((most, count), np.bool_), 0
    score, odds, cost = np.empty(count), np.empty(count), np.empty(count)
    likely, by_rank = np.empty(count, np.bool_), np.empty((n_states, count, ranks), np.int64)
    for n in range(n_states):
        choice = states.choice[n]
        _score(model, outlook, states, n, work, score, odds)
        by_rank[n] = _tokens_by_rank(states.log_p[n])
        where = _softmax(score, choice)
        filled = 0
        for m in range(count):
            filled += choice[m] >= 0
            where[m] = where[m] if choice[m] < 0 else -1.0
        forced = np.argsort(-where, kind="mergesort")[: limits.forced]
        for nth in range(len(model.offsets)):
            before = model.offsets[nth, 1] + np.log(states.p[n])
            none, together, number = before, before, 0
            for m in range(count):
                likely[m], cost[m] = False, np.inf
                if choice[m] < 0:
                    odd = min(max(odds[m] + model.offsets[nth, 0], -_MOST_ODDS), _MOST_ODDS)
                    likely[m], cost[m] = odd > 0, abs(odd)
                    none -= np.log1p(np.exp(odd))
                    together -= np.log1p(np.exp(-cost[m]))
                    if likely[m]:
                        number += 1
                        together += states.log_p[n, m, by_rank[n, m, 0]]
            uncertain = np.argsort(cost, kind="mergesort")[:width]
            for flips in range(1 << width):
                total, size = together, number
                for bit in range(width):
                    if flips >> bit & 1:
                        m = uncertain[bit]
                        sign = -1 if likely[m] else 1
                        size += sign
                        total += sign * states.log_p[n, m, by_rank[n, m, 0]] - cost[m]
                if total > wanted and size > 0 and size + filled <= room:
                    parent[found], log_p[found], chosen[found] = n, total, likely
                    for bit in range(width):
                        if flips >> bit & 1:
                            chosen[found, uncertain[bit]] ^= True
                    found += 1
            for m in forced:
                total = none + np.log(where[m] + 1e-30) + states.log_p[n, m, by_rank[n, m, 0]]
                if choice[m] < 0 and total > wanted and 1 + filled <= room:
                    parent[found], log_p[found], chosen[found, m] = n, total, True
                    found += 1
    return _with_other_tokens(
        model.others, states, by_rank, parent[:found], log_p[:found], chosen[:found]
    )


@compiled
def _with_other_tokens(
    others: Any, states: Any, by_rank: Any, parent: Any, log_p: Any, chosen: Any
) -> Any:
    """Sets with their most probable tokens, and with others where these are least certain."""
    sets, count = chosen.shape
    most = sets * (1 + len(others))
    parents, choices = np.empty(most, np.int64), np.empty((most, count), np.int64)
    p, deepest = np.empty(most), others[:, 0].max() + 1
    weakest = np.full((sets, deepest), -1)
    for k in range(sets):
        n = parent[k]
        parents[k], p[k], choices[k] = n, np.exp(log_p[k]), states.choice[n]
        for m in range(count):
            if chosen[k, m]:
                choices[k, m] = by_rank[n, m, 0]
        weak = _weakest(chosen[k], states.log_p[n], by_rank[n], deepest)
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
                change = np.exp(states.log_p[n, m, other] - states.log_p[n, m, first])
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
def _filled(model: Any, outlook: Any, states: Any, children: Any, work: Any) -> Any:
    """The children as states: `features.States.filled`."""
    parent, choice, seen, leads = children.parent, children.choice, outlook.seen, outlook.lead
    (n_states, count), ranks, neighbours = choice.shape, states.log_p.shape[2], outlook.neighbours
    source, depth = np.zeros(n_states, np.int64), np.empty(n_states, np.int64)
    unseen, new = np.empty((n_states, count), np.bool_), np.empty((n_states, count), np.bool_)
    log_p, token_p = np.empty((n_states, count, ranks)), np.empty((n_states, count, ranks))
    logit, held, fresh = np.empty((n_states, count)), states.choice, outlook.fresh
    filled = States(choice, source, unseen, log_p, token_p, logit, depth, children.p)
    for n in range(n_states):
        above, best, lead = parent[n], 0, leads[0]
        for s in range(1, len(leads)):
            if leads[s] > lead:
                fits = True
                for m in range(count):
                    fits &= seen[s, m] < 0 or seen[s, m] == choice[n, m]
                if fits:
                    best, lead = s, leads[s]
        moved, drafted, source[n] = best != states.source[above], 0, best
        for m in range(count):
            unseen[n, m] = choice[n, m] >= 0 and seen[best, m] < 0
            new[n, m] = unseen[n, m] and (moved or held[above, m] < 0)
            drafted += unseen[n, m]
        depth[n] = states.depth[above] + 1
        if moved:
            depth[n] = min(depth[n], drafted)
            log_p[n], token_p[n] = outlook.log_p[best], outlook.token_p[best]
            logit[n] = outlook.constant[1, best]
        else:
            log_p[n], token_p[n] = states.log_p[above], states.token_p[above]
            logit[n] = states.logit[above]
        for m in range(count):
            left, right = neighbours[0, m], neighbours[1, m]
            beside = (left >= 0 and new[n, left]) or (right >= 0 and new[n, right])
            if moved:
                beside |= fresh[0, best, m] or fresh[1, best, m]
            if beside and choice[n, m] < 0:
                _rerank(model, outlook, filled, n, m, work)
    return filled


@compiled
def _worth(children: Any, mass: Any, least: Any, least_reach: Any) -> Any:
    """Numbers of those whose own children may be drafts: `expand._reach`."""
    worth, found = np.empty(len(children.p), np.int64), 0
    for k in range(len(children.p)):
        reach = 0.0
        for m in range(len(mass)):
            if children.choice[k, m] < 0:
                reach = max(reach, children.p[k] * mass[m])
        if children.p[k] >= least and reach > least_reach:
            worth[found] = k
            found += 1
    return worth[:found]


@compiled
def expand(model: Any, outlook: Any, budget: Any, room: Any, deepest: Any) -> Any:
    """`expand.expand`."""
    count, limits = len(outlook.positions), model.limits
    mass, sets = np.zeros(count), len(model.commit) > 0
    none = (np.full((1, count), -1), np.zeros(1, np.int64), np.zeros((1, count), np.bool_))
    known = (outlook.log_p[:1].copy(), outlook.token_p[:1].copy(), outlook.constant[1, :1].copy())
    states = States(*none, *known, np.zeros(1, np.int64), np.ones(1))
    work = _work(outlook, len(model.position))
    for m in range(count):
        for s in range(len(outlook.lead)):
            mass[m] = max(mass[m], np.exp(outlook.log_mass[s, m]))
        if outlook.fresh[0, 0, m] or outlook.fresh[1, 0, m]:
            _rerank(model, outlook, states, 0, m, work)
    best = Children(np.empty(0, np.int64), np.empty((0, count), np.int64), np.empty(0))
    limit = 0.0
    for depth in range(1, deepest + 1):
        if sets:
            wanted = np.log(max(limit * limits.path_share, limits.least))
            children = _threshold_children(model, outlook, states, work, wanted, room)
        else:
            least = limit * limits.path_share
            children = _static_children(model, outlook, states, work, least, 4 * budget)
        if not len(children.p):
            break
        children = _merged(children, model.hashes, budget)
        together = _together(best, children)
        if sets:
            best = _merged(together, model.hashes, budget)
        else:
            best = _taken(together, np.argsort(-together.p, kind="mergesort")[:budget])
        limit = best.p[-1] if len(best.p) == budget else 0.0
        worth = _worth(children, mass, max(limit, limits.rare), limit * limits.path_share)
        if depth == deepest or not len(worth):
            break
        states = _filled(model, outlook, states, _taken(children, worth), work)
    return best.choice, best.p
