"""The compiled search (extra `fast`) drafts what NumPy's does, and steps aside where it cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from spiffy.runtime.draft import compiled, primitives, search
from spiffy.runtime.draft.acceptance import POSITION_FEATURES, TOKEN_FEATURES, AcceptanceWeights
from spiffy.runtime.draft.compiled import arrays, layout, loops
from spiffy.runtime.draft.compiled import primitives as compiled_primitives
from spiffy.runtime.draft.expand import expand, most_states
from spiffy.runtime.draft.ngrams import Bigrams
from spiffy.runtime.draft.outlook import Outlook, Rejected

MASK, EOS, VOCAB = 29, 28, 30


def drawn_root(
    seed: int, length: int, ranks: int, rejected: int, *, everywhere: bool = False
) -> tuple[Outlook, arrays.Outlook]:
    """A root with some masked positions, and what some rejected drafts say, by both."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 6, length)
    ids[rng.random(length) < (1.0 if everywhere else 0.6)] = MASK
    ids[rng.integers(length)] = MASK
    masked, known = np.flatnonzero(ids == MASK), np.flatnonzero(ids != MASK)
    order = rng.permutation(masked)
    tokens = np.stack([rng.permutation([*range(6), EOS])[:ranks] for _ in order])
    # Some are sure, so that drafts reach far; not so sure that what is left is mostly rounding.
    shape, alpha = (1 + rejected, len(order)), rng.choice([0.02, 0.3, 2.0])
    law = 0.97 * rng.dirichlet(np.full(ranks + 1, alpha), shape)
    law += 0.03 * rng.dirichlet(np.full(ranks + 1, 4.0), shape)
    log_p = np.log(law[..., :ranks])
    fresh = known[rng.random(len(known)) < 0.4]
    said = None
    if rejected:
        choice = np.where(
            rng.random((rejected, len(order))) < 0.3,
            rng.integers(0, min(2, ranks), (rejected, len(order))),
            -1,
        )
        choice[:, -1] = -1
        said = Rejected(choice, log_p[1:], rng.random((rejected, len(fresh))) < 0.5)
    facts = (ids, order, tokens, log_p[0], fresh)
    known = {"mask_token_id": MASK, "eos_token_ids": np.array([EOS, 4]), "vocab": VOCAB}
    at = Outlook.at(*facts, **known, rejected=said)
    return at, compiled.lay_out(*facts, **known, rejected=said)


def drawn_weights(seed: int, sets: bool) -> AcceptanceWeights:
    rng = np.random.default_rng(seed)
    pairs = [(int(a), int(b), int(n) + 1) for a, b, n in rng.integers(0, 6, (12, 3))]
    return AcceptanceWeights(
        position=rng.normal(0, 0.3, len(POSITION_FEATURES)),
        commit=rng.normal(0, 0.3, len(POSITION_FEATURES) + 1) if sets else None,
        spread=seed % 3 * 0.8,
        token=np.append([1.0], rng.normal(0, 0.3, len(TOKEN_FEATURES) - 1)),
        bigrams=Bigrams(pairs, VOCAB),
    )


def assert_same_drafts(
    weights: AcceptanceWeights, both: tuple[Outlook, arrays.Outlook], budget: int, room: int
) -> None:
    """The same probabilities, of the same states but where equals compete for the last place."""
    choice, p = expand(weights, both[0], budget, room)
    ours, our_p = compiled.expand(compiled.prepare(weights), both[1], budget, room)
    assert (ours.dtype, our_p.dtype) == (choice.dtype, p.dtype)
    assert our_p == pytest.approx(p, rel=1e-6)
    ids, facts = np.full(200, MASK), (both[0].positions, both[0].tokens, choice)
    assert compiled.fill_in(ids, *facts).tolist() == primitives.fill_in(ids, *facts).tolist()
    known = dict(zip(map(tuple, choice.tolist()), p, strict=True))
    for state, probability in zip(map(tuple, ours.tolist()), our_p, strict=True):
        assert known.get(state, p[-1]) == pytest.approx(probability, rel=1e-6)


@given(
    st.integers(0, 10**6),
    st.integers(1, 14),
    st.integers(1, 4),
    st.integers(0, 4),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 20),
)
def test_the_drafts_are_those_of_numpy(
    seed: int, length: int, ranks: int, rejected: int, sets: bool, budget: int, room: int
) -> None:
    both = drawn_root(seed, length, ranks, rejected)
    weights = drawn_weights(seed % 1009, sets)
    assert_same_drafts(weights, both, budget, min(room, len(both[0].positions)))


