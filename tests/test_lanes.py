"""Sequences that share forwards attend together: to the tokens that each has alone.

Models are in float64, where another order of summation decides no tie. On a CPU sequences do not
lie in lanes; here they are made to. `test_device.py` does without that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Oracle, decode, own_examples, parity_model, random_prompt, states
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiffy.runtime import DiffusionLM, decoding_settings
from spiffy.runtime.decode import Scheduler, Task, driver, make_task
from spiffy.runtime.draft import Candidates, GraphDrafter
from spiffy.runtime.forward import pack, request
from spiffy.runtime.forward.pack import Row, forward
from spiffy.runtime.models.batch import Batch
from spiffy.runtime.models.lanes import Lane, Lanes, Pool, roomy
from spiffy.runtime.models.slots import KeyValues
from spiffy.runtime.step.canvas import Cursor

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llada, dual": ("llada-a", {"cache": "dual"}),
    "llada, prefix": ("llada-a", {"cache": "prefix"}),
    "llada, prefix-shared": ("llada-a", {"cache": "prefix-shared"}),
    "dream, dual": ("dream-a", {"cache": "dual"}),  # whose heads share keys
    "sdar": ("sdar-a", {}),
    "llada2": ("llada2-a", {}),
    "fast-dllm-v2": ("fastdllm2-a", {"sub_block_length": 2}),
}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """All that attend together from here on."""
    found: list[Batch] = []
    batched = pack.batched

    def noting(*args: Any) -> Batch:
        found.append(batched(*args))
        return found[-1]

    monkeypatch.setattr(pack, "batched", noting)
    return found


def pooled(model: DiffusionLM, batch_size: int) -> Scheduler:
    """A scheduler as on an accelerator."""
    scheduler = Scheduler(model, batch_size)
    scheduler._pool = Pool(batch_size)
    return scheduler


def finish(scheduler: Scheduler) -> None:
    while scheduler.busy:
        for task in scheduler.step():
            assert task.error is None


def slots_of(lane: Lane, layer: int) -> list[Tensor]:
    """Keys and values [slots, heads, head_dim]."""
    return [buffer[lane.number] for buffer in lane.lanes.known(layer)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_sequences_together_come_to_the_states_of_each_alone(
    layout: str, batches: list[Batch]
) -> None:
    """Whatever their lengths, drafts, and when they join; some hop along their own future."""
    name, options = LAYOUTS[layout]
    model = parity_model(name, "float64")
    fills = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=2)

    @own_examples(layout)
    @given(st.data())
    @settings(max_examples=8, deadline=None)
    def check(data: st.DataObject) -> None:
        temperature = data.draw(st.sampled_from((0.0, 0.0, 0.8)))
        alone, tasks = [], []
        for k in range(data.draw(st.integers(2, 6))):
            given_ = {"gen_length": data.draw(st.sampled_from((4, 8, 12))), "block_length": 4}
            own = decoding_settings(
                model, **given_, **options, temperature=temperature, stop_at_eos=False
            )
            prompt = random_prompt(model, data.draw(st.integers(1, 90)), k)
            alone.append(decode(model, prompt, own, seed=5, sequence=k))
            drafter: Any = data.draw(st.sampled_from(("plain", "graph", "oracle")))
            if drafter == "graph":
                drafter = GraphDrafter(data.draw(st.lists(fills, min_size=1, max_size=20)), model)
            elif drafter == "oracle":
                drafter = Oracle(alone[-1], data.draw(st.integers(1, 6)))
            else:
                drafter = None
            tasks.append(make_task(model, prompt, own, drafter, 5, k))
            if own.cache == "prefix-shared":  # whose drafts are not exact
                alone[-1] = decode(model, prompt, own, drafter, 5, k)
        scheduler = pooled(model, data.draw(st.integers(2, 6)))
        for task in tasks:
            scheduler.add(task)
            if data.draw(st.booleans()):
                assert all(done.error is None for done in scheduler.step())
        finish(scheduler)
        assert [states(task) for task in tasks] == [states(task) for task in alone]

    check()
    assert any(batch.taken is None for batch in batches)
    assert any(batch.taken is not None for batch in batches)


def rows_of(model: DiffusionLM, pool: Pool, lengths: list[int], more: int = 3) -> list[Row]:
    """Rows of a few positions, each behind a sequence of its own."""
    rows = []
    for k, length in enumerate(lengths):
        kv, ids = pool.open(length), random_prompt(model, length + more, k)
        before = Row(ids[:length], torch.arange(length), None, kv, (range(length),), length)
        forward(model, [before])
        end = length + more
        behind = torch.arange(length, end)
        rows.append(Row(ids[length:], behind, None, kv, (range(length, end),), end))
    return rows


def alone(model: DiffusionLM, rows: list[Row]) -> list[Tensor]:
    return [forward(model, [row])[0].hidden for row in rows]


def test_lanes_between_those_of_a_batch_may_be_free(batches: list[Batch]) -> None:
    """But no more of them than others: what they compute is lost."""
    model, pool = parity_model("dream-a", "float64"), Pool(16)
    rows = rows_of(model, pool, [9, 12, 9, 14, 9, 9, 9, 9, 10])
    expected = alone(model, rows)
    numbers = [0, 1, 3, 4, 8]  # of those that take part: three lanes in a row have none
    found = forward(model, [rows[k] for k in reversed(numbers)])
    (batch,) = batches
    assert (batch.first, batch.rows, len(batch.wholes)) == (0, 9, 5)
    for k, output in zip(reversed(numbers), found, strict=True):
        assert torch.allclose(output.hidden, expected[k], rtol=0, atol=1e-12)
    forward(model, [rows[0], rows[2]])
    forward(model, [rows[0], rows[3]])
    assert [(batch.first, batch.rows) for batch in batches[1:]] == [(0, 3)]


def test_rows_without_masks_and_of_equal_length_need_none(batches: list[Batch]) -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    rows = rows_of(model, pool, [9, 9, 9])
    forward(model, rows)
    assert batches[-1].mask is batches[-1].taken is batches[-1].back is None
    forward(model, rows_of(model, pool, [9, 12]))
    assert batches[-1].mask is not None


def test_forwards_of_very_different_lengths_do_not_wait_for_each_other(
    batches: list[Batch],
) -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    few, many = rows_of(model, pool, [40, 40], 4), rows_of(model, pool, [40, 40], 80)
    expected = alone(model, [*few, *many])
    found = forward(model, [few[0], many[0], few[1], many[1]])
    assert sorted((batch.rows, batch.length) for batch in batches) == [(2, 4), (2, 80)]
    for output, hidden in zip(found, (expected[k] for k in (0, 2, 1, 3)), strict=True):
        assert torch.allclose(output.hidden, hidden, rtol=0, atol=1e-12)


def test_sequences_attend_apart_where_the_model_has_another_attention(
    batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    rows = rows_of(model, pool, [9, 9])
    expected = alone(model, rows)
    monkeypatch.setattr(model.module.config, "_attn_implementation", "eager")
    for output, hidden in zip(forward(model, rows), expected, strict=True):
        assert torch.allclose(output.hidden, hidden, rtol=0, atol=1e-5)  # its softmax is float32
    assert not batches


def test_a_lane_that_is_too_short_is_changed_for_another_with_all_that_it_holds() -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    (row, other) = rows_of(model, pool, [60, 60])
    lane: Any = row.kv
    assert lane.lanes.slots == 64
    held = [part[:60].clone() for layer in lane.lanes.layers for part in slots_of(lane, layer)]
    lane.reserve(64)
    assert lane.lanes is other.kv.lanes  # type: ignore[union-attr]
    lane.reserve(65)
    assert (lane.lanes.slots, lane.number) == (128, 0)
    after = [part[:60] for layer in lane.lanes.layers for part in slots_of(lane, layer)]
    assert len(after) == len(held) > 0
    assert all(map(torch.equal, held, after))
    assert pool.open(60).lanes is lane.lanes  # new ones need as much sooner or later
    again = pool.open(30)
    assert again.lanes is other.kv.lanes  # type: ignore[union-attr]
    assert again.number == 0  # which was left


def test_what_is_not_finite_stays_with_its_sequence() -> None:
    """Neither beside it nor in the lane that it leaves does it reach another one."""
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    first, second, third = rows_of(model, pool, [20, 40, 30])
    expected = alone(model, [first, third])
    lane: Any = second.kv
    with torch.inference_mode():
        for layer in lane.lanes.layers:
            for part in slots_of(lane, layer):
                part.fill_(torch.nan)
    found = [output.hidden for output in forward(model, [first, second, third])]
    assert found[1].isnan().all()
    for hidden, right in zip((found[0], found[2]), expected, strict=True):
        assert torch.allclose(hidden, right, rtol=0, atol=1e-12)
    number = lane.number
    del second, lane
    (again,) = rows_of(model, pool, [10])
    assert isinstance(again.kv, Lane)
    assert again.kv.number == number
    right = alone(model, [again])[0]
    assert torch.allclose(forward(model, [again, third])[0].hidden, right, rtol=0, atol=1e-12)


def test_a_lane_is_changed_before_anything_is_put_there() -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    (row,) = rows_of(model, pool, [60])
    lanes = [pool.open(60) for _ in range(4)]
    for lane in lanes:
        lane.reserve(65)
    assert [lane.number for lane in lanes] == [0, 1, 2, 3]
    assert isinstance(row.kv, Lane)
    assert row.kv.lanes is not lanes[0].lanes
    row.kv.reserve(60)  # what others need, it needs sooner or later
    assert row.kv.lanes is lanes[0].lanes


def test_a_lane_that_cannot_be_changed_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    (row,) = rows_of(model, pool, [60])
    lane: Any = row.kv
    lanes, number = lane.lanes, lane.number
    held = [part.clone() for layer in lanes.layers for part in slots_of(lane, layer)]

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("spiffy.runtime.models.lanes.Lanes.of", full)
        with pytest.raises(torch.OutOfMemoryError):
            lane.reserve(100)
    assert (lane.lanes, lane.number, pool.room) == (lanes, number, 0)
    assert all(map(torch.equal, held, (p for layer in lanes.layers for p in slots_of(lane, layer))))
    lane.reserve(100)
    assert lane.number == 0


def test_memory_of_lanes_that_nobody_uses_comes_back() -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    rows = rows_of(model, pool, [20, 21, 22, 23, 24])
    lanes: Any = rows[0].kv.lanes  # type: ignore[union-attr]
    expected = alone(model, rows)
    assert {len(buffer) for layer in lanes.layers for buffer in lanes.known(layer)} == {8}
    few = Pool(5)
    assert all(row.kv.lanes is lanes for row in rows)  # type: ignore[union-attr]
    others: Any = rows_of(model, few, [20, 21, 22, 23, 24])[0].kv
    assert {len(b) for layer in others.lanes.layers for b in others.lanes.known(layer)} == {5}
    kept = [rows[1], rows[4]]
    del rows
    pool.trim()
    assert {len(buffer) for layer in lanes.layers for buffer in lanes.known(layer)} == {2}
    assert [row.kv.number for row in kept] == [0, 1]  # type: ignore[union-attr]
    for output, hidden in zip(forward(model, kept), (expected[1], expected[4]), strict=True):
        assert torch.allclose(output.hidden, hidden, rtol=0, atol=1e-12)
    del kept
    pool.trim()
    assert lanes.layers == []


def test_a_lane_that_nothing_was_put_into_is_trimmed_with_the_others() -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    rows = rows_of(model, pool, [20, 21])
    expected = alone(model, rows)
    free = [pool.open(20) for _ in range(4)]  # beyond the buffers, which have two lanes
    del free[0], free[0], rows[0]
    assert not pool.trim()
    assert [lane.number for lane in (rows[0].kv, *free)] == [0, 1, 2]  # type: ignore[union-attr]
    assert pool.open(20).number == 3
    assert torch.allclose(forward(model, rows)[0].hidden, expected[1], rtol=0, atol=1e-12)
    more = rows_of(model, pool, [20, 22, 24])
    right = alone(model, more)
    for output, hidden in zip(forward(model, more), right, strict=True):
        assert torch.allclose(output.hidden, hidden, rtol=0, atol=1e-12)


def test_what_cannot_be_trimmed_for_want_of_memory_stays_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy of the keys fits, one of the values does not."""
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    rows = rows_of(model, pool, [20, 21, 22, 23, 24])
    expected = alone(model, rows)[:3]
    lanes: Any = rows[0].kv.lanes  # type: ignore[union-attr]
    del rows[3:]
    clone, made = Tensor.clone, []

    def short(tensor: Tensor) -> Tensor:
        made.append(tensor)
        if len(made) % 2 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clone(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "clone", short)
        assert not pool.trim()
    assert {len(buffer) for layer in lanes.layers for buffer in lanes.known(layer)} == {8}
    rows += rows_of(model, pool, [20] * 6)
    for output, hidden in zip(forward(model, rows), expected, strict=False):
        assert torch.allclose(output.hidden, hidden, rtol=0, atol=1e-12)


