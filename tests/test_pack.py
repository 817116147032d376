"""Packing and batching change where states are computed, never what comes out.

Models are in float64, so that 1e-9 separates "another order of summation" from "another value".
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from helpers import own_examples, parity_model, random_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spiffy.runtime.forward import cache as caches
from spiffy.runtime.forward.cache import CACHES, BlockEdges, Cache, Evaluation
from spiffy.runtime.forward.pack import Row, RowOutput, Segment, forward, pack
from spiffy.runtime.forward.request import Reader, _cross_pairs
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.lanes import Pool
from spiffy.runtime.models.mask import Mask
from spiffy.runtime.models.slots import KeyValues
from spiffy.runtime.step.canvas import Canvas, Cursor
from spiffy.schemas import DecodingSettings

CHECKPOINTS = ("llada-a", "dream-a", "sdar-a")
TOLERANCE = 1e-9


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def held_of(model: DiffusionLM, ids: Tensor) -> KeyValues:
    """Keys and values of a sequence of which every position sees all others."""
    kv, slots = KeyValues(len(ids)), (range(len(ids)),)
    forward(model, [Row(ids, torch.arange(len(ids)), None, kv, slots, len(ids))])
    return kv


def held_at(kv: KeyValues, layer: int, slots: range) -> tuple[Tensor, Tensor]:
    """Keys and values in some slots of a layer."""
    key, value = (part[:, :, slots.start : slots.stop] for part in kv._buffers[layer])
    return key, value


def behind(
    model: DiffusionLM, ids: Tensor, past: int, mask: Mask | None = None, seed: int = 0
) -> Row:
    """A row behind `past` random positions (0: on its own)."""
    positions, end = torch.arange(len(ids)) + past, past + len(ids)
    if not past:
        return Row(ids, positions, mask)
    kv = held_of(model, random_prompt(model, past, seed))
    return Row(ids, positions, mask, kv, (range(past, end),), end)


def layers_of(model: DiffusionLM) -> range:
    return range(model.module.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def assert_same(
    model: DiffusionLM, rows: tuple[Row, Row], outputs: tuple[RowOutput, RowOutput]
) -> None:
    """Hidden states, and what was put away."""
    assert apart(outputs[0].hidden, outputs[1].hidden) < TOLERANCE
    for layer in layers_of(model):
        held = [held_at(row.kv, layer, range(row.kv_end)) for row in rows if row.kv is not None]
        for a, b in zip(*held, strict=True) if held else ():
            assert apart(a, b) < TOLERANCE


@st.composite
def pairs(draw: st.DrawFn, model: DiffusionLM) -> list[tuple[Row, Row]]:
    """Two to five rows twice; of any lengths, some behind others, or with masks."""
    made = []
    for number in range(draw(st.integers(2, 5))):
        length, past = draw(st.integers(1, 7)), draw(st.sampled_from([0, 0, 3, 8]))
        mask = None
        if draw(st.booleans()):
            generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
            seen = torch.rand(length, past + length, generator=generator) < 0.5
            seen[:, past:] |= torch.eye(length, dtype=torch.bool)
            mask = Mask.of(seen)
        ids = random_prompt(model, length, number)
        twice = (behind(model, ids, past, mask, number) for _ in range(2))
        made.append((next(twice), next(twice)))
    return made


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_rows_that_share_a_forward_equal_each_row_alone(checkpoint: str) -> None:
    model = parity_model(checkpoint, "float64")

    @own_examples(checkpoint)
    @settings(max_examples=40)
    @given(batch=pairs(model))
    def check(batch: list[tuple[Row, Row]]) -> None:
        together = forward(model, [row for row, _ in batch])
        for pair, ours in zip(batch, together, strict=True):
            assert_same(model, pair, (ours, forward(model, [pair[1]])[0]))

    check()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_rows_of_equal_length_attend_apart(checkpoint: str) -> None:
    """They are computed by one call of the kernel, as states without a cache are."""
    model = parity_model(checkpoint, "float64")
    batch = [behind(model, random_prompt(model, 5, seed), 0) for seed in (1, 2, 3)]
    for row, ours in zip(batch, forward(model, batch), strict=True):
        assert apart(ours.hidden, forward(model, [row])[0].hidden) < TOLERANCE


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_row_without_mask_attends_to_everything(checkpoint: str) -> None:
    model = parity_model(checkpoint, "float64")
    ids, everything = random_prompt(model, 4, 1), Mask.of(torch.ones(4, 9, dtype=torch.bool))
    rows = behind(model, ids, 5), behind(model, ids, 5, everything)
    assert_same(model, rows, (forward(model, [rows[0]])[0], forward(model, [rows[1]])[0]))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_keys_and_values_stay_when_room_behind_them_grows(checkpoint: str) -> None:
    model = parity_model(checkpoint, "float64")
    kv = held_of(model, random_prompt(model, 6))
    before = [held_at(kv, layer, range(6)) for layer in layers_of(model)]
    ids = random_prompt(model, 9, 1)
    forward(model, [Row(ids, torch.arange(9), None, kv, (range(6, 15),), 15)])
    for layer, pair in zip(layers_of(model), before, strict=True):
        for a, b in zip(held_at(kv, layer, range(6)), pair, strict=True):
            assert torch.equal(a, b)
    moved = [held_at(kv, layer, range(9, 12)) for layer in layers_of(model)]
    moved = [(key.clone(), value.clone()) for key, value in moved]
    kv.move(range(9, 12), 2)
    for layer, pair in zip(layers_of(model), moved, strict=True):
        for a, b in zip(held_at(kv, layer, range(2, 5)), pair, strict=True):
            assert torch.equal(a, b)


def test_nothing_grows_for_drafts_that_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that fails in some layer is made again with fewer drafts, which need less."""
    model = parity_model("sdar-a", "float64")
    kv = held_of(model, random_prompt(model, 6))
    first, *others = layers_of(model)
    before = [held_at(kv, layer, range(6)) for layer in layers_of(model)]
    put = KeyValues.put

    def full(self: KeyValues, layer: int, *rest: Any) -> Any:
        if layer != first:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return put(self, layer, *rest)

    def behind(count: int) -> Row:
        ids = random_prompt(model, count, 1)
        return Row(ids, torch.arange(count), None, kv, (range(6, 6 + count),), 6 + count)

    with monkeypatch.context() as patch:
        patch.setattr(KeyValues, "put", full)
        with pytest.raises(torch.OutOfMemoryError):
            forward(model, [behind(90)])
    forward(model, [behind(2)])
    made = {layer: buffers[0].shape[2] for layer, buffers in kv._buffers.items()}
    assert made == {first: 6 + 128} | dict.fromkeys(others, 6 + 64)
    for layer, pair in zip(layers_of(model), before, strict=True):
        for a, b in zip(held_at(kv, layer, range(6)), pair, strict=True):
            assert torch.equal(a, b)


