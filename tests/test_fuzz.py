"""Hostile artifacts: refused with one line, or used without a token changing."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import decode, parity_model, random_prompt, states, study
from hypothesis import given, settings
from hypothesis import strategies as st

from spiffy.runtime.budget.auto import AutoBudget, auto_budget
from spiffy.runtime.budget.predict import best_plan, steps_by_drafts
from spiffy.runtime.decode import Task, make_task, run
from spiffy.runtime.draft import (
    AcceptanceDrafter,
    GraphDrafter,
    Selection,
    graph_drafter,
    way_of,
)
from spiffy.runtime.draft.acceptance import POSITION_FEATURES, TOKEN_FEATURES, acceptance_of
from spiffy.runtime.models.base import DiffusionLM
from spiffy.schemas import (
    AcceptanceModel,
    CostPoint,
    CostProfile,
    DecodingSettings,
    DraftGraph,
    ExpectedSteps,
    ModelRecord,
    Node,
    SpiffyError,
)
from spiffy.schemas.records import MAX_NODES, MOST_UNASKED

fuzz, fuzz_decodes = study("fuzz"), study("fuzz_decodes")
STORED = fuzz.base_graph().to_json()

# ---------------------------------------------------------------- loading


def test_the_valid_artifact_drafts_by_its_acceptance_model() -> None:
    """With features that nobody has, all that starts from it would leave its model out."""
    assert acceptance_of(fuzz.base_graph()) is not None


def test_mutated_artifacts_are_accepted_as_graphs_or_refused_in_one_line(tmp_path: Path) -> None:
    path, counts = tmp_path / "graph.json", Counter[str]()
    for seed in range(1000):
        kind, raw = fuzz.case(seed, STORED)
        path.unlink(missing_ok=True)  # a file system may take long to empty a file
        path.write_bytes(raw)
        found, _ = fuzz.verdict(path)
        assert found in ("accepted", "refused"), f"seed {seed} ({kind})"
        counts[found] += 1
    assert min(counts["accepted"], counts["refused"]) > 150  # the cases are neither all dull


def test_every_field_survives_hostile_values(tmp_path: Path) -> None:
    """Each place of the artifact with a twelfth of the values, as its only fault."""
    path = tmp_path / "graph.json"
    whole = json.loads(STORED)
    del whole["digest"]
    for number in range(len(fuzz.places(whole))):
        for value in fuzz.HOSTILE[number % 12 :: 12]:
            content = json.loads(json.dumps(whole))
            holder, key = fuzz.places(content)[number]
            holder[key] = value
            path.unlink(missing_ok=True)
            path.write_bytes(fuzz.write(content).encode("utf-8", "surrogatepass"))
            assert fuzz.verdict(path)[0] in ("accepted", "refused"), (key, value)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=100)
@given(field=st.sampled_from(sorted(DraftGraph.model_fields)), value=anything)
def test_any_json_in_any_field_is_accepted_or_refused(
    field: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = json.loads(STORED) | {field: value}
    del content["digest"]
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    assert fuzz.verdict(path)[0] in ("accepted", "refused")


@settings(max_examples=100)
@given(raw=st.binary())
def test_any_bytes_are_refused(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(raw)
    assert fuzz.verdict(path)[0] == "refused"


def test_giants_are_judged(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    verdicts = {}
    for kind, raw in fuzz.giants(0.1):
        path.write_bytes(raw)
        verdicts[kind] = fuzz.verdict(path)[0]
    accepted = {kind for kind, found in verdicts.items() if found == "accepted"}
    assert set(verdicts.values()) == {"accepted", "refused"}
    assert accepted == {"unknown objects"}


def test_a_device_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(SpiffyError, match="not a regular file"):
        DraftGraph.load("/dev/zero")


def test_names_cannot_carry_escape_sequences_or_lines(tmp_path: Path) -> None:
    content = json.loads(STORED)
    del content["digest"]
    for name in ("\x1b[31mred", "two\nlines", "\u202eltr"):
        content["model"]["id"] = name
        (tmp_path / "graph.json").write_text(json.dumps(content))
        with pytest.raises(SpiffyError, match=r"model\.id: holds characters"):
            DraftGraph.load(tmp_path / "graph.json")
    assert str(SpiffyError("a\nb\x1b" + "x" * 10**6)).startswith(r"a\nb\x1bxxx")
    assert len(str(SpiffyError("x" * 10**6))) <= 1000


def test_digests_of_the_format_before_are_still_checked(tmp_path: Path) -> None:
    """1.1 did not know edges and prompts; its digests do not cover them."""
    graph = fuzz.base_graph()
    later = ("edges", "prompts", "prompt_digests")
    record = graph.calibration.model_copy(update=dict.fromkeys(later))
    old = json.loads(graph.model_copy(update={"calibration": record}).to_json())
    for field in later:
        del old["calibration"][field]
    del old["provenance"], old["measured_steps"]
    old["version"] = "1.1"
    covered = {k: old[k] for k in old if k not in ("format", "version", "digest", "cost_profiles")}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert old["digest"] == hashlib.sha256(text.encode()).hexdigest()
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(old))
    assert DraftGraph.load(path).calibration.edges is None
    old["nodes"][0]["count"] += 1
    path.write_text(json.dumps(old))
    with pytest.raises(SpiffyError, match="digest disagree"):
        DraftGraph.load(path)


# ---------------------------------------------------------------- decoding

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llada-none": ("llada-a", {"cache": "none"}),
    "dream-dual": ("dream-a", {"cache": "dual"}),
    "sdar-block": ("sdar-a", {"cache": "block"}),
}
POLICIES: tuple[dict[str, Any], ...] = ({}, {"policy": "threshold", "threshold": 0.5})


def setting_of(layout: str, policy: int) -> tuple[DiffusionLM, DecodingSettings]:
    checkpoint, options = LAYOUTS[layout]
    options = {**options, **POLICIES[policy], "block_length": 8, "gen_length": 16}
    return parity_model(checkpoint, "float64"), DecodingSettings.parse(**options)


@cache
def plain(layout: str, policy: int) -> Task:
    model, setting = setting_of(layout, policy)
    return decode(model, random_prompt(model, 11), setting)


def artifact(model: DiffusionLM, setting: DecodingSettings, **fields: Any) -> DraftGraph:
    """A valid artifact of the model, through the same checks as a file."""
    record = ModelRecord(
        family=model.family.name,
        id="x",
        fingerprint=model.fingerprint,
        vocab_size=model.vocab_size,
    )
    base = fuzz.base_graph().model_dump(mode="json")
    base |= {"model": record.model_dump(), "decoding": setting.model_dump()}
    given_fields = DraftGraph.model_construct(**fields).model_dump(mode="json", warnings=False)
    content = {**base, **{key: given_fields[key] for key in fields}}
    return DraftGraph.model_validate_json(json.dumps(content))


def lossless(
    graph: DraftGraph,
    layout: str,
    policy: int,
    selection: Selection = "model",
    budget: int | None = None,
) -> Task:
    model, setting = setting_of(layout, policy)
    plainly = plain(layout, policy)
    drafter = graph_drafter(model, graph, setting, budget, "graph")
    if selection == "model":  # alone: a hostile one would soon be left
        drafter = way_of(model, graph, setting, budget or graph.budget, "model")
        assert isinstance(drafter, AcceptanceDrafter)
    ours = decode(model, plainly.prompt, setting, drafter)
    assert states(ours) == states(plainly)
    return ours


def test_random_decodes_with_drafts_are_plain_decoding() -> None:
    """A few of `studies/fuzz_decodes.py`, over families, caches, policies and batches."""
    found = [outcome for seed in range(30) for outcome in fuzz_decodes.judge(seed)]
    assert [name for name, outcome in found if outcome != "same"] == []
    assert len({name.partition(",")[0] for name, _ in found}) > 8  # checkpoints


def test_a_decode_that_differs_is_told() -> None:
    model, setting = setting_of("llada-none", 0)
    one = decode(model, random_prompt(model, 11), setting)
    other = decode(model, random_prompt(model, 11, 1), setting)
    assert fuzz_decodes.difference(one, one) == "same"
    assert fuzz_decodes.difference(one, other).startswith("STATE 0 of 16")


coefficient = st.one_of(
    st.sampled_from([-1e6, 1e6, 0.0, 1e-300, -1.0]), st.floats(-1e6, 1e6, allow_nan=False)
)


@settings(max_examples=40)
@given(data=st.data())
def test_hostile_acceptance_models_change_no_token(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    policy = data.draw(st.integers(0, 1))
    model, setting = setting_of(layout, policy)
    names = st.sampled_from((*POSITION_FEATURES, "constant", "spread"))
    tokens = st.integers(0, 2**31 - 1)  # also beyond the vocabulary
    pair = st.tuples(tokens, tokens, st.integers(1, 2**36))
    acceptance = AcceptanceModel(
        position=data.draw(st.dictionaries(names, coefficient)),
        commit=data.draw(st.none() | st.dictionaries(names, coefficient)),
        token=data.draw(st.dictionaries(st.sampled_from(TOKEN_FEATURES), coefficient)),
        bigrams=tuple(data.draw(st.lists(pair, max_size=5))),
    )
    lossless(artifact(model, setting, acceptance=acceptance), layout, policy)


def test_nodes_draft_where_the_acceptance_model_is_of_another_version() -> None:
    model, setting = setting_of("llada-none", 0)
    known = AcceptanceModel(position={"logit": 1.0}, token={"log_p": 1.0}, bigrams=())
    unknown = known.model_copy(update={"position": {"logit": 1.0, "of another version": 1.0}})
    for acceptance, kind in ((known, AcceptanceDrafter), (unknown, GraphDrafter)):
        graph = artifact(model, setting, acceptance=acceptance)
        assert type(graph_drafter(model, graph, setting).leader) is kind


seconds = st.sampled_from([1e-9, 1e-3, 1.0, 1e6])


@settings(max_examples=25)
@given(data=st.data())
def test_absurd_costs_and_expectations_change_no_token(data: st.DataObject) -> None:
    """Through `budget auto`, with a profile that claims to be of this very machine."""
    from spiffy.runtime.budget.cost import conditions

    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    model, setting = setting_of(layout, 0)
    plainly = plain(layout, 0)
    task = make_task(model, plainly.prompt, setting)
    many = (0, 1, 4, MAX_NODES)

    def curve(start: int = 0) -> tuple[CostPoint, ...]:
        return tuple(CostPoint(drafts=n, seconds=data.draw(seconds)) for n in many[start:])

    profile = CostProfile(
        points=curve(),
        step_seconds=data.draw(st.sampled_from([0.0, 1e6])),
        turns={"graph": curve(1), "model": curve(1)},
        largest=MAX_NODES,
        **conditions(task),
    )
    steps = st.floats(1, MAX_NODES + 1)
    nodes = fuzz.base_graph().nodes
    acceptance = fuzz.base_graph().acceptance.model_copy(
        update={
            "expected_steps": tuple(ExpectedSteps(drafts=n, steps=data.draw(steps)) for n in many)
        }
    )
    graph = artifact(
        model,
        setting,
        nodes=nodes,
        expected_steps=tuple(data.draw(st.lists(steps, min_size=5, max_size=5))),
        acceptance=acceptance,
        cost_profiles=(profile,),
        measured_steps={
            way: (
                ExpectedSteps(drafts=data.draw(st.sampled_from(many[1:])), steps=data.draw(steps)),
            )
            for way in ("graph", "model")
        },
    )
    assert set(steps_by_drafts(graph)) == {"graph", "model"}
    assert best_plan(steps_by_drafts(graph), profile).drafts <= MAX_NODES
    budget = auto_budget(task, graph)
    assert budget is not None
    for _ in range(2):  # what was learned from the first decode serves the second
        ours = make_task(model, plainly.prompt, setting)
        ours.adviser = budget
        for _ in run(model, [ours]):
            pass
        assert states(ours) == states(plainly)


def largest_nodes(shape: str) -> tuple[Node, ...]:
    if shape == "wide":
        return tuple(
            Node(fill=((k // 1024, k % 1024),), parents=(0,), count=0) for k in range(MAX_NODES)
        )
    deep = tuple((k, 0) for k in range(1024))
    chain = [Node(fill=deep[: k + 1], parents=(k,), count=0) for k in range(200)]
    fills = [Node(fill=((0, 0), (1, k)), parents=(1,), count=0) for k in range(1, 1024)]
    return (*chain, *fills)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["wide", "deep"])
def test_the_largest_graphs_change_no_token_and_forwards_stay_bounded(
    layout: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spiffy.runtime.forward import cache as caches

    monkeypatch.setattr(caches, "_MOST_STACKED", 64 * 27)
    monkeypatch.setattr(caches, "_MOST_PACKED", 64 * 8)
    model, setting = setting_of(layout, 0)
    graph = artifact(model, setting, nodes=largest_nodes(shape), expected_steps=())
    unasked = lossless(graph, layout, 0, "graph")
    assert unasked.stats.drafted <= 128 * unasked.stats.nfe
    ours = lossless(graph, layout, 0, "graph", MAX_NODES)
    assert ours.most_drafts == (32 if layout == "sdar-block" else 64)
    assert 0 < ours.stats.drafted <= ours.most_drafts * ours.stats.nfe
    chosen = lossless(graph, layout, 0, "model", MAX_NODES)  # by the acceptance model
    assert 0 < chosen.stats.drafted <= ours.most_drafts * chosen.stats.nfe


def test_auto_never_plans_more_drafts_than_where_nobody_asked_for_a_number() -> None:
    """Of a graph that holds more, where drafts cost nothing and all of them come true."""
    model, setting = setting_of("llada-none", 0)
    steps = tuple(map(float, range(1, MAX_NODES + 2)))
    graph = artifact(model, setting, nodes=largest_nodes("wide"), expected_steps=steps)
    shared, planned = AutoBudget(model, graph, setting, "graph").shared, set()
    for _ in range(200):
        choices = [] if shared.rests else [shared.choose()]
        shared.after_forward(1, 1.0)
        for choice in choices:
            planned.add(choice.drafts)
            shared.learn(choice, 1 + choice.drafts, 0.0)
    assert max(planned) == MOST_UNASKED
