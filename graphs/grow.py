"""Growing draft graphs under a node budget, on expected accepted steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from spiffy.graphs.chains import Chain, Fill, Prompt, count_chains
from spiffy.graphs.replay import replay

_TRIED = 24  # fills that a replay decides between; 6 to 96 measured the same within 0.1%


class Trie:
    """All chains as a tree of prefixes, and how much of it a growing graph accepts.

    A trie node is accepted when the fills on its path are all in the graph; the value of the graph
    is the number of roots that pass through accepted trie nodes, i.e. the accepted steps summed
    over all roots. Waiting trie nodes are those whose parent is accepted but whose own fill is not
    in the graph yet; `gains` says what each fill would add.
    """

    def __init__(self, chains: Mapping[Chain, int]) -> None:
        self.margin = sum(chains.values()) * max(map(len, chains), default=0)  # see _grow
        self.fill: list[Fill] = [()]
        self.weight: list[int] = [0]
        self.parent: list[int] = [-1]
        self.children: list[dict[Fill, int]] = [{}]
        for chain, count in sorted(chains.items()):
            node = 0
            for fill in chain:
                node = self._child(node, fill)
                self.weight[node] += count
        self.with_fill: dict[Fill, list[int]] = defaultdict(list)
        for node, fill in enumerate(self.fill):
            self.with_fill[fill].append(node)

    def _child(self, node: int, fill: Fill) -> int:
        if fill not in self.children[node]:
            self.children[node][fill] = len(self.fill)
            self.fill.append(fill)
            self.weight.append(0)
            self.parent.append(node)
            self.children.append({})
        return self.children[node][fill]

    def start(self) -> None:
        """Empty the graph."""
        self.graph: set[Fill] = {()}
        self.accepted: set[int] = set()
        self.gains: dict[Fill, int] = defaultdict(int)
        self._accept(0)

    def worth(self, node: int) -> int:
        """Roots through this trie node and all below it that the graph would then accept."""
        below = self.children[node].items()
        return self.weight[node] + sum(self.worth(k) for fill, k in below if fill in self.graph)

    def add(self, fill: Fill) -> None:
        """Put a fill into the graph."""
        self.graph.add(fill)
        self.gains.pop(fill, None)
        for node in self.with_fill[fill]:
            if self.parent[node] in self.accepted:
                self._accept(node)
                continue
            # Not reached yet. Accepting a waiting node above would reach it if all between the two
            # have fills in the graph, so only the nearest above whose fill is missing can gain: any
            # further up would still wait for that fill. (The climb ends there, because a node in
            # the graph below an accepted one is accepted.) It gains just this worth, which counted
            # for nothing as long as this fill was missing; gains of nodes that do not lead here
            # stay as they are. No chain holds a fill twice, so no worth is added twice.
            above = self.parent[node]
            while self.fill[above] in self.graph and self.parent[above] not in self.accepted:
                above = self.parent[above]
            if self.fill[above] not in self.graph and self.parent[above] in self.accepted:
                self.gains[self.fill[above]] += self.worth(node)

    def _accept(self, node: int) -> None:
        self.accepted.add(node)
        for fill, child in self.children[node].items():
            if fill in self.graph:
                self._accept(child)
            else:
                self.gains[fill] += self.worth(child)

    def value(self, graph: Collection[Fill]) -> int:
        """Accepted steps summed over all roots, for any graph."""
        total, stack = 0, [0]
        while stack:
            node = stack.pop()
            total += self.weight[node]
            stack += [child for fill, child in self.children[node].items() if fill in graph]
        return total


def grow(chains: Mapping[Chain, int], budget: int, passes: int = 4) -> list[Fill]:
    """Choose up to `budget` fills that maximise the accepted steps over all roots.

    Greedy growth by gain (ties to the smaller fill), then up to `passes` rounds that drop one node
    and regrow as long as that improves the whole. Nodes come in growth order, so every prefix is
    connected to the root and is itself a good graph.
    """
    return grow_with_margin(chains, budget, passes)[0]


def grow_with_margin(
    chains: Mapping[Chain, int], budget: int, passes: int = 4
) -> tuple[list[Fill], int]:
    """The fills that `grow` chooses, and the smallest gain for which it chose any.

    Fills that could never gain as much might as well not have been there; 0 if growth ran out of
    fills before the budget.
    """
    trie = Trie(chains)
    best = _grow(trie, (), budget, None)
    for _ in range(passes):
        improved = _swap_one(trie, best, budget)
        if improved is None:
            break
        best = improved
    order = _grow(trie, (), budget, set(best))  # leaves out what a swap has cut off
    return _grow(trie, order, budget, None), trie.margin


def _grow(
    trie: Trie, kept: Collection[Fill], budget: int, allowed: Collection[Fill] | None
) -> list[Fill]:
    """Greedy growth from the `kept` fills; only with `allowed` fills, if given.

    `trie.margin` keeps the smallest gain that decided while all fills were allowed.
    """
    trie.start()
    order: list[Fill] = []
    for fill in kept:
        trie.add(fill)
        order.append(fill)
    while len(order) < budget:
        choices = [
            (gain, fill)
            for fill, gain in trie.gains.items()
            if gain > 0 and (allowed is None or fill in allowed)
        ]
        gain, fill = min(
            choices, default=(0, ()), key=lambda choice: (-choice[0], len(choice[1]), choice[1])
        )
        if allowed is None:
            trie.margin = min(trie.margin, gain)
        if not gain:
            break
        trie.add(fill)
        order.append(fill)
    return order


def _swap_one(trie: Trie, graph: list[Fill], budget: int) -> list[Fill] | None:
    """Drop the node that costs least, regrow; None if nothing is better than `graph`."""
    value = trie.value(set(graph))
    without = [[fill for fill in graph if fill != dropped] for dropped in graph]
    without.sort(key=lambda rest: -trie.value(set(rest)))
    for rest in without:
        grown = _grow(trie, rest, budget, None)
        if trie.value(set(grown)) > value:
            return grown
    return None


def grow_on_replay(prompts: Sequence[Prompt], budget: int) -> list[Fill]:
    """Choose up to `budget` fills, each the one that leaves the fewest forwards in a replay.

    `grow` counts every state of the recorded decodes as a root, but a decode with drafts only has
    roots where walks end. Of the fills that gain most by `grow`'s measure (which also settles
    ties) this one takes whichever is best under the real hops. Prefixes are connected here too.
    """
    trie = Trie(count_chains(prompts))
    trie.start()
    order: list[Fill] = []
    while len(order) < budget:
        choices = [(-gain, len(fill), fill) for fill, gain in trie.gains.items() if gain > 0]
        if not choices:
            break
        graph = set(order)
        *_, fill = min(
            (replay(prompts, graph | {choice[-1]}).forwards, *choice)
            for choice in sorted(choices)[:_TRIED]
        )
        trie.add(fill)
        order.append(fill)
    return order
