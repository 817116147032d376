"""Policies that are not shipped: what they are told, how they are named, and no token changed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import own_policies
import pytest
import torch
from helpers import (
    Call,
    Oracle,
    a_graph_of,
    chain_graph,
    decode,
    own_examples,
    parity_model,
    random_prompt,
    refusal,
    states,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from own_policies import FACTOR, ODD, Factor
from test_losslessness import (
    ANY_FILLS,
    EDGES,
    LAYOUTS,
    SPECIAL,
    Fills,
    Garbage,
    assert_lossless,
)
from torch import Tensor

from spiffy.calib.pipeline import build_graph, prepare, record
from spiffy.calib.prompts import load_prompts
from spiffy.integrations import custom_generate
from spiffy.integrations.ray import Decoder
from spiffy.runtime import (
    Step,
    decoding_settings,
    generate,
    generate_many,
    load_model,
    register_policy,
)
from spiffy.runtime.draft import AcceptanceDrafter, Drafter, GraphDrafter
from spiffy.runtime.draft.acceptance import AcceptanceWeights
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.step import own_policy, reading
from spiffy.runtime.step.canvas import Cursor
from spiffy.runtime.step.noise import redraw
from spiffy.runtime.step.own_policy import Bools, own_choice
from spiffy.schemas import DecodingSettings, DraftGraph

NAMES = (FACTOR, ODD)
EXACT = ("llada-none", "llada-dual", "dream-dual", "dream-prefix", "sdar-block", "fast-block")
SCHEDULES: tuple[dict[str, Any], ...] = (
    {},
    {"tokens_per_step": 2},
    {"schedule": "timestep", "steps_per_block": 12},
)


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers, and where it imports from, ends with it."""
    monkeypatch.setattr(own_policy, "_registered", dict(own_policy._registered))
    monkeypatch.setattr(sys, "path", [*sys.path])


# ---------------------------------------------------------------- no token changes