def drafts_of(model: DiffusionLM, cursor: Cursor, span: range, count: int) -> Tensor:
    """The root and `count` states that fill random positions of the block."""
    drafts = cursor.ids.repeat(count + 1, 1)
    for k in range(1, count + 1):
        for position in list(span)[:: k % 3 + 1]:
            drafts[k, position] = (31 * k + position) % (model.mask_token_id - 1)
    return drafts


def opened(model: DiffusionLM, canvas: Canvas, cache: str, kv: KeyValues | None = None) -> Cache:
    """A cache of blocks of 4, of which nothing is read beforehand."""
    settings = DecodingSettings.parse(cache=cache, block_length=4, gen_length=12)
    reader = Reader(model, settings, canvas, 0, asks_rejected=False)
    return CACHES[settings.cache](model, canvas, BlockEdges(), reader, kv)


def evaluate(
    model: DiffusionLM, cache: Cache, cursor: Cursor, drafted: Tensor
) -> tuple[Evaluation, list[Row]]:
    """Run a cache's forwards for some states; also the rows of its last forward."""
    forwards = cache.evaluate(cursor, drafted, True)
    batch: list[Row] = next(forwards)
    while True:
        try:
            batch = forwards.send(forward(model, batch))
        except StopIteration as stop:
            evaluation: Evaluation = stop.value
            return evaluation, batch


