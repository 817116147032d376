"""Growth, pruning and replay of draft graphs on hand-made and random chains."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import pytest
from helpers import own_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from spiffy.graphs import (
    Chain,
    Fill,
    count_chains,
    grow,
    grow_by_all_parents,
    grow_by_children,
    grow_by_chosen_parents,
    grow_by_count,
    grow_by_nodes_and_transitions,
    grow_by_transitions,
    grow_on_replay,
    grow_paper,
    replay,
    replay_prefixes,
    transitions,
)
from spiffy.graphs.optimum import optimum
from spiffy.graphs.replay import accepted_steps

BASELINES = (
    grow_by_count,
    grow_by_all_parents,
    grow_by_chosen_parents,
    grow_by_nodes_and_transitions,
    grow_by_transitions,
    grow_by_children,
)

Growth = Callable[[Mapping[Chain, int], int], list[Fill]]

A: Fill = ((0, 0),)
B: Fill = ((1, 0),)
C: Fill = ((2, 0),)
AC: Fill = ((0, 0), (2, 0))
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
    before, known = transitions(counts), {()}
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


@given(chain_counts(), st.randoms(use_true_random=False))
def test_all_budgets_are_replayed_as_each_by_itself(
    counts: Counter[Chain], order: random.Random
) -> None:
    chains: list[Chain | None] = [None, *counts.elements()]
    order.shuffle(chains)
    fills = sorted({fill for chain in counts for fill in chain})
    order.shuffle(fills)  # a chain's later fill may come first
    prompts = [chains, chains[::2]]
    each = [replay(prompts, set(fills[:budget])) for budget in range(len(fills) + 1)]
    assert replay_prefixes(prompts, fills) == each


def test_replaying_all_budgets_takes_no_graph_for_each() -> None:
    fills: list[Fill] = [((i, j),) for i in range(1000) for j in range(2)]
    tracemalloc.start()
    found = replay_prefixes([[(fill,) for fill in fills[:50]]], fills)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[-1].forwards == 25  # each hops over the root behind it
    assert most < 10e6  # 2,000 sets of up to 2,000 fills take some 100 MB


def test_a_hop_needs_every_state_on_the_way() -> None:
    assert accepted_steps((A, AB, ABC), {AB, ABC}) == 0
    assert accepted_steps((A, AB, ABC), {A, ABC}) == 1
    assert accepted_steps(None, {A}) == 0


def test_a_state_reached_in_two_orders_is_one_node() -> None:
    counts = count_chains([[(A, AB)] * 3, [(B, AB)] * 2])
    assert transitions(counts)[AB] == {A: 3, B: 2}
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
    prompts = [[chain] for chain in counts.elements()]
    grown = [growth(counts, budget) for growth in (grow, *BASELINES)]
    for fills in (*grown, grow_on_replay(prompts, budget)):
        assert len(fills) == len(set(fills)) <= budget
        assert is_connected(fills, counts)


@pytest.mark.parametrize("growth", BASELINES)
def test_a_baseline_adds_to_what_it_chose_for_a_smaller_budget(growth: Growth) -> None:
    @own_examples(growth.__name__)
    @given(chain_counts(), st.integers(1, 8))
    def check(counts: Counter[Chain], budget: int) -> None:
        assert growth(counts, budget) == growth(counts, budget + 1)[:budget]

    check()


@given(chain_counts(), st.integers(1, 6))
def test_a_bigger_budget_never_accepts_less(counts: Counter[Chain], budget: int) -> None:
    smaller, larger = grow(counts, budget), grow(counts, budget + 1)
    assert value(counts, set(smaller)) <= value(counts, set(larger))


@given(chain_counts(), st.integers(1, 8))
def test_no_baseline_beats_the_optimum_on_its_own_data(counts: Counter[Chain], budget: int) -> None:
    best = optimum(counts, budget).value
    for growth in (grow, *BASELINES):
        assert value(counts, set(growth(counts, budget))) <= best


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


@given(chain_counts(), st.integers(1, 3))
@settings(max_examples=50)
def test_the_optimum_is_the_best_of_all_graphs(counts: Counter[Chain], budget: int) -> None:
    fills = sorted({fill for chain in counts for fill in chain})
    graphs = combinations(fills, min(budget, len(fills)))
    found = optimum(counts, budget)
    assert found.value == found.bound == max(value(counts, set(graph)) for graph in graphs)
    assert value(counts, set(found.fills)) == found.value
    assert len(found.fills) <= budget


@pytest.mark.parametrize("seed", range(4))
def test_branch_and_bound_finds_what_swapping_misses(seed: int, monkeypatch: Any) -> None:
    """The optimum must not lean on good growth: here it starts from an empty graph."""
    monkeypatch.setattr("spiffy.graphs.optimum.grow", lambda chains, budget: [])
    rng = random.Random(seed)
    counts = Counter(
        {
            chain_of([(p, 0) for p in rng.sample(range(5), 4)], [1] * 4): rng.randint(1, 9)
            for _ in range(8)
        }
    )
    fills = sorted({fill for chain in counts for fill in chain})
    best = max(value(counts, set(graph)) for graph in combinations(fills, 4))
    found = optimum(counts, 4)
    assert value(counts, set(found.fills)) == found.value == found.bound == best > 0


def test_the_optimum_of_nothing_is_nothing() -> None:
    found = optimum(Counter(), 3)
    assert (found.fills, found.value, found.bound) == ((), 0, 0)


def test_a_bound_holds_when_time_runs_out() -> None:
    rng = random.Random(0)
    counts = Counter(
        chain_of([(p, 0) for p in rng.sample(range(8), 6)], [1] * 6) for _ in range(60)
    )
    hurried, patient = optimum(counts, 10, time_limit=0.0), optimum(counts, 10)
    assert hurried.value <= patient.value == patient.bound <= hurried.bound
    assert value(counts, set(hurried.fills)) == hurried.value


def test_growth_on_replay_counts_only_the_roots_where_walks_end() -> None:
    # B is right at state 2, which a walk over A never stops at: it ends at state 3.
    prompt = [None, (A, AB), (B,), (), None]
    counts = count_chains([prompt])
    assert value(counts, {A, B}) == value(counts, {A, AB}) == 2
    assert grow(counts, 2) == [A, B]
    assert grow_on_replay([prompt], 2) == [A, AB]
    assert replay([prompt], {A, AB}).forwards < replay([prompt], {A, B}).forwards


# Counts: A 5 (4 before AB), B 6 (2 before AB), AB 6, C 3, AC 3 (always after C).
READINGS = Counter({(A, AB): 4, (A,): 1, (B, AB): 2, (B,): 4, (C, AC): 3})


@pytest.mark.parametrize(
    ("growth", "order"),
    [
        (grow_by_count, [B, AB, A, C, AC]),
        # AB: 6 + 5 + 6; AC: 3 + 3.
        (grow_by_all_parents, [B, AB, A, C, AC]),
        # AB follows B: 6 + 6.
        (grow_by_chosen_parents, [B, AB, A, C, AC]),
        # A: 5 + 5; AB after B: 6 + 2, after A too: 6 + 6.
        (grow_by_nodes_and_transitions, [B, A, AB, C, AC]),
        # AB after B only: 2; after A too: 6.
        (grow_by_transitions, [B, A, AB, C, AC]),
        # B: 6 + 6; A: 5 + 6; C: 3 + 3, which ties with AB, the larger fill.
        (grow_by_children, [B, A, C, AB, AC]),
    ],
)
def test_a_baseline_follows_its_reading(growth: Growth, order: list[Fill]) -> None:
    assert growth(READINGS, 8) == order


def test_a_parent_outside_the_graph_counts_in_one_reading_only() -> None:
    # Once A (5) is in: AB has 2 + 5, and 4 more for its parent B; AC has 3 + 5.
    counts = Counter({(A, AC): 3, (A, AB): 1, (A,): 1, (B, AB): 1, (B,): 3})
    assert grow_by_all_parents(counts, 3) == [A, AB, AC]
    assert grow_by_chosen_parents(counts, 3) == [A, AC, AB]


def test_growth_stops_when_nothing_is_left_to_gain() -> None:
    assert grow(Counter({(A,): 2}), 32) == [A]
    assert grow(Counter(), 32) == []
    for growth in BASELINES:
        assert growth(Counter(), 32) == []
        assert growth(Counter({(A,): 2}), 32) == [A]
    assert grow_on_replay([[None, (A,), ()]], 32) == [A]
    assert grow_on_replay([], 32) == []


def test_the_papers_rule_is_the_reading_that_measured_best() -> None:
    assert grow_paper is grow_by_chosen_parents
