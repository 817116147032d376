"""What our growth has to beat: connected counting, and readings of the paper's rule.

The paper grows a connected graph of D nodes by "degree-1 accumulation": it maximises the sum, over
its nodes, of count(q) and the counts of q's parents (two independent sets of notes on v3 and v4
agree on this; there is no public code). Whether q's parents are all that were observed or only
those in the graph is not stated: both readings are here, and `grow_paper` is the one that did
better. The other functions score otherwise; `grow_by_transitions` did best of all.

They share what is not in doubt: start from the root, add one fill at a time, only fills that were
observed right after one that is in the graph, the best score first (ties to the smaller fill). The
count of a fill is the number of roots whose future passed through it; the root itself has none.
`studies/graphs.py` measures them all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from spiffy.graphs.chains import Chain, Fill, transitions


@dataclass(frozen=True)
class _Counts:
    """How often each fill was passed, and which fill came right before and right after it."""

    count: Mapping[Fill, int]
    before: Mapping[Fill, Counter[Fill]]
    after: Mapping[Fill, Counter[Fill]]

    @classmethod
    def of(cls, chains: Mapping[Chain, int]) -> _Counts:
        before = transitions(chains)
        after: defaultdict[Fill, Counter[Fill]] = defaultdict(Counter)
        for fill, parents in before.items():
            for parent, count in parents.items():
                after[parent][fill] = count
        return cls({fill: parents.total() for fill, parents in before.items()}, before, after)


_Score = Callable[[Fill, Collection[Fill]], int]  # of a fill, given the graph and the root


def _grow_connected(counts: _Counts, budget: int, score: _Score) -> list[Fill]:
    graph: list[Fill] = []
    chosen: set[Fill] = {()}
    connected = set(counts.after.get((), ()))
    while connected and len(graph) < budget:
        fill = min(connected, key=lambda fill: (-score(fill, chosen), len(fill), fill))
        graph.append(fill)
        chosen.add(fill)
        connected |= counts.after.get(fill, Counter()).keys()
        connected -= chosen
    return graph


def grow_by_count(chains: Mapping[Chain, int], budget: int) -> list[Fill]:
    """Plain connected counting: count(q)."""
    counts = _Counts.of(chains)
    return _grow_connected(counts, budget, lambda fill, _: counts.count[fill])


def grow_by_all_parents(chains: Mapping[Chain, int], budget: int) -> list[Fill]:
    """The published rule, with all parents ever observed: count(q) plus their counts."""
    counts = _Counts.of(chains)
    total = {
        fill: counts.count[fill] + sum(counts.count[parent] for parent in parents if parent)
        for fill, parents in counts.before.items()
    }
    return _grow_connected(counts, budget, lambda fill, _: total[fill])


def grow_by_chosen_parents(chains: Mapping[Chain, int], budget: int) -> list[Fill]:
    """The published rule, with parents in the graph: count(q) plus their counts."""
    counts = _Counts.of(chains)

    def score(fill: Fill, chosen: Collection[Fill]) -> int:
        parents = (parent for parent in counts.before[fill] if parent and parent in chosen)
        return counts.count[fill] + sum(counts.count[parent] for parent in parents)

    return _grow_connected(counts, budget, score)


def grow_by_nodes_and_transitions(chains: Mapping[Chain, int], budget: int) -> list[Fill]:
    """A subgraph is worth the counts of its nodes plus the transitions between them.

    So q adds count(q) and the transitions into it from the graph (the root's included).
    """
    counts = _Counts.of(chains)
    into = _transitions(counts)
    return _grow_connected(
        counts, budget, lambda fill, chosen: counts.count[fill] + into(fill, chosen)
    )


def grow_by_transitions(chains: Mapping[Chain, int], budget: int) -> list[Fill]:
    """A subgraph is worth the transitions along its edges: our own baseline, not the paper's rule.

    So q adds the transitions into it from the graph (the root's included): roots whose future
    reached q by another way do not count.
    """
    counts = _Counts.of(chains)
    return _grow_connected(counts, budget, _transitions(counts))


def grow_by_children(chains: Mapping[Chain, int], budget: int) -> list[Fill]:
    """Count(q) plus the counts of its children: accumulation from below instead of above."""
    counts = _Counts.of(chains)
    total = {
        fill: count + sum(counts.count[child] for child in counts.after.get(fill, ()))
        for fill, count in counts.count.items()
    }
    return _grow_connected(counts, budget, lambda fill, _: total[fill])


def _transitions(counts: _Counts) -> _Score:
    def score(fill: Fill, chosen: Collection[Fill]) -> int:
        return sum(count for parent, count in counts.before[fill].items() if parent in chosen)

    return score


#: The better of the two readings of the published rule (docs/results-drafting.md).
grow_paper = grow_by_chosen_parents