def in_second_block(model: DiffusionLM, seed: int) -> tuple[Canvas, Cursor]:
    """A canvas of three blocks of 4, the first full, the second just begun."""
    causal = model.family.block_causal
    canvas = Canvas.plan(9, 12, 4, causal)
    cursor = canvas.start(random_prompt(model, 9, seed), model.mask_token_id)
    ids = cursor.ids.clone()
    first = canvas.span(0)
    ids[9 : first.stop] = random_prompt(model, first.stop - 9, seed + 1)
    return canvas, Cursor(ids, block=1, block_step=0, step=4)


def block_begun(cursor: Cursor, canvas: Canvas) -> Cursor:
    ids = cursor.ids.clone()
    ids[canvas.span(1).start + 2] = 7
    return Cursor(ids, block=1, block_step=1, step=5)


@pytest.mark.parametrize(
    ("checkpoint", "cache_name"),
    [
        ("llada-a", "dual"),
        ("dream-a", "dual"),
        ("llada-a", "prefix"),
        ("dream-a", "prefix"),
        ("sdar-a", "block"),
        ("llada-a", "none"),
    ],
)
def test_packed_drafts_equal_drafts_evaluated_alone(checkpoint: str, cache_name: str) -> None:
    model = parity_model(checkpoint, "float64")
    canvas, cursor = in_second_block(model, seed=4)
    cache = opened(model, canvas, cache_name)
    evaluate(model, cache, cursor, cursor.ids[None])  # the block's first forward freezes the rest
    root = block_begun(cursor, canvas)
    together, _ = evaluate(model, cache, root, drafts := drafts_of(model, root, canvas.span(1), 5))
    assert len(together.windows) == 6
    for k, state in enumerate(drafts):
        alone, _ = evaluate(model, cache, root, state[None])
        assert apart(together.windows[k].hidden, alone.windows[0].hidden) < TOLERANCE
    assert apart(together.windows[0].hidden, together.windows[1].hidden) > 1e-3  # drafts do matter


@pytest.mark.parametrize("checkpoint", ["llada-a", "dream-a"])
def test_dual_cache_freezes_what_the_blocks_first_forward_saw(checkpoint: str) -> None:
    """Against the definition: K/V of the whole sequence at the start of the block, minus the
    block, then the block's tokens at their own positions."""
    model = parity_model(checkpoint, "float64")
    canvas, cursor = in_second_block(model, seed=5)
    cache = opened(model, canvas, "dual")
    evaluate(model, cache, cursor, cursor.ids[None])
    root = block_begun(cursor, canvas)
    ours, _ = evaluate(model, cache, root, root.ids[None])

    span, length = canvas.span(1), canvas.length
    sees = torch.ones(len(span), length + len(span), dtype=torch.bool)
    sees[:, span.start : span.stop] = False
    block = root.ids[span.start : span.stop]
    slots = (range(length, length + len(span)),)
    held = held_of(model, cursor.ids)
    row = Row(block, torch.tensor(span), Mask.of(sees), held, slots, length + len(span))
    assert apart(ours.windows[0].hidden, forward(model, [row])[0].hidden) < TOLERANCE


