"""The entropy-bounded policy and dllm's rounded schedule on hand-written numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spiffy.runtime.step.policy import Distribution, choose, select, step_quota
from spiffy.schemas import DecodingSettings, SpiffyError


def bounded(bound: float, **options: Any) -> DecodingSettings:
    return DecodingSettings.parse(policy="entropy-bounded", entropy_bound=bound, **options)


# Logits of 4 tokens. Entropies: log 2, 0, log 4, log 2, and 0 of a certain position.
HALF, SURE, FLAT = [5.0, 5.0, -math.inf, -math.inf], [9.0, *[-math.inf] * 3], [0.0] * 4
LOGITS = [HALF, SURE, FLAT, HALF, SURE]


def committed(settings: DecodingSettings, rows: list[list[float]] = LOGITS) -> list[int]:
    """Positions that one step with a quota of 1 commits."""
    logits = torch.tensor(rows, dtype=torch.float64)
    distribution = Distribution.of(logits)
    _, score = choose(distribution, settings, mask_token_id=3)
    chosen: list[int] = select(score.numpy(), 1, settings, strict=False).nonzero()[0].tolist()
    return chosen


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (0.0, [0, 1, 4]),  # the certain ones, and one whose own entropy is the largest
        (0.69, [0, 1, 4]),
        (0.7, [0, 1, 3, 4]),  # log 2 before the second half
        (1.38, [0, 1, 3, 4]),
        (1.39, [0, 1, 2, 3, 4]),  # 2 log 2 before the flat one
        (100.0, [0, 1, 2, 3, 4]),
    ],
)
def test_the_most_certain_are_committed_within_the_bound(bound: float, expected: list[int]) -> None:
    assert committed(bounded(bound)) == expected


def test_one_position_is_always_committed() -> None:
    assert committed(bounded(0.0), [FLAT, FLAT]) == [0]


def test_ties_go_to_the_lower_position() -> None:
    assert committed(bounded(0.7), [HALF, HALF, HALF]) == [0, 1]


def test_a_step_commits_its_tokens_whatever_the_bound() -> None:
    settings = bounded(0.0, tokens_per_step=2)
    score = np.array([-2.0, -1.0, -3.0])
    assert step_quota(settings, 0, 3) == 2
    assert select(score, 2, settings, strict=False).tolist() == [True, True, False]


def test_the_score_is_the_negative_entropy_whatever_score_asks() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    distribution = Distribution.of(logits)
    _, score = choose(distribution, bounded(1.0, score="margin"), mask_token_id=3)
    expected = [-math.log(2), 0.0, -math.log(4), -math.log(2), 0.0]
    assert score.tolist() == pytest.approx(expected, abs=1e-12)


@given(
    entropies=st.lists(st.floats(0, 5), min_size=1, max_size=12),
    bound=st.floats(0, 10),
)
def test_it_commits_as_many_as_the_definition_says(entropies: list[float], bound: float) -> None:
    """Sum of the chosen less the largest of them, counted anew for every number of positions."""
    score = -np.array(entropies)
    chosen = select(score, 1, bounded(bound), strict=False)
    ordered = sorted(entropies)
    most = max(k + 1 for k in range(len(ordered)) if k == 0 or math.fsum(ordered[:k]) <= bound)
    if any(abs(math.fsum(ordered[:k]) - bound) < 1e-9 for k in range(1, len(ordered))):
        return  # a matter of rounding
    assert int(chosen.sum()) == most
    left = [e for e, taken in zip(entropies, chosen.tolist(), strict=True) if not taken]
    assert not left or min(left) >= ordered[most - 1]


@pytest.mark.parametrize("bound", [-0.1, math.inf, math.nan])
def test_a_bound_that_is_none_is_refused(bound: float) -> None:
    with pytest.raises(SpiffyError, match="entropy_bound"):
        bounded(bound)


def test_settings_state_the_bound_only_where_it_is_read() -> None:
    """So that what was calibrated before there was one keeps its digest."""
    assert "entropy_bound" not in DecodingSettings.parse().model_dump()
    assert bounded(0.3).model_dump()["entropy_bound"] == 0.3
    assert DecodingSettings.parse(**bounded(0.3).model_dump()) == bounded(0.3)


# ---------------------------------------------------------------- masks left over steps left


@pytest.mark.parametrize(
    ("masks", "steps", "expected"),
    [
        (8, 3, [3, 2, 3]),
        (8, 4, [2, 2, 2, 2]),
        (8, 13, [1] * 8),  # steps that get nothing are left out
        (32, 12, [3, 3, 3, 3, 3, 2, 3, 2, 3, 2, 3, 2]),  # recorded: 2.5 goes either way in float32
        (5, 1, [5]),
    ],
)
def test_the_rounded_schedule_is_dllms(masks: int, steps: int, expected: list[int]) -> None:
    settings = DecodingSettings.parse(
        block_length=32, gen_length=32, steps_per_block=steps, schedule="round"
    )
    left, shares = masks, []
    while left:
        shares.append(step_quota(settings, len(shares), left, masks))
        left -= shares[-1]
    assert shares == expected


def test_an_even_split_may_be_of_the_masks_there_are() -> None:
    settings = DecodingSettings.parse(block_length=8, gen_length=8, steps_per_block=4)
    assert [step_quota(settings, step, 5 - step, shared=5) for step in range(3)] == [2, 1, 1]
    assert step_quota(settings, 0, 5) == 2


def test_rounding_needs_a_number_of_steps() -> None:
    with pytest.raises(SpiffyError, match="schedule 'round' needs steps_per_block"):
        DecodingSettings.parse(schedule="round")
