"""Drafts never change a decode: every state after every step is plain decoding's.

The models have random weights and run in float64: a matmul of another shape rounds differently,
and in float32 that could flip a near-tie of two scores, which is no fault of the decoder.
Longer than other files: what the project stands for is to be read in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import accumulate, product
from typing import Any

import numpy as np
import pytest
import sampling
import torch
from helpers import (
    Oracle,
    decode,
    fold,
    own_examples,
    parity_model,
    random_prompt,
    states,
    with_eos,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiffy.runtime.decode import Task, keys_of, looked_at, make_task, run
from spiffy.runtime.draft import AcceptanceDrafter, Candidates, Drafter, GraphDrafter
from spiffy.runtime.draft.acceptance import POSITION_FEATURES, TOKEN_FEATURES, AcceptanceWeights
from spiffy.runtime.draft.ngrams import Bigrams
from spiffy.runtime.draft.outlook import Rejected
from spiffy.runtime.forward.cache import NO_EDGES, BlockEdges
from spiffy.runtime.generate import answer_ids
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import DecodingSettings

Fills = list[list[tuple[int, int]]]

# Checkpoint, exact cache, geometry: small enough to decode in milliseconds. Prompts of 11 tokens
# give SDAR one stored block and a tail of 3 that opens the first of three decoded blocks.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llada-none": ("llada-a", {"cache": "none", "block_length": 8, "gen_length": 16}),
    "llada-dual": ("llada-a", {"cache": "dual", "block_length": 8, "gen_length": 16}),
    "dream-none": ("dream-a", {"cache": "none", "block_length": 8, "gen_length": 16}),
    "dream-dual": ("dream-a", {"cache": "dual", "block_length": 8, "gen_length": 16}),
    "llada-prefix": ("llada-a", {"cache": "prefix", "block_length": 8, "gen_length": 16}),
    "dream-prefix": ("dream-a", {"cache": "prefix", "block_length": 8, "gen_length": 16}),
    "sdar-block": ("sdar-a", {"cache": "block", "block_length": 8, "gen_length": 16}),
    "sdar-plain-edges": ("sdar-a", {"cache": "block", "block_length": 8, "gen_length": 16}),
}
# Of these, only with the policies named.
SPECIAL: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "fast-block": (
        "fastdllm2-a",
        {"cache": "block", "block_length": 8, "sub_block_length": 4, "gen_length": 16},
        ("static-1", "uneven", "threshold", "entropy-bounded", "sequential"),
    ),
    "llada2-block": (
        "llada21-a",
        {"cache": "block", "block_length": 8, "gen_length": 16},
        ("joint", "joint-few", "joint-sure"),
    ),
    "llada-none-edited": (
        "llada-a",
        {"cache": "none", "block_length": 8, "gen_length": 16},
        ("joint", "joint-few"),
    ),
    "sdar-plain-edges-edited": (
        "sdar-a",
        {"cache": "block", "block_length": 8, "gen_length": 16},
        ("joint-sure",),
    ),
}
EDGES = dict.fromkeys((*LAYOUTS, *SPECIAL), BlockEdges()) | dict.fromkeys(
    ("sdar-plain-edges", "sdar-plain-edges-edited"), NO_EDGES
)
POLICIES: dict[str, dict[str, Any]] = {
    "static-1": {"tokens_per_step": 1},
    "static-2": {"tokens_per_step": 2},
    "uneven": {"steps_per_block": 3},
    "threshold": {"policy": "threshold", "threshold": 0.5},
    "entropy-bounded": {"policy": "entropy-bounded", "entropy_bound": 2.0},
    "margin": {"score": "margin"},
    "entropy": {"score": "entropy"},
    "sequential": {"policy": "sequential"},
}
EDITING: dict[str, dict[str, Any]] = {
    "joint": {"policy": "joint", "threshold": 0.5, "edit_threshold": 0.2, "max_post_steps": 3},
    "joint-few": {"policy": "joint", "threshold": 0.9, "edit_threshold": 0.0, "max_post_steps": 2},
    "joint-sure": {"policy": "joint", "threshold": 0.5, "edit_threshold": 1.0},
}
TEMPERATURES = (0.0, 0.6, 1.0)
# Where there are few policies, for time's sake: what a step commits does not ask which cache its
# logits came from, nor (sdar-block has all policies) what a forward stores beside them.
FEW: dict[str, tuple[str, ...]] = {
    "llada-prefix": ("static-1", "threshold"),
    "dream-prefix": ("static-1", "threshold"),
    "sdar-plain-edges": ("static-1", "uneven", "threshold", "entropy-bounded"),
}
COMBINATIONS = [
    pytest.param(layout, policy, id=f"{layout}-{policy}")
    for layout, policies in [
        *((layout, FEW.get(layout, tuple(POLICIES))) for layout in LAYOUTS),
        *((layout, policies) for layout, (_, _, policies) in SPECIAL.items()),
    ]
    for policy in policies
]
# At one temperature where there are many policies, so that every layout, and every policy, meets
# all of them; at each of them where there are few.
DEGREES = [
    (layout, policy, temperature)
    for layout, policy in (case.values for case in COMBINATIONS)
    for k, temperature in enumerate(TEMPERATURES)
    if layout in SPECIAL
    or "prefix" in layout
    or ([*LAYOUTS].index(layout) + [*POLICIES].index(policy)) % 3 == k
]
# Where a forward's number of steps is simply counted: no block begins alone, none is edited.
COUNTED = [case for case in DEGREES if case[0] in LAYOUTS]


def setting_of(
    layout: str, policy: str, temperature: float = 0.0, stop_at_eos: bool = False
) -> tuple[DiffusionLM, DecodingSettings]:
    checkpoint, geometry = LAYOUTS[layout] if layout in LAYOUTS else SPECIAL[layout][:2]
    options = {**geometry, **(POLICIES | EDITING)[policy], "temperature": temperature}
    settings = DecodingSettings.parse(**options, stop_at_eos=stop_at_eos)
    return parity_model(checkpoint, "float64"), settings


@cache
def plain(layout: str, policy: str, temperature: float, prompt_length: int, seed: int) -> Task:
    model, settings = setting_of(layout, policy, temperature)
    prompt = random_prompt(model, prompt_length)
    return decode(model, prompt, settings, None, seed, edges=EDGES[layout])


class Origins:
    """Drafts nothing and keeps, for every root, the prediction that drafts would start from."""

    token_ranks = 1 << 20  # all of them
    asks_rejected = False

    def __init__(self) -> None:
        self.by_step: dict[int, Candidates] = {}

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        self.by_step[root.step] = candidates
        return root.ids.new_empty((0, len(root.ids)))


@cache
def future_fills(
    layout: str, policy: str, temperature: float, prompt_length: int, depth: int
) -> Fills:
    """What a graph needs to hold to draft this very decode `depth` steps ahead, block by block."""
    model, settings = setting_of(layout, policy, temperature)
    origins = Origins()
    task = decode(
        model, random_prompt(model, prompt_length), settings, origins, edges=EDGES[layout]
    )
    mask, fills = model.mask_token_id, set()
    for step, ranked in origins.by_step.items():
        for later in task.path[step : step + depth]:
            pairs = []
            for i, position in enumerate(ranked.positions):
                if (token := later.ids[position]) != mask:
                    pairs.append((i, ranked.tokens[i].tolist().index(int(token))))
            if pairs:
                fills.add(tuple(pairs))
    return [list(fill) for fill in sorted(fills)]


def expected_positions(task: Task) -> int:
    """Positions computed, from the layout's definition and the number of forwards and drafts."""
    stats, canvas, settings = task.stats, task.canvas, task.settings
    block, whole = settings.block_length, canvas.length
    if settings.cache == "none":
        return (stats.nfe + stats.drafted) * whole  # every state is a whole sequence
    if settings.cache == "dual":  # one whole forward a block, then blocks
        return canvas.blocks * whole + (stats.nfe - canvas.blocks + stats.drafted) * block
    if settings.cache == "prefix":  # as dual, and of two blocks the first has the second behind it
        assert canvas.blocks == 2
        later = stats.nfe - canvas.blocks + stats.drafted
        longer, rest = divmod(stats.positions_computed - 2 * whole - later * block, block)
        assert rest == 0
        assert 0 <= longer <= later
        return stats.positions_computed
    stored = canvas.first + (canvas.blocks - 1) * block  # each finished block once
    denoising = (stats.nfe - stores(task) + stats.drafted) * block
    if task.edges.complete:  # a completing state carries the next block, and may save its store
        if task.drafter is None:
            return stored + denoising
        roots = stats.nfe if settings.edits_full_blocks else 0  # these may be complete, too
        most = stored + denoising + (stats.drafted + roots) * block
        assert denoising <= stats.positions_computed <= most
        return stats.positions_computed
    return stored + denoising