@pytest.mark.parametrize(
    ("cache_name", "exact"), [("prefix", [True] * 5), ("prefix-shared", [True] + [False] * 4)]
)
@pytest.mark.parametrize("checkpoint", ["llada-a", "dream-a"])
def test_what_a_prefix_cache_says_of_root_and_drafts(
    checkpoint: str, cache_name: str, exact: list[bool]
) -> None:
    """Against the definition: a forward over one state's block and suffix, nothing packed beside
    it, behind the frozen prefix. With one suffix for all, only the root's logits are those."""
    model = parity_model(checkpoint, "float64")
    canvas, cursor = in_second_block(model, seed=6)
    cache = opened(model, canvas, cache_name)
    evaluate(model, cache, cursor, cursor.ids[None])
    root, span = block_begun(cursor, canvas), canvas.span(1)
    ours, _ = evaluate(model, cache, root, states := drafts_of(model, root, span, 4))

    anew = range(span.start, canvas.length)
    held = held_of(model, cursor.ids)
    error = []
    for window, ids in zip(ours.windows, states, strict=True):
        row = Row(ids[anew.start :], torch.tensor(anew), None, held, (anew,), anew.stop)
        (alone,) = forward(model, [row])
        assert window.start == span.start
        error.append(apart(model.head(window.hidden), model.head(alone.hidden[: len(span)])))
    assert [value < 1e-5 for value in error] == exact  # logits are float32


@pytest.mark.parametrize("cache_name", ["dual", "prefix", "prefix-shared"])
def test_frozen_keys_end_at_a_blocks_edge_and_so_do_windows(cache_name: str) -> None:
    """The next block's logits rest on another cache: no walk may take them from this one."""
    model = parity_model("llada-a", "float64")
    canvas, cursor = in_second_block(model, seed=6)
    cache = opened(model, canvas, cache_name)
    evaluate(model, cache, cursor, cursor.ids[None])
    ours, _ = evaluate(model, cache, block_begun(cursor, canvas), cursor.ids.repeat(2, 1))
    assert all(window.covers(canvas.span(1)) for window in ours.windows)
    assert not any(window.covers(canvas.span(2)) for window in ours.windows)
    assert not cache.crosses


@pytest.mark.parametrize("checkpoint", ["sdar-a"])
def test_block_cache_equals_the_block_causal_forward(checkpoint: str) -> None:
    """Hidden states behind the stored blocks give the logits of the whole masked forward."""
    model = parity_model(checkpoint, "float64")
    canvas, cursor = in_second_block(model, seed=7)
    cache = opened(model, canvas, "block")
    ours, _ = evaluate(model, cache, cursor, cursor.ids[None])
    span = canvas.span(1)
    logits = model.forward_logits(cursor.ids[None, : span.stop], block_length=4)
    assert (
        apart(model.head(ours.windows[0].hidden), logits[0, span.start :]) < 1e-5
    )  # logits are float32


@pytest.mark.parametrize(
    ("checkpoint", "cache_name", "per_state", "shared"),
    [
        ("llada-a", "none", 21, 0),
        ("llada-a", "dual", 4, 0),
        ("llada-a", "prefix", 8, 0),
        ("llada-a", "prefix-shared", 4, 4),
        ("sdar-a", "block", 4, 4),
    ],
)
def test_positions_that_a_forward_runs(
    checkpoint: str, cache_name: str, per_state: int, shared: int
) -> None:
    """None: 9 + 12 per state; dual and block: one block of 4 each; prefix: and a suffix of 4 each;
    prefix-shared: and one of 4 in all; block: and the next block of 4 behind the one draft that
    completes its own."""
    model = parity_model(checkpoint, "float64")
    canvas, cursor = in_second_block(model, seed=8)
    cache = opened(model, canvas, cache_name)
    evaluate(model, cache, cursor, cursor.ids[None])
    root = block_begun(cursor, canvas)
    _, batch = evaluate(model, cache, root, drafts_of(model, root, canvas.span(1), 3))
    assert sum(len(row.ids) for row in batch) == 4 * per_state + shared


