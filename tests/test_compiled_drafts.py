"""The compiled search (extra `fast`) drafts what NumPy's does, and steps aside where it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiffy.runtime.draft import by_model
from spiffy.runtime.draft.acceptance import POSITION_FEATURES, TOKEN_FEATURES, AcceptanceWeights
from spiffy.runtime.draft.expand import expand
from spiffy.runtime.draft.ngrams import Bigrams
from spiffy.runtime.draft.outlook import Outlook, Rejected

pytest.importorskip("numba")

from spiffy.runtime.draft import compiled
from spiffy.runtime.draft.compiled import loops

MASK, EOS, VOCAB = 29, 28, 30


def drawn_root(
    seed: int, length: int, ranks: int, rejected: int, *, everywhere: bool = False
) -> Outlook:
    """A root with some masked positions, and what some rejected drafts say."""
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
    return Outlook.at(
        ids,
        order,
        tokens,
        log_p[0],
        fresh,
        mask_token_id=MASK,
        eos_token_ids=np.array([EOS]),
        vocab=VOCAB,
        rejected=said,
    )


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


def assert_same_drafts(weights: AcceptanceWeights, root: Outlook, budget: int, room: int) -> None:
    """The same probabilities, of the same states but where equals compete for the last place."""
    choice, p = expand(weights, root, budget, room)
    ours, our_p = compiled.expand(weights, root, budget, room)
    assert (ours.dtype, our_p.dtype) == (choice.dtype, p.dtype)
    assert our_p == pytest.approx(p, rel=1e-6)
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
    root = drawn_root(seed, length, ranks, rejected)
    weights = drawn_weights(seed % 1009, sets)
    assert_same_drafts(weights, root, budget, min(room, len(root.positions)))


@pytest.mark.parametrize("sets", [False, True])
def test_blocks_of_a_hundred_positions(sets: bool) -> None:
    root = drawn_root(3, 128, 4, 2, everywhere=True)
    assert_same_drafts(drawn_weights(4, sets), root, budget=32, room=128)


def test_nothing_is_compiled_twice() -> None:
    """What differs from root to root is no type: another one would compile for seconds."""
    compiled.warm_up()
    for sets in (False, True):
        for rejected in (0, 2):
            root = drawn_root(1, 6, 3, rejected)
            compiled.expand(drawn_weights(1, sets), root, 4, 4)
    assert len(loops.expand.signatures) == 1


FALLS_BACK = """
import sys, warnings
{setup}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from spiffy.runtime.draft import fastest_search
    search = fastest_search()
from spiffy.runtime.draft.expand import expand
print(search is expand, *(w.message for w in caught if "searched" in str(w.message)), sep="|")
"""


@pytest.mark.parametrize(
    ("setup", "warned"),
    [
        ("sys.modules['numba'] = None", None),  # as if it were not installed
        ("import os; os.environ['NUMBA_DISABLE_JIT'] = '1'", None),
        ("import numba; del numba.njit", "cannot import name 'njit'"),
    ],
)
def test_numpy_searches_where_numba_cannot(setup: str, warned: str | None, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FALLS_BACK.format(setup=setup)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    fell_back, *said = done.stdout.strip().split("|")
    assert fell_back == "True"
    assert [warned in line for line in said] == ([True] if warned else [])


def test_drafters_use_it() -> None:
    assert by_model.fastest_search() is compiled.expand