def drafter_of(kind: str, model: DiffusionLM, fills: Fills, plainly: Any) -> Drafter:
    if kind == "oracle":
        return Oracle(plainly, 3)
    if kind == "garbage":
        return Garbage("no masks", model.mask_token_id)
    if kind == "graph":
        return GraphDrafter(fills, model)
    position, commit = {"logit": 1.0, "nearness": 0.3}, {"logit": 0.7}
    weights = AcceptanceWeights.of(position, commit, {"log_p": 1.0}, [(1, 2, 3)], model.vocab_size)
    return AcceptanceDrafter(weights, 6, model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", EXACT)
def test_any_drafts_leave_every_state_as_it_was(layout: str, name: str) -> None:
    checkpoint, geometry = LAYOUTS[layout] if layout in LAYOUTS else SPECIAL[layout][:2]
    model = parity_model(checkpoint, "float64")

    @own_examples(layout, name)
    @settings(max_examples=6)
    @given(
        kind=st.sampled_from(["graph", "oracle", "model", "garbage"]),
        fills=ANY_FILLS,
        temperature=st.sampled_from([0.0, 0.8]),
        schedule=st.sampled_from(SCHEDULES),
        seed=st.integers(0, 2),
    )
    def check(
        kind: str, fills: Fills, temperature: float, schedule: dict[str, Any], seed: int
    ) -> None:
        given = geometry | schedule | {"policy": name, "temperature": temperature}
        setting = DecodingSettings.parse(**given, stop_at_eos=False)
        prompt, edges = random_prompt(model, 11), EDGES[layout]
        plainly = decode(model, prompt, setting, None, seed, edges=edges)
        drafter = drafter_of(kind, model, fills, plainly)
        assert_lossless(decode(model, prompt, setting, drafter, seed, edges=edges), plainly)

    check()


def test_what_a_policy_left_masked_is_drawn_anew() -> None:
    """As with `threshold`, where a schedule lets a step commit nothing: its draws had their go."""
    setting = DecodingSettings.parse(**SCHEDULES[2], policy=FACTOR, temperature=1.0)
    cursor = Cursor(torch.zeros(4, dtype=torch.long), block_step=5)
    assert redraw(setting, cursor) == 5
    assert redraw(setting.changed(policy="static"), cursor) == 0


# ---------------------------------------------------------------- what a policy is told and says


def step_of(score: list[float], quota: int = 1) -> Step:
    places = np.arange(len(score))
    return Step(np.array(score), places + 40, places, quota, block=0, block_step=0)


@pytest.mark.parametrize(
    ("factor", "score", "expected"),
    [
        (1.0, [0.6, 0.9, 0.65], [1]),  # 2 * 0.1 is less than 1, 3 * 0.35 is not
        (1.0, [0.9, 0.6, 0.8], [0, 2]),  # 2 * 0.1 and 3 * 0.2 are, 4 * 0.4 is not
        (2.0, [0.9, 0.6, 0.8], [0, 1, 2]),
        (0.1, [0.2, 0.9, 0.3], [1]),  # no n holds: the best one, so that decoding ends
    ],
)
def test_the_factor_rule_commits_the_largest_number_that_holds(
    factor: float, score: list[float], expected: list[int]
) -> None:
    register_policy("mine:factor", Factor(factor))
    assert own_choice("mine:factor", step_of(score)).nonzero()[0].tolist() == expected


@dataclass
class Says:
    """Says whatever it is to say."""

    chosen: Any
    scores: Any = None

    def score(self, log_p: Tensor, tokens: Tensor) -> Any:
        found = log_p.gather(1, tokens[:, None])[:, 0].exp()
        return found if self.scores is None else self.scores(found)

    def select(self, step: Step) -> Any:
        return self.chosen(step) if callable(self.chosen) else self.chosen


@pytest.mark.parametrize(
    ("chosen", "quota", "expected"),
    [
        ([0, 0, 0, 0], 0, []),  # as a schedule may have it
        ([0, 0, 0, 0], 1, [2]),
        ([0, 0, 0, 0], 3, [0, 1, 2]),  # of equals the first ones
        ([0, 0, 0, 1], 2, [2, 3]),
        ([1, 1, 0, 1], 1, [0, 1, 3]),  # more than the quota is the policy's own business
    ],
)
def test_fewer_than_the_quota_are_filled_up_with_the_best(
    chosen: list[int], quota: int, expected: list[int]
) -> None:
    register_policy("mine:says", Says(np.array(chosen, dtype=bool)))
    found = own_choice("mine:says", step_of([0.5, 0.5, 0.9, 0.1], quota))
    assert found.nonzero()[0].tolist() == expected


def nothing(step: Step) -> Bools:
    return np.zeros(len(step.score), dtype=np.bool_)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (
            Says(nothing, lambda s: s.float()),
            "score gave float32 [8] instead of a tensor, float64 [8]",
        ),
        (
            Says(nothing, lambda s: s[:, None]),
            "score gave float64 [8, 1] instead of a tensor, float64 [8]",
        ),
        (
            Says(nothing, lambda s: s.tolist()),
            "score gave an object of type list instead of a tensor",
        ),
        (Says(nothing, lambda s: s.to("meta")), "score gave a tensor on meta instead of cpu"),
        (Says(nothing, lambda s: s * torch.nan), "score of the answer's position 0 is NaN"),
        (Says([True] * 8), "select gave an object of type list instead of a NumPy array, bool [8]"),
        (Says(lambda s: s.score), "select gave float64 [8] instead of a NumPy array, bool [8]"),
        (Says(lambda s: nothing(s)[1:]), "select gave bool [7] instead of a NumPy array, bool [8]"),
        (Says(lambda s: torch.tensor([True] * 8)), "select gave bool [8] instead of a NumPy array"),
        (Says(None), "select gave an object of type NoneType instead of"),
        (Says(lambda s: nothing(s)[99]), "select failed (IndexError: "),
        (Says(nothing, lambda s: s[99]), "score failed (IndexError: "),
    ],
)
def test_what_says_something_else_is_named(policy: Says, why: str) -> None:
    register_policy("mine:says", policy)
    model = parity_model("llada-a")
    message = refusal(
        lambda: generate(
            model, random_prompt(model, 5), policy="mine:says", gen_length=8, block_length=8
        )
    )
    assert message.startswith("policy mine:says: ")
    assert why in message


