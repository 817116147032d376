"""Calibration end to end on a random-weight model: chains, artifact, replay against decoding."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import decode, parity_model, random_prompt
from test_graphs import READINGS, Growth

from spiffy.calib import fit, pipeline, record
from spiffy.calib.pipeline import (
    Traces,
    build_graph,
    expected_steps,
    grow_by,
    prepare,
)
from spiffy.calib.prompts import PromptSet, load_prompts
from spiffy.calib.record import Recorder, Root, Trace, spread
from spiffy.calib.replay_drafts import replay_drafter
from spiffy.calib.synthetic import final_answer, problems
from spiffy.graphs import (
    ChainCounts,
    count_chains,
    grow,
    grow_by_transitions,
    grow_paper,
    replay,
)
from spiffy.runtime import BlockEdges, decoding_settings, load_model
from spiffy.runtime.decode import make_task, run
from spiffy.runtime.draft import AcceptanceDrafter, GraphDrafter
from spiffy.runtime.draft.acceptance import AcceptanceWeights
from spiffy.schemas import AcceptanceModel, DraftGraph, Objective, SpiffyError

LAYOUTS = [("llada-a", "none"), ("llada-a", "dual"), ("dream-a", "dual"), ("sdar-a", "block")]


def traced(name: str, cache: str, prompts: int = 4, **options: object) -> tuple[object, list, list]:
    """Model, plain tasks and their traces."""
    model = parity_model(name, "float64")
    settings = decoding_settings(
        model, gen_length=24, block_length=8, cache=cache, stop_at_eos=False, **options
    )
    tasks, traces = [], []
    for k in range(prompts):
        task = decode(model, random_prompt(model, 5 + 3 * k), settings, Recorder())
        tasks.append(task)
        traces.append(Trace.of(task))
    return model, tasks, traces


@pytest.mark.parametrize(("name", "cache"), LAYOUTS)
@pytest.mark.parametrize("policy", ["static", "threshold"])
def test_replay_predicts_the_forwards_of_real_decoding(name: str, cache: str, policy: str) -> None:
    model, plain, traces = traced(name, cache, policy=policy, threshold=0.5)
    fills = grow(count_chains(trace.chains for trace in traces), 12)
    assert fills
    hops = 0
    for task, trace in zip(plain, traces, strict=True):
        drafter = GraphDrafter(fills, model)
        # What a rejected draft says about the next block is not in a plain decode's record.
        edges = BlockEdges(first=cache != "block")
        ours = make_task(model, task.prompt, task.settings, drafter, edges=edges)
        for _ in run(model, [ours]):
            pass
        predicted = replay([trace.chains], set(fills))
        assert ours.stats.steps == predicted.steps == len(trace.roots)
        assert ours.stats.nfe == predicted.forwards
        again = replay_drafter([trace], drafter)
        assert (again.steps, again.forwards) == (predicted.steps, predicted.forwards)
        assert again.drafts == ours.stats.drafted
        hops += ours.stats.accepted
    assert hops > 0


@pytest.mark.parametrize("policy", ["static", "threshold"])
@pytest.mark.parametrize(("name", "cache"), LAYOUTS)
def test_replay_predicts_drafts_chosen_at_run_time(name: str, cache: str, policy: str) -> None:
    """What rejected drafts say is in no plain decode either."""
    model, plain, traces = traced(name, cache, prompts=2, policy=policy, threshold=0.5)
    commit = {"logit": 1.0, "constant": 1.0} if policy == "threshold" else None
    position = {"logit": 1.0, "nearness": 0.5}
    weights = AcceptanceWeights.of(position, commit, {"log_p": 1.0}, (), model.vocab_size)
    drafter = AcceptanceDrafter(weights, 8, model, asks_rejected=False)
    hops = 0
    for task, trace in zip(plain, traces, strict=True):
        edges = BlockEdges(first=cache != "block")
        ours = make_task(model, task.prompt, task.settings, drafter, edges=edges)
        for _ in run(model, [ours]):
            pass
        predicted = replay_drafter([trace], drafter)
        assert (ours.stats.steps, ours.stats.nfe) == (predicted.steps, predicted.forwards)
        assert ours.stats.drafted == predicted.drafts
        hops += ours.stats.accepted
    assert hops > 0


@pytest.mark.parametrize(("name", "cache"), LAYOUTS)
def test_a_chain_names_the_states_that_follow(name: str, cache: str) -> None:
    """Drafting exactly a root's own chain must bring every state of it back."""
    model, (task, *_), (trace, *_) = traced(name, cache, prompts=1)
    seen = 0

    class Echo(Recorder):
        def __call__(self, root, candidates, room):  # type: ignore[no-untyped-def]
            nonlocal seen
            chain = trace.chains[root.step]
            drafts = GraphDrafter(chain, model)(root, candidates, room)
            for draft, cursor in zip(drafts, task.path[root.step :], strict=False):
                assert torch.equal(draft, cursor.ids)
                seen += 1
            return root.ids.new_empty((0, len(root.ids)))

    decode(model, task.prompt, task.settings, Echo())
    assert seen >= len(trace.roots) // 2


