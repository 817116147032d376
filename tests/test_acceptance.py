"""The acceptance model: features by hand, expansion by enumeration, fits against known laws."""

from __future__ import annotations

from itertools import combinations, product
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spiffy.calib.fit import _fit_sets, _fit_softmax, _out_of_step, can_fit
from spiffy.runtime.draft.acceptance import POSITION_FEATURES, TOKEN_FEATURES, AcceptanceWeights
from spiffy.runtime.draft.expand import expand
from spiffy.runtime.draft.features import States, position_features, token_features
from spiffy.runtime.draft.ngrams import Bigrams, Counts
from spiffy.runtime.draft.outlook import Outlook, Rejected
from spiffy.schemas import DecodingSettings

MASK, EOS, VOCAB = 9, 8, 10


def outlook(
    ids: list[int], tokens: dict[int, list[int]], log_p: dict[int, list[float]], fresh: list[int]
) -> Outlook:
    """`tokens` and `log_p` by masked position, best position first."""
    positions = list(tokens)
    return Outlook.at(
        np.array(ids),
        np.array(positions),
        np.array([tokens[k] for k in positions]),
        np.array([log_p[k] for k in positions]),
        np.array(fresh, dtype=np.int64),
        mask_token_id=MASK,
        eos_token_ids=np.array([EOS]),
        vocab=VOCAB,
    )


def random_weights(seed: int, sets: bool) -> AcceptanceWeights:
    draw = np.random.default_rng(seed).normal
    return AcceptanceWeights(
        position=draw(0, 0.3, len(POSITION_FEATURES)),
        commit=draw(0, 0.3, len(POSITION_FEATURES) + 1) if sets else None,
        spread=seed % 3 * 0.8,
        token=np.append([1.0], draw(0, 0.3, len(TOKEN_FEATURES) - 1)),
        bigrams=Bigrams([(1, 2, 5), (2, 3, 4), (3, 3, 1), (0, 1, 1)], VOCAB),
    )


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[Outlook, set[int]]:
    """A root, and the tokens that its distribution has not seen."""
    ids = draw(st.lists(st.sampled_from([0, 1, 2, 3, MASK]), min_size=4, max_size=8))
    masked = [k for k, token in enumerate(ids) if token == MASK][:4]
    if not masked:
        ids[2], masked = MASK, [2]
    ids = [0 if token == MASK and k not in masked else token for k, token in enumerate(ids)]
    order = draw(st.permutations(masked))
    tokens = {k: draw(st.permutations([1, 2, 3, EOS]))[:2] for k in order}
    top = {k: draw(st.floats(0.51, 0.9)) for k in order}
    log_p = {k: [float(np.log(p)), float(np.log(0.9 - p * 0.9 + 0.05))] for k, p in top.items()}
    fresh = [k for k, token in enumerate(ids) if token != MASK and draw(st.booleans())]
    return outlook(ids, tokens, log_p, fresh), {ids[k] for k in fresh}


def roots() -> st.SearchStrategy[Outlook]:
    return laid_out().map(lambda both: both[0])


def next_positions(weights: AcceptanceWeights, at: Outlook, choice: tuple[int, ...]):  # type: ignore[no-untyped-def]
    """Score of every position and log-probability of every token at one state, from scratch."""
    depth = np.array([sum(j >= 0 for j in choice)])
    states = States.of(at, weights, np.array([choice]), depth)
    features, masked = position_features(at, states)
    return np.tensordot(weights.position, features, 1)[0], masked[0], states.log_p[0]


def enumerated(weights: AcceptanceWeights, at: Outlook, room: int) -> dict[tuple[int, ...], float]:
    """Probability of reaching every state, one token per step, path by path."""
    count = len(at.positions)
    reached = {(-1,) * count: 1.0}
    total: dict[tuple[int, ...], float] = {}
    for _ in range(room):
        following: dict[tuple[int, ...], float] = {}
        for state, p in reached.items():
            score, masked, log_p = next_positions(weights, at, state)
            weight = np.exp(score - score[masked].max()) * masked
            for m, j in product(np.flatnonzero(masked), range(log_p.shape[1])):
                child = (*state[:m], j, *state[m + 1 :])
                step = weight[m] / weight.sum() * np.exp(log_p[m, j])
                following[child] = following.get(child, 0.0) + p * step
        total |= following
        reached = {state: p for state, p in following.items() if min(state) < 0}
    return total