def test_what_a_policy_is_told_are_the_positions_that_may_be_filled_now() -> None:
    """Those of the sub-block; a block's first one alone, where the family has that."""
    told = []

    def note(step: Step) -> Bools:
        if step.block == 1:
            told.append((step.block, step.block_step, step.positions.tolist()))
        step.score[:] = step.tokens[:] = step.positions[:] = 0  # copies, all of them
        return nothing(step)

    register_policy("mine:says", Says(note))
    checkpoint, geometry, _ = SPECIAL["fast-block"]
    model = parity_model(checkpoint, "float64")
    setting = DecodingSettings.parse(**geometry, policy="mine:says", stop_at_eos=False)
    task = decode(model, random_prompt(model, 11), setting)
    assert told == [
        *((1, 0, [5]), (1, 1, [6, 7, 8]), (1, 2, [7, 8]), (1, 3, [8])),
        *((1, 4, [9, 10, 11, 12]), (1, 5, [9, 11, 12]), (1, 6, [9, 11]), (1, 7, [9])),
    ]
    same = decode(model, task.prompt, setting.changed(policy="static"))
    assert states(task) == states(same)  # what is filled up goes by the confidences


@pytest.mark.parametrize("name", NAMES)
def test_rows_may_come_a_few_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do with a large vocabulary."""
    model = parity_model("llada-a", "float64")
    setting = DecodingSettings.parse(gen_length=16, block_length=8, policy=name)
    together = decode(model, random_prompt(model, 11), setting)
    monkeypatch.setattr(reading, "_ON_HOST", 3 * model.vocab_size)
    assert states(decode(model, together.prompt, setting)) == states(together)


def test_calibration_fits_the_law_of_sets() -> None:
    """A policy that is not shipped may commit any number; whatever it is, no token differs."""

    def two(step: Step) -> Bools:
        chosen = nothing(step)
        chosen[(-step.score).argsort(kind="stable")[:2]] = True
        return chosen

    register_policy("mine:two", Says(two))
    model, drawn = load_model("tiny-llada", device="cpu"), load_prompts("synthetic", 5)
    options: dict[str, Any] = {"gen_length": 32, "cache": "dual", "policy": "mine:two"}
    setting = decoding_settings(model, **options)
    traces = record(model, prepare(model, drawn, setting))
    graph = build_graph(model, drawn, setting, traces, 4)
    assert graph.decoding.policy == "mine:two"
    assert graph.acceptance is not None
    assert graph.acceptance.commit is not None
    assert graph.differences(setting.changed(policy="static")) == ("policy static (mine:two)",)
    plain = generate(model, drawn.texts[0], **options)
    ours = generate(model, drawn.texts[0], graph=graph, budget=4)
    assert ours.token_ids == plain.token_ids
    assert ours.stats.nfe < plain.stats.nfe == 16


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "policy", "why"),
    [
        ("factor", own_policies.factor, "name one of your own module:object, such as my_policies:"),
        ("a:b\n", own_policies.factor, "'a:b\\n': name one"),
        (3, own_policies.factor, "policy 3: name one"),
        ("mine:factor", Factor, "policy mine:factor is a class: give an object of it"),
        ("mine:factor", len, "of type builtin_function_or_method, has no score and no select"),
    ],
)
def test_what_is_no_policy_is_not_registered(name: Any, policy: Any, why: str) -> None:
    assert why in refusal(lambda: register_policy(name, policy))


def test_a_policy_that_nobody_registered_is_refused_with_what_to_do() -> None:
    model = parity_model("llada-a")
    message = refusal(lambda: decoding_settings(model, policy="mine:rule"))
    assert "give --policy mine:rule (in Python call register_policy('mine:rule', ...)" in message


MODULE = """
import numpy as np

print("imported")

class Two:
    def score(self, log_p, tokens):
        return log_p.gather(1, tokens[:, None])[:, 0].exp()

    def select(self, step):
        chosen = np.zeros(len(step.score), dtype=bool)
        chosen[np.argsort(-step.score)[:2]] = True
        return chosen

two, number = Two(), 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module into the working folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(code: str) -> str:
        (tmp_path / "in_this_folder.py").write_text(code)
        return "in_this_folder"

    yield write
    sys.modules.pop("in_this_folder", None)


