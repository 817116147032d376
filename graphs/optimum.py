"""The best of all graphs under a budget, as a mixed-integer program: what growth is held to.

Not imported by the package: it needs SciPy (HiGHS), and growth never does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog, milp
from scipy.sparse import csr_array

from spiffy.graphs.chains import Chain, Fill
from spiffy.graphs.grow import Trie, grow

_SLACK = 1e-6  # of a bound: what HiGHS's tolerances may hide; worths are integers


@dataclass(frozen=True)
class Optimum:
    """The best graph found, its worth, and a proof of how much better another could be.

    Attributes
    ----------
    value
        Accepted steps of `fills`, summed over all roots.
    bound
        No graph within the budget accepts more; equal to `value` if the optimum is proven.
    """

    fills: tuple[Fill, ...]
    value: int
    bound: int


@dataclass(frozen=True)
class _Program:
    """Maximise the roots through accepted trie nodes, with at most `budget` fills.

    Variables are x_fill (in the graph or not), then y_node (accepted or not; whole by itself once
    all x are): y_node <= x of its fill, y_node <= y_parent, sum of x <= budget.
    """

    fills: Sequence[Fill]
    cost: np.ndarray[Any, Any]
    matrix: csr_array
    limit: np.ndarray[Any, Any]

    @classmethod
    def of(cls, trie: Trie, allowed: frozenset[Fill], budget: int) -> _Program:
        """The program over `allowed` fills and the trie nodes that they can reach."""
        reached = {0}
        for node in range(1, len(trie.fill)):  # parents come before their children
            if trie.parent[node] in reached and trie.fill[node] in allowed:
                reached.add(node)
        nodes = sorted(reached - {0})
        fills = sorted({trie.fill[node] for node in nodes})
        x = {fill: column for column, fill in enumerate(fills)}
        y = {node: column for column, node in enumerate(nodes, start=len(fills))}
        pairs = [(y[node], x[trie.fill[node]]) for node in nodes]
        pairs += [(y[node], y[trie.parent[node]]) for node in nodes if trie.parent[node]]
        below, above = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        rows = np.arange(len(pairs))
        entries = np.concatenate((np.ones(len(pairs)), -np.ones(len(pairs)), np.ones(len(fills))))
        where = (
            np.concatenate((rows, rows, np.full(len(fills), len(pairs)))),
            np.concatenate((below, above, np.arange(len(fills)))),
        )
        shape = (len(pairs) + 1, len(fills) + len(nodes))
        cost = np.concatenate((np.zeros(len(fills)), [-float(trie.weight[node]) for node in nodes]))
        limit = np.concatenate((np.zeros(len(pairs)), [float(budget)]))
        return cls(fills, cost, csr_array((entries, where), shape=shape), limit)


def optimum(chains: Mapping[Chain, int], budget: int, time_limit: float = 60.0) -> Optimum:
    """Solve the choice of up to `budget` fills to proven optimality, starting from growth.

    Exact, in three steps. Deeper than the budget nothing can be accepted, so chains are cut there.
    The linear relaxation bounds every graph; its reduced costs bound every graph that holds a given
    fill, and a fill for which that is no better than the grown graph is left out. What remains,
    often nothing, is solved by branch and bound.

    Parameters
    ----------
    time_limit
        Seconds for the relaxation, and again for branch and bound; when they run out `bound` says
        what is proven by then.
    """
    cut: Counter[Chain] = Counter()
    for chain, count in chains.items():
        cut[chain[:budget]] += count
    trie = Trie(cut)
    grown = grow(cut, budget)
    value = trie.value(set(grown))
    best = Optimum(tuple(grown), value, sum(trie.weight))
    program = _Program.of(trie, frozenset(trie.with_fill), budget)
    if not program.fills:
        return best

    relaxed = linprog(
        program.cost,
        A_ub=program.matrix,
        b_ub=program.limit,
        bounds=(0, 1),
        method="highs",
        options={"time_limit": time_limit},
    )
    allowed = frozenset(program.fills)
    if relaxed.status == 0:
        with_fill = -relaxed.fun - relaxed.lower.marginals[: len(program.fills)]
        best = Optimum(best.fills, value, max(value, _whole(-relaxed.fun)))
        allowed = frozenset(
            fill
            for fill, bound in zip(program.fills, with_fill, strict=True)
            if _whole(bound) > value
        )
    program = _Program.of(trie, allowed, budget)
    if best.bound == value or not program.fills:
        return Optimum(best.fills, value, value)

    whole = np.zeros(len(program.cost))
    whole[: len(program.fills)] = 1
    solved = milp(
        program.cost,
        constraints=(program.matrix, -np.inf, program.limit),
        integrality=whole,
        bounds=(0, 1),
        options={"time_limit": time_limit},
    )
    bound = best.bound
    if solved.mip_dual_bound is not None:
        bound = max(value, min(bound, _whole(-solved.mip_dual_bound)))
    if solved.x is not None:
        chosen = [fill for fill, x in zip(program.fills, solved.x, strict=False) if x > 0.5]
        if trie.value(set(chosen)) > value:
            return Optimum(tuple(chosen), trie.value(set(chosen)), bound)
    return Optimum(best.fills, value, bound)


def _whole(bound: float) -> int:
    """The largest whole worth that a bound allows, after HiGHS's rounding."""
    return int(np.floor(bound + _SLACK * max(1.0, abs(bound))))