def test_what_others_need_is_not_waited_for_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Pool(16)
    lane, change = pool.open(60), Lane._change
    pool.room = 50

    def short(self: Lane, slots: int) -> None:
        if slots > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        change(self, slots)

    monkeypatch.setattr(Lane, "_change", short)
    lane.reserve(64)
    assert lane.lanes.slots == 64
    with pytest.raises(torch.OutOfMemoryError):
        lane.reserve(65)
    monkeypatch.undo()
    lane.reserve(64)  # what has failed is not wished for again
    assert lane.lanes.slots == 64
    pool.open(1)  # until another one comes
    lane.reserve(64)
    assert lane.lanes.slots == 128
    pool.room = 5000
    assert pool.open(60).lanes.slots == 128  # at most as much room as it is long


def test_the_last_one_to_leave_for_a_longer_lane_leaves_no_memory_behind() -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    (row,) = rows_of(model, pool, [60])
    before: Any = row.kv.lanes  # type: ignore[union-attr]
    assert before.layers
    row.kv.reserve(65)  # type: ignore[union-attr]
    assert before.layers == []


def test_long_rows_without_masks_are_with_their_like_only(batches: list[Batch]) -> None:
    """Filled up they would need masks, of their length times that of what they attend to."""
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    rows = rows_of(model, pool, [20, 20, 20, 20], more=257)
    rows[3:] = rows_of(model, pool, [20], more=270)
    expected = alone(model, rows)
    for output, hidden in zip(forward(model, rows), expected, strict=True):
        assert torch.allclose(output.hidden, hidden, rtol=0, atol=1e-12)
    (batch,) = batches
    assert (batch.length, len(batch.wholes), batch.mask) == (257, 3, None)


