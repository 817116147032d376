"""Unmasking policies on hand-written numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import a_graph_of, parity_model
from hypothesis import given
from hypothesis import strategies as st

from spiffy.runtime import decoding_settings
from spiffy.runtime.draft import rank_candidates
from spiffy.runtime.step import reading
from spiffy.runtime.step.noise import Noise
from spiffy.runtime.step.policy import Distribution, choose, select, step_quota
from spiffy.runtime.step.reading import Reading, Rules
from spiffy.schemas import DecodingSettings, SpiffyError

STATIC = DecodingSettings.parse()


def quotas(settings: DecodingSettings, masked: int) -> list[int]:
    """Tokens that each step commits until nothing is masked."""
    committed: list[int] = []
    while masked:
        committed.append(step_quota(settings, len(committed), masked))
        masked -= committed[-1]
    return committed


def of_probabilities(rows: list[list[float]]) -> Distribution:
    """Distribution from probabilities."""
    log_p = torch.tensor(rows, dtype=torch.float64).log()
    return Distribution(log_p, log_p)


def read(distribution: Distribution, mask_token_id: int) -> Reading:
    """The reading at positions 0, 1, ..."""
    positions = torch.arange(len(distribution.log_p))
    return Reading.of(distribution.logits, positions, Rules(STATIC, mask_token_id, ranks=0))


# ---------------------------------------------------------------- how many tokens a step commits


@pytest.mark.parametrize(
    ("block", "steps", "expected"),
    [
        (8, 3, [3, 3, 2]),
        (8, 4, [2, 2, 2, 2]),
        (8, 5, [2, 2, 2, 1, 1]),
        (4, 1, [4]),
        (7, 7, [1] * 7),
    ],
)
def test_even_schedule_gives_the_remainder_to_the_first_steps(
    block: int, steps: int, expected: list[int]
) -> None:
    settings = DecodingSettings.parse(block_length=block, gen_length=block, steps_per_block=steps)
    assert quotas(settings, block) == expected


def test_a_block_with_fewer_masks_left_keeps_the_full_blocks_quota() -> None:
    """SDAR's first block may open with prompt tokens: 5 masks of 8 in 3 steps."""
    settings = DecodingSettings.parse(block_length=8, gen_length=8, steps_per_block=3)
    assert quotas(settings, 5) == [3, 2]
    assert quotas(settings, 1) == [1]


def test_the_last_step_takes_what_is_left() -> None:
    settings = DecodingSettings.parse(block_length=8, gen_length=8, steps_per_block=3)
    assert step_quota(settings, block_step=2, masked=7) == 7
    assert step_quota(settings, block_step=5, masked=7) == 7


def test_more_steps_than_positions_commit_one_token_each() -> None:
    settings = DecodingSettings.parse(block_length=4, gen_length=4, steps_per_block=9)
    assert quotas(settings, 4) == [1, 1, 1, 1]


def test_tokens_per_step_is_capped_by_the_masks_left() -> None:
    settings = DecodingSettings.parse(tokens_per_step=3)
    assert quotas(settings, 8) == [3, 3, 2]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (32, [0, *[1] * 30, 2]),
        (16, [1, *[2] * 14, 3]),
        (5, [6, 6, 6, 6, 8]),
        (40, [*[0] * 9, *[1] * 30, 2]),
    ],
)
def test_timestep_schedule_is_dreams(steps: int, expected: list[int]) -> None:
    """The official loop's counts (tests/parity/dream-a/golden.json)."""
    settings = DecodingSettings.parse(
        block_length=32, gen_length=32, schedule="timestep", steps_per_block=steps
    )
    assert quotas(settings, 32) == expected


def test_timestep_schedule_needs_a_number_of_steps() -> None:
    with pytest.raises(SpiffyError, match="steps_per_block"):
        DecodingSettings.parse(schedule="timestep")


@given(
    block=st.integers(1, 40),
    steps=st.integers(1, 60),
    schedule=st.sampled_from(["even", "timestep"]),
    data=st.data(),
)
def test_every_schedule_commits_every_mask_within_its_steps(
    block: int, steps: int, schedule: str, data: st.DataObject
) -> None:
    steps = min(steps, 16 * block)  # more are refused
    settings = DecodingSettings.parse(
        block_length=block, gen_length=block, schedule=schedule, steps_per_block=steps
    )
    masked = data.draw(st.integers(1, block))
    committed = quotas(settings, masked)
    assert sum(committed) == masked
    assert min(committed) >= 0
    assert len(committed) <= steps


