"""The trained models that ship with the package: lossless, token for token, as users decode them.

In float32, the dtype that users get on a CPU: matrices of other shapes round differently, and the
tests show that this does not reach the tokens.
"""

from __future__ import annotations

from functools import cache
from itertools import islice

import pytest

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.calib.synthetic import final_answer, problems
from spiffy.runtime import BlockEdges, DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.draft import AcceptanceDrafter, BestOfDrafter, graph_drafter, way_of
from spiffy.runtime.forward.cache import NO_EDGES
from spiffy.runtime.generate import collect
from spiffy.schemas import DraftGraph

GEN_LENGTH = 64
EXACT_CACHES = {
    "tiny-llada": ("none", "dual"),
    "tiny-dream": ("none", "dual"),
    "tiny-sdar": ("block",),
}
# Prompts by cache: without one a forward holds whole sequences. studies/losslessness.py has more.
PROMPTS = {"none": 2, "dual": 5, "block": 8}
FEWER = {"none": 1, "dual": 2, "block": 5}  # for what goes over the same ground
MOST = max(PROMPTS.values())
LAYOUTS = [(name, kind) for name, kinds in EXACT_CACHES.items() for kind in kinds]
# The other caches have nothing to gain at a block's edge.
WITH_EDGES = [layout for layout in LAYOUTS if layout[1] in ("none", "block")]
SWITCHES = {
    "complete": BlockEdges(first=False, fold=False),
    "first": BlockEdges(complete=False, fold=False),
    "fold": BlockEdges(complete=False, first=False),  # only blocks are stored
}
POLICIES = ("static", "threshold")
# Alternately by either policy, so that each switch and each layout meets both.
ONE_EDGE = [
    (*layout, switch, POLICIES[(i + j) % 2])
    for i, layout in enumerate(WITH_EDGES)
    for j, switch in enumerate(SWITCHES)
    if switch != "fold" or layout[1] == "block"
]


@cache
def model(name: str) -> DiffusionLM:
    return load_model(name, device="cpu", dtype="float32")


@cache
def graph(name: str, policy: str) -> DraftGraph:
    lm = model(name)
    # Threshold unmasking makes few steps per prompt, and a fit wants a few hundred of them.
    prompts = load_prompts("synthetic", 8 if policy == "static" else 40)
    # In the cache whose forwards hold least: those with others are found by it as well.
    kind = EXACT_CACHES[name][-1]
    settings = decoding_settings(lm, gen_length=GEN_LENGTH, cache=kind, policy=policy)
    traces = record(lm, prepare(lm, prompts, settings))
    return build_graph(lm, prompts, settings, traces, budget=32)


@cache
def decoded(
    name: str,
    kind: str,
    policy: str,
    temperature: float,
    budget: int,
    edges: BlockEdges,
    prompts: int,
) -> list[Task]:
    """The first test prompts decoded; budget 0 is plain."""
    lm = model(name)
    options = {"policy": policy, "cache": kind, "temperature": temperature}
    if temperature:  # two short blocks, for time's sake
        options |= {"gen_length": 32, "block_length": min(16, lm.default_block_length)}
    artifact = graph(name, policy)
    settings = decoding_settings(lm, artifact, **options)
    drafter = graph_drafter(lm, artifact, settings, budget) if budget else None
    if drafter is not None:
        assert isinstance(drafter, BestOfDrafter)
        assert isinstance(drafter.leader, AcceptanceDrafter)
    texts = load_prompts("synthetic", MOST, split="test").texts[:prompts]
    tasks = [make_task(lm, text, settings, drafter, 1, k, edges) for k, text in enumerate(texts)]
    for _ in run(lm, tasks):
        pass
    return tasks


def assert_lossless(
    name: str,
    kind: str,
    policy: str,
    temperature: float,
    budget: int,
    edges: BlockEdges,
    prompts: int,
) -> None:
    most = (FEWER if temperature else PROMPTS)[kind]  # decoded plainly once for all tests
    plain = decoded(name, kind, policy, temperature, 0, NO_EDGES, most)[:prompts]
    ours = decoded(name, kind, policy, temperature, budget, edges, prompts)
    assert len(ours) == prompts
    for mine, theirs in zip(ours, plain, strict=True):
        assert collect(mine, trace=True).states == collect(theirs, trace=True).states
        assert collect(mine).token_ids == collect(theirs).token_ids
    spent, plainly = (sum(task.stats.nfe for task in tasks) for tasks in (ours, plain))
    # What few prompts draw by threshold may leave so few forwards that none can be saved.
    assert spent <= plainly if temperature and policy == "threshold" else spent < plainly


@pytest.mark.parametrize(
    ("name", "kind", "policy", "budget"),
    [(*layout, policy, 8) for policy in POLICIES for layout in LAYOUTS]
    # For time's sake: few drafts and many do not ask which cache their logits come from.
    + [
        (*layout, POLICIES[(i + j) % 2], budget)
        for i, layout in enumerate(layout for layout in LAYOUTS if layout[1] != "none")
        for j, budget in enumerate((1, 32))
    ],
)
def test_greedy_decoding_is_lossless(name: str, kind: str, policy: str, budget: int) -> None:
    prompts = (PROMPTS if budget == 8 else FEWER)[kind]
    assert_lossless(name, kind, policy, 0.0, budget, BlockEdges(), prompts)