def behind(trace: Trace, prefix: int) -> Trace:
    """The same decode behind more prompt."""
    front = torch.zeros(prefix, dtype=torch.int64)
    path = [replace(cursor, ids=torch.cat((front, cursor.ids))) for cursor in trace.path]
    roots = [
        root
        and Root(replace(root.candidates, positions=root.candidates.positions + prefix), root.room)
        for root in trace.roots
    ]
    return Trace(path, roots)


def test_chains_are_found_without_looking_at_a_long_prompt_token_by_token() -> None:
    _, _, (trace,) = traced("llada-a", "none", prompts=1)
    lines = 0

    def on_line(frame: object, event: str, _: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return on_line

    def on_call(frame: FrameType, event: str, _: object) -> Any:
        return on_line if frame.f_code.co_filename == record.__file__ else None

    found = []
    for prefix in (0, 1000):
        lines, longer, before = 0, behind(trace, prefix), sys.gettrace()
        sys.settrace(on_call)
        try:
            chains = longer.chains
        finally:
            sys.settrace(before)
        found.append((chains, lines))
    assert found[0][1] > 100
    assert found[0] == found[1]


def test_chains_are_counted_once() -> None:
    _, _, prompts = traced("llada-a", "none", prompts=2)
    traces = Traces(tuple(prompts), 0, 0)
    assert traces.counts is traces.counts
    assert traces.counts.chains() == count_chains([prompts[0].chains])


def test_of_many_prompts_some_are_replayed_and_each_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _, prompts = traced("llada-a", "dual", prompts=5)
    model_of = AcceptanceModel(position={"logit": 1.0}, token={"log_p": 1.0}, bigrams=())
    told: list[tuple[int, int]] = []
    every = expected_steps(model, prompts, model_of, 4, lambda *done: told.append(done))
    assert told == [(k, 5) for k in range(1, 6)]
    monkeypatch.setattr(pipeline, "_REPLAYED", 2)
    told.clear()
    some = expected_steps(model, prompts, model_of, 4, lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    assert some == expected_steps(model, [prompts[0], prompts[2]], model_of, 4)
    assert some != every


@pytest.mark.parametrize(("count", "most"), [(0, 3), (1, 3), (3, 3), (4, 3), (99, 7), (99, 98)])
def test_what_is_spread_is_spread_evenly(count: int, most: int) -> None:
    found = [*spread(count, most)]
    assert len(found) == len(set(found)) == min(count, most)
    assert found == sorted(found)
    ends = [*found, count]
    gaps = [after - before for before, after in pairwise(ends)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_no_regression_sees_the_answer_that_it_is_fitted_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one prompt alone there is no other to count bigrams on; of two, the other."""
    model, _, prompts = traced("llada-a", "none", prompts=3)
    settings = decoding_settings(model, gen_length=24, block_length=8, cache="none")
    monkeypatch.setattr(fit, "_FEW", 10)
    counted: list[list[int]] = []
    seen: list[set[int]] = []

    def look(examples: Any, folds: Any) -> Any:
        counted.append([len(weights.bigrams.pairs.keys) for weights in folds])
        seen.append({example.prompt for example in examples})
        return fit_tokens(examples, folds)

    fit_tokens = fit._fit_tokens
    monkeypatch.setattr(fit, "_fit_tokens", look)
    alone = fit.fit_acceptance(model, settings, prompts[:1])
    assert counted[-1][0] == 0 < min(counted[-1][1:])
    assert alone is not None
    assert alone.bigrams
    assert {alone.token[name] for name in ("left_bigram", "right_bigram")} == {0.0}
    fit.fit_acceptance(model, settings, prompts[:2])
    assert min(counted[-1]) > 0
    assert seen[-1] == {0, 1}
    monkeypatch.setattr(fit, "_MAX_PROMPTS", 2)
    fit.fit_acceptance(model, settings, prompts)
    assert seen[-1] == {0, 1}  # of three, evenly


@pytest.mark.parametrize(
    ("objective", "growth"),
    [("expected-steps", grow), ("paper", grow_paper), ("transitions", grow_by_transitions)],
)
def test_a_graph_is_grown_by_the_rule_that_its_objective_names(
    objective: Objective, growth: Growth
) -> None:
    assert grow_by(objective, ChainCounts.of(READINGS), 8) == growth(READINGS, 8)


def test_equal_inputs_give_equal_bytes() -> None:
    prompts = PromptSet("random", ("-",) * 4)
    artifacts = []
    for _ in range(2):
        model, tasks, traces = traced("llada-a", "none")
        recorded = Traces(tuple(traces), 0, 0)
        graph = build_graph(model, prompts, tasks[0].settings, recorded, budget=8)
        artifacts.append(graph.to_json())
    assert artifacts[0] == artifacts[1]
    assert '"digest"' in artifacts[0]


def test_artifact_survives_a_round_trip_and_states_its_origin(tmp_path: Path) -> None:
    model, tasks, traces = traced("llada-a", "none", prompts=6)
    recorded = Traces(tuple(traces), 0, 0)
    graph = build_graph(model, PromptSet("x", ("-",) * 6), tasks[0].settings, recorded, budget=8)
    graph.save(tmp_path / "graph.json")
    assert DraftGraph.load(tmp_path / "graph.json") == graph
    assert graph.budget == 8
    # Six prompts: the fifth is held out, the others grow the graph.
    assert (graph.calibration.samples, graph.calibration.held_out_samples) == (5, 1)
    assert graph.calibration.roots == recorded.counts.total()
    assert graph.expected_steps[0] == 1.0
    held_out = replay([traces[4].chains], {node.fill for node in graph.nodes})
    assert graph.expected_steps[8] == pytest.approx(held_out.steps_per_forward, abs=1e-6)


@pytest.mark.parametrize(("prompts", "held_out"), [(1, 0), (2, 1), (3, 1), (5, 1), (10, 2)])
def test_no_prompt_both_grows_and_measures(prompts: int, held_out: int) -> None:
    prompts_ = tuple(Trace([], []) for _ in range(prompts))
    traces = Traces(prompts_, 0, 0)
    assert len(traces.held_out) == held_out
    used = [id(trace) for trace in (*traces.growing, *traces.held_out)]
    assert sorted(used) == sorted(id(trace) for trace in prompts_)


def test_equal_prompts_are_decoded_once() -> None:
    model = parity_model("llada-a")
    problems: list[str] = []
    repeated: list[str] = []
    one, two = random_prompt(model, 5), random_prompt(model, 6)
    prompts = PromptSet("p.jsonl", (one, two, one.clone()), ({}, {}, {}))
    settings = decoding_settings(model, gen_length=8, block_length=8)
    tasks = prepare(model, prompts, settings, left_out=problems, repeated=repeated)
    assert [task.sequence for task in tasks] == [0, 1]
    assert repeated == ["prompt 3 is prompt 1 once more"]
    assert problems == []


def test_a_prompt_that_cannot_be_decoded_is_known_by_how_it_begins() -> None:
    model = load_model("tiny-sdar", device="cpu")
    text = "Tom has " + "3 apples, and then " * 2000
    problems: list[str] = []
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": text[4:]}]
    settings = decoding_settings(model, gen_length=8)
    prepare(model, PromptSet("p.jsonl", ("one", text, chat)), settings, left_out=problems)
    assert len(problems) == 2
    assert problems[0].startswith("'Tom has 3 apples, and then 3 apples, and'...: ")
    assert problems[1].startswith("'has 3 apples, and then 3 apples, and the'...: ")


def test_prompts_come_from_question_and_prompt_fields(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"question": "one?"}, {"prompt": "two", "question": "no"}, {"prompt": "three"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    prompts = load_prompts(str(path))
    assert prompts.texts == ("one?", "two", "three")  # all of them, in order
    calibration = load_prompts(str(path), samples=1).texts
    test = load_prompts(str(path), samples=2, split="test").texts
    assert {*calibration, *test} == set(prompts.texts)  # drawn from opposite ends
    assert load_prompts(str(path), seed=1).sha256 == load_prompts(str(path), seed=1).sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt":', "line 2: not valid JSON"),
        ('{"answer": "a"}', "line 1: needs a non-empty text field"),
        ('{"prompt": "  "}', "line 1: needs a non-empty text field"),
        ("[1]", "record 1: needs a non-empty text field"),
    ],
)
def test_broken_prompt_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(SpiffyError, match=message):
        load_prompts(str(path))


def test_an_unknown_dataset_names_the_known_ones() -> None:
    with pytest.raises(SpiffyError, match=r"no such file.*synthetic.*gsm8k"):
        load_prompts("gsm9k")


def test_packaged_humaneval_has_all_problems() -> None:
    assert len(load_prompts("humaneval").texts) == 164


def test_synthetic_splits_share_no_question_and_repeat_for_a_seed() -> None:
    def first(split: str, seed: int = 0) -> list[str]:
        stream = problems(split, seed)  # type: ignore[arg-type]
        return [next(stream).question for _ in range(300)]

    train, calibration, test = (set(first(s)) for s in ("train", "calibration", "test"))
    assert train.isdisjoint(calibration)
    assert train.isdisjoint(test)
    assert calibration.isdisjoint(test)
    assert first("test", 3) == first("test", 3)
    assert first("test", 3) != first("test", 4)


def test_synthetic_answers_add_up() -> None:
    stream = problems("test")
    for _ in range(300):
        answer = next(stream).answer
        for step in answer.split("<<")[1:]:
            calculation, result = step.split(">>")[0].split("=")
            assert eval(calculation) == int(result)  # digits and operators of our own making
        assert final_answer(answer) == answer.split(">>")[-2].split("=")[-1]