@given(roots(), st.integers(0, 5), st.integers(1, 4))
def test_expansion_finds_every_state_with_its_probability(
    at: Outlook, seed: int, room: int
) -> None:
    weights = random_weights(seed, sets=False)
    expected = enumerated(weights, at, min(room, len(at.positions)))
    choice, p = expand(weights, at, budget=1000, room=room)
    found = dict(zip(map(tuple, choice.tolist()), p.tolist(), strict=True))
    assert len(found) == len(choice)  # no state twice
    for state, probability in expected.items():
        if probability > 1e-4:  # states that rare are not followed up
            assert found[state] == pytest.approx(probability, rel=1e-2, abs=2e-4)
    assert set(found) <= set(expected)
    assert (np.diff(p) <= 0).all()


@given(roots(), st.integers(0, 5), st.data())
def test_no_token_is_more_probable_than_all_that_are_looked_at(
    at: Outlook, seed: int, data: st.DataObject
) -> None:
    """By which `expand` skips states whose children cannot be probable enough."""
    choice = data.draw(st.tuples(*[st.integers(-1, 1) for _ in at.positions]))
    _, masked, log_p = next_positions(random_weights(seed, sets=False), at, choice)
    before = np.exp(at.log_p[0]).sum(1)
    law = masked & (before <= 1)  # drawn numbers may be none
    assert np.exp(log_p[law]).sum(1) == pytest.approx(before[law], rel=1e-9)
    assert np.exp(at.log_mass[0, law]) == pytest.approx(before[law], rel=1e-9)


@given(roots(), st.integers(0, 5), st.integers(1, 6), st.booleans())
def test_drafts_keep_to_budget_and_room(at: Outlook, seed: int, budget: int, sets: bool) -> None:
    weights = random_weights(seed, sets)
    for room in range(1, len(at.positions) + 1):
        choice, p = expand(weights, at, budget, room)
        filled = (choice >= 0).sum(1)
        assert len(choice) == len(p) <= budget
        assert ((filled >= 1) & (filled <= room)).all()
        assert len({tuple(row) for row in choice.tolist()}) == len(choice)
        assert (choice < at.tokens.shape[1]).all()


@given(roots(), st.integers(0, 5))
def test_one_threshold_step_is_a_law_over_sets(at: Outlook, seed: int) -> None:
    """Positions that share an offset, or the best one where none is committed: by hand."""
    weights = random_weights(seed, sets=True)
    assert weights.commit is not None
    count = len(at.positions)
    start = States.of(at, weights, np.full((1, count), -1), np.zeros(1, dtype=np.int64))
    features, _ = position_features(at, start)
    odds = np.tensordot(weights.commit[:-1], features, 1)[0] + weights.commit[-1]
    score = np.tensordot(weights.position, features, 1)[0]
    single = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
    choice, p = expand(weights, at, budget=10_000, room=count)
    found = dict(zip(map(tuple, choice.tolist()), p.tolist(), strict=True))
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            inside = np.isin(np.arange(count), chosen)
            law = 0.0
            for offset, share in ((-(3**0.5), 1 / 6), (0, 2 / 3), (3**0.5, 1 / 6)):
                shifted = np.clip(odds + offset * weights.spread, -14, 14)
                chance = 1 / (1 + np.exp(-shifted))
                law += share * np.prod(np.where(inside, chance, 1 - chance))
                law += share * np.prod(1 - chance) * single[inside].sum() * (size == 1)
            state = np.where(inside, start.log_p[0].argmax(-1), -1)
            law *= np.exp(start.log_p[0].max(-1)[inside].sum())
            if law > 1e-3 and size <= 4:
                # Later steps may lead to the same state: never less than its first step, but for
                # ways to it that are rarer than one in a million, which are not followed up.
                assert found[tuple(state.tolist())] >= law - 1e-5