@given(st.integers(0, 10**6), st.integers(1, 14), st.integers(1, 4), st.integers(0, 4))
def test_the_root_is_laid_out_as_by_numpy(
    seed: int, length: int, ranks: int, rejected: int
) -> None:
    at, root = drawn_root(seed, length, ranks, rejected)
    for name in arrays.Outlook._fields[:-2]:
        expected, found = getattr(at, name), getattr(root, name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert found == pytest.approx(expected, rel=1e-9), name
    assert root.token_p == pytest.approx(np.exp(at.log_p), rel=1e-9)
    table = root.in_text
    found = dict(zip(table.keys.tolist(), table.counts.tolist(), strict=True))
    wanted = [int(key) for key in at.in_text.keys if key >= 0]
    assert {key: times for key, times in found.items() if key >= 0} == Counter(wanted)


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 3), st.integers(1, 12))
def test_the_informative_drafts_are_those_of_numpy(
    seed: int, block: int, ranks: int, states: int
) -> None:
    """Drafts like those of a walk: what the root holds, or likely tokens, or neither."""
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.permutation(4)[:ranks] for _ in range(block)])
    ids = np.where(rng.random(block) < 0.7, MASK, 5)
    ids[rng.integers(block)] = MASK
    parent = np.where(rng.random(block) < 0.3, MASK, ids)
    drafted = np.where(rng.random((states, block)) < 0.1, 7, tokens[:, 0])
    drafted = np.where(ids == MASK, drafted, ids)
    held = np.where(rng.random((states, block)) < 0.5, drafted, MASK)
    held = np.where(rng.random((states, block)) < 0.9, np.where(parent == MASK, held, parent), held)
    held = np.concatenate((parent[None], held))
    positions = rng.permutation(np.flatnonzero(ids == MASK))
    facts = (positions, tokens[positions], np.log(rng.random((len(positions), ranks))), MASK)
    expected = primitives.informative_drafts(held, ids, 0, *facts)
    ours = compiled.informative_drafts(held, ids, 0, *facts)
    assert ours.tolist() == expected.tolist()
    event(f"{min(len(expected), 3)} drafts")


def assert_same(ours: Sequence[Any], expected: Sequence[Any]) -> None:
    for found, wanted in zip(ours, expected, strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found == pytest.approx(wanted, rel=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 6), st.booleans())
def test_candidates_are_ranked_as_by_numpy(
    seed: int, count: int, ranks: int, by_token: bool
) -> None:
    """With the mask token among the likeliest, equal scores and equal probabilities."""
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.permutation(40)[:count])
    tokens = np.stack([rng.permutation([*range(8), MASK])[:ranks] for _ in positions])
    log_p = np.log(rng.integers(1, 4, tokens.shape) / 20)
    score = rng.integers(1, 4, count) / 4
    masked = positions[rng.random(count) < 0.7]
    facts = (positions, tokens, log_p, score, masked, MASK, ranks - 1, by_token)
    assert_same(compiled.rank(*facts), primitives.rank(*facts))


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
def test_what_drafts_say_is_computed_as_by_numpy(
    seed: int, count: int, ranks: int, drafts: int
) -> None:
    """With numbers that overflowed, and tokens whose probabilities add up to more than 1."""
    rng = np.random.default_rng(seed)
    positions, fresh = np.split(rng.permutation(10)[: count + 2], [count])
    tokens = np.stack([rng.permutation(6)[:ranks] for _ in positions])
    log_p = np.log(rng.dirichlet(np.full(ranks + 1, 0.1), count)[:, :ranks] + 1e-12)
    log_p += rng.choice([0.0, 1e-9])
    held = np.where(rng.random((drafts, 10)) < 0.6, MASK, rng.integers(0, 7, (drafts, 10)))
    logits = rng.normal(0, 4, (drafts, count, ranks))
    logits[rng.random(logits.shape) < 0.05] = rng.choice([np.inf, -np.inf, np.nan])
    facts = (held, positions, fresh, tokens, log_p, rng.normal(0, 2, count), logits, MASK)
    with np.errstate(invalid="ignore"):
        expected = primitives.rejected_log_p(*facts)
    assert_same(compiled.rejected_log_p(*facts), expected)
    event(f"{len(expected[0])} of {drafts} finite")


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 30))
def test_cross_logits_are_found_as_by_numpy(seed: int, count: int, ranks: int, pairs: int) -> None:
    rng = np.random.default_rng(seed)
    state = np.sort(rng.integers(0, 6, 4 * count))
    rows = len(state)
    table = np.stack([rng.permutation(9) for _ in range(rows)])
    numbers = rng.permutation(rows)[:count]
    tokens = np.stack([rng.permutation(table[row, 4 : 4 + ranks]) for row in numbers])
    cross_pairs = rng.integers(0, rows, (2, pairs))
    by_pair = rng.normal(size=(pairs, ranks + 1))
    states = rng.permutation(7)[: rng.integers(1, 5)]
    facts = (table, 4, numbers, cross_pairs, state, by_pair, states, tokens)
    # Where a pair stands there twice, the last one counts; nobody asks for one twice.
    assert_same([compiled.cross_logits_of(*facts)], [primitives.cross_logits_of(*facts)])


