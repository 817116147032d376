"""Expected steps of what is really run: held-out prompts decoded with drafts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from own_policies import FACTOR

from spiffy.calib import measure
from spiffy.calib.measure import decodes, measure_steps
from spiffy.calib.pipeline import Traces, build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.graphs import replay
from spiffy.runtime import decoding_settings, generate, load_model
from spiffy.runtime.budget.predict import steps_by_drafts
from spiffy.schemas import DraftGraph, ExpectedSteps, SpiffyError

Calibrated = tuple[list[Any], Traces, DraftGraph]


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    model, prompts = load_model("tiny-sdar", device="cpu"), load_prompts("synthetic", 12)
    settings = decoding_settings(model, gen_length=48)
    tasks = prepare(model, prompts, settings)
    traces = record(model, tasks)
    return tasks, traces, build_graph(model, prompts, settings, traces, 12)


def test_steps_are_those_of_decoding_with_drafts(calibrated: Calibrated) -> None:
    tasks, traces, graph = calibrated
    done: list[None] = []
    measured = measure_steps(graph, tasks, traces, lambda: done.append(None))
    assert 0 < len(done) <= decodes(graph, traces)
    assert measured.digest() == graph.digest()
    held_out = [tasks[k] for k in traces.held_out_indices()]
    for way, points in measured.measured_steps.items():
        for point in points:
            outputs = [
                generate(
                    task.model,
                    task.prompt,
                    graph=graph,
                    budget=point.drafts,
                    selection=way,  # type: ignore[arg-type]
                )
                for task in held_out
            ]
            steps = sum(output.stats.steps for output in outputs)
            accepted = sum(output.stats.accepted for output in outputs)
            assert point.steps == pytest.approx(steps / (steps - accepted), abs=1e-6)


def replayed(graph: DraftGraph, traces: Traces, drafts: int, numbers: Sequence[int]) -> float:
    """What chains, rather than drafters, say of these prompts and the first nodes."""
    fills = {node.fill for node in graph.nodes[:drafts]}
    return replay([traces.prompts[k].chains for k in numbers], fills).steps_per_forward


def test_what_was_measured_is_compared_with_a_replay_of_the_same_prompts(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    tasks, traces, graph = calibrated
    found = measure_steps(graph, tasks, traces)
    for point in found.measured_steps["graph"]:
        known = replayed(graph, traces, point.drafts, traces.held_out_indices())
        assert point.replayed == pytest.approx(known, abs=1e-6)
    assert all(point.replayed for point in found.measured_steps["model"])
    found.save(tmp_path / "graph.json")
    assert DraftGraph.load(tmp_path / "graph.json") == found


def test_other_prompts_than_most_do_not_scale_the_curve(calibrated: Calibrated) -> None:
    """Four prompts that draft better than the others, by decodes and by replays alike."""
    _, _, graph = calibrated
    before = steps_by_drafts(graph)["graph"]
    for share in (1.0, 0.5):
        few = ExpectedSteps(drafts=8, steps=1 + 3 * share, replayed=4.0)
        corrected = graph.model_copy(update={"measured_steps": {"graph": (few,)}})
        after = steps_by_drafts(corrected)["graph"]
        assert [p.steps - 1 for p in after] == pytest.approx(
            [share * (p.steps - 1) for p in before]
        )


def test_older_points_state_no_replay_and_keep_their_digest() -> None:
    assert ExpectedSteps(drafts=8, steps=3.0).model_dump() == {"drafts": 8, "steps": 3.0}
    known = {"drafts": 8, "steps": 3.0, "replayed": 2.5}
    assert ExpectedSteps.model_validate(known).model_dump() == known


def test_the_replayed_curve_goes_through_what_was_measured(calibrated: Calibrated) -> None:
    _, _, graph = calibrated
    point = ExpectedSteps(drafts=8, steps=3.0)
    corrected = graph.model_copy(update={"measured_steps": {"graph": (point,)}})
    before, after = steps_by_drafts(graph), steps_by_drafts(corrected)
    assert after["model"] == before["model"]
    at = {p.drafts: p.steps for p in after["graph"]}
    assert at[8] == pytest.approx(3.0)
    assert at[0] == 1.0
    replayed = {p.drafts: p.steps for p in before["graph"]}
    assert at[4] - 1 == pytest.approx((replayed[4] - 1) * 2.0 / (replayed[8] - 1))
    assert at[1] <= 2.0


def test_a_token_that_drafts_change_is_an_error(calibrated: Calibrated) -> None:
    tasks, traces, graph = calibrated
    other = traces.held_out_indices()[0]
    wrong = [traces.prompts[other - 1] if k == other else t for k, t in enumerate(traces.prompts)]
    with pytest.raises(SpiffyError, match="drafts changed a token of prompt"):
        measure_steps(graph, tasks, Traces(tuple(wrong), traces.nfe, traces.positions_computed))


def test_in_a_less_exact_dtype_such_a_decode_is_left_out(
    calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tasks, traces, graph = calibrated
    monkeypatch.setattr(measure, "_EXACT", (torch.float64,))
    first, *others = traces.held_out_indices()
    wrong = [traces.prompts[first - 1] if k == first else t for k, t in enumerate(traces.prompts)]
    found = measure_steps(graph, tasks, Traces(tuple(wrong), traces.nfe, traces.positions_computed))
    assert "decodes with drafts of held-out prompts differ from those recorded" in caplog.text
    outputs = [
        generate(tasks[k].model, tasks[k].prompt, graph=graph, budget=8, selection="graph")
        for k in others
    ]
    steps = sum(output.stats.steps for output in outputs)
    accepted = sum(output.stats.accepted for output in outputs)
    (point,) = (p for p in found.measured_steps["graph"] if p.drafts == 8)
    assert point.steps == pytest.approx(steps / (steps - accepted), abs=1e-6)
    assert point.replayed == pytest.approx(replayed(graph, traces, 8, others), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_policy_of_ones_own_is_blamed_only_where_no_tie_can_be(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """A graphics card computes in bfloat16: a calibration of hours does not end by one tie."""
    model, prompts = (
        load_model("tiny-sdar", device="cpu", dtype=dtype),
        load_prompts("synthetic", 4),
    )
    settings = decoding_settings(model, gen_length=16, policy=FACTOR)
    tasks = prepare(model, prompts, settings)
    traces = record(model, tasks)
    graph = build_graph(model, prompts, settings, traces, 4)
    wrong = Traces(traces.prompts[1:] + traces.prompts[:1], traces.nfe, traces.positions_computed)
    if dtype == torch.float32:
        with pytest.raises(SpiffyError, match=f"is policy {FACTOR} a pure function"):
            measure_steps(graph, tasks, wrong)
    else:
        measure_steps(graph, tasks, wrong)
        assert f"by a near-tie of bfloat16 (or policy {FACTOR} is no pure function)" in caplog.text


def test_one_prompt_has_nothing_held_out_to_measure(calibrated: Calibrated) -> None:
    tasks, traces, graph = calibrated
    alone = Traces(traces.prompts[:1], traces.nfe, traces.positions_computed)
    assert decodes(graph, alone) == 0
    assert measure_steps(graph, tasks[:1], alone).measured_steps == {}
