"""What pays: the decision on hand-made numbers, and where measurements are kept. Nothing timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import decode, parity_model, random_prompt, states
from hypothesis import given
from hypothesis import strategies as st

from spiffy.calib.pipeline import Traces, build_graph
from spiffy.calib.prompts import PromptSet
from spiffy.calib.record import Recorder, Trace
from spiffy.runtime import decoding_settings, generate, load_model
from spiffy.runtime.budget import cost, timed
from spiffy.runtime.budget.auto import Cutoff, auto_budget
from spiffy.runtime.budget.predict import Plan, best_plan, steps_by_drafts
from spiffy.runtime.budget.roofline import (
    Accelerator,
    Shape,
    forward_seconds,
    layout,
    predicted_profile,
)
from spiffy.runtime.decode import Task, make_task
from spiffy.runtime.draft import AcceptanceDrafter, GraphDrafter, way_of
from spiffy.runtime.models import base
from spiffy.runtime.step.canvas import Canvas
from spiffy.schemas import (
    AcceptanceModel,
    CostPoint,
    CostProfile,
    DecodingSettings,
    DraftGraph,
    ExpectedSteps,
)


def curve(*pairs: tuple[int, float]) -> tuple[CostPoint, ...]:
    return tuple(CostPoint(drafts=n, seconds=seconds) for n, seconds in pairs)


def profile(*pairs: tuple[int, float], **more: object) -> CostProfile:
    return CostProfile(**{"device": "any", "dtype": "float32", "points": curve(*pairs), **more})


def steps(*pairs: tuple[int, float]) -> tuple[ExpectedSteps, ...]:
    return tuple(ExpectedSteps(drafts=n, steps=value) for n, value in pairs)


STEPS = steps((0, 1.0), (1, 1.6), (4, 2.4), (8, 2.8))
FLAT = profile((0, 1.0), (1, 1.01), (4, 1.02), (8, 1.03))
STEEP = profile((0, 1.0), (1, 2.0), (4, 5.0), (8, 9.0))


# The decision


def test_all_drafts_pay_where_they_are_free_and_none_where_they_cost_a_forward_each() -> None:
    flat = best_plan({"graph": STEPS}, FLAT)
    assert (flat.selection, flat.drafts) == ("graph", 8)
    assert flat.speedup == pytest.approx(2.8 / 1.03)
    steep = best_plan({"graph": STEPS}, STEEP)
    assert (steep.selection, steep.drafts, steep.speedup) == (None, 0, 1.0)


def test_between_the_extremes_the_most_steps_per_second_win() -> None:
    # 1.6 / 1.2 = 1.33, 2.4 / 1.5 = 1.6, 2.8 / 2.0 = 1.4
    plan = best_plan({"graph": STEPS}, profile((0, 1.0), (1, 1.2), (4, 1.5), (8, 2.0)))
    assert plan.drafts == 4
    assert plan.speedup == pytest.approx(1.6)


def test_steps_cost_the_same_either_way_and_dilute_the_gain() -> None:
    # Per step: plain 1 + 0.5, with four drafts 1.5 / 2.4 + 0.5.
    points = ((0, 1.0), (1, 1.2), (4, 1.5), (8, 2.0))
    plan = best_plan({"graph": STEPS}, profile(*points, step_seconds=0.5))
    assert plan.drafts == 4
    assert plan.speedup == pytest.approx(1.5 / (1.5 / 2.4 + 0.5))


def test_a_better_way_of_choosing_must_be_worth_its_time() -> None:
    both = {"graph": STEPS, "model": steps((0, 1.0), (4, 2.6), (8, 3.2))}
    assert best_plan(both, FLAT).selection == "model"
    slow = {"graph": curve((1, 0.01)), "model": curve((1, 0.9), (8, 1.1))}
    assert best_plan(both, profile(*pairs(FLAT), drafting=slow)).selection == "graph"
    turns = {"graph": curve((1, 1.0), (8, 1.1)), "model": curve((1, 2.0), (8, 2.1))}
    assert best_plan(both, profile(*pairs(FLAT), turns=turns)).selection == "graph"


def pairs(measured: CostProfile) -> list[tuple[int, float]]:
    return [(point.drafts, point.seconds) for point in measured.points]


def test_a_small_promise_is_not_trusted() -> None:
    promising = profile((0, 1.0), (1, 1.6 / 1.05))
    assert best_plan({"graph": STEPS[:2]}, promising, margin=0.0).drafts == 1
    assert best_plan({"graph": STEPS[:2]}, promising).selection is None


def test_drafts_beyond_what_was_measured_or_calibrated_are_not_planned() -> None:
    assert best_plan({"graph": STEPS}, profile((0, 1.0), (4, 1.0))).drafts == 4
    assert best_plan({"graph": STEPS[:3]}, FLAT).drafts == 4


def test_a_draft_is_kept_while_its_probability_exceeds_its_price() -> None:
    # At 2 steps a second, a draft of 0.2 s must gain 0.4 steps.
    cutoff = Cutoff(2.0, np.array([1.0, 1.2, 1.4, 1.6]))
    assert cutoff(np.array([0.9, 0.5, 0.3])) == 2
    assert cutoff(np.array([0.3, 0.3, 0.3])) == 0
    assert cutoff(np.array([])) == 0
    assert cutoff(np.array([0.9] * 9)) == 3  # no price is known beyond
    # A step up that two drafts share: neither pays alone.
    assert Cutoff(1.0, np.array([1.0, 1.9, 1.9]))(np.array([0.6, 0.5])) == 2


probabilities = st.lists(st.floats(0, 1), max_size=12).map(lambda p: sorted(p, reverse=True))
increments = st.lists(st.floats(0, 2), min_size=12, max_size=12)


@given(probabilities, increments, st.floats(0.01, 10))
def test_no_draft_is_chosen_whose_marginal_gain_is_negative(
    p: list[float], more: list[float], rate: float
) -> None:
    seconds = np.concatenate(([1.0], 1.0 + np.cumsum(more)))
    n = Cutoff(rate, seconds)(np.array(p))
    assert 0 <= n <= len(p)
    for fewer in range(n):  # dropping the last ones loses
        assert sum(p[fewer:n]) > rate * (seconds[n] - seconds[fewer]) - 1e-9
    for further in range(n + 1, len(p) + 1):  # and adding some gains nothing
        assert sum(p[n:further]) <= rate * (seconds[further] - seconds[n]) + 1e-9


@given(probabilities, increments, increments, st.floats(0.01, 10))
def test_dearer_drafts_are_never_more(
    p: list[float], more: list[float], extra: list[float], rate: float
) -> None:
    cheap = np.concatenate(([1.0], 1.0 + np.cumsum(more)))
    dear = np.concatenate(([1.0], 1.0 + np.cumsum(np.add(more, extra))))
    few, many = Cutoff(rate, dear)(np.array(p)), Cutoff(rate, cheap)(np.array(p))
    # Sums round; equal worth may then go either way.
    gain = sum(p[many:few]) - rate * (dear[few] - dear[many])
    assert few <= many or gain < 1e-9


# Drafting by it


@pytest.fixture(scope="module")
def calibrated() -> tuple[Task, DraftGraph]:
    """A plain decode, and a graph with an acceptance model made for it by hand."""
    model = parity_model("sdar-a", "float64")
    settings = decoding_settings(model, gen_length=24, block_length=8, stop_at_eos=False)
    tasks = [decode(model, random_prompt(model, 5 + k), settings, Recorder()) for k in range(3)]
    traces = Traces(tuple(Trace.of(task) for task in tasks), 0, 0)
    graph = build_graph(model, PromptSet("random", ("-",) * 3), settings, traces, budget=8)
    acceptance = AcceptanceModel(
        position={"logit": 1.0},
        token={"log_p": 1.0},
        bigrams=(),
        expected_steps=steps((0, 1.0), (8, 9.0)),
    )
    assert graph.expected_steps[8] > 1.1
    return tasks[0], graph.model_copy(update={"acceptance": acceptance})


def test_drafts_that_do_not_pay_at_a_root_are_left_out(
    calibrated: tuple[Task, DraftGraph],
) -> None:
    plain, graph = calibrated
    drafted = []
    for dear in (1.0, 3.0):
        drafter = way_of(plain.model, graph, plain.settings, 8, "model")
        assert isinstance(drafter, AcceptanceDrafter)
        plan = best_plan(steps_by_drafts(graph), profile((0, 1.0), (8, dear)))
        # A plain forward takes a second, so the speedup is also the steps per second.
        drafter.cutoff = Cutoff(plan.speedup, np.linspace(1.0, dear, 9))
        ours = decode(plain.model, plain.prompt, plain.settings, drafter)
        assert states(ours) == states(plain)
        drafted.append(ours.stats.drafted / ours.stats.nfe)
    assert 0 < drafted[1] < drafted[0]


def _with_cache(settings: DecodingSettings, cache: str) -> DecodingSettings:
    return settings.model_copy(update={"cache": cache})


def test_settings_for_which_expected_steps_do_not_hold_are_named(
    calibrated: tuple[Task, DraftGraph],
) -> None:
    plain, graph = calibrated
    other = DecodingSettings.parse(**{**plain.settings.model_dump(), "policy": "threshold"})
    assert graph.differences(other) == ("policy threshold (static)",)
    # How long an answer may be does not matter, nor a threshold that is not looked at.
    assert not graph.differences(plain.settings.model_copy(update={"gen_length": 8}))
    assert not graph.differences(plain.settings.model_copy(update={"threshold": 0.5}))
    # The two prefix caches decode the same without drafts, whatever else does not.
    prefix = graph.model_copy(update={"decoding": _with_cache(graph.decoding, "prefix")})
    assert not prefix.differences(_with_cache(graph.decoding, "prefix-shared"))
    assert prefix.differences(_with_cache(graph.decoding, "dual")) == ("cache dual (prefix)",)
    # Auto drafts all the same, and learns; but not by a model fitted to other steps.
    task = make_task(plain.model, plain.prompt, other)
    budget = auto_budget(task, graph)
    assert budget is not None
    assert {choice.way for choice in budget.shared.current._choices} == {None, "graph"}


def _given(graph: DraftGraph) -> dict[str, Any]:
    """The graph's settings, as options."""
    return {key: value for key, value in graph.decoding.model_dump().items() if value is not None}