def stores(task: Task) -> int:
    """Forwards that do nothing but store the prompt's whole blocks, or a finished block."""
    if task.settings.cache != "block" or task.edges.fold:
        return 0
    return (task.canvas.first > 0) + task.canvas.blocks - 1


def crosses(task: Task) -> bool:
    """Whether a walk may go on from a draft that completes its block."""
    return task.settings.cache in ("none", "block") and task.edges.complete


def assert_lossless(ours: Task, plainly: Task) -> None:
    assert states(ours) == states(plainly)
    assert answer_ids(ours) == answer_ids(plainly)
    spent, spent_plainly = ours.stats, plainly.stats
    assert spent.steps == spent_plainly.steps == len(ours.path)
    # A forward makes one step, and one more for every hop to a draft.
    assert spent.nfe + spent.accepted == spent_plainly.nfe
    joins = ours.canvas.blocks if ours.settings.edits_full_blocks else 0  # block to block, as it is
    assert 0 <= spent.accepted <= spent.drafted + joins
    assert spent.positions_computed == expected_positions(ours)


def token_fills(ranks: st.SearchStrategy[int]) -> st.SearchStrategy[Fills]:
    pair = st.tuples(ranks, st.one_of(st.integers(0, 2), st.integers(0, 400)))
    return st.lists(st.lists(pair, min_size=1, max_size=10), max_size=12)