def test_features_by_hand() -> None:
    # Prompt 0 1, then a block: position 2 committed just now, 3 and 4 masked, 5 known, 6 masked.
    at = outlook(
        [0, 1, 2, MASK, MASK, 1, MASK],
        tokens={4: [3, 1], 3: [2, 3], 6: [EOS, 1]},
        log_p={4: [-0.1, -3.0], 3: [-0.5, -1.0], 6: [-0.7, -2.0]},
        fresh=[2],
    )
    assert at.positions.tolist() == [3, 4, 6]
    assert np.expm1(at.constant[0, 0]) == pytest.approx([1, 0, 2])
    # Left, right, two to the left, two to the right.
    assert at.neighbours.tolist() == [[-1, 0, -1], [1, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert at.neighbour_tokens.tolist() == [[2, -1, 1], [-1, 1, -1], [1, 2, -1], [1, -1, -1]]
    assert at.fresh[:, 0].tolist() == [[True, False, False], [False, False, False]]
    assert at.constant[3].tolist() == [[0, 0, 1]]  # whether its likely token ends the answer
    plain = AcceptanceWeights.of({}, None, {"log_p": 1.0}, (), VOCAB)
    states = States.of(at, plain, np.array([[-1, -1, -1], [0, -1, -1]]), np.array([0, 1]))
    features, masked = position_features(at, states)
    value = {name: features[k] for k, name in enumerate(POSITION_FEATURES)}
    assert masked.tolist() == [[True, True, True], [False, True, True]]
    # Re-ranked by nothing but log p, the tokens keep their mass.
    assert np.exp(states.log_p[0, 0]).sum() == pytest.approx(np.exp([-0.5, -1.0]).sum())
    assert value["origin_logit"][0, 1] == pytest.approx(np.log(np.exp(-0.1) / (1 - np.exp(-0.1))))
    assert value["first_rank"][0].tolist() == [0, 1, 0]
    assert value["origin_log_rank"][0].tolist() == pytest.approx(np.log1p([1, 0, 2]))
    assert value["left_committed"][0].tolist() == [1, 0, 0]
    assert value["left_drafted"][1].tolist() == [0, 1, 0]
    assert value["right_masked"][0].tolist() == [1, 0, 0]
    assert value["distance"][0].tolist() == pytest.approx(np.log1p([0, 1, 3]))
    # One position from the new token at 2; from the draft at 3.
    assert value["nearness"][0].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 5])
    assert value["nearness"][1, 1:].tolist() == pytest.approx([1 / 2, 1 / 4])
    assert value["below_best"][0, 1] == 0
    assert value["eos"][0].tolist() == [0, 0, 1]