def test_auto_needs_no_expected_steps(calibrated: tuple[Task, DraftGraph]) -> None:
    plain, graph = calibrated
    bare = graph.model_copy(update={"acceptance": None, "expected_steps": ()})
    out = generate(plain.model, plain.prompt, graph=bare, trace=True)
    assert out.states == states(plain)
    assert sum(out.stats.budgets.values()) > 0
    # Those of the acceptance model alone, which do not hold for other settings.
    half = graph.model_copy(update={"expected_steps": ()})
    other = {"policy": "threshold", "threshold": 0.2}
    by_hand = generate(plain.model, plain.prompt, **{**_given(graph), **other}, trace=True)
    out = generate(plain.model, plain.prompt, graph=half, **other, trace=True)
    assert out.states == by_hand.states
    empty = bare.model_copy(update={"nodes": ()})
    assert auto_budget(plain, empty) is None
    assert generate(plain.model, plain.prompt, graph=empty, trace=True).states == states(plain)


# Measuring, and keeping what was measured


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llada-a", "none"),
        ("llada-a", "prefix"),
        ("llada-a", "prefix-shared"),
        ("dream-a", "dual"),
        ("sdar-a", "block"),
    ],
)
@pytest.mark.parametrize("length", [5, 16])
def test_measuring_covers_what_was_asked_for(name: str, kind: str, length: int) -> None:
    model = parity_model(name)
    settings = decoding_settings(model, gen_length=16, block_length=8, cache=kind)
    task = make_task(model, random_prompt(model, length), settings)
    makers = {"graph": lambda n: GraphDrafter([[(0, j)] for j in range(n)], model)}
    measured = cost.measure_cost(task, 6, makers, limit=0.3)
    drafts = [point.drafts for point in measured.points]
    assert drafts == [0, 1, 2, 3, 4, 6][: len(drafts)]
    assert len(drafts) > 1
    assert [point.drafts for point in measured.turns["graph"]] == drafts[1:]
    assert measured.step_seconds > 0
    assert measured.largest == 6
    assert (measured.cache, measured.block_length) == (kind, 8)
    assert task.path == []
    assert task.stats.nfe == 0