@pytest.mark.parametrize(
    ("cache_name", "most"),
    [("none", 4), ("dual", 12), ("prefix", 4), ("prefix-shared", 10), ("block", 6)],
)
def test_forwards_stay_bounded_whatever_a_graph_holds(
    monkeypatch: pytest.MonkeyPatch, cache_name: str, most: int
) -> None:
    """A prompt of 9, three blocks of 4: 84 positions are 4 states of 21; 48 are 12 blocks, or 4
    blocks with suffixes of 8, or one such suffix and 10 blocks, or 6 blocks with the next one."""
    monkeypatch.setattr(caches, "_MOST_STACKED", 84)
    monkeypatch.setattr(caches, "_MOST_PACKED", 48)
    settings = DecodingSettings.parse(cache=cache_name, block_length=4, gen_length=12)
    assert caches.most_drafts(settings, Canvas.plan(9, 12, 4, block_causal=False)) == most


@pytest.mark.parametrize(
    ("checkpoint", "cache_name", "bound"),
    [
        ("llada-a", "none", 84),
        ("llada-a", "dual", 48),
        ("llada-a", "prefix", 48),
        ("llada-a", "prefix-shared", 48),
        ("sdar-a", "block", 48),
    ],
)
def test_as_many_drafts_as_there_may_be_stay_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, checkpoint: str, cache_name: str, bound: int
) -> None:
    """Drafts that need most room: all of them complete their block."""
    monkeypatch.setattr(caches, "_MOST_STACKED", 84)
    monkeypatch.setattr(caches, "_MOST_PACKED", 48)
    model = parity_model(checkpoint, "float64")
    canvas, cursor = in_second_block(model, seed=8)
    cache = opened(model, canvas, cache_name)
    evaluate(model, cache, cursor, cursor.ids[None])
    root, span = block_begun(cursor, canvas), canvas.span(1)
    settings = DecodingSettings.parse(cache=cache_name, block_length=4, gen_length=12)
    states = root.ids.repeat(1 + caches.most_drafts(settings, canvas), 1)
    states[1:, span.start : span.stop] = random_prompt(model, 4)
    batches = [evaluate(model, cache, root, some)[1] for some in (states[:1], states)]
    alone, together = (sum(len(row.ids) for row in batch) for batch in batches)
    assert 0.6 * bound < together - alone <= bound


