"""What takes more as prompts and answers grow: masks, and looking for stop strings."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from helpers import Oracle, decode, parity_model, random_prompt, states

from spiffy.runtime import load_model
from spiffy.runtime.decode import driver, make_task, run
from spiffy.runtime.forward import cache
from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.models.text import TextCodec
from spiffy.schemas import DecodingSettings


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("layout", ["sdar-a", "fastdllm2-a", "llada2-a", "a2d-bd3lm-a"])
@pytest.mark.parametrize("length", [40, 41, 61])
def test_a_long_prompt_is_stored_part_by_part(
    layout: str, fold: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parity_model(layout, "float64")
    settings = DecodingSettings.parse(
        cache="block", block_length=8, gen_length=16, stop_at_eos=False
    )
    prompt = random_prompt(model, length)
    whole = decode(model, prompt, settings)
    monkeypatch.setattr(cache, "_MOST_STORED", 16)
    masks: list[int] = []
    forward = driver.forward

    def watched(model: Any, rows: Any, *rest: Any) -> Any:
        masks.extend(0 if row.mask is None else row.mask.shape[0] for row in rows)
        return forward(model, rows, *rest)

    monkeypatch.setattr(driver, "forward", watched)
    for drafter in (None, Oracle(whole, 2)):
        ours = make_task(model, prompt, settings, drafter, edges=BlockEdges(fold=fold))
        masks.clear()
        for _ in run(model, [ours]):
            pass
        assert states(ours) == states(whole)
        stored = length // 8 * 8
        assert max(masks[: (stored - 1) // 16]) <= 16  # of the forwards that store most of it
        # What waits for the root's forward, or the last that stores alone, is no longer.
        assert max(masks) <= 16 + 3 * 16
        assert ours.plain_nfe >= whole.stats.nfe + (stored - 1) // 16


def test_a_long_answer_is_searched_for_stop_strings_where_it_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model("tiny-sdar", device="cpu")
    settings = DecodingSettings.parse(
        cache="block", block_length=8, gen_length=256, stop_at_eos=False
    )
    looked: list[int] = []
    before_stop = TextCodec.before_stop

    def watched(self: TextCodec, ids: Any, stop: Any) -> Any:
        looked.append(len(ids))
        return before_stop(self, ids, stop)

    monkeypatch.setattr(TextCodec, "before_stop", watched)
    task = make_task(model, "How many?", settings, stop="no such text")
    for _ in run(model, [task]):
        pass
    assert task.path[-1].finished
    assert len(looked) > 10
    assert max(looked) <= 8 + 8 * (1 + len("no such text"))


@pytest.mark.parametrize(
    ("layout", "which"), [("llada-a", "none"), ("llada-a", "dual"), ("sdar-a", "block")]
)
def test_what_a_forward_computed_is_not_kept_during_the_next(
    layout: str, which: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all sequences that share it that is a gigabyte."""
    model = parity_model(layout)
    settings = DecodingSettings.parse(cache=which, block_length=8, gen_length=24)
    prompt = random_prompt(model, 5)
    whole = decode(model, prompt, settings)
    before: list[weakref.ref[Any]] = []
    alive: list[int] = []
    forward = driver.forward

    def watched(*args: Any) -> Any:
        alive.append(sum(ref() is not None for ref in before))
        outputs = forward(*args)
        before[:] = [weakref.ref(output.hidden) for output in outputs]
        return outputs

    monkeypatch.setattr(driver, "forward", watched)
    task = make_task(model, prompt, settings, Oracle(whole, 2))
    for _ in run(model, [task]):
        pass
    assert len(alive) > 5
    assert not any(alive)