def test_a_large_head_is_part_of_the_forward_as_several_states_pass_it_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = parity_model("sdar-a")
    settings = decoding_settings(model, gen_length=16, block_length=8, cache="block")
    task = make_task(model, random_prompt(model, 16), settings)
    passed: dict[str, list[int]] = {"forward": [], "step": []}
    doing = ["forward"]
    head, step = model.head, timed._DecodeParts.step

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        passed[doing[-1]].append(len(hidden))
        return head(hidden)

    def stepping(*arguments: Any) -> None:
        doing.append("step")
        step(*arguments)
        doing.pop()

    monkeypatch.setattr(model, "head", counting)
    monkeypatch.setattr(timed._DecodeParts, "step", stepping)
    cost.measure_cost(task, 2, limit=0.2)
    assert passed["step"]
    monkeypatch.setattr(base, "_EXPENSIVE", 0)
    for found in passed.values():
        found.clear()
    cost.measure_cost(task, 2, limit=0.2)
    assert not passed["step"]
    assert max(passed["forward"]) > 8  # of a block


def test_what_is_slow_once_is_not_taken_for_what_drafts_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first forward of a size may load kernels, or compile them."""
    model = parity_model("sdar-a")
    settings = decoding_settings(model, gen_length=16, block_length=8, cache="block")
    task = make_task(model, random_prompt(model, 16), settings)
    forward, seen = timed._DecodeParts.forward, set[int]()
    now = 0.0  # of a clock that goes on where a forward is made

    def first_slow(parts: Any, roots: Any, states: torch.Tensor) -> Any:
        nonlocal now
        now += 1.5 if len(states) == 2 and 2 not in seen else 0.01
        seen.add(len(states))
        return forward(parts, roots, states)

    monkeypatch.setattr(timed._DecodeParts, "forward", first_slow)
    monkeypatch.setattr(timed, "perf_counter", lambda: now)
    measured = cost.measure_cost(task, 4, limit=1.0)
    assert [point.drafts for point in measured.points] == [0, 1, 2, 3, 4]
    assert [point.seconds for point in measured.points] == pytest.approx([0.01] * 5)


def test_where_no_draft_fits_into_memory_plain_forwards_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = parity_model("llada-a")
    task = make_task(model, random_prompt(model, 4), decoding_settings(model, gen_length=32))
    forward = timed._DecodeParts.forward

    def short(parts: Any, roots: Any, states: torch.Tensor) -> Any:
        if len(states) > 1:
            raise torch.OutOfMemoryError
        return forward(parts, roots, states)

    monkeypatch.setattr(timed._DecodeParts, "forward", short)
    chain = GraphDrafter([[(0, 0)], [(0, 0), (1, 0)]], model)
    measured = cost.measure_cost(task, 8, {"graph": lambda _: chain})
    assert [point.drafts for point in measured.points] == [0]
    assert measured.drafting == measured.turns == {}
    here = cost.conditions(task)
    assert cost._serves(measured, here, 8, {"graph"})  # it is not measured in every run
    assert not cost._serves(cost.measure_cost(task, 8), here, 9, {"graph"})
    assert best_plan({"graph": STEPS}, measured) == Plan(None, 0, 1.0)


def test_where_drafts_overflow_costs_are_those_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which makes such a forward again without them."""
    model = parity_model("llada-a")
    settings = decoding_settings(model, gen_length=16, block_length=8, cache="dual")
    task = make_task(model, random_prompt(model, 4), settings)
    hidden_states = model.hidden_states

    def overflowing(ids: torch.Tensor, positions: torch.Tensor, groups: Any) -> torch.Tensor:
        hidden = hidden_states(ids, positions, groups)
        (group,) = groups
        return hidden if group.mask is None else torch.full_like(hidden, torch.nan)

    monkeypatch.setattr(model, "hidden_states", overflowing)
    chain = GraphDrafter([[(0, 0)], [(0, 0), (1, 0)]], model)
    measured = cost.measure_cost(task, 2, {"graph": lambda _: chain}, limit=0.5)
    assert [point.drafts for point in measured.points] == [0, 1, 2]
    assert min(point.seconds for point in measured.turns["graph"]) > 0


