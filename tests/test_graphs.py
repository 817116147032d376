"""Growth, pruning and replay of draft graphs on hand-made and random chains."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffy.graphs import Chain, Fill, count_chains, edges, grow, grow_paper, replay
from spiffy.graphs.replay import accepted_steps

A: Fill = ((0, 0),)
B: Fill = ((1, 0),)
C: Fill = ((2, 0),)
AB: Fill = ((0, 0), (1, 0))
ABC: Fill = ((0, 0), (1, 0), (2, 0))


def chain_of(pairs: list[tuple[int, int]], sizes: list[int]) -> Chain:
    """The chain that fills in `pairs` in order, `sizes` at a time."""
    chain, taken = [], 0
    for size in sizes:
        taken += size
        chain.append(tuple(sorted(pairs[:taken])))
    return tuple(chain)


@st.composite
def chain_counts(draw: st.DrawFn, ranks: int = 4) -> Counter[Chain]:
    chains = []
    for _ in range(draw(st.integers(1, 6))):
        positions = draw(st.permutations(range(ranks)))
        tokens = [draw(st.sampled_from((0, 0, 1))) for _ in positions]
        pairs = list(zip(positions, tokens, strict=True))
        depth = draw(st.integers(1, ranks))
        chains += [chain_of(pairs, [1] * depth)] * draw(st.integers(1, 5))
    return Counter(chains)


def value(counts: Counter[Chain], graph: set[Fill]) -> int:
    """Accepted steps over all roots, counted one chain at a time."""
    return sum(count * accepted_steps(chain, graph) for chain, count in counts.items())


def is_connected(fills: list[Fill], counts: Counter[Chain]) -> bool:
    before, known = edges(counts), {()}
    for fill in fills:
        if known.isdisjoint(before[fill]):
            return False
        known.add(fill)
    return True


def test_replay_counts_only_the_roots_where_walks_end() -> None:
    # Six steps; the chain of the root at step 1 is right for two states, and so on.
    prompt = [None, (A, AB, ABC), (A,), (), (A, AB), (A,)]
    assert replay([prompt], set()).forwards == 6
    # Steps 0 (no drafts) and 1 (hops over A and AB to step 4), then 4 (hops over A to the end).
    result = replay([prompt], {A, AB})
    assert (result.steps, result.forwards) == (6, 3)
    assert result.steps_per_forward == 2.0


def test_a_hop_needs_every_state_on_the_way() -> None:
    assert accepted_steps((A, AB, ABC), {AB, ABC}) == 0
    assert accepted_steps((A, AB, ABC), {A, ABC}) == 1
    assert accepted_steps(None, {A}) == 0


def test_a_state_reached_in_two_orders_is_one_node() -> None:
    counts = count_chains([[(A, AB)] * 3, [(B, AB)] * 2])
    assert edges(counts)[AB] == {A: 3, B: 2}
    assert set(grow(counts, 3)) == {A, B, AB}


def test_growth_counts_what_a_node_unlocks() -> None:
    # Alone, C (4 roots) gains more than A (3). With AB in the graph, A also unlocks AB: 3 + 3.
    counts = Counter({(B, AB): 5, (A, AB): 3, (C,): 4})
    assert grow(counts, 3) == [B, AB, A]


def test_swapping_finds_what_greedy_growth_misses() -> None:
    pairs = [(0, 0), (1, 0), (2, 0), (3, 0)]
    order = {name: [pairs[int(k)] for k in name] for name in ("0213", "213", "12", "301")}
    counts = Counter(
        {
            chain_of(order["0213"], [1] * 4): 6,
            chain_of(order["213"], [1] * 3): 6,
            chain_of(order["12"], [1] * 2): 5,
            chain_of(order["301"], [1] * 3): 3,
        }
    )
    greedy, swapped = (set(grow(counts, 4, passes=passes)) for passes in (0, 4))
    fills = {fill for chain in counts for fill in chain}
    best = max(value(counts, set(graph)) for graph in combinations(sorted(fills), 4))
    assert value(counts, greedy) < value(counts, swapped) == best


@given(chain_counts(), st.integers(1, 8))
def test_every_prefix_is_connected(counts: Counter[Chain], budget: int) -> None:
    for fills in (grow(counts, budget), grow_paper(counts, budget)):
        assert len(fills) == len(set(fills)) <= budget
        assert is_connected(fills, counts)


@given(chain_counts(), st.integers(1, 6))
def test_a_bigger_budget_never_accepts_less(counts: Counter[Chain], budget: int) -> None:
    smaller, larger = grow(counts, budget), grow(counts, budget + 1)
    assert value(counts, set(smaller)) <= value(counts, set(larger))


@given(chain_counts(), st.integers(1, 8))
def test_growth_beats_the_papers_rule_on_its_own_data(counts: Counter[Chain], budget: int) -> None:
    assert value(counts, set(grow(counts, budget))) >= value(
        counts, set(grow_paper(counts, budget))
    )


@pytest.mark.parametrize("seed", range(12))
def test_growth_is_close_to_the_best_of_all_graphs(seed: int) -> None:
    rng = random.Random(seed)
    counts: Counter[Chain] = Counter()
    for _ in range(8):
        positions = sorted(range(5), key=lambda p: p + rng.gauss(0, 1.5))
        pairs = [(p, int(rng.random() < 0.2)) for p in positions]
        counts[chain_of(pairs, [1] * rng.randint(1, 4))] += rng.randint(1, 9)
    fills = sorted({fill for chain in counts for fill in chain})
    best = max(value(counts, set(graph)) for graph in combinations(fills, 4))
    ours = value(counts, set(grow(counts, 4)))
    assert ours >= 0.9 * best


def test_the_papers_rule_adds_the_counts_of_parents() -> None:
    # AB has count 4 and parent A with count 5: score 9 beats B's count of 6 once A is in.
    counts = Counter({(A, AB): 4, (A,): 1, (B,): 6})
    assert grow_paper(counts, 3) == [B, A, AB]
    assert grow_paper(Counter({(A, AB): 4, (A,): 3, (B,): 6}), 2) == [A, AB]


def test_growth_stops_when_nothing_is_left_to_gain() -> None:
    assert grow(Counter({(A,): 2}), 32) == [A]
    assert grow(Counter(), 32) == []
    assert grow_paper(Counter(), 32) == []