# ---------------------------------------------------------------- which positions


def chosen(scores: list[float], quota: int, strict: bool = False, **options: object) -> list[int]:
    settings = DecodingSettings.parse(**options)
    picked: list[int] = select(np.array(scores), quota, settings, strict).nonzero()[0].tolist()
    return picked


def test_select_takes_the_best_scores() -> None:
    assert chosen([0.1, 0.9, 0.5, 0.7], 2) == [1, 3]


def test_equal_scores_go_to_the_lower_position() -> None:
    assert chosen([0.5, 0.9, 0.5, 0.5], 2) == [0, 1]
    assert chosen([0.25] * 50, 7) == list(range(7))


def test_a_quota_of_zero_chooses_nothing() -> None:
    assert chosen([0.5, 0.9], 0) == []


def test_static_ignores_the_threshold() -> None:
    assert chosen([0.95, 0.96, 0.97], 1, threshold=0.9) == [2]


@pytest.mark.parametrize(("strict", "expected"), [(False, [0, 1]), (True, [0])])
def test_a_score_at_the_threshold_counts_unless_strict(strict: bool, expected: list[int]) -> None:
    options = {"policy": "threshold", "threshold": 0.5}
    assert chosen([0.75, 0.5, 0.25], 1, strict, **options) == expected


def test_threshold_chooses_at_least_the_quota() -> None:
    assert chosen([0.1, 0.3, 0.2], 1, policy="threshold", threshold=0.9) == [1]
    assert chosen([0.1, 0.95, 0.2, 0.3], 2, policy="threshold", threshold=0.9) == [1, 3]


def test_threshold_adds_to_the_quota_not_on_top_of_it() -> None:
    assert chosen([0.95, 0.1, 0.99, 0.2], 2, policy="threshold", threshold=0.9) == [0, 2]


# ---------------------------------------------------------------- which token, and how sure


def test_the_score_is_the_probability_of_the_chosen_token() -> None:
    tokens, score = choose(of_probabilities([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]), STATIC, 2)
    assert tokens.tolist() == [1, 0]
    assert score.tolist() == pytest.approx([0.5, 0.6])


def test_equal_probabilities_go_to_the_lower_token_id() -> None:
    tokens, _ = choose(of_probabilities([[0.1, 0.4, 0.4, 0.1]]), STATIC, mask_token_id=3)
    assert tokens.tolist() == [1]


def test_the_mask_token_is_never_chosen() -> None:
    distribution = of_probabilities([[0.1, 0.2, 0.7]])
    tokens, score = choose(distribution, STATIC, mask_token_id=2)
    assert tokens.tolist() == [1]
    assert score.tolist() == pytest.approx([0.2])  # the untouched softmax: not renormalised
    many = of_probabilities([[0.1, 0.2, 0.7]] * 200)
    drawn, _ = choose(many, DecodingSettings.parse(temperature=1.0), 2, torch.arange(200))
    assert set(drawn.tolist()) == {0, 1}
    for kept in (distribution, many):
        assert kept.log_p[-1].exp().tolist() == pytest.approx([0.1, 0.2, 0.7])  # not written to


def test_the_score_of_a_drawn_token_is_untempered() -> None:
    """The plain softmax probability of that token, however it was drawn."""
    distribution = of_probabilities([[0.6, 0.3, 0.1]] * 200)
    for temperature in (0.5, 2.0):
        settings = DecodingSettings.parse(temperature=temperature)
        tokens, score = choose(distribution, settings, 2, torch.arange(200))
        assert 20 < tokens.sum() < 100
        assert score.tolist() == pytest.approx([(0.6, 0.3)[token] for token in tokens.tolist()])


def test_margin_and_entropy_scores() -> None:
    distribution = of_probabilities([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]])
    _, margin = choose(distribution, DecodingSettings.parse(score="margin"), 2)
    assert margin.tolist() == pytest.approx([0.2, 0.85])
    _, entropy = choose(distribution, DecodingSettings.parse(score="entropy"), 2)
    expected = [sum(p * math.log(p) for p in row) for row in ([0.2, 0.5, 0.3], [0.9, 0.05, 0.05])]
    assert entropy.tolist() == pytest.approx(expected, abs=1e-8)


def test_sequential_prefers_the_leftmost_position() -> None:
    settings = DecodingSettings.parse(policy="sequential")
    distribution = of_probabilities([[0.4, 0.6], [0.01, 0.99], [0.3, 0.7]])
    tokens, score = choose(distribution, settings, mask_token_id=0)
    assert tokens.tolist() == [1, 1, 1]
    assert select(score.numpy(), 2, settings, strict=True).tolist() == [True, True, False]


