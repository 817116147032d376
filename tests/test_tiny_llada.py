"""The trained model that ships with the package: lossless, token for token, as users decode it.

In float32, the dtype that users get on a CPU: other matrix shapes round differently, and the tests
show that this does not reach the tokens.
"""

from __future__ import annotations

from functools import cache
from itertools import islice

import pytest

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.synthetic import final_answer, problems
from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import run
from spiffy.runtime.generate import collect, graph_drafter, make_task
from spiffy.schemas import DraftGraph

PROMPTS = 20
GEN_LENGTH = 64
BUDGETS = (1, 8, 32)


@cache
def model() -> DiffusionLM:
    return load_model("tiny-llada", device="cpu", dtype="float32")


@cache
def graph() -> DraftGraph:
    lm = model()
    prompts = load_prompts("synthetic", 10)
    settings = decoding_settings(lm, gen_length=GEN_LENGTH)
    traces = record(lm, prepare(lm, prompts, settings))
    return build_graph(lm, prompts, settings, traces, budget=32)


@cache
def answers(budget: int, **options: object) -> list[tuple[list[int], int]]:
    """Tokens and NFE of every test prompt; budget 0 decodes plainly."""
    lm = model()
    settings = decoding_settings(lm, graph(), **options)
    drafter = graph_drafter(lm, graph(), settings, budget) if budget else None
    texts = load_prompts("synthetic", PROMPTS, split="test").texts
    tasks = [make_task(lm, text, settings, drafter, 1, k) for k, text in enumerate(texts)]
    for _ in run(lm, tasks):
        pass
    outputs = [collect(task) for task in tasks]
    return [(output.token_ids, output.stats.nfe) for output in outputs]


def assert_lossless(budget: int, **options: object) -> None:
    plain, ours = answers(0, **options), answers(budget, **options)
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in plain]
    assert sum(nfe for _, nfe in ours) < sum(nfe for _, nfe in plain)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", ["none", "dual"])
@pytest.mark.parametrize("policy", ["static", "threshold"])
def test_greedy_decoding_is_lossless(policy: str, kind: str, budget: int) -> None:
    assert_lossless(budget, policy=policy, cache=kind)


@pytest.mark.parametrize("budget", [1, 8])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("policy", ["static", "threshold"])
def test_sampling_is_lossless(policy: str, temperature: float, budget: int) -> None:
    assert_lossless(budget, policy=policy, cache="dual", temperature=temperature)


def test_sampling_is_lossless_without_a_cache() -> None:
    assert_lossless(8, cache="none", temperature=1.0)


def test_temperature_and_sequence_change_the_answer() -> None:
    assert answers(0, cache="dual", temperature=1.0) != answers(0, cache="dual", policy="static")


def test_it_solves_problems_it_has_not_seen() -> None:
    unseen = list(islice(problems("test", 0), PROMPTS))
    texts = load_prompts("synthetic", PROMPTS, split="test").texts
    assert texts == tuple(problem.question for problem in unseen)
    decoded = [model().decode_text(tokens) for tokens, _ in answers(0, cache="none")]
    right = sum(
        final_answer(text) == final_answer(problem.answer)
        for text, problem in zip(decoded, unseen, strict=True)
    )
    # training/README.md measures at least 90% on hundreds of problems; 20 leave room for chance.
    assert right >= 0.8 * PROMPTS
