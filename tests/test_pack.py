"""Packing and batching change where states are computed, never what comes out.

Models are in float64, so that 1e-9 separates "another order of summation" from "another value".
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers import parity_model, random_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiffy.runtime.forward import cache as caches
from spiffy.runtime.forward.cache import CACHES, BlockEdges, DualCache, Evaluation
from spiffy.runtime.forward.pack import Row, RowOutput, Segment, forward, pack
from spiffy.runtime.models.base import DiffusionLM, KeyValues
from spiffy.runtime.step.canvas import Canvas, Cursor
from spiffy.schemas import DecodingSettings

CHECKPOINTS = ("llada-a", "dream-a", "sdar-a")
TOLERANCE = 1e-9


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def frozen_of(model: DiffusionLM, length: int, seed: int) -> KeyValues:
    """Keys and values of a random sequence."""
    ids = random_prompt(model, length, seed)
    (output,) = forward(model, [Row(ids, torch.arange(length), keep=True)])
    assert output.kept is not None
    return output.kept


def assert_same(ours: RowOutput, alone: RowOutput) -> None:
    assert apart(ours.hidden, alone.hidden) < TOLERANCE
    assert (ours.kept is None) == (alone.kept is None)
    if ours.kept is not None and alone.kept is not None:
        for ours_layer, alone_layer in zip(ours.kept.layers, alone.kept.layers, strict=True):
            for a, b in zip(ours_layer, alone_layer, strict=True):
                assert apart(a, b) < TOLERANCE


@st.composite
def rows(draw: st.DrawFn, model: DiffusionLM) -> list[Row]:
    """Two to four rows of any lengths, some with frozen positions, masks, or kept K/V."""
    made = []
    for number in range(draw(st.integers(2, 4))):
        length, past = draw(st.integers(1, 7)), draw(st.sampled_from([0, 0, 3, 8]))
        mask = None
        if draw(st.booleans()):
            generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
            mask = torch.rand(length, past + length, generator=generator) < 0.5
            mask[:, past:] |= torch.eye(length, dtype=torch.bool)
        made.append(
            Row(
                random_prompt(model, length, number),
                torch.arange(length) + past,
                mask,
                frozen_of(model, past, number) if past else None,
                draw(st.booleans()),
            )
        )
    return made


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_rows_batched_together_equal_each_row_alone(checkpoint: str) -> None:
    model = parity_model(checkpoint, "float64")

    @settings(max_examples=40)
    @given(batch=rows(model))
    def check(batch: list[Row]) -> None:
        for row, together in zip(batch, forward(model, batch), strict=True):
            assert_same(together, forward(model, [row])[0])

    check()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_row_without_mask_attends_to_everything(checkpoint: str) -> None:
    model = parity_model(checkpoint, "float64")
    frozen, ids = frozen_of(model, 5, 0), random_prompt(model, 4, 1)
    positions = torch.arange(5, 9)
    everything = torch.ones(4, 9, dtype=torch.bool)
    without = forward(model, [Row(ids, positions, None, frozen)])[0]
    assert_same(without, forward(model, [Row(ids, positions, everything, frozen)])[0])


def drafts_of(model: DiffusionLM, cursor: Cursor, span: range, count: int) -> Tensor:
    """The root and `count` states that fill random positions of the block."""
    drafts = cursor.ids.repeat(count + 1, 1)
    for k in range(1, count + 1):
        for position in list(span)[:: k % 3 + 1]:
            drafts[k, position] = (31 * k + position) % (model.mask_token_id - 1)
    return drafts


def evaluate(
    model: DiffusionLM, cache: object, cursor: Cursor, drafted: Tensor
) -> tuple[Evaluation, list[Row]]:
    """Run a cache's forwards for some states; also the rows of its last forward."""
    forwards = cache.evaluate(cursor, drafted, True)  # type: ignore[attr-defined]
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
    cache = CACHES[cache_name](model, canvas, BlockEdges())  # type: ignore[index]
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
    block, then the block's tokens at their own positions behind it."""
    model = parity_model(checkpoint, "float64")
    canvas, cursor = in_second_block(model, seed=5)
    cache = DualCache(model, canvas, BlockEdges())
    evaluate(model, cache, cursor, cursor.ids[None])
    root = block_begun(cursor, canvas)
    ours, _ = evaluate(model, cache, root, root.ids[None])

    everything = torch.arange(canvas.length)
    (whole,) = forward(model, [Row(cursor.ids, everything, keep=True)])
    assert whole.kept is not None
    span = canvas.span(1)
    row = Row(root.ids[span.start : span.stop], torch.tensor(span), None, whole.kept.without(span))
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
    cache = CACHES[cache_name](model, canvas, BlockEdges())  # type: ignore[index]
    evaluate(model, cache, cursor, cursor.ids[None])
    root, span = block_begun(cursor, canvas), canvas.span(1)
    ours, _ = evaluate(model, cache, root, states := drafts_of(model, root, span, 4))

    (whole,) = forward(model, [Row(cursor.ids, torch.arange(canvas.length), keep=True)])
    assert whole.kept is not None
    prefix = whole.kept.narrow(range(span.start))
    anew = torch.arange(span.start, canvas.length)
    error = []
    for window, ids in zip(ours.windows, states, strict=True):
        (alone,) = forward(model, [Row(ids[span.start :], anew, None, prefix)])
        assert window.start == span.start
        error.append(apart(model.head(window.hidden), model.head(alone.hidden[: len(span)])))
    assert [value < 1e-5 for value in error] == exact  # logits are float32