def test_a_machine_too_slow_for_the_limit_still_tries_one_draft() -> None:
    model = parity_model("llada-a")
    task = make_task(model, random_prompt(model, 4), decoding_settings(model, gen_length=32))
    measured = cost.measure_cost(task, 8, limit=0.0)
    assert [point.drafts for point in measured.points] == [0, 1]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Count measurements instead of making them, in an empty cache."""
    done: list[int] = []

    def measure(task: Task, largest: int, drafters: object = None) -> CostProfile:
        done.append(largest)
        return profile((0, 1.0), (largest, 2.0), largest=largest, **cost.conditions(task))

    monkeypatch.setattr(cost, "measure_cost", measure)
    monkeypatch.setattr(cost, "_remembered", {})
    monkeypatch.setenv("SPIFFY_CACHE", str(tmp_path / "cache"))
    return done


def task_of(length: int = 20, **options: object) -> Task:
    model = parity_model("llada-a")
    settings = decoding_settings(model, **{"gen_length": 32, "block_length": 8, **options})
    return make_task(model, random_prompt(model, length), settings)


def test_a_measurement_is_kept_across_processes_and_for_similar_prompts(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cost.cost_profile(task_of(), 8)
    monkeypatch.setattr(cost, "_remembered", {})  # another process
    assert cost.cost_profile(task_of(), 8) == first
    assert cost.cost_profile(task_of(21), 4) == first  # 44 and 45 positions outside the block
    assert counted == [8]
    assert cost.cost_profile(task_of(), 8, remeasure=True) == first
    assert counted == [8, 8]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("fpu avx512_bf16 amx_bf16 amx_tile", "Some Xeon with AMX"),
        ("fpu avx512f avx512_bf16", "Some Xeon with AVX-512 BF16"),
        ("fpu avx512f", "Some Xeon"),
    ],
)
def test_processors_of_one_name_are_told_apart_by_what_they_multiply(
    flags: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: {flags}\nbugs\t\t:\n\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: said * 2)
    assert cost.device_name(torch.device("cpu")) == name


def test_other_conditions_are_measured_on_their_own(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [
        task_of(),
        task_of(block_length=16),
        task_of(cache="dual"),
        task_of(cache="prefix"),
        task_of(cache="prefix", gen_length=16),
        task_of(cache="prefix-shared"),
        task_of(policy="threshold"),
        task_of(60),
    ]
    for task in others:
        cost.cost_profile(task, 8)
    assert len(counted) == len(others)
    monkeypatch.setattr(cost, "device_name", lambda device: "another")
    cost.cost_profile(others[0], 8)
    assert len(counted) == len(others) + 1
    cost.cost_profile(others[0], 16)  # more drafts than were measured
    assert len(counted) == len(others) + 2


def test_what_was_measured_before_prefix_was_exact_is_measured_again(counted: list[int]) -> None:
    """Older profiles of that cache say nothing of a suffix: a draft cost a block alone."""
    task = task_of(cache="prefix")
    older = cost.measure_cost(task, 8).model_copy(update={"suffix_length": None})
    assert cost.known_profile(task, (older,)) is None
    cost.cost_profile(task, 8, stored=(older,))
    assert counted == [8, 8]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"points": [{"drafts": 0}]}', b"\xff\xfe", b'{"a": NaN}']
)
def test_a_damaged_file_is_measured_again(
    counted: list[int], damage: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = cost.cost_profile(task_of(), 8)
    (file,) = (tmp_path / "cache" / "cost").iterdir()
    file.write_bytes(damage)
    monkeypatch.setattr(cost, "_remembered", {})
    assert cost.cost_profile(task_of(), 8) == expected
    assert counted == [8, 8]
    assert CostProfile.model_validate_json(file.read_text()) == expected


def test_a_cache_that_cannot_be_written_costs_one_measurement(
    counted: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPIFFY_CACHE", str(tmp_path / "file"))
    cost.cost_profile(task_of(), 8)
    cost.cost_profile(task_of(), 8)
    assert counted == [8]


def test_a_profile_that_came_with_the_artifact_serves_where_it_was_measured(
    counted: list[int],
) -> None:
    task = task_of()
    ours = profile((0, 3.0), (8, 4.0), largest=8, **cost.conditions(task))
    foreign = ours.model_copy(update={"device": "another"})
    assert cost.cost_profile(task, 8, stored=(foreign, ours)) == ours
    assert counted == []
    assert cost.cost_profile(task, 8, stored=(foreign,)) != foreign
    assert counted == [8]


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setenv("SPIFFY_CACHE", "/else")
    assert cost.cache_folder() == Path("/else")
    monkeypatch.delenv("SPIFFY_CACHE")
    assert cost.cache_folder() == Path("/somewhere/spiffy")


# Roofline


SHAPE = Shape(
    shared=1_000_000, experts=0, experts_share=1.0, layers=2, width=64, kv_width=32, head=50_000
)
CANVAS = Canvas.plan(40, 64, 16, block_causal=False)  # blocks at 40, 56, 72, 88
SLOW_MEMORY = Accelerator("slow memory", bandwidth=1e6, peak=1e15)
SLOW_COMPUTE = Accelerator("slow compute", bandwidth=1e15, peak=1e6)


def test_layouts_of_a_middle_block() -> None:
    # The third of four blocks: 72 positions before it, 16 after it.
    assert layout(CANVAS, "none", 3) == (4, 104, 0)
    assert layout(CANVAS, "dual", 3) == (1, 64, 88)
    assert layout(CANVAS, "prefix", 3) == (1, 128, 72)
    assert layout(CANVAS, "prefix-shared", 3) == (1, 80, 72)
    assert layout(CANVAS, "block", 3) == (1, 64, 72)


def test_memory_bound_forwards_move_weights_once_and_keys_and_values() -> None:
    # 2 bytes each: a million weights; keys and values of 2 layers, 32 wide, 88 + 4 * 16 positions.
    moved = 2 * (1_000_000 + 2 * 2 * 32 * (88 + 64))
    assert forward_seconds(SHAPE, SLOW_MEMORY, CANVAS, "dual", 3) == pytest.approx(moved / 1e6)


def test_compute_bound_forwards_pay_for_every_position() -> None:
    # 2 FLOPs per weight and position; queries times keys and weights times values: 2 FLOPs each.
    flops = 2 * 1_000_000 * 64 + 2 * (2 + 2) * 64 * 64 * (88 + 64)
    assert forward_seconds(SHAPE, SLOW_COMPUTE, CANVAS, "dual", 3) == pytest.approx(flops / 1e6)
    # Without a cache, four sequences of 104 positions that see themselves only.
    flops = 2 * 1_000_000 * 416 + 2 * (2 + 2) * 64 * 416 * 104
    assert forward_seconds(SHAPE, SLOW_COMPUTE, CANVAS, "none", 3) == pytest.approx(flops / 1e6)


def test_all_states_of_a_forward_read_the_output_head_once() -> None:
    shape = Shape(0, 0, 1.0, 0, 0, 0, head=5_000_000)
    points = predicted_profile(shape, SLOW_MEMORY, CANVAS, "dual", (0, 1, 8)).points
    assert [p.seconds for p in points] == pytest.approx([2 * 5_000_000 / 1e6] * 3)
    points = predicted_profile(shape, SLOW_COMPUTE, CANVAS, "dual", (0, 1)).points
    rows = CANVAS.block_length // 2  # masked on average
    flops = 2 * 5_000_000 * rows
    assert [p.seconds for p in points] == pytest.approx([flops / 1e6, 2 * flops / 1e6])


def test_few_positions_leave_experts_unread() -> None:
    mixture = replace(SHAPE, experts=4_000_000, experts_share=0.25)
    tiny = Canvas.plan(0, 2, 1, block_causal=False)
    # One position reads a quarter of the experts, and computes with a quarter.
    moved = 2 * (1_000_000 + 1_000_000 + 2 * 2 * 32 * 2)
    assert forward_seconds(mixture, SLOW_MEMORY, tiny, "dual", 0) == pytest.approx(moved / 1e6)
    # Two positions miss one with probability 9/16.
    moved = 2 * (1_000_000 + 4_000_000 * 7 / 16 + 2 * 2 * 32 * 3)
    assert forward_seconds(mixture, SLOW_MEMORY, tiny, "dual", 1) == pytest.approx(moved / 1e6)


def test_a_mixtures_shape_counts_its_experts_by_their_weights() -> None:
    """4 of 12 experts of 3 x 32 x 256 parameters in 4 layers of tiny-llada2."""
    shape = Shape.of(load_model("tiny-llada2", device="cpu"))
    assert (shape.experts, shape.experts_share) == (4 * 12 * 3 * 32 * 256, 4 / 12)
    assert (shape.layers, shape.width, shape.head) == (5, 256, 1024 * 256)


@pytest.mark.parametrize("name", ["llada-a", "dream-a", "sdar-a"])
def test_the_shape_of_a_model_counts_its_parameters(name: str) -> None:
    model = parity_model(name)
    shape = Shape.of(model)
    matrices = sum(
        p.numel()
        for key, p in model.module.state_dict().items()
        if "embed_tokens" not in key and "lm_head" not in key
    )
    assert shape.shared == matrices
    assert shape.head == model.vocab_size * model.module.config.hidden_size
    layer = model.module.model.layers[0].self_attn
    assert shape.width == layer.q_proj.out_features
    assert shape.kv_width == layer.k_proj.out_features


def test_drafts_pay_on_a_memory_bound_accelerator_only() -> None:
    model = parity_model("llada-a")
    canvas = Canvas.plan(8, 16, 8, block_causal=False)
    plans = [
        best_plan(
            {"graph": STEPS},
            predicted_profile(Shape.of(model), accelerator, canvas, "dual", (0, 1, 4, 8)),
        )
        for accelerator in (SLOW_MEMORY, SLOW_COMPUTE)
    ]
    assert plans[0].drafts > 0
    assert plans[1].drafts == 0


def test_a_forward_with_drafts_is_not_predicted_to_take_less_than_a_plain_one() -> None:
    """Timed in a slow moment, a plain one may seem to: then more would be gained than steps."""
    uneven = profile((0, 4.0), (1, 1.01), (4, 1.02), (8, 1.03))
    assert best_plan({"graph": STEPS}, uneven).speedup == pytest.approx(2.8)