@pytest.mark.parametrize("sets", [False, True])
def test_blocks_of_a_hundred_positions(sets: bool) -> None:
    both = drawn_root(3, 128, 4, 2, everywhere=True)
    assert_same_drafts(drawn_weights(4, sets), both, budget=32, room=128)


@pytest.mark.parametrize(("count", "most"), [(1000, 65), (2048, 32)])
def test_no_more_states_are_looked_at_than_memory_is_taken_for(count: int, most: int) -> None:
    """65,536 positions of them (docs/trust.md), whatever number of drafts is asked for."""
    at, root = drawn_root(3, count, 2, 0, everywhere=True)
    weights = drawn_weights(4, sets=False)
    found = [expand(weights, at, budget=4096, room=1)]
    found.append(compiled.expand(compiled.prepare(weights), root, 4096, 1))
    assert [choice.shape for choice, _ in found] == [(most, count)] * 2
    assert most_states(count) == most
    assert most_states(1 << 20) == 1


@pytest.mark.parametrize("sets", [False, True])
def test_what_overflowed_drafts_nothing(sets: bool) -> None:
    """A source of NaN: numba writes where it is told to, whatever stands there."""
    ids = np.array([3, MASK, MASK, MASK])
    tokens, nothing = np.array([[0, 1], [2, 3], [1, 4]]), np.full((3, 2), np.nan)
    known = {"mask_token_id": MASK, "eos_token_ids": np.array([EOS]), "vocab": VOCAB}
    facts = (ids, np.array([1, 2, 3]), tokens, nothing, np.array([0]))
    weights = drawn_weights(3, sets)
    root = compiled.lay_out(*facts, **known)
    assert root.best.tolist() == Outlook.at(*facts, **known).best.tolist() == [[0, 0, 0]]
    assert not len(compiled.expand(compiled.prepare(weights), root, 4, 3)[1])
    with np.errstate(invalid="ignore"):
        assert not len(expand(weights, Outlook.at(*facts, **known), 4, 3)[1])


def test_nothing_is_compiled_twice() -> None:
    """What differs from root to root is no type: another one would compile for seconds."""
    compiled.warm_up()
    for sets in (False, True):
        for rejected in (0, 2):
            _, root = drawn_root(1, 6, 3, rejected)
            compiled.expand(compiled.prepare(drawn_weights(1, sets)), root, 4, 4)
    assert len(layout.lay_out.signatures) == len(loops.expand.signatures) == 1
    for name in ("rank", "informative_drafts", "cross_logits_of", "rejected_log_p", "fill_in"):
        assert len(getattr(compiled_primitives, name).signatures) == 1


def test_numpy_searches_where_numba_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    assert search.fastest_search.__wrapped__() is search.IN_NUMPY


def test_numpy_searches_where_numba_may_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert search.fastest_search.__wrapped__() is search.IN_NUMPY


def test_numpy_searches_and_a_warning_says_so_where_numba_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise RuntimeError("cannot cache function:\nno locator available")

    monkeypatch.setattr(compiled, "warm_up", fails)
    with pytest.warns(UserWarning, match="NumPy: cannot cache function: no locator available"):
        assert search.fastest_search.__wrapped__() is search.IN_NUMPY


def test_drafters_use_it() -> None:
    assert search.fastest_search().expand is compiled.expand