@pytest.mark.parametrize("cache_name", ["dual", "prefix", "prefix-shared"])
def test_frozen_keys_end_at_a_blocks_edge_and_so_do_windows(cache_name: str) -> None:
    """The next block's logits rest on another cache: no walk may take them from this one."""
    model = parity_model("llada-a", "float64")
    canvas, cursor = in_second_block(model, seed=6)
    cache = CACHES[cache_name](model, canvas, BlockEdges())  # type: ignore[index]
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
    cache = CACHES["block"](model, canvas, BlockEdges())
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
    cache = CACHES[cache_name](model, canvas, BlockEdges())  # type: ignore[index]
    evaluate(model, cache, cursor, cursor.ids[None])
    root = block_begun(cursor, canvas)
    _, batch = evaluate(model, cache, root, drafts_of(model, root, canvas.span(1), 3))
    assert sum(len(row.ids) for row in batch) == 4 * per_state + shared


@pytest.mark.parametrize(
    ("cache_name", "most"),
    [("none", 4), ("dual", 12), ("prefix", 4), ("prefix-shared", 10)],
)
def test_forwards_stay_bounded_whatever_a_graph_holds(
    monkeypatch: pytest.MonkeyPatch, cache_name: str, most: int
) -> None:
    """A prompt of 9, three blocks of 4: 84 positions are 4 states of 21; 48 are 12 blocks, or 4
    blocks with suffixes of 8, or one such suffix and 10 blocks."""
    monkeypatch.setattr(caches, "_MOST_STACKED", 84)
    monkeypatch.setattr(caches, "_MOST_PACKED", 48)
    settings = DecodingSettings.parse(cache=cache_name, block_length=4, gen_length=12)
    assert caches.most_drafts(settings, Canvas.plan(9, 12, 4, block_causal=False)) == most


def brute_force_mask(lengths: Sequence[int], sees: Sequence[Sequence[int]], past: int) -> Tensor:
    owner = [k for k, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(
        [[True] * past + [other in sees[mine] for other in owner] for mine in owner]
    )


def test_pack_lets_segments_see_exactly_what_they_list() -> None:
    model = parity_model("llada-a", "float64")
    segments = [
        Segment(random_prompt(model, length, start), start)
        for length, start in ((3, 10), (3, 10), (2, 13))
    ]
    sees = [[0, 2], [1], [2, 0]]
    row = pack(segments, sees, frozen_of(model, 5, 0))
    assert row.positions.tolist() == [10, 11, 12, 10, 11, 12, 13, 14]
    assert row.ids.tolist() == [t for segment in segments for t in segment.ids.tolist()]
    assert row.mask is not None
    assert torch.equal(row.mask, brute_force_mask([3, 3, 2], sees, 5))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_single_segment_attends_to_everything(frozen: bool) -> None:
    model = parity_model("llada-a", "float64")
    past = frozen_of(model, 5, 0) if frozen else None
    segment = Segment(random_prompt(model, 4), 5)
    row = pack([segment], [[0]], past)
    everything = torch.ones(4, 4 + row.past, dtype=torch.bool)
    explicit = Row(row.ids, row.positions, everything, past)
    assert_same(forward(model, [row])[0], forward(model, [explicit])[0])
