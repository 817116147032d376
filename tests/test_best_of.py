"""Leaving forwards to the best way of drafting: what a walk says of each way, and who leads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import Oracle, a_graph_of, decode, parity_model, random_prompt, states
from torch import Tensor

from spiffy.bench import watch
from spiffy.runtime import generate
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.draft import (
    AcceptanceDrafter,
    BestOfDrafter,
    Candidates,
    GraphDrafter,
    Walk,
    confidence_chain,
    graph_drafter,
    lasting_drafter,
)
from spiffy.runtime.draft.best_of import Standing, filled_of, fills_of
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import AcceptanceModel, DecodingSettings

MASK = 9
ROOT = [0, MASK, MASK, MASK, 1]
KNOWN = Candidates(
    positions=torch.tensor([2, 1, 3]),
    tokens=torch.tensor([[4, 5], [6, 7], [4, 8]]),
    log_p=torch.zeros(3, 2, dtype=torch.float64),
    fresh=torch.tensor([4]),
)
FIRST, SECOND, LAST = [0, MASK, 5, MASK, 1], [0, 6, 5, MASK, 1], [0, 6, 5, 4, 1]


class Drafts:
    """Always the same drafts."""

    token_ranks = 2
    asks_rejected = False

    def __init__(self, *drafts: Sequence[int]) -> None:
        self.states = torch.tensor(drafts, dtype=torch.long).reshape(-1, len(ROOT))
        self.calls = 0

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        self.calls += 1
        return self.states


class Nothing:
    """No drafts."""

    token_ranks = 1
    asks_rejected = False

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        return root.ids.new_empty((0, len(root.ids)))


def walk(led: Drafts, *reached: Sequence[int], room: int = 2) -> Walk:
    root = Cursor(torch.tensor(ROOT), 0)
    return Walk(led, root, KNOWN, room, led.states, torch.tensor(reached))


@pytest.mark.parametrize(
    ("reached", "room", "fills"),
    [
        ([FIRST, SECOND], 2, [{(0, 1)}, {(0, 1), (1, 0)}]),
        ([FIRST, SECOND, LAST], 3, [{(0, 1)}, {(0, 1), (1, 0)}, {(0, 1), (1, 0), (2, 0)}]),
        ([FIRST, SECOND, LAST], 2, [{(0, 1)}, {(0, 1), (1, 0)}]),  # no draft may fill as many
        ([SECOND], 2, [{(0, 1), (1, 0)}]),  # a step of two
        ([[0, MASK, 2, MASK, 1], SECOND], 2, []),  # a token that is no candidate
        ([FIRST, [3, 6, 5, MASK, 1]], 2, [{(0, 1)}]),  # a committed token is replaced
    ],
)
def test_true_states_in_draft_coordinates(
    reached: list[list[int]], room: int, fills: list[set[tuple[int, int]]]
) -> None:
    walked = walk(Drafts(), *reached, room=room)
    assert fills_of(walked, filled_of(walked)) == fills


def test_every_way_is_told_how_far_the_walk_would_have_come_with_its_drafts() -> None:
    model = parity_model("llada-a")
    led, other, none = Drafts(FIRST), Drafts(SECOND, FIRST), Drafts(SECOND)
    both, second = GraphDrafter([((0, 1),), ((1, 0), (0, 1))], model), GraphDrafter([], model)
    best = BestOfDrafter([led, other, none, both, second])
    best.learn(walk(led, FIRST, SECOND))
    # The second state is the new root: with `led` the walk has come to the first one only.
    assert best.standing.ahead == [0, 1, -1, 1, -1]
    assert (led.calls, other.calls, none.calls) == (0, 1, 1)


def test_a_draft_behind_one_that_is_wrong_is_worth_nothing() -> None:
    led, skips = Drafts(), Drafts(SECOND)
    best = BestOfDrafter([led, skips])
    best.learn(walk(led, FIRST))
    assert best.standing.ahead == [0, 0]


def simulated(p: Sequence[float], walks: int, standing: Standing, seed: int, dear: int) -> float:
    """Steps per walk where way w has a draft accepted, and each after it, with probability p[w].

    As in a decode, way `dear` is only compared where it leads or is due, and of those that do not
    lead no more is seen than one draft beyond the leader's.
    """
    draw, steps = random.Random(seed), 0
    for _ in range(walks):
        depth = [0] * len(p)
        for way, chance in enumerate(p):
            while draw.random() < chance:
                depth[way] += 1
        led = depth[standing.leader]
        seen: list[int | None] = [min(own, led + 1) for own in depth]
        if standing.leader != dear and not standing.is_due(dear):
            seen[dear] = None
        standing.observe(seen)
        steps += 1 + led
    return steps / walks


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_way_leads_nearly_always(best: int) -> None:
    p = [0.4] * 3
    p[best] = 0.55
    found = [simulated(p, 1000, Standing([0.0] * 3), seed, dear=0) for seed in range(20)]
    # A way alone makes 1 / (1 - p) steps: 2.22, the others 1.67.
    assert sum(found) / len(found) == pytest.approx(1 / 0.45, rel=0.02)


def test_who_leads_changes_with_the_texts() -> None:
    standing = Standing([0.0] * 3)
    for seed, best in enumerate((1, 0, 2, 0, 1, 2)):
        p = [0.3] * 3
        p[best] = 0.6
        simulated(p, 400, standing, seed, dear=0)
        assert standing.leader == best


def test_equal_ways_change_seldom() -> None:
    standing = Standing([0.0] * 3)
    leaders = []
    for seed in range(500):
        simulated([0.5] * 3, 1, standing, seed, dear=0)
        leaders.append(standing.leader)
    assert sum(a != b for a, b in pairwise(leaders)) < 50


def test_a_dear_way_far_behind_is_compared_seldom() -> None:
    standing = Standing([0.0, -5.0])
    due = []
    for _ in range(16):
        due.append(standing.is_due(1))
        standing.observe([0, None])
    assert due == ([False] * 3 + [True]) * 4
    assert standing.ahead == [0, -5]


@pytest.mark.parametrize("checkpoint", ["llada-a", "sdar-a"])
def test_decodes_go_on_by_the_way_that_is_right(checkpoint: str) -> None:
    model = parity_model(checkpoint, "float64")
    cache = model.family.caches[0]
    settings = DecodingSettings.parse(cache=cache, block_length=8, gen_length=32)
    prompts = [random_prompt(model, 8, seed) for seed in range(2)]
    plain = [decode(model, prompt, settings) for prompt in prompts]
    alone = decode(model, prompts[0], settings, Oracle(plain[0], 3)).stats.nfe
    best = BestOfDrafter([Nothing(), Oracle(plain[0], 3)])
    ours = decode(model, prompts[0], settings, best)
    assert states(ours) == states(plain[0])
    # Right after every walk, it is ahead by one and leads after three.
    assert alone < ours.stats.nfe <= alone + 3
    assert best.standing.leader == 1

    # Both in every forward: the other decode's future is of no use, and costs no token either.
    tasks = [make_task(model, prompt, settings, best, 0, k) for k, prompt in enumerate(prompts)]
    for _ in run(model, tasks, 2):
        pass
    assert [states(task) for task in tasks] == [states(task) for task in plain]


def test_who_is_watched_learns_all_the_same() -> None:
    model = parity_model("llada-a", "float64")
    settings = DecodingSettings.parse(cache="none", block_length=8, gen_length=16)
    prompt = random_prompt(model, 8)
    plain = decode(model, prompt, settings)

    def decoded(watched: bool) -> tuple[Task, Standing, int]:
        best = BestOfDrafter([Nothing(), Oracle(plain, 2), GraphDrafter([((0, 0),)], model)])
        task = make_task(model, prompt, settings, watch.Watched(best) if watched else best)
        seen = sum(len(forward.accepted) for forward in watch.decode(task))
        return task, best.standing, seen

    (mine, standing, _), (watched, watched_standing, seen) = decoded(False), decoded(True)
    assert watched_standing == standing
    assert standing.walks > 0
    assert standing.leader == 1
    assert watched.stats.nfe == mine.stats.nfe
    assert seen == watched.stats.accepted > 0


def test_an_artifact_drafts_by_its_model_its_nodes_and_a_chain() -> None:
    model = parity_model("llada-a")
    graph = a_graph_of(model)
    acceptance = AcceptanceModel(position={"logit": 1.0}, token={"log_p": 1.0}, bigrams=())
    nodes = frozenset({frozenset({(0, 0)}), frozenset({(0, 0), (1, 0)})})

    best = graph_drafter(model, graph, graph.decoding, 2)
    assert isinstance(best, BestOfDrafter)
    assert [way.fills for way in best.ways if isinstance(way, GraphDrafter)] == [nodes] * 2
    best = graph_drafter(
        model, graph.model_copy(update={"acceptance": acceptance}), graph.decoding, 2
    )
    assert isinstance(best, BestOfDrafter)
    assert isinstance(best.leader, AcceptanceDrafter)
    assert len(best.ways) == 3
    alone = graph_drafter(model, graph, graph.decoding, 3, "graph")
    assert isinstance(alone, GraphDrafter)
    assert len(alone.fills) == 3
    # No chain is longer than a block, or than the longest that pays, however many drafts are asked.
    best = graph_drafter(model, graph, graph.decoding, 1 << 30)
    assert isinstance(best, BestOfDrafter)
    assert isinstance(best.ways[-1], GraphDrafter)
    assert best.ways[-1].fills == frozenset(map(frozenset, confidence_chain(4)))


def test_calls_of_generate_go_on_from_one_another() -> None:
    model = parity_model("llada-a")
    graph = a_graph_of(model)
    first = lasting_drafter(model, graph, graph.decoding, 2)
    assert isinstance(first, BestOfDrafter)
    out = generate(model, random_prompt(model, 8), graph=graph, budget=2)
    assert first.standing.walks == out.stats.nfe - 1 > 0  # the first forward has no drafts

    longer = graph.decoding.model_copy(update={"gen_length": 64})
    others = [
        lasting_drafter(model, graph, longer, 2),
        lasting_drafter(model, graph, graph.decoding, 3),
        lasting_drafter(model, a_graph_of(model), graph.decoding, 2),
    ]
    shared = [isinstance(d, BestOfDrafter) and d.standing is first.standing for d in others]
    assert shared == [True, False, False]
    assert isinstance(lasting_drafter(model, graph, graph.decoding, 2, "graph"), GraphDrafter)


def test_a_way_is_not_credited_with_drafts_that_memory_left_out() -> None:
    model = parity_model("llada-a")
    led = Drafts(FIRST)
    bad_first = GraphDrafter([((2, 0),), ((0, 1),)], model)
    late = Drafts(LAST, FIRST)
    best = BestOfDrafter([led, bad_first, late])
    best.learn(replace(walk(led, FIRST), most=2))
    assert best.standing.ahead == [0, 0, 0]
    best.learn(replace(walk(led, FIRST), most=1))
    assert best.standing.ahead == [0, -1, -1]
