"""Several states through the output head at once: the same decode, fewer passes."""

from __future__ import annotations

import pytest
import torch
from helpers import Oracle, decode, own_examples, random_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losslessness import (
    COMBINATIONS,
    EDGES,
    assert_lossless,
    future_fills,
    plain,
    setting_of,
)
from torch import Tensor

from spiffy.runtime.decode import loop
from spiffy.runtime.draft import GraphDrafter
from spiffy.runtime.forward import request
from spiffy.runtime.forward.evaluation import Evaluation, Window
from spiffy.runtime.forward.request import Reader
from spiffy.runtime.models import base
from spiffy.runtime.step.canvas import Canvas

LENGTH = 11


@pytest.fixture(autouse=True)
def _expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_EXPENSIVE", 0)


@pytest.mark.parametrize(("layout", "policy"), COMBINATIONS[::3])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_drafts_that_hold_change_nothing(layout: str, policy: str, temperature: float) -> None:
    model, setting = setting_of(layout, policy, temperature)
    plainly = plain(layout, policy, temperature, LENGTH, 0)
    fills = future_fills(layout, policy, temperature, LENGTH, 3)[:12]
    drafter = GraphDrafter(fills, model)
    prompt = random_prompt(model, LENGTH)
    assert_lossless(decode(model, prompt, setting, drafter, edges=EDGES[layout]), plainly)


@pytest.mark.parametrize(("layout", "policy"), COMBINATIONS[::3])
def test_states_that_are_read_ahead_are_read_the_same(
    layout: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that would be waited for; there all comes from tables."""
    model, setting = setting_of(layout, policy)
    plainly = plain(layout, policy, 0.0, LENGTH, 0)
    fills = future_fills(layout, policy, 0.0, LENGTH, 3)[:12]
    monkeypatch.setattr(request, "_HOSTS", {"elsewhere"})
    for on_demand in ("logits", "_table"):
        monkeypatch.setattr(Evaluation, on_demand, lambda *_: pytest.fail("read on demand"))
    drafter = GraphDrafter(fills, model)
    assert_lossless(decode(model, plainly.prompt, setting, drafter, edges=EDGES[layout]), plainly)


FILLS = st.lists(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2)), min_size=1, max_size=4), max_size=8
)


@pytest.mark.parametrize(("layout", "policy"), COMBINATIONS[::3])
def test_no_graph_changes_a_token(layout: str, policy: str) -> None:
    model, setting = setting_of(layout, policy)
    plainly = plain(layout, policy, 0.0, LENGTH, 0)

    @own_examples(layout, policy)
    @settings(max_examples=8)
    @given(fills=FILLS)
    def check(fills: list[list[tuple[int, int]]]) -> None:
        drafter = GraphDrafter(fills, model)
        ours = decode(model, plainly.prompt, setting, drafter, edges=EDGES[layout])
        assert_lossless(ours, plainly)

    check()


def test_a_walk_along_its_likely_states_passes_the_head_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, setting = setting_of("llada-dual", "static-1")
    plainly = plain("llada-dual", "static-1", 0.0, LENGTH, 0)
    passed: list[int] = []
    head = model.head

    def counting(hidden: Tensor) -> Tensor:
        passed.append(len(hidden))
        return head(hidden)

    monkeypatch.setattr(model, "head", counting)
    ours = decode(model, random_prompt(model, LENGTH), setting, Oracle(plainly, 3))
    assert_lossless(ours, plainly)
    assert len(passed) < ours.stats.steps
    assert setting.block_length < max(passed) <= 128 // model.dtype.itemsize
    fewer = len(passed)
    passed.clear()
    monkeypatch.setattr(loop, "_HEAD_BATCH", setting.block_length * model.dtype.itemsize)
    ours = decode(model, random_prompt(model, LENGTH), setting, Oracle(plainly, 3))
    assert_lossless(ours, plainly)
    assert len(passed) > fewer
    assert max(passed) <= setting.block_length


def test_what_was_precomputed_is_what_the_head_says() -> None:
    model, setting = setting_of("dream-dual", "static-1")
    reader = Reader(model, setting, Canvas.plan(6, 16, 8, False), 0, asks_rejected=False)
    hidden = torch.randn(3, 20, model.module.config.hidden_size, dtype=model.dtype)
    evaluation = Evaluation(model, [Window(part, 0, 5, len(part)) for part in hidden], reader)
    positions = [torch.tensor([6, 9]), torch.tensor([12]), torch.tensor([7, 8, 20])]
    alone = [evaluation.logits(k, at) for k, at in enumerate(positions)]
    evaluation.precompute(dict(enumerate(positions)))
    for k, at in enumerate(positions):
        torch.testing.assert_close(evaluation.logits(k, at), alone[k])
    other = torch.tensor([9])  # asked about otherwise: the head is asked again
    torch.testing.assert_close(evaluation.logits(0, other), alone[0][1:])