@given(laid_out(), st.integers(0, 5), st.data())
def test_every_position_feature_is_what_its_name_says(
    root: tuple[Outlook, set[int]], seed: int, data: st.DataObject
) -> None:
    """One position at a time, by its definition: rows are computed in groups, in a fixed order."""
    at, fresh_tokens = root
    weights = random_weights(seed, sets=False)
    count = len(at.positions)
    choice = data.draw(st.lists(st.integers(-1, 1), min_size=count, max_size=count))
    assume(min(choice) < 0)
    states = States.of(at, weights, np.array([choice]), np.array([seed]))
    features, _ = position_features(at, states)
    where = at.positions.tolist()
    drafted = {where[k] for k in range(count) if choice[k] >= 0}
    new = fresh_tokens | {int(at.tokens[k, choice[k]]) for k in range(count) if choice[k] >= 0}
    masked = set(where) - drafted

    def logit(log_p: float) -> float:
        return float(np.log(np.exp(log_p) / (1 - np.exp(log_p))))

    log_p = {where[k]: sorted(states.log_p[0, k]) for k in range(count)}
    logits = {k: logit(values[-1]) for k, values in log_p.items()}
    order = sorted(sorted(masked), key=lambda k: -logits[k])
    for k, position in enumerate(where):
        if position in drafted:
            continue
        left, right = position - 1, position + 1
        own, eos, depth = logits[position], bool(at.tokens[k, 0] == EOS), seed
        second, first = sorted(at.log_p[0, k])
        moved = own - logit(first)
        below = own - logits[order[0]]
        distance = np.log1p(max(position - min(masked), 0))
        # A committed token counts from the neighbour that it is beside, and beyond.
        near = [abs(position - other) for other in drafted]
        near += [
            position - p + 1
            for p, new_ in zip(where, at.fresh[0, 0], strict=True)
            if new_ and p <= position
        ]
        near += [
            p + 1 - position
            for p, new_ in zip(where, at.fresh[1, 0], strict=True)
            if new_ and p >= position
        ]
        nearness = 1 / (1 + min(near)) if near else 0
        # Most likely tokens by the distribution, which has not seen the fresh and drafted ones.
        likely = {p: int(tokens[0]) for p, tokens in zip(where, at.tokens, strict=True)}
        echo = likely[position] in new
        twins = sum(likely[p] == likely[position] for p in masked) - 1
        on_left, on_right = left in drafted, right in drafted
        left_logit = logits[left] if left in masked else 0.0
        right_logit = logits[right] if right in masked else 0.0
        expected = {
            "origin_log_rank": at.constant[0, 0, k],
            "origin_logit": logit(first),
            "origin_gap": first - second,
            "eos": eos,
            "left_committed": at.fresh[0, 0, k],
            "right_committed": at.fresh[1, 0, k],
            "left_drafted": on_left,
            "right_drafted": on_right,
            "nearness": nearness,
            "echo": echo,
            "depth": depth,
            "distance": distance,
            "left_masked": left in masked,
            "right_masked": right in masked,
            "both_masked": left in masked and right in masked,
            "second_left_drafted_left_masked": left in masked and left - 1 in drafted,
            "second_right_drafted_right_masked": right in masked and right + 1 in drafted,
            "left_above": max(left_logit - own, 0) if left in masked else 0,
            "right_above": max(right_logit - own, 0) if right in masked else 0,
            "logit": own,
            "below_best": below,
            "logit_above_2": max(own - 2, 0),
            "logit_above_4": max(own - 4, 0),
            "logit_above_7": max(own - 7, 0),
            "logit_below_0": min(own, 0),
            "log_p": log_p[position][-1],
            "gap": log_p[position][-1] - log_p[position][-2],
            "confidence": np.exp(log_p[position][-1]),
            "log_rank": np.log1p(order.index(position)),
            "first_rank": order[0] == position,
            "reranked_by": moved,
            "twins": min(twins, 2),
            "left_committed_x_logit": at.fresh[0, 0, k] * own,
            "right_committed_x_logit": at.fresh[1, 0, k] * own,
            "left_drafted_x_logit": on_left * own,
            "right_drafted_x_logit": on_right * own,
            "nearness_x_logit": nearness * own,
            "echo_x_logit": echo * own,
            "depth_x_logit": depth * own,
            "depth_x_eos": depth * eos,
            "eos_distance": eos * distance,
            "nearness_x_first_rank": nearness * (order[0] == position),
            "origin_log_rank_x_logit_above_7": at.constant[0, 0, k] * max(own - 7, 0),
            "both_masked_x_eos_distance": (
                eos * distance if left in masked and right in masked else 0
            ),
            "reranked_by_squared": moved**2,
        }
        found = dict(zip(POSITION_FEATURES, features[:, 0, k], strict=True))
        numbers = {name: float(value) for name, value in expected.items()}
        assert found == pytest.approx(numbers, abs=1e-6)


@st.composite
def asked(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], Rejected, list[int]]:
    """A root, what one rejected draft says, and a state that holds what the draft does."""
    ids = np.array(draw(st.lists(st.sampled_from([0, 1, 2, 3, MASK]), min_size=4, max_size=9)))
    ids[:2] = ids[-1] = MASK
    masked = np.flatnonzero(ids == MASK)
    known = np.flatnonzero(ids != MASK)
    fresh = known[[draw(st.booleans()) for _ in known]]
    numbers = np.random.default_rng(draw(st.integers(0, 99)))
    tokens = np.stack([numbers.permutation([1, 2, 3, EOS])[:2] for _ in masked])
    # The draft is surer than the distribution that the root is known from.
    log_p = np.log(numbers.uniform([[[0.02]], [[0.25]]], [[[0.2]], [[0.49]]], (2, len(masked), 2)))
    choice = np.array([draw(st.integers(-1, 1)) for _ in masked])
    choice[0], choice[-1] = abs(choice[0]), -1  # it holds something, and not all
    state = np.array([c if c >= 0 else draw(st.integers(-1, 1)) for c in choice])
    state[-1] = -1
    unseen = np.array([draw(st.booleans()) for _ in fresh], dtype=np.bool_)
    root = {"ids": ids, "positions": masked, "tokens": tokens, "log_p": log_p[0], "fresh": fresh}
    return root, Rejected(choice[None], log_p[1:], unseen[None]), state.tolist()


