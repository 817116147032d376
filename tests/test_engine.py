"""The engine of docs/engine.md: rows in, hidden states out, and nothing else of this package."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers import Oracle, chain_graph, decode, random_prompt, refusal, shown, states

from spiffy.runtime import DiffusionLM, decoding_settings, generate, load_model
from spiffy.runtime.decode import TooLargeError, denoise, make_task
from spiffy.runtime.forward import request
from spiffy.runtime.generate import TaskMaker, collect

PROMPTS = [f"Lily has {k} old pens and buys 2 new pens. How many now?" for k in (3, 40)]
CASES: dict[str, dict[str, Any]] = {
    "tiny-sdar": {"gen_length": 24},
    "tiny-llada": {"gen_length": 16, "block_length": 8, "cache": "dual"},
}


@cache
def loaded(name: str, device: str = "cpu") -> DiffusionLM:
    return load_model(name, device=device)


@pytest.fixture
def door() -> dict[str, Any]:
    """What the page defines."""
    scope: dict[str, Any] = {}
    exec(compile(shown("docs/engine.md", "class Engine"), "engine.md", "exec"), scope)
    return scope


@pytest.mark.parametrize(("budget", "ahead"), [(2, False), (2, True), ("auto", True)])
@pytest.mark.parametrize("name", CASES)
def test_another_engine_gives_the_tokens_of_generate(
    name: str, budget: Any, ahead: bool, door: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks together; `ahead`: all is read in the forward, and hidden states are not kept."""
    ours, graph = loaded(name), chain_graph(name, **CASES[name])
    alone = [generate(ours, prompt, graph=graph, budget=budget) for prompt in PROMPTS]
    engine, outputs_of = door["Engine"](ours.module), door["outputs_of"]
    model = engine.describe(loaded(name, "meta"))
    assert model.fingerprint == ours.fingerprint
    if ahead:
        monkeypatch.setattr(request, "_HOSTS", frozenset())
        nothing = torch.empty(0)
        door["outputs_of"] = lambda *args: [
            replace(output, hidden=nothing) for output in outputs_of(*args)
        ]
    monkeypatch.setattr(ours, "hidden_states", None)
    tasks = TaskMaker(model, graph=graph, budget=budget).all(PROMPTS)
    engine.run(tasks)
    found = [collect(task) for task in tasks]
    assert [out.token_ids for out in found] == [out.token_ids for out in alone]
    assert [out.text for out in found] == [out.text for out in alone]
    if budget == 2:
        assert [out.stats.accepted for out in found] == [out.stats.accepted for out in alone]
        assert sum(out.stats.accepted for out in found) > 0


def test_an_engine_without_memory_is_asked_for_less(door: dict[str, Any]) -> None:
    ours = loaded("tiny-sdar")
    settings = decoding_settings(ours, gen_length=24)
    plain = decode(ours, random_prompt(ours, 9), settings)
    engine = door["Engine"](ours.module)
    model = engine.describe(loaded("tiny-sdar", "meta"))
    task = make_task(model, plain.prompt, settings, Oracle(plain, 5))
    decoding, refused = denoise(task, door["Slots"]()), 0
    rows = next(decoding)
    with torch.inference_mode():
        try:
            while True:
                if sum(len(row.ids) for row in rows) > 30:
                    refused += 1
                    rows = decoding.throw(TooLargeError())
                    continue
                hidden = torch.cat([engine.hidden(row) for row in rows])
                rows = decoding.send(door["outputs_of"](model, rows, hidden))
        except StopIteration:
            pass
    assert refused
    assert task.stats.accepted > 0
    assert states(task) == states(plain)


def test_the_page_says_how_it_is_used(door: dict[str, Any]) -> None:
    door |= {"graph": chain_graph("tiny-sdar", gen_length=16), "prompts": PROMPTS[:1]}
    exec(compile(shown("docs/engine.md", "engine = Engine"), "engine.md", "exec"), door)
    assert door["tasks"][0].stats.accepted > 0


def test_a_model_without_weights_is_for_engines_alone() -> None:
    model = loaded("tiny-sdar", "meta")
    assert all(part.is_meta for part in model.module.parameters())
    assert "loaded without weights" in refusal(lambda: generate(model, "Hi", gen_length=8))
    for options in ({"compile": True}, {"quantize": "int8"}, {"prepack": True}):
        refusal(lambda o=options: load_model("tiny-sdar", device="meta", **o))  # type: ignore[misc]