def test_nothing_is_imported_because_a_graph_says_so(
    here: Callable[[str], str], call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{here(MODULE)}:two"
    model = parity_model("llada-a")
    graph = a_graph_of(model, policy=name)
    graph.save("graph.json")
    assert DraftGraph.load("graph.json").decoding.policy == name
    doors: list[Callable[[], object]] = [
        lambda: generate(model, torch.arange(4), graph=graph),
        lambda: Decoder(model.name, "graph.json"),
        lambda: model.module.generate(  # type: ignore[operator]
            torch.arange(4)[None], custom_generate=custom_generate, graph=graph, max_new_tokens=8
        ),
    ]
    for door in doors:
        assert f"give --policy {name}" in refusal(door)
    command = ("decode", "--graph", "graph.json", "--model", model.name, "--prompt", "a")
    code, printed, log = call(*command)
    assert (code, printed) == (2, "")
    assert f"give --policy {name}" in log
    assert call("graph", "show", "graph.json")[0] == 0
    assert "imported" not in capsys.readouterr().out


def test_whoever_names_it_has_it_imported(here: Callable[[str], str], call: Call) -> None:
    name = f"{here(MODULE)}:two"
    graph = chain_graph("tiny-sdar", gen_length=16)
    graph = graph.model_copy(update={"decoding": graph.decoding.changed(policy=name)})
    graph.save("graph.json")
    verify = ("--prompts", "synthetic", "--samples", 2, "--budget", 3, "--verify")
    code, printed, log = call("decode", "--graph", "graph.json", "--policy", name, *verify)
    assert code == 0, log
    assert printed.startswith("imported")
    assert f"tiny-sdar: {name}" in printed
    assert Decoder(graph="graph.json", policy=name).loaded.settings.policy == name


def test_what_cannot_be_imported_is_named(here: Callable[[str], str], call: Call) -> None:
    def refused(policy: str) -> str:
        words = ("decode", "--model", "tiny-sdar", "--prompt", "a", "--policy", policy)
        code, printed, log = call(*words)
        assert (code, printed.replace("imported\n", "")) == (2, "")
        return log

    module = here(MODULE)
    path = f"({Path('in_this_folder.py').resolve()})"
    assert "nowhere cannot be imported (ModuleNotFoundError: No module" in refused("nowhere:rule")
    assert f"{module} {path} has no rule" in refused(f"{module}:rule")
    assert f"policy {module}:Two is a class: give an object" in refused(f"{module}:Two")
    assert "of type int, has no score and no select" in refused(f"{module}:number")
    sys.modules.pop(module)
    here("1 / 0")
    assert "cannot be imported (ZeroDivisionError: division by zero)" in refused(f"{module}:two")
    here("import sys; sys.exit(0)")  # a script
    assert "in_this_folder cannot be imported (SystemExit: 0)" in refused(f"{module}:two")


class Slip(Factor):
    """With a mistake in it."""

    def select(self, step: Step) -> Bools:
        raise IndexError("a slip")


def test_a_policy_that_fails_ends_the_run_and_once_mended_all_is_decoded(
    call: Call, tmp_path: Path
) -> None:
    """Its failure is no answer: nothing is kept of it, and no prompt is left out for it."""
    register_policy("mine:rule", Slip(1.0))
    words = ("decode", "--model", "tiny-llada", "--gen-length", 32, "--policy", "mine:rule")
    asked = (*words, "--prompts", "synthetic", "--samples", 2)
    for more in ((), ("--batch-size", 2), ("--out", tmp_path / "a.jsonl")):
        code, _, log = call(*asked, *more)
        assert (code, "left out" in log) == (2, False)
        assert "policy mine:rule: select failed (IndexError: a slip)" in log
    model = load_model("tiny-llada", device="cpu")
    many = generate_many(model, ["a", "b"], gen_length=32, policy="mine:rule")
    assert refusal(lambda: next(many)).startswith("policy mine:rule: select failed")
    register_policy("mine:rule", Factor(1.0))
    code, _, log = call(*asked, "--out", tmp_path / "a.jsonl")
    assert (code, "wrote 2 answers" in log) == (0, True), log


# ---------------------------------------------------------------- other doors


def test_transformers_generate_takes_one_that_is_registered() -> None:
    model = parity_model("llada-a")
    ours = generate(model, torch.arange(4), policy=FACTOR, gen_length=8, block_length=8)
    found: Any = model.module.generate(  # type: ignore[operator]
        torch.arange(4)[None],
        custom_generate=custom_generate,
        decoding={"policy": FACTOR, "block_length": 8},
        max_new_tokens=8,
    )
    assert found[0, 4:].tolist()[: len(ours.token_ids)] == ours.token_ids


def test_threshold_and_the_like_say_nothing_to_it(call: Call) -> None:
    words = ("--model", "tiny-sdar", "--prompt", "a", "--policy", FACTOR, "--threshold", 0.5)
    code, _, log = call("decode", *words)
    assert code == 2
    assert f"--threshold is read by --policy threshold or joint, not by {FACTOR}" in log