@given(asked(), st.integers(0, 5))
def test_a_rejected_draft_is_asked_as_if_the_decode_had_come_to_it(
    drawn: tuple[dict[str, np.ndarray], Rejected, list[int]], seed: int
) -> None:
    """The same features as at a root that holds what it holds."""
    root, rejected, state = drawn
    facts = {"mask_token_id": MASK, "eos_token_ids": np.array([EOS]), "vocab": VOCAB}
    weights = random_weights(seed, sets=False)
    for name in ("left_in_text", "right_in_text", "left_two_in_text"):
        weights.token[TOKEN_FEATURES.index(name)] = 0  # what is drafted is no text yet
    choice, unseen = rejected.choice[0], rejected.unseen[0]
    at = Outlook.at(**root, rejected=rejected, **facts)
    filling = np.full((1, len(choice)), -1)
    states = States.of(at, weights, filling, np.zeros(1, dtype=np.int64))
    for k in np.random.default_rng(seed).permutation(len(choice)):
        if state[k] >= 0:  # one step after the other
            filling = filling.copy()
            filling[0, k] = state[k]
            states = states.filled(at, weights, np.zeros(1, dtype=np.int64), filling)
    assert states.source.tolist() == [1]

    left = choice < 0
    ids = root["ids"].copy()
    (held,) = (~left).nonzero()
    ids[root["positions"][held]] = root["tokens"][held, choice[held]]
    log_p = rejected.log_p[0, left]
    by_p = np.argsort(-log_p, 1, kind="stable")  # as a root's tokens are ranked
    order = np.argsort(-log_p.max(1), kind="stable")
    there = Outlook.at(
        ids,
        root["positions"][left][order],
        np.take_along_axis(root["tokens"][left], by_p, 1)[order],
        np.take_along_axis(log_p, by_p, 1)[order],
        root["fresh"][unseen],
        **facts,
    )
    drafted = np.array(state)[left]
    ranks = np.where(drafted < 0, -1, (by_p == drafted[:, None]).argmax(1))
    expected = States.of(there, weights, ranks[None], np.array([(drafted >= 0).sum()]))
    features, masked = position_features(at, states)
    numbers, still = position_features(there, expected)
    assert masked[:, left].tolist() == still.tolist()
    assert features[:, masked] == pytest.approx(numbers[:, still])
    found = np.take_along_axis(states.log_p[0, left], by_p, 1)
    assert found[still[0]] == pytest.approx(expected.log_p[still])


@given(asked(), st.integers(0, 5), st.integers(1, 12), st.booleans())
def test_no_level_is_left_out_that_drafts_come_from(
    drawn: tuple[dict[str, np.ndarray], Rejected, list[int]], seed: int, budget: int, sets: bool
) -> None:
    root, rejected, _ = drawn
    facts = {"mask_token_id": MASK, "eos_token_ids": np.array([EOS]), "vocab": VOCAB}
    at, weights = Outlook.at(**root, rejected=rejected, **facts), random_weights(seed, sets)
    room = len(at.positions)
    choice, p = expand(weights, at, budget, room)
    with patch("spiffy.runtime.draft.expand._reach", lambda outlook, children: np.inf):
        everywhere, probabilities = expand(weights, at, budget, room)
    assert choice.tolist() == everywhere.tolist()
    assert p.tolist() == probabilities.tolist()


@given(roots(), st.integers(0, 5), st.integers(1, 12))
def test_no_set_is_left_out_that_drafts_come_from(at: Outlook, seed: int, budget: int) -> None:
    weights, room = random_weights(seed, sets=True), len(at.positions)
    choice, p = expand(weights, at, budget, room)
    with patch("spiffy.runtime.draft.expand._ROUNDING", np.inf):
        every, probabilities = expand(weights, at, budget, room)
    assert choice.tolist() == every.tolist()
    assert p.tolist() == probabilities.tolist()