# Few ranks, so that fills overlap and hit; and ranks beyond block and vocabulary. Position ranks
# may repeat in a fill and fills in a list, which a valid artifact would not hold.
ANY_FILLS = st.one_of(token_fills(st.integers(0, 3)), token_fills(st.integers(0, 40)))

ADVERSARIAL: dict[str, Fills] = {
    "nothing": [],
    "useless": [[(0, 300)], [(3, 317)], [(7, 318), (0, 318)]],
    "deep chain": [[(i, 0) for i in range(depth)] for depth in range(1, 20)],
    "beyond the block": [[(8, 0)], [(1000, 0)], [(0, 0), (500, 0)]],
    "beyond the vocabulary": [[(0, 319)], [(0, 320)], [(0, 100_000)]],
    "duplicates": [[(0, 0)]] * 5 + [[(0, 0), (1, 0)]] * 3,
    "one position twice": [[(0, 0), (0, 1)], [(0, 1), (0, 0)], [(1, 0), (0, 0), (1, 0)]],
    "every single fill": [[(i, j)] for i in range(8) for j in range(5)],
    "children without parents": [[(0, 0), (1, 0), (2, 0)], [(0, 0), (1, 0), (2, 0), (3, 0)]],
}


def test_every_parametrisation_has_examples_of_its_own_and_keeps_them() -> None:
    def drawn(*case: str) -> list[Fills]:
        found: list[Fills] = []

        @own_examples(*case)
        @settings(max_examples=8)
        @given(fills=ANY_FILLS)
        def check(fills: Fills) -> None:
            found.append(fills)

        check()
        return found

    first, second = (drawn("llada-none", policy) for policy in ("static-1", "threshold"))
    assert first == drawn("llada-none", "static-1")
    assert first != second


@pytest.mark.parametrize(("layout", "policy"), COMBINATIONS)
def test_any_drafts_leave_every_state_as_it_was(layout: str, policy: str) -> None:
    @own_examples(layout, policy)
    @settings(max_examples=6)
    @given(
        fills=ANY_FILLS,
        temperature=st.sampled_from(TEMPERATURES),
        prompt_length=st.sampled_from([1, 8, 11]),
        seed=st.integers(0, 2),
    )
    def check(fills: Fills, temperature: float, prompt_length: int, seed: int) -> None:
        model, setting = setting_of(layout, policy, temperature)
        plainly = plain(layout, policy, temperature, prompt_length, seed)
        drafter = GraphDrafter(fills, model)
        assert_lossless(
            decode(model, plainly.prompt, setting, drafter, seed, edges=plainly.edges), plainly
        )

    check()