def test_attention_is_the_models_own_again_after_a_lane_did_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    (row,) = rows_of(model, pool, [60])

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("spiffy.runtime.models.attention._Arrangement.__init__", full)
        with pytest.raises(torch.OutOfMemoryError):
            forward(model, [row])
    config: Any = model.module.config
    assert config._attn_implementation == "sdpa"
    forward(model, [row])


class Overflowing:
    """Drafts of a chain, and one with a token for which the model computes no numbers."""

    token_ranks, asks_rejected = 1, False

    def __init__(self, model: DiffusionLM, token: int, since: int) -> None:
        self.chain = GraphDrafter([[(k, 0) for k in range(n)] for n in (1, 2, 3)], model)
        self.token, self.since = token, since  # block

    def __call__(self, root: Cursor, candidates: Candidates, room: int) -> Tensor:
        drafts = self.chain(root, candidates, room)
        if room < 1 or root.block < self.since:
            return drafts
        wrong = root.ids.clone()
        wrong[candidates.positions[-1]] = self.token
        return torch.cat((drafts, wrong[None]))


@pytest.mark.parametrize("since", [0, 1])
@pytest.mark.parametrize("read", ["as walked", "ahead", "in lanes"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "shared" not in name])
def test_a_draft_that_overflows_takes_no_answer_along(
    layout: str, read: str, since: int, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in float16: all that shares its row is NaN, and nothing else may be.

    Beside it, a sequence whose drafts reach further: what lies in the lane is shown, masked.
    """
    name, options = LAYOUTS[layout]
    model = parity_model(name, "float64")
    own = decoding_settings(model, gen_length=16, block_length=8, stop_at_eos=False, **options)
    prompts = [random_prompt(model, length, length) for length in (9, 10)]
    plain = [decode(model, prompt, own) for prompt in prompts]
    held = {token for task in plain for ids in states(task) for token in ids}
    token = next(k for k in range(model.vocab_size) if k not in held)

    def overflow(_: object, given: tuple[Tensor], embedded: Tensor) -> Tensor:
        return embedded.masked_fill((given[0] == token)[..., None], torch.inf)

    module: Any = model.module
    hook = module.model.embed_tokens.register_forward_hook(overflow)
    if read != "as walked":
        monkeypatch.setattr(request, "_HOSTS", frozenset())
    scheduler = pooled(model, 2) if read == "in lanes" else Scheduler(model, 2)
    drafters = (Overflowing(model, token, since), GraphDrafter([[(k, 0)] for k in range(4)], model))
    tasks = [
        make_task(model, prompt, own, drafter)
        for prompt, drafter in zip(prompts, drafters, strict=True)
    ]
    try:
        for task in tasks:
            scheduler.add(task)
        finish(scheduler)
    finally:
        hook.remove()
    assert [states(task) for task in tasks] == [states(task) for task in plain]
    assert [task.stats.overflows for task in tasks] == [1, 0]
    assert [task.plain_nfe for task in tasks] == [task.stats.nfe for task in plain]
    assert [task.stats.drafted > 0 for task in tasks] == [since > 0, True]
    assert tasks[0].overflowed
    assert any(batch.rows > 1 for batch in batches) == (read == "in lanes")


def test_idle_lanes_are_given_back_before_anything_is_done_with_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After many sequences one alone: what they had is not what it fails of."""
    model = parity_model("sdar-a", "float64")
    scheduler, pool, last = three_end_and_one_goes_on(model)
    make = driver.forward

    def short(*args: Any) -> Any:
        if any(size > 1 for size in buffers(pool)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(*args)

    assert set(buffers(pool)) == {4}
    monkeypatch.setattr(driver, "forward", short)
    finish(scheduler)
    assert states(last) == states(decode(model, last.prompt, last.settings))
    assert (scheduler.halvings, scheduler.most_decodes) == (0, 4)


def three_end_and_one_goes_on(model: DiffusionLM) -> tuple[Scheduler, Pool, Task]:
    own = decoding_settings(model, gen_length=4, block_length=4, stop_at_eos=False)
    scheduler = pooled(model, 4)
    pool = scheduler._pool
    assert pool is not None
    tasks = [
        make_task(model, random_prompt(model, 9, k), own.changed(gen_length=12 if k == 3 else 4))
        for k in range(4)
    ]
    for task in tasks:
        scheduler.add(task)
    while len(scheduler) > 1:
        scheduler.step()
    return scheduler, pool, tasks[3]


def buffers(pool: Pool) -> list[int]:
    """Lanes of all buffers."""
    every = pool._lanes.values()
    return [len(b) for lanes in every for layer in lanes.layers for b in lanes.known(layer)]


@pytest.mark.parametrize("given_up", [False, True])
def test_an_idle_scheduler_keeps_no_memory(given_up: bool) -> None:
    """Others may need it: a server's own checks of answers have a scheduler of their own."""
    scheduler, pool, last = three_end_and_one_goes_on(parity_model("sdar-a", "float64"))
    assert buffers(pool)
    if given_up:
        scheduler.remove(last)
    finish(scheduler)
    assert buffers(pool) == []


def test_a_lane_that_cannot_grow_among_others_ends_in_fewer_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Growth begins, ends at the second layer, and what it took comes back: not for ever.

    The buffers that others have alone suffice for them.
    """
    model = parity_model("sdar-a", "float64")
    own = decoding_settings(model, gen_length=4, block_length=4, stop_at_eos=False)
    graph = GraphDrafter([[(k, 0)] for k in range(4)], model)
    longer = make_task(model, random_prompt(model, 100, 0), own)
    task = make_task(model, random_prompt(model, 55, 1), own, graph)
    expected = [decode(model, each.prompt, own) for each in (longer, task)]
    scheduler, of, refused = pooled(model, 2), Lanes.of, 0

    def short(lanes: Lanes, layer: int, like: Any) -> Any:
        nonlocal refused
        grows = layer in lanes.layers and len(lanes.known(layer)[0]) < lanes._count
        if lanes.slots == 128 and layer == 1 and grows:
            refused += 1
            assert refused < 50
            raise torch.OutOfMemoryError("CUDA out of memory")
        return of(lanes, layer, like)

    monkeypatch.setattr(Lanes, "of", short)
    for each in (longer, task):
        scheduler.add(each)
    finish(scheduler)
    assert refused
    assert scheduler.halvings > 0
    assert [states(each) for each in (longer, task)] == [states(each) for each in expected]


def test_a_wish_that_failed_costs_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = parity_model("sdar-a", "float64"), Pool(16)
    short, longer = rows_of(model, pool, [40])[0], rows_of(model, pool, [100])[0]
    lanes: Any = longer.kv.lanes  # type: ignore[union-attr]
    expected = alone(model, [short, longer])
    pool.room = 40
    of, grown = Lanes.of, []

    def full(self: Lanes, layer: int, like: Any) -> Any:
        if layer in self.layers and len(self.known(layer)[0]) < self._count:
            grown.append(self)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return of(self, layer, like)

    monkeypatch.setattr(Lanes, "of", full)
    for _ in range(2):
        for output, hidden in zip(forward(model, [short, longer]), expected, strict=True):
            assert torch.allclose(output.hidden, hidden, rtol=0, atol=1e-12)
    assert grown == [lanes]  # the wish, once
    third = pool.open(40)
    assert third.lanes.slots == 64  # neither has one that joins


def test_lanes_are_of_few_sizes_and_hardly_too_long() -> None:
    sizes = {roomy(slots) for slots in range(1, 20_000)}
    assert all(slots <= roomy(slots) for slots in range(1, 20_000))
    assert all(roomy(slots) < 1.26 * slots for slots in range(1025, 20_000))
    assert sorted(sizes)[:9] == [64, 128, 256, 512, 1024, 1280, 1536, 1792, 2048]
    assert len(sizes) < 25


def test_what_a_finished_sequence_had_goes_to_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many lanes as sequences that run, however many there were."""
    model = parity_model("sdar-a", "float64")
    own = decoding_settings(model, gen_length=4, block_length=4, stop_at_eos=False)
    scheduler, seen = pooled(model, 3), set()
    make = driver.forward

    def noting(model: DiffusionLM, rows: list[Row], *args: Any) -> Any:
        seen.update(row.kv.number for row in rows if isinstance(row.kv, Lane))
        return make(model, rows, *args)

    monkeypatch.setattr(driver, "forward", noting)
    for k in range(12):
        scheduler.add(make_task(model, random_prompt(model, 8 + k % 2, k), own))
    finish(scheduler)
    assert seen == {0, 1, 2}


def test_decodes_go_on_with_what_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those put out for want of it leave their lanes, and begin anew to the same states."""
    model = parity_model("sdar-a", "float64")
    own = decoding_settings(model, gen_length=12, block_length=4, stop_at_eos=False)
    prompts = [random_prompt(model, 20, k) for k in range(6)]
    alone = [decode(model, prompt, own) for prompt in prompts]
    graph = GraphDrafter([[(0, 0)], [(0, 0), (1, 0)], [(1, 0)]], model)
    tasks = [make_task(model, prompt, own, graph) for prompt in prompts]
    make, made = driver.forward, []

    def short(model: DiffusionLM, rows: list[Row], *args: Any) -> Any:
        made.append(len(rows))
        if len(made) > 3 and len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(model, rows, *args)

    monkeypatch.setattr(driver, "forward", short)
    scheduler = pooled(model, 6)
    pool: Any = scheduler._pool
    for task in tasks:
        scheduler.add(task)
    for _ in range(4):
        scheduler.step()
    buffers = [
        len(buffer)
        for lanes in pool._lanes.values()
        for layer in lanes.layers
        for buffer in lanes.known(layer)
    ]
    assert set(buffers) == {3}  # given back when 3 of 6 did not fit either, and only 1 was left
    finish(scheduler)
    assert any(task.anew for task in tasks)
    assert [states(task) for task in tasks] == [states(task) for task in alone]


def test_sequences_on_a_cpu_have_keys_and_values_of_their_own() -> None:
    """Nothing is launched there: lanes would only compute more."""
    model = parity_model("sdar-a", "float64")
    scheduler = Scheduler(model, batch_size=2)
    own = decoding_settings(model, gen_length=4, block_length=4)
    for k in range(2):
        scheduler.add(make_task(model, random_prompt(model, 5, k), own))
    scheduler.step()
    kvs = [row.kv for _, _, rows in scheduler._running for row in rows]
    assert len(kvs) == 2
    assert all(type(kv) is KeyValues for kv in kvs)