def test_token_evidence_by_hand() -> None:
    at = outlook(
        [1, 3, 1, 3, MASK, 2, 1, MASK],
        tokens={4: [2, 3], 7: [3, 2]},
        log_p={4: [-0.3, -1.5], 7: [-0.3, -1.5]},
        fresh=[3, 6],
    )
    bigrams = Bigrams([(1, 3, 6), (3, 2, 2)], VOCAB)
    plain = AcceptanceWeights.of({}, None, {"log_p": 1.0}, (), VOCAB)
    start = States.of(at, plain, np.full((1, 2), -1), np.array([0]))
    rows = token_features(at, bigrams, start, np.array([0, 0]), np.array([0, 1]))
    value = dict(zip(TOKEN_FEATURES, rows, strict=True))
    # Position 7 follows a new 1, which the text so far has continued with 3 twice.
    assert value["left_in_text"][1].tolist() == pytest.approx(np.log1p([2, 0]))
    assert value["left_two_in_text"][1].tolist() == [0, 0]  # "2 1" has no continuation yet
    assert value["left_bigram"][1, 0] == pytest.approx(np.log((6 + 2 * (6 + 0.1) / 9) / (6 + 2)))
    assert value["left_same"][0].tolist() == [0, 1]
    assert value["right_bigram"].tolist() == [[0, 0], [0, 0]]  # nothing new on the right
    assert value["first"].tolist() == [[1, 0], [1, 0]]


def test_pairs_of_another_vocabulary_count_nothing() -> None:
    ours = [(1, 3, 6), (3, 2, 2)]
    strange = [(1, VOCAB + 2, 9), (2**40, 3, 9), (VOCAB, VOCAB, 9)]
    tokens, beside = np.array([[2, 3]]), np.array([[1], [2]])
    expected = Bigrams(ours, VOCAB).log_p(tokens, beside)
    assert np.array_equal(Bigrams([*strange, *ours], VOCAB).log_p(tokens, beside), expected)


def test_counts_look_up_whole_arrays() -> None:
    counts = Counts(np.array([7, 3, 7, 7]))
    assert counts[np.array([[3, 7], [5, 100]])].tolist() == [[1, 3], [0, 0]]
    counts = Counts(np.array([7, 3, 7]), np.array([2.0, 0.5, 1.5]))
    assert counts[np.array([[3, 7], [5, 100]])].tolist() == [[0.5, 3.5], [0, 0]]
    assert Counts(np.array([], dtype=np.int64))[np.array([1])].tolist() == [0]


def test_a_softmax_regression_finds_the_law_it_was_drawn_from() -> None:
    random = np.random.default_rng(0)
    true = np.array([1.5, -0.7, 0.0])
    x = random.normal(size=(4000, 5, 3))
    noise = random.gumbel(size=(4000, 5))
    targets = np.arange(4000) * 5 + (x @ true + noise).argmax(1)
    found = _fit_softmax(x.reshape(-1, 3), np.arange(4000) * 5, targets, np.ones(4000))
    assert found == pytest.approx(true, abs=0.1)


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_the_law_of_sets_is_found_from_what_it_drew(spread: float) -> None:
    random = np.random.default_rng(1)
    states, each = 8_000, 5
    x = random.normal(loc=(3.0, 0.0), size=(states, each, 2))
    offsets = random.choice([-(3**0.5), 0.0, 3**0.5], size=(states, 1), p=[1 / 6, 2 / 3, 1 / 6])
    odds = x @ [1.0, -0.5] - 4 + spread * offsets
    y = odds + random.logistic(size=odds.shape) > 0
    score = 2 * x[:, :, 1]  # what is forced where none is drawn goes by something else
    forced = (score + random.gumbel(size=score.shape)).argmax(1)
    none = ~y.any(1)
    assert none.mean() > 0.1
    y[none, forced[none]] = True
    sizes = np.full(states, each)
    found = _fit_sets(x.reshape(-1, 2), y.ravel(), sizes, np.ones(states), score.ravel())
    assert found[:3] == pytest.approx([1.0, -0.5, -4.0], abs=0.15)
    assert found[3] == pytest.approx(spread, abs=0.15 if spread else 0.3)


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({}, True),
        ({"policy": "threshold"}, True),
        ({"policy": "sequential"}, False),
        ({"tokens_per_step": 2}, False),
        ({"steps_per_block": 8}, False),
    ],
)
def test_only_policies_with_a_model_get_one(options: dict[str, object], fits: bool) -> None:
    assert can_fit(DecodingSettings.parse(**options)) is fits


@pytest.mark.parametrize("period", [1, 4, 31, 32])
@pytest.mark.parametrize("least", [1, 2, 3, 31, 32])
def test_what_is_fitted_to_comes_from_every_step_of_a_block(least: int, period: int) -> None:
    stride = _out_of_step(least, period)
    assert least <= stride <= least + 2
    assert {k * stride % period for k in range(period)} == set(range(period))