@pytest.mark.parametrize(("layout", "policy"), COMBINATIONS)
def test_any_acceptance_model_leaves_every_state_as_it_was(layout: str, policy: str) -> None:
    """Coefficients that mean nothing: bad drafts, and still the same tokens."""

    @own_examples(layout, policy)
    @settings(max_examples=3)
    @given(seed=st.integers(0, 99), budget=st.integers(1, 12), sets=st.booleans())
    def check(seed: int, budget: int, sets: bool) -> None:
        temperature = TEMPERATURES[seed % 3]
        model, setting = setting_of(layout, policy, temperature)
        plainly = plain(layout, policy, temperature, 11, 0)
        draw = np.random.default_rng(seed).normal
        weights = AcceptanceWeights(
            draw(0, 1, len(POSITION_FEATURES)),
            draw(0, 1, len(POSITION_FEATURES) + 1) if sets else None,
            abs(draw(0, 1)),
            draw(0, 1, len(TOKEN_FEATURES)),
            Bigrams([(1, 2, 3), (2, 319, 1)], model.vocab_size),
        )
        drafter = AcceptanceDrafter(weights, budget, model)
        ours = decode(model, plainly.prompt, setting, drafter, edges=plainly.edges)
        assert_lossless(ours, plainly)
        assert 0 < ours.stats.drafted <= budget * ours.stats.nfe

    check()


def each_with_a_temperature(
    kinds: Iterable[str], temperatures: Sequence[float]
) -> list[tuple[str, str, float]]:
    """Each kind in each layout at one temperature, so that each of both meets all of them."""
    return [
        (kind, layout, temperatures[(i + j) % len(temperatures)])
        for i, kind in enumerate(kinds)
        for j, layout in enumerate(LAYOUTS)
    ]


@pytest.mark.parametrize(
    ("kind", "layout", "temperature"), each_with_a_temperature(ADVERSARIAL, TEMPERATURES)
)
def test_adversarial_drafts_leave_every_state_as_it_was(
    kind: str, layout: str, temperature: float
) -> None:
    policy = "threshold" if temperature == 0.6 else "static-1"
    model, setting = setting_of(layout, policy, temperature)
    plainly = plain(layout, policy, temperature, 11, 0)
    ours = decode(
        model,
        plainly.prompt,
        setting,
        GraphDrafter(ADVERSARIAL[kind], model),
        edges=plainly.edges,
    )
    assert_lossless(ours, plainly)
    if kind in ("nothing", "beyond the block"):
        assert ours.stats.drafted == 0