def test_confident_positions_are_ranked_in_float64() -> None:
    """In float32 both softmaxes are exactly 1.0 and the lower position would win."""
    logits = torch.tensor([[29.0, 0.0], [31.0, 0.0]])
    assert logits.softmax(-1)[:, 0].tolist() == [1.0, 1.0]
    tokens, score = choose(Distribution.of(logits), STATIC, mask_token_id=1)
    assert tokens.tolist() == [0, 0]
    assert select(score.numpy(), 1, STATIC, strict=False).tolist() == [False, True]


# ---------------------------------------------------------------- draft coordinates


def test_candidates_rank_positions_by_score_and_tokens_by_probability() -> None:
    rows = [[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.7, 0.1], [0.25, 0.5, 0.2, 0.05]]
    ranked = rank_candidates(read(of_probabilities(rows), 3), STATIC, 3, token_ranks=3)
    assert ranked.positions.tolist() == [1, 0, 2]  # 0.7, then a tie at 0.5: lower position first
    assert ranked.tokens.tolist() == [[2, 0, 1], [0, 1, 2], [1, 0, 2]]  # ties: lower id first


def test_candidates_never_offer_the_mask_token() -> None:
    distribution = of_probabilities([[0.1, 0.8, 0.1]])
    ranked = rank_candidates(read(distribution, 1), STATIC, 1, token_ranks=10)
    assert ranked.tokens.tolist() == [[0, 2]]
    assert distribution.log_p[0, 1].exp() == pytest.approx(0.8)  # not written to


# ---------------------------------------------------------------- the likeliest tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_at_a_time_are_read_to_the_same_bits(
    temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(7, 640, generator=generator)).to(dtype)
    positions = torch.arange(10, 17)
    settings = DecodingSettings.parse(policy="static", temperature=temperature)
    keys = Noise(5, 0).keys(torch.tensor(0), 0, positions) if temperature else None
    rules = Rules(settings, mask_token_id=3, ranks=4)
    whole = Reading.of(logits, positions, rules, keys)
    monkeypatch.setattr(reading, "_ON_HOST", 3 * 640)
    parts = Reading.of(logits, positions, rules, keys)
    assert torch.equal(parts.tokens, whole.tokens)
    assert torch.equal(parts.score, whole.score)
    (log_p, ids), (expected, same) = parts.top(5), whole.top(5)
    torch.testing.assert_close(log_p, expected)
    assert torch.equal(ids, same)
    assert parts.is_number
    logits[5, 9] = torch.nan
    assert not Reading.of(logits, positions, rules, keys).is_number


@pytest.mark.parametrize("vocab", [5, 640, 2560, 2561, 4096, 5003])
@pytest.mark.parametrize("ties", [False, True])
def test_the_top_of_a_distribution_is_that_of_a_sort(vocab: int, ties: bool) -> None:
    """Groups, and what is left over behind the last, hide no token."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(24, vocab, generator=generator)
    logits[:8] = torch.arange(vocab) * torch.linspace(-1, 1, 8)[:, None]  # best ones side by side
    if ties:
        logits = logits.round()
    distribution = Distribution.of(logits)
    log_p, ids = distribution.top(5)
    assert torch.equal(log_p, distribution.log_p.sort(descending=True).values[:, :5])
    assert torch.equal(distribution.log_p.gather(1, ids), log_p)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_tokens_per_step_replace_the_schedule_of_a_graph() -> None:
    model = parity_model("dream-a")
    graph = a_graph_of(model, schedule="timestep", steps_per_block=4)
    assert decoding_settings(model, graph).schedule == "timestep"
    ours = decoding_settings(model, graph, tokens_per_step=2)
    assert (ours.schedule, ours.steps_per_block, ours.tokens_per_step) == ("even", None, 2)


def test_the_default_dtype_of_the_process_decides_no_quota() -> None:
    """Whoever loads a model in another thread changes it for that long."""
    setting = DecodingSettings.parse(
        gen_length=32, block_length=32, schedule="timestep", steps_per_block=32
    )
    expected = [step_quota(setting, step, masked) for step in range(32) for masked in range(1, 33)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [step_quota(setting, step, masked) for step in range(32) for masked in range(1, 33)]
    finally:
        torch.set_default_dtype(before)
    assert found == expected
    assert step_quota(setting, 0, 32) == 0  # a share of 0.0312, not of 1 / 32