@pytest.mark.parametrize(("policy", "most"), [("static", 0.35), ("threshold", 0.7)])
@pytest.mark.parametrize(("name", "kind"), [("tiny-sdar", "block")])
def test_what_was_fitted_knows_which_states_come_next(
    name: str, kind: str, policy: str, most: float
) -> None:
    """On prompts that it has not seen, and without the ways that take over where it does not.

    8 drafts leave 0.32 of plain decoding's forwards, and 0.36 or more where the fit is to other
    states than those that came next; by threshold, which makes fewer, 0.66.
    """
    lm, artifact = model(name), graph(name, policy)
    plain = decoded(name, kind, policy, 0.0, 0, NO_EDGES, PROMPTS[kind])[: FEWER[kind]]
    drafter = way_of(lm, artifact, plain[0].settings, 8, "model")
    assert isinstance(drafter, AcceptanceDrafter)
    ours = [make_task(lm, task.prompt, task.settings, drafter) for task in plain]
    for _ in run(lm, ours):
        pass
    for mine, theirs in zip(ours, plain, strict=True):
        assert collect(mine).token_ids == collect(theirs).token_ids
    assert sum(task.stats.nfe for task in ours) < most * sum(task.plain_nfe for task in ours)


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_the_prefix_cache_is_lossless_to_the_last_position(name: str) -> None:
    """One prompt, for time's sake: studies/losslessness.py compares many."""
    lm = model(name)
    settings = decoding_settings(lm, gen_length=GEN_LENGTH, cache="prefix", stop_at_eos=False)
    drafter = graph_drafter(lm, graph(name, "static"), settings, 8)
    text = load_prompts("synthetic", 1, split="test").texts[0]
    plain, ours = (make_task(lm, text, settings, drafts) for drafts in (None, drafter))
    for task in (plain, ours):
        for _ in run(lm, [task]):
            pass
    assert collect(ours, trace=True).states == collect(plain, trace=True).states
    assert ours.stats.nfe < plain.stats.nfe


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "kind"), WITH_EDGES)
def test_decoding_without_block_edges_is_lossless(name: str, kind: str, policy: str) -> None:
    assert_lossless(name, kind, policy, 0.0, 8, NO_EDGES, FEWER[kind])


@pytest.mark.parametrize(("name", "kind", "switch", "policy"), ONE_EDGE)
def test_each_block_edge_is_lossless(name: str, kind: str, switch: str, policy: str) -> None:
    assert_lossless(name, kind, policy, 0.0, 8, SWITCHES[switch], FEWER[kind])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "kind"), LAYOUTS)
def test_sampling_is_lossless(name: str, kind: str, policy: str) -> None:
    """At one temperature: tests/test_losslessness.py has more, which run the same code."""
    assert_lossless(name, kind, policy, 0.6, 8, BlockEdges(), FEWER[kind])


@pytest.mark.parametrize("name", EXACT_CACHES)
def test_temperature_changes_the_answers(name: str) -> None:
    kind = EXACT_CACHES[name][-1]
    few = FEWER[kind]
    mild, hot = (decoded(name, kind, "static", degree, 0, NO_EDGES, few) for degree in (0.6, 3.0))
    assert [collect(task).token_ids for task in mild] != [collect(task).token_ids for task in hot]


@pytest.mark.parametrize("name", EXACT_CACHES)
def test_it_solves_problems_it_has_not_seen(name: str) -> None:
    kind = EXACT_CACHES[name][-1]
    unseen = list(islice(problems("test", 0), PROMPTS[kind]))
    texts = load_prompts("synthetic", MOST, split="test").texts
    assert texts[: len(unseen)] == tuple(problem.question for problem in unseen)
    plain = decoded(name, kind, "static", 0.0, 0, NO_EDGES, len(unseen))
    answers = [collect(task).text for task in plain]
    right = sum(
        final_answer(text) == final_answer(problem.answer)
        for text, problem in zip(answers, unseen, strict=True)
    )
    # training/README.md measures hundreds of problems; the few here leave room for chance.
    assert right >= 0.7 * len(unseen)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("static", {"block_length": 8}),
        ("threshold", {}),
        ("joint", {"threshold": 0.9, "edit_threshold": 0.8}),
    ],
)
def test_the_mixture_is_lossless(policy: str, options: dict[str, object]) -> None:
    """Few prompts, for time's sake: studies/mixture.py compares many."""
    lm = model("tiny-llada2")
    prompts = load_prompts("synthetic", 10)
    settings = decoding_settings(lm, gen_length=GEN_LENGTH, policy=policy, **options)
    traces = record(lm, prepare(lm, prompts, settings))
    artifact = build_graph(lm, prompts, settings, traces, budget=8)
    drafter = graph_drafter(lm, artifact, settings, 8)
    unseen = list(islice(problems("test", 0), 4))
    plain, ours = (
        [make_task(lm, problem.question, settings, drafts) for problem in unseen]
        for drafts in (None, drafter)
    )
    for task in (*plain, *ours):
        for _ in run(lm, [task]):
            pass
    for mine, theirs in zip(ours, plain, strict=True):
        assert collect(mine, trace=True).states == collect(theirs, trace=True).states
    assert sum(task.stats.nfe for task in ours) < sum(task.stats.nfe for task in plain)
    right = sum(
        final_answer(collect(task).text) == final_answer(problem.answer)
        for task, problem in zip(ours, unseen, strict=True)
    )
    assert right >= 0.7 * len(unseen)