@pytest.mark.parametrize(("layout", "policy", "temperature"), DEGREES)
def test_drafts_that_hit_leave_every_state_as_it_was(
    layout: str, policy: str, temperature: float
) -> None:
    """Most random fills miss; these are taken from the decode itself, so walks hop."""
    model, setting = setting_of(layout, policy, temperature)
    plainly = plain(layout, policy, temperature, 11, 0)
    fills = future_fills(layout, policy, temperature, 11, depth=3)
    drafter = GraphDrafter(fills, model)
    ours = decode(model, plainly.prompt, setting, drafter, edges=plainly.edges)
    assert_lossless(ours, plainly)
    assert ours.stats.accepted > 0
    if not crosses(plainly):
        assert ours.stats.nfe == expected_forwards(plainly, depth=3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts_start_from_the_prediction_that_produced_the_root(layout: str) -> None:
    """At every root of a walk `origin` is what plain decoding saw one step before."""
    model, setting = setting_of(layout, "static-1", 1.0)
    seen = Origins()
    plainly = decode(model, random_prompt(model, 11), setting, seen, edges=EDGES[layout])
    oracle = Oracle(plainly, 2)
    compared = 0

    def checking(root: Cursor, candidates: Candidates, room: int) -> Tensor:
        nonlocal compared
        expected = seen.by_step.get(root.step)
        if expected is not None:  # plain decoding may know less about a block's first state
            assert torch.equal(candidates.positions, expected.positions)
            assert torch.equal(candidates.tokens[:, :3], expected.tokens[:, :3])
            assert (candidates.log_p - expected.log_p).abs().max() < 1e-5  # logits are float32
            assert torch.equal(candidates.fresh, expected.fresh)
            compared += 1
        return oracle(root, candidates, room)

    checking.token_ranks, checking.asks_rejected = seen.token_ranks, seen.asks_rejected
    for depth in (2, 6):  # 6: with a root where a block begins
        oracle.depth = depth
        ours = decode(model, plainly.prompt, setting, checking, edges=plainly.edges)
        assert_lossless(ours, plainly)
    assert compared >= 4


@pytest.mark.parametrize("ranks", [4, 1 << 20])
@pytest.mark.parametrize("layout", ["llada-none", "dream-none", "sdar-block"])
def test_rejected_drafts_are_read_correctly(layout: str, ranks: int) -> None:
    """What is said of a draft is what a forward of its own says of that very state."""
    model, setting = setting_of(layout, "static-1")
    plainly = decode(model, random_prompt(model, 11), setting)
    mask, asked = model.mask_token_id, 0

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        block = setting.block_length if model.family.block_causal else None
        return model.forward_logits(ids[None], block)[0, positions].double()

    class Asking(Oracle):
        """Drafts futures as they will be, without their first step, and with a wrong token."""

        token_ranks = ranks
        asks_rejected = True
        last: Tensor = torch.empty(0)

        def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
            if candidates.rejected is not None:
                self.check(root, candidates, candidates.rejected)
            following = [cursor.ids for cursor in self.task.path[root.step : root.step + 10]]
            without = [torch.where(ids == following[0], root.ids, ids) for ids in following[1:]]
            wrong = [
                ids.where((ids == root.ids) | (following[0] == root.ids), (ids + 1) % mask)
                for ids in following[1:2]
            ]
            lacking = [ids.clone() for ids in following[2:4]]
            for ids in lacking:
                ids[candidates.positions[0]] = mask
            hop = following[: root.step % 3 == 0]
            drafts = [*hop, *without, *wrong, *lacking]
            self.last = torch.stack(drafts) if drafts else root.ids[None][:0]
            return self.last

        def check(self, root: Cursor, candidates: Candidates, rejected: Rejected) -> None:
            nonlocal asked
            before, tokens = root.ids.clone(), candidates.tokens
            before[candidates.fresh] = mask  # what the candidates were seen from
            known = logits(before, candidates.positions)
            for k, choice in enumerate(torch.from_numpy(rejected.choice)):
                held = choice >= 0
                ids = root.ids.clone()
                ids[candidates.fresh[torch.from_numpy(rejected.unseen[k])]] = mask
                ids[candidates.positions[held]] = tokens[held, choice[held]]
                assert (self.last == ids).all(1).any()  # one of the drafts, and none else
                # Tokens that were not asked about keep their logits.
                said = logits(ids, candidates.positions).gather(-1, tokens)
                exact = known.scatter(-1, tokens, said).log_softmax(-1).gather(-1, tokens)
                error = (torch.from_numpy(rejected.log_p[k]) - exact)[~held]
                assert error.abs().max() < 1e-3
                asked += 1

    ours = decode(model, plainly.prompt, setting, Asking(plainly, 3))
    assert_lossless(ours, plainly)
    assert asked >= 3


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("layout", ["llada-none", "dream-none"])
def test_plain_decoding_equals_its_definition(layout: str, temperature: float) -> None:
    """Whole forwards, one position at a time."""
    model, setting = setting_of(layout, "static-1", temperature)
    ids, expected = random_prompt(model, 11).tolist(), []
    ids += [model.mask_token_id] * 16
    for step in range(16):
        start = 11 + 8 * (step // 8)
        logits = model.forward_logits(torch.tensor([ids]))[0].double()
        best, best_at, best_token = -1.0, -1, -1
        for position in range(start, start + 8):
            if ids[position] == model.mask_token_id:
                choices = logits[position].clone()
                choices[model.mask_token_id] = -torch.inf
                token, told = int(choices.argmax()), logits[position]
                if temperature > 0:
                    key = sampling.key_of(3, 2, step % 8, 0, position)
                    token = sampling.drawn(choices.tolist(), temperature, key)
                    if layout == "dream-none":  # whose scores are of what is drawn from
                        told = choices / temperature
                if (p := float(told.softmax(-1)[token])) > best:
                    best, best_at, best_token = p, position, token
        ids[best_at] = best_token
        expected.append(list(ids))
    prompt = random_prompt(model, 11)
    assert states(decode(model, prompt, setting, None, seed=3, sequence=2)) == expected


@pytest.mark.parametrize("layout", ["dream-none", "dream-dual"])
def test_steps_that_commit_nothing_cost_no_forward_and_change_nothing(layout: str) -> None:
    """Dream's timesteps may commit 0 tokens: the state, and so its logits, stay as they are."""
    checkpoint, geometry = LAYOUTS[layout]
    model = parity_model(checkpoint, "float64")
    setting = DecodingSettings.parse(
        **geometry, schedule="timestep", steps_per_block=8, stop_at_eos=False
    )
    prompt = random_prompt(model, 11)
    plainly = decode(model, prompt, setting)
    start = plainly.canvas.start(prompt, model.mask_token_id).ids.tolist()
    different = len(fold([start, *states(plainly)])) - 1
    assert plainly.stats.nfe == different < plainly.stats.steps
    every_start = [[(i, j)] for i in range(4) for j in range(20)]
    for drafter in (GraphDrafter(every_start, model), Oracle(plainly, 5)):
        ours = decode(model, prompt, setting, drafter)
        assert_lossless(ours, plainly)
        assert ours.stats.accepted > 0


def test_without_a_cache_a_graph_drafts_to_the_end_of_the_block_and_walks_on() -> None:
    """16 steps x1 to x16, 8 in each of two blocks; every fill up to 4 steps ahead is drafted.

    The forwards start from: the masks (x1); x1 (hops to x2..x5, x6); x6 (x7, x8, and x9 from the
    completed block: no draft reaches into the next one); x9 (x10..x13, x14); x14 (x15, x16).
    """
    at = ("llada-none", "static-1", 0.0, 11)
    model, setting = setting_of(*at[:3])
    plainly = plain(*at, 0)
    drafter = GraphDrafter(future_fills(*at, depth=4), model)
    ours = decode(model, plainly.prompt, setting, drafter)
    assert_lossless(ours, plainly)
    assert ours.stats.nfe == 5
    assert ours.stats.accepted == 4 + 2 + 4 + 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batched_decoding_equals_one_by_one(layout: str, temperature: float) -> None:
    model, setting = setting_of(layout, "threshold", temperature)
    lengths, oracle_for = (3, 9, 8, 11, 1), {1, 3}
    alone, batched = [], []
    for sequence, length in enumerate(lengths):
        prompt = random_prompt(model, length)
        plainly = decode(model, prompt, setting, None, 5, sequence, EDGES[layout])
        drafter: Drafter = GraphDrafter([[(0, 0)], [(0, 0), (1, 0)]], model)
        if sequence in oracle_for:
            drafter = Oracle(plainly, 3)
        alone.append(decode(model, prompt, setting, drafter, 5, sequence, EDGES[layout]))
        assert_lossless(alone[-1], plainly)
        batched.append(make_task(model, prompt, setting, drafter, 5, sequence, EDGES[layout]))
    finished = [task for tasks in run(model, batched, batch_size=3) for task in tasks]
    assert {id(task) for task in finished} == {id(task) for task in batched}
    assert len(finished) == len(batched)
    for one, other in zip(alone, batched, strict=True):
        assert states(one) == states(other)
        for name, count in asdict(one.stats).items():
            assert name.endswith("seconds") or count == getattr(other.stats, name), name


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("llada-none", POLICIES["threshold"]),
        ("llada-none", POLICIES["threshold"] | {"schedule": "timestep", "steps_per_block": 12}),
        ("dream-dual", POLICIES["static-1"] | {"schedule": "timestep", "steps_per_block": 8}),
        ("llada2-block", EDITING["joint-few"]),
        ("llada2-block", EDITING["joint-few"] | {"schedule": "timestep", "steps_per_block": 12}),
        ("fast-block", POLICIES["static-2"]),
    ],
)
def test_no_noise_that_decided_something_is_drawn_again(layout: str, options: Any) -> None:
    """Every step draws anew, unless the schedule alone had said that the last one commits nothing.

    With drafts, whose counters nobody knows, the states are the same.
    """
    checkpoint, geometry = LAYOUTS[layout] if layout in LAYOUTS else SPECIAL[layout][:2]
    model = parity_model(checkpoint, "float64")
    setting = DecodingSettings.parse(
        **(geometry | options | {"threshold": 0.99}), temperature=1.0, stop_at_eos=False
    )
    plainly = decode(model, random_prompt(model, 11), setting)
    before = plainly.canvas.start(plainly.prompt, model.mask_token_id)
    seen: dict[tuple[int, ...], Cursor] = {}
    idle = 0
    for after in plainly.path:
        positions = looked_at(plainly, before)
        keys = keys_of(plainly, before, positions)
        assert keys is not None
        same = seen.setdefault(tuple(keys.tolist()), before)
        if same is not before:
            idle += 1
            assert setting.policy == "static"
            assert torch.equal(same.ids, before.ids)
        before = after
    assert (idle > 0) == (setting.policy == "static" and setting.schedule == "timestep")
    assert_lossless(decode(model, plainly.prompt, setting, Oracle(plainly, 5)), plainly)


