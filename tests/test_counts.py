"""The mergeable counts of chains: nothing lost by packing, by merging, or by growing from them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiffy.graphs import (
    Chain,
    ChainCounts,
    chain_from_bytes,
    chain_to_bytes,
    grow,
    grow_counted,
    transitions,
)


def chain_of(draw: random.Random, ranks: int, steps: int, at_most: int) -> Chain:
    """A random future: every step fills in one to `at_most` positions, low ranks first mostly."""
    left, fill, chain = list(range(ranks)), [], []
    for _ in range(draw.randrange(1, steps + 1)):
        for _ in range(min(draw.randint(1, at_most), len(left))):
            position = left.pop(min(int(draw.expovariate(0.8)), len(left) - 1))
            fill.append((position, min(int(draw.expovariate(2.0)), 3)))
        if chain and len(fill) == len(chain[-1]):
            break
        chain.append(tuple(sorted(fill)))
    return tuple(chain)


def random_chains(seed: int, roots: int, **shape: int) -> list[Chain]:
    draw = random.Random(seed)
    shape = {"ranks": 8, "steps": 5, "at_most": 1, **shape}
    return [chain_of(draw, **shape) for _ in range(roots)]


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_a_packed_chain_comes_back(seed: int, at_most: int) -> None:
    for chain in random_chains(seed, 20, at_most=at_most):
        assert chain_from_bytes(chain_to_bytes(chain)) == chain


def test_a_chain_is_cut_where_a_rank_has_no_room() -> None:
    near, far = ((3, 1),), ((3, 1), (1024, 0))
    assert chain_from_bytes(chain_to_bytes((near, far))) == (near,)
    counts = ChainCounts()
    counts.add([(near, far), None, (), (((0, 32),),)])
    assert counts.chains() == {(near,): 1}


def test_counts_are_those_of_a_plain_counter_however_they_are_split_and_merged() -> None:
    chains = random_chains(1, 600)
    parts = []
    for part in range(3):
        counts = ChainCounts()
        counts.add(chains[part::3])
        parts.append(counts)
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = ChainCounts()
        for part in order:
            merged.merge(parts[part])
        assert merged.chains() == Counter(chains)
        assert merged.total() == 600
        assert len(merged) == len(set(chains))


@pytest.mark.parametrize("at_most", [1, 3])
@pytest.mark.parametrize("budget", [1, 4, 30])
def test_growth_from_counts_is_growth_from_all_chains(budget: int, at_most: int) -> None:
    for seed in range(2):
        chains = Counter(random_chains(seed, 3000, at_most=at_most))
        counts = ChainCounts.of(chains)
        assert grow_counted(counts, budget) == grow(chains, budget)
    assert len(counts.reduced(3000 // 32)) < len(chains) / 4  # it did leave something out


@pytest.mark.parametrize("at_most", [1, 2])
def test_passages_are_the_edges_among_some_fills(at_most: int) -> None:
    chains = Counter(random_chains(5, 500, at_most=at_most))
    before = transitions(chains)
    fills = grow(chains, 10)
    passed, parents = ChainCounts.of(chains).passages(fills)
    assert passed == [before[fill].total() for fill in fills]
    numbers = {(): 0, **{fill: k for k, fill in enumerate(fills, start=1)}}
    assert parents == [sorted(numbers[p] for p in before[f] if p in numbers) for f in fills]


def test_no_chains_grow_no_graph() -> None:
    counts = ChainCounts()
    assert grow_counted(counts, 8) == []
    assert counts.passages([]) == ([], [])
    assert counts.passages([((0, 0),)]) == ([0], [[]])