def test_pack_lets_segments_see_exactly_what_they_list() -> None:
    """Behind five slots, of which the first segment takes two anew; worked out by hand."""
    model = parity_model("llada-a", "float64")
    segments = [
        Segment(random_prompt(model, length, start).numpy(), start, slot)
        for length, start, slot in ((2, 3, 3), (2, 3, 7), (2, 5, 5))
    ]
    kv = held_of(model, random_prompt(model, 5))
    row = pack(segments, [[0, 2], [1], [2, 0]], kv, 5)
    assert row.positions.tolist() == [3, 4, 3, 4, 5, 6]
    assert row.ids.tolist() == [t for segment in segments for t in segment.ids.tolist()]
    assert row.slots == (range(3, 5), range(7, 9), range(5, 7))
    assert row.kv_end == 9
    assert row.mask is not None
    first, second = [1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert row.mask.dense().int().tolist() == [first, first, second, second, first, first]


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_any_segments_are_packed_position_by_position(data: st.DataObject) -> None:
    """Some in the slots of what is held, the others behind it in any order."""
    held, count = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    slot, free, segments = held, 0, {}
    for number in data.draw(st.permutations(range(count))):
        start, length = data.draw(st.integers(0, 9)), lengths[number]
        inside = free + length <= held and data.draw(st.booleans())
        at, free, slot = (free, free + length, slot) if inside else (slot, free, slot + length)
        segments[number] = Segment(np.arange(length) + 10 * number, start, at)
    packed = [segments[number] for number in range(count)]
    others = st.sets(st.integers(0, count - 1))
    sees = [sorted({number, *data.draw(others)}) for number in range(count)]
    row = pack(packed, sees, KeyValues(9), held)

    mine = [(n, k) for n, segment in enumerate(packed) for k in range(len(segment.ids))]
    assert row.ids.tolist() == [10 * n + k for n, k in mine]
    assert row.positions.tolist() == [packed[n].start + k for n, k in mine]
    slots = [packed[n].slot + k for n, k in mine]
    assert [at for run in row.slots for at in run] == slots
    assert row.kv_end == max(held, *(at + 1 for at in slots))
    owner = {at: n for at, (n, _) in zip(slots, mine, strict=True)}
    seen = [[owner.get(at, n) in sees[n] for at in range(row.kv_end)] for n, _ in mine]
    if row.mask is None:
        assert all(map(all, seen))
    else:
        assert row.mask.dense().tolist() == seen


@given(st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_cross_pairs_are_masked_at_two_states_of_which_one_extends_the_other(
    seed: int,
) -> None:
    draw = np.random.default_rng(seed)
    states, length = draw.integers(1, 5), draw.integers(1, 5)
    ids = draw.integers(0, 3, (states, length))
    masked = ids == 0
    asked = masked & (draw.random(masked.shape) < 0.8)
    number = np.where(asked, asked.ravel().cumsum().reshape(masked.shape) - 1, -1)
    expected = [
        (int(number[of, at]), int(number[by, at]))
        for of, by, at in product(range(states), range(states), range(length))
        if of != by
        and all(masked[of, k] or ids[of, k] == ids[by, k] for k in range(length))
        and asked[of, at]
        and asked[by, at]
    ]
    assert _cross_pairs(ids, masked, number).T.tolist() == [list(pair) for pair in expected]


def test_segments_that_see_all_need_no_mask() -> None:
    model = parity_model("llada-a", "float64")
    ids = random_prompt(model, 4).numpy()
    row = pack([Segment(ids[:2], 5, 5), Segment(ids[2:], 7, 7)], [[0, 1], [0, 1]], KeyValues(9), 5)
    assert row.mask is None
    assert (row.slots, row.kv_end) == ((range(5, 9),), 9)


class _Largest(TorchDispatchMode):
    """The largest number of elements that any operation made, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        inputs = {
            part.untyped_storage().data_ptr()
            for part in tree_leaves(args)
            if isinstance(part, Tensor)
        }
        for part in tree_leaves(out):
            if isinstance(part, Tensor) and part.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, part.numel())
        return out


@pytest.mark.parametrize(
    ("lengths", "together"), [((400,), False), ((400, 430, 411), False), ((400, 430, 411), True)]
)
@pytest.mark.parametrize(("checkpoint", "cache"), [("sdar-a", "block"), ("llada-a", "dual")])
def test_no_forward_copies_what_is_stored(
    checkpoint: str, cache: str, lengths: tuple[int, ...], together: bool
) -> None:
    """Once there is room for a draft, alone and among unequal prompts, nothing
    that an operation makes is as large as one layer's stored keys: one sequence's, or all
    those that attend together."""
    model = parity_model(checkpoint, "float64")
    rows, caches_of, pool = [], [], Pool(3)
    for seed, length in enumerate(lengths):
        canvas = Canvas.plan(length, 8, 4, model.family.block_causal)
        cursor = canvas.start(random_prompt(model, length, seed), model.mask_token_id)
        own = opened(model, canvas, cache, pool.open(canvas.length) if together else None)
        evaluate(model, own, cursor, cursor.ids[None])
        drafts = drafts_of(model, cursor, canvas.span(0), 1)
        evaluate(model, own, cursor, drafts)  # room is made
        forwards = own.evaluate(cursor, drafts, True)
        rows += next(forwards)
        caches_of.append(forwards)
    config: Any = model.module.config
    stored = min(lengths) * config.num_key_value_heads * config.hidden_size
    stored //= config.num_attention_heads
    stored *= len(lengths) if together else 1
    with _Largest() as largest:
        forward(model, rows)
    assert 0 < largest.elements < stored