def test_temperature_draws_differ_by_seed_and_by_sequence() -> None:
    model, setting = setting_of("llada-none", "static-1", 1.0)
    prompt = random_prompt(model, 11)
    answers = [decode(model, prompt, setting, None, *at) for at in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    first, second, third, again = (answer_ids(task) for task in answers)
    assert first == again
    assert first != second
    assert first != third


# ---------------------------------------------------------------- drafters that know, or do not


def steps_by_block(task: Task) -> list[int]:
    """Denoising steps of each block: a step belongs to the block of the state it starts from."""
    starts = [0, *(cursor.block for cursor in task.path[:-1])]
    return [starts.count(block) for block in range(task.canvas.blocks)]


def expected_forwards(task: Task, depth: int) -> int:
    """Forwards of a decode whose next `depth` states are always drafted.

    A forward makes one step, and `depth` more if there was a prediction to draft from: not in the
    first forward, nor where the one before ended just at a block's edge and saw nothing behind it.
    Walks go to the end of the block; with `crosses` of the next one, or without a cache anywhere.
    """
    edges = list(accumulate(steps_by_block(task)))
    forwards = done = 0
    drafts = False
    while done < edges[-1]:
        block = sum(edge <= done for edge in edges)
        ahead = len(edges) if task.settings.cache == "none" else int(crosses(task))
        furthest = edges[min(block + ahead, len(edges) - 1)]
        done = min(done + 1 + drafts * depth, furthest)
        drafts = task.settings.cache == "none" or done not in edges
        forwards += 1
    return forwards + stores(task)


@pytest.mark.parametrize(("layout", "policy", "temperature"), COUNTED)
def test_an_oracle_of_depth_k_makes_k_plus_1_steps_a_forward(
    layout: str, policy: str, temperature: float
) -> None:
    model, setting = setting_of(layout, policy, temperature)
    plainly = plain(layout, policy, temperature, 11, 0)
    assert sum(steps_by_block(plainly)) == plainly.stats.steps
    for depth in (1, 3, 50):
        ours = decode(model, plainly.prompt, setting, Oracle(plainly, depth), edges=plainly.edges)
        assert_lossless(ours, plainly)
        assert ours.stats.nfe == expected_forwards(plainly, depth)


@pytest.mark.parametrize(("layout", "forwards"), [("llada-none", 3), ("llada-dual", 4)])
def test_only_without_a_cache_a_completing_draft_crosses_the_block_boundary(
    layout: str, forwards: int
) -> None:
    """Two blocks of 8 steps, all futures known. Without a cache: the first forward, one for the
    rest of block 0 and the first step of block 1 and all the states drafted behind it, ..."""

    @dataclass
    class WithinBlock(Oracle):
        """Drafts no further than the end of the root's block."""

        def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
            drafts = super().__call__(root, candidates, room)
            ahead = self.task.canvas.span(root.block).stop
            mask = self.task.model.mask_token_id
            untouched = (drafts[:, ahead:] == mask).all(-1)
            assert isinstance(untouched, Tensor)
            return drafts[untouched]

    model, setting = setting_of(layout, "static-1")
    plainly = plain(layout, "static-1", 0.0, 11, 0)
    ours = decode(model, plainly.prompt, setting, WithinBlock(plainly, 8))
    assert_lossless(ours, plainly)
    # None: x1 | x2..x8 by hops, x9 from the completed block | x10..x16.
    # Dual: x1 | x2..x8 | x9 (whole forward of block 1) | x10..x16.
    assert ours.stats.nfe == forwards


@dataclass
class Garbage:
    """Whole states that have nothing to do with the decode."""

    kind: str
    mask_token_id: int
    token_ranks = 1
    asks_rejected = True

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        ids = root.ids
        generator = torch.Generator().manual_seed(root.step)
        noise = torch.randint(0, self.mask_token_id, (3, len(ids)), generator=generator)
        if self.kind == "noise":
            return noise
        if self.kind == "all masks":
            return torch.full_like(noise, self.mask_token_id)
        if self.kind == "the root again":
            return ids.repeat(3, 1)
        if self.kind == "prompt changed":
            drafts = ids.repeat(3, 1)
            drafts[:, 0] = noise[:, 0]
            return drafts
        filled = ids.repeat(3, 1)
        filled[filled == self.mask_token_id] = noise[filled == self.mask_token_id]
        return filled  # no masks


GARBAGE = ("noise", "all masks", "the root again", "prompt changed", "no masks")


@pytest.mark.parametrize(
    ("kind", "layout", "temperature"), each_with_a_temperature(GARBAGE, (0.0, 1.0))
)
def test_garbage_drafts_change_nothing(kind: str, layout: str, temperature: float) -> None:
    model, setting = setting_of(layout, "static-1", temperature)
    plainly = plain(layout, "static-1", temperature, 11, 0)
    ours = decode(
        model, plainly.prompt, setting, Garbage(kind, model.mask_token_id), edges=plainly.edges
    )
    assert_lossless(ours, plainly)
    assert ours.stats.accepted == 0
    assert ours.stats.drafted > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_true_states_drafted_beyond_the_room_given_change_nothing(layout: str) -> None:
    """A drafter that completes blocks where it was told not to is right about the future."""
    plainly = plain(layout, "static-1", 0.0, 11, 0)
    drafter = Oracle(plainly, 20, obeys_room=False)
    ours = decode(plainly.model, plainly.prompt, plainly.settings, drafter, edges=plainly.edges)
    assert states(ours) == states(plainly)
    assert ours.stats.nfe + ours.stats.accepted == plainly.stats.nfe
    assert ours.stats.nfe < plainly.stats.nfe


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("layout", ["llada-none", "sdar-block"])
def test_block_edges_change_the_cost_and_never_the_tokens(layout: str, temperature: float) -> None:
    model, setting = setting_of(layout, "static-1", temperature)
    prompt = random_prompt(model, 11)
    expected = states(plain(layout, "static-1", temperature, 11, 0))
    fills = future_fills(layout, "static-1", temperature, 11, 4)
    for switches in product([False, True], repeat=3):
        edges = BlockEdges(*switches)
        plainly = decode(model, prompt, setting, edges=edges)
        assert states(plainly) == expected
        assert plainly.stats.nfe == len(expected) + stores(plainly)
        for drafter in (GraphDrafter(fills, model), Oracle(plainly, 3)):
            ours = decode(model, prompt, setting, drafter, edges=edges)
            assert states(ours) == expected
            gained = plainly.stats.nfe - ours.stats.nfe - ours.stats.accepted
            # A draft that completes its block and comes true has stored it, too.
            assert 0 <= gained <= (stores(plainly) if edges.complete else 0)


# ---------------------------------------------------------------- the end of an answer


def first_new_token(ids: Sequence[int], block: int) -> int:
    """A token of the given block that does not occur in the blocks before it."""
    return next(k for k in range(8 * block, 8 * block + 8) if ids[k] not in ids[: 8 * block])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("layout", ["llada-none", "llada-dual", "dream-none", "dream-dual"])
def test_an_answer_ends_with_the_block_that_holds_its_first_eos(
    layout: str, temperature: float
) -> None:
    model, setting = setting_of(layout, "static-1", temperature, stop_at_eos=True)
    whole = plain(layout, "static-1", temperature, 11, 0)
    full = answer_ids(whole)
    for block in (0, 1):
        at = first_new_token(full, block)
        ending = with_eos(model, [full[at]])
        plainly = decode(ending, whole.prompt, setting)
        assert answer_ids(plainly) == full[: full.index(full[at]) + 1]
        assert states(plainly) == states(whole)[: 8 * (block + 1)]  # one token a step
        assert plainly.path[-1].finished
        for drafter in (Oracle(whole, 5), GraphDrafter([[(0, 0)], [(1, 0)]], ending)):
            ours = decode(ending, whole.prompt, setting, drafter)
            assert states(ours) == states(plainly)
            assert answer_ids(ours) == answer_ids(plainly)
            assert ours.stats.nfe + ours.stats.accepted == plainly.stats.nfe


def test_an_eos_in_the_prompt_ends_nothing() -> None:
    model, setting = setting_of("sdar-block", "static-1", stop_at_eos=True)
    whole = plain("sdar-block", "static-1", 0.0, 11, 0)
    eos = int(whole.prompt[10])  # in the prompt's tail, which opens the first decoded block
    assert eos not in answer_ids(whole)
    ours = decode(with_eos(model, [eos]), whole.prompt, setting)
    assert states(ours) == states(whole)


def test_without_stop_at_eos_an_answer_runs_to_its_length() -> None:
    model, setting = setting_of("llada-none", "static-1")
    whole = plain("llada-none", "static-1", 0.0, 11, 0)
    ours = decode(with_eos(model, answer_ids(whole)), whole.prompt, setting)
    assert answer_ids(ours) == answer_ids(whole)
    assert len(answer_ids(ours)) == 16


def test_mask_tokens_in_the_prompt_stay_there() -> None:
    for layout in ("llada-none", "llada-dual", "sdar-block"):
        model, setting = setting_of(layout, "static-1")
        prompt = random_prompt(model, 11)
        prompt[[2, 10]] = model.mask_token_id
        plainly = decode(model, prompt, setting)
        assert states(plainly)[-1][:11] == prompt.tolist()
        assert model.mask_token_id not in answer_ids(plainly)
        assert_lossless(decode(model, prompt, setting, Oracle(plainly, 3)), plainly)
