"""The order network: what it reads, what is grown from it, that it learns, and its file."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import a_graph_of, decode, parity_model, random_prompt, states
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spiffy.bench.methods import methods
from spiffy.bench.order import (
    FORMAT,
    OrderNetwork,
    OrderShape,
    check_fits,
    load_order,
    save_order,
    scene_of,
)
from spiffy.bench.order_drafter import OrderDrafter, grow
from spiffy.bench.order_training import Training, examples_of, train
from spiffy.calib.record import Recorder, Root, Trace
from spiffy.runtime.draft import Candidates
from spiffy.runtime.draft.acceptance import TOKEN_RANKS
from spiffy.runtime.step.canvas import Cursor
from spiffy.schemas import DecodingSettings, SpiffyError

MASK = 9
SMALL = OrderShape(4, "of a model", ranks=4, width=16, layers=1, heads=2)
ROOT = Cursor(torch.tensor([1, 2, 3, MASK, MASK, 5, MASK, MASK, MASK, MASK]))
KNOWN = Candidates(
    positions=torch.tensor([4, 3]),  # the block is 2 to 5
    tokens=torch.tensor([[6, 7], [8, 6]]),
    log_p=torch.tensor([[0.7, 0.2], [0.5, 0.4]], dtype=torch.float64).log(),
    fresh=torch.tensor([5]),
)


def test_a_scene_is_the_block_of_the_candidates() -> None:
    scene = scene_of(ROOT, KNOWN, SMALL, MASK)
    assert scene.start == 2
    assert scene.masked.tolist() == [False, True, True, False]
    assert scene.tokens[:, :2].tolist() == [[-1, -1], [8, 6], [6, 7], [-1, -1]]
    assert scene.log_p[1:3, :2].exp().flatten().tolist() == pytest.approx([0.5, 0.4, 0.7, 0.2])
    # Best score first: position 4 has rank 0, and is no less confident than the best.
    log_p, (below, entropy, gap, log_rank) = scene.seen[:, :2], scene.seen[:, 5:9].T
    assert (10 * log_p[1:3]).exp().flatten().tolist() == pytest.approx([0.5, 0.4, 0.7, 0.2])
    assert log_rank.tolist() == pytest.approx([0, 0.6931, 0, 0], abs=1e-4)
    assert below[2] == 0 > below[1]
    assert gap[1:3].tolist() == pytest.approx([0.1, 0.5])
    assert entropy[1] > entropy[2] > entropy[0] == 0
    fresh, filled, share, lag = scene.seen[:, 10:].T
    assert fresh.tolist() == [0, 0, 0, 1]
    assert filled.tolist() == [1, 0, 0, 1]
    assert (share.tolist(), lag.tolist()) == ([0.5] * 4, pytest.approx([0.1] * 4))


class Fixed(nn.Module):
    """The same odds of positions at every state, whatever is drafted; tokens as they were."""

    def __init__(self, odds: list[float]) -> None:
        super().__init__()
        self.shape = SMALL
        self.odds = torch.tensor(odds)

    def forward(self, seen: Tensor, draft: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        others = torch.full_like(log_p[:, :, :1], -torch.inf)
        return self.odds.log().expand(len(seen), -1), torch.cat((log_p, others), -1)


def brute_force(p: dict[tuple[int, int], float], odds: list[float]) -> dict[frozenset, float]:  # type: ignore[type-arg]
    """Every state that fills in some of the positions, by adding up all orders."""
    found: dict[frozenset, float] = {}  # type: ignore[type-arg]
    places = sorted({place for place, _ in p})
    for count in range(1, len(places) + 1):
        for order in itertools.permutations(places, count):
            for ranks in itertools.product((0, 1), repeat=count):
                left, chance = set(places), 1.0
                for place, rank in zip(order, ranks, strict=True):
                    chance *= odds[place] / sum(odds[k] for k in left) * p[place, rank]
                    left.remove(place)
                key = frozenset(zip(order, ranks, strict=True))
                found[key] = found.get(key, 0.0) + chance
    return found


@pytest.mark.parametrize("budget", [1, 3, 8, 26])
def test_states_are_grown_each_once_with_the_sum_of_their_paths(budget: int) -> None:
    odds = [0.2, 0.5, 0.3, 1.0]  # the last one is not masked
    root = replace(ROOT, ids=torch.tensor([1, 2, MASK, MASK, MASK, 5]))
    known = Candidates(
        positions=torch.tensor([3, 4, 2]),
        tokens=torch.tensor([[6, 7], [8, 6], [7, 6]]),
        log_p=torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]], dtype=torch.float64).log(),
        fresh=torch.tensor([5]),
    )
    p = {(1, 0): 0.6, (1, 1): 0.4, (2, 0): 0.9, (2, 1): 0.1, (0, 0): 0.7, (0, 1): 0.3}
    expected = brute_force(p, odds)
    scene = scene_of(root, known, SMALL, MASK)
    grown = grow(Fixed(odds), scene, budget, room=3)  # type: ignore[arg-type]
    assert len({tuple(row) for row in grown.choice.tolist()}) == len(grown.p) == budget
    assert grown.p.tolist() == sorted(grown.p.tolist(), reverse=True)
    for choice, chance in zip(grown.choice.tolist(), grown.p.tolist(), strict=True):
        key = frozenset((place, rank) for place, rank in enumerate(choice) if rank >= 0)
        assert chance <= expected[key] * (1 + 1e-5)  # not all paths are looked at
    if budget == len(expected):
        assert sum(grown.p) == pytest.approx(sum(expected.values()), rel=1e-5)


def test_no_draft_fills_more_than_there_is_room_for() -> None:
    scene = scene_of(ROOT, KNOWN, SMALL, MASK)
    grown = grow(Fixed([0.25] * 4), scene, 8, room=1)  # type: ignore[arg-type]
    assert (grown.choice >= 0).sum(1).tolist() == [1, 1, 1, 1]
    drafter = OrderDrafter(OrderNetwork(SMALL), 8, parity_model("sdar-a"))
    assert len(drafter(ROOT, KNOWN, 0)) == 0


@pytest.mark.parametrize(
    ("name", "cache"), [("llada-a", "dual"), ("dream-a", "none"), ("sdar-a", "block")]
)
def test_an_untrained_network_changes_no_token(name: str, cache: str) -> None:
    model = parity_model(name)
    settings = DecodingSettings.parse(cache=cache, gen_length=12, block_length=4)
    prompt = random_prompt(model, 6)
    torch.manual_seed(0)
    drafter = OrderDrafter(OrderNetwork(SMALL), 3, model)
    ours, plain = (decode(model, prompt, settings, drafter=d) for d in (drafter, None))
    assert states(ours) == states(plain)
    assert ours.stats.drafted > 0


def leftmost_first(prompts: int, seed: int = 0, turned: bool = False) -> list[Trace]:
    """Decodes of one block that commit the leftmost mask, however confident the others are.

    Or, turned, the rightmost.
    """
    generator = torch.Generator().manual_seed(seed)
    traces = []
    for _ in range(prompts):
        answer = torch.randint(0, 8, (4,), generator=generator)
        path, roots = [], []
        for step in range(5):
            held = torch.arange(4)
            held = held >= 4 - step if turned else held < step
            ids = torch.cat((torch.tensor([1, 2]), answer.where(held, MASK)))
            path.append(Cursor(ids, step=step))
            if step == 4:
                break
            left = (~held).nonzero()[:, 0]
            p = torch.rand(len(left), generator=generator, dtype=torch.float64) / 2 + 0.4
            order = p.argsort(descending=True)
            tokens = torch.stack((answer[left], (answer[left] + 1) % 8), 1)[order]
            log_p = torch.stack((p, 0.9 * (1 - p)), 1)[order].log()
            roots.append(Root(Candidates(2 + left[order], tokens, log_p, torch.tensor([1])), 4))
        traces.append(Trace(path, roots))
    return traces


def test_examples_name_what_came_next() -> None:
    (trace,) = leftmost_first(1)
    examples = examples_of([trace], SMALL, MASK)
    assert examples.masked.sum(1).tolist() == [4, 3, 2, 1]
    assert examples.places[:, :4].tolist() == [
        [0, 1, 2, 3],
        [1, 2, 3, -1],
        [2, 3, -1, -1],
        [3, -1, -1, -1],
    ]
    assert set(examples.ranks[examples.places >= 0].tolist()) == {0}


def test_a_step_of_two_positions_is_no_example() -> None:
    (trace,) = leftmost_first(1)
    skipping = Trace([*trace.path[:1], *trace.path[2:]], [*trace.roots[:1], *trace.roots[2:]])
    assert examples_of([skipping], SMALL, MASK).masked.sum(1).tolist() == [2, 1]
    with pytest.raises(SpiffyError, match="record more prompts"):
        examples_of([Trace(skipping.path[:2], skipping.roots[:1])], SMALL, MASK)


def test_training_learns_the_order() -> None:
    growing, held_out = leftmost_first(100), leftmost_first(20, seed=1)
    batches: list[tuple[int, int]] = []
    _, report = train(
        growing, held_out, SMALL, MASK, Training(epochs=30), lambda *at: batches.append(at)
    )
    assert report.accuracy > 0.9 > 0.6 > report.by_confidence
    assert report.losses[report.best - 1] == min(report.losses) < report.losses[0]
    assert (report.prompts, report.checked_prompts, report.roots) == (100, 20, 400)
    done, total = zip(*batches, strict=True)
    assert done == tuple(range(1, len(report.losses) * 7 + 1))
    assert set(total) == {30 * 7}


def test_training_repeats_by_its_seed() -> None:
    growing, held_out = leftmost_first(4), leftmost_first(2, seed=1)

    def trained(seed: int) -> list[Tensor]:
        network, _ = train(growing, held_out, SMALL, MASK, Training(epochs=2, seed=seed))
        return [*network.state_dict().values()]

    one, again, other = trained(0), trained(0), trained(1)
    assert all(map(torch.equal, one, again))
    assert not all(map(torch.equal, one, other))


def test_training_stops_when_nothing_gets_better() -> None:
    growing, other = leftmost_first(100), leftmost_first(20, seed=1, turned=True)
    _, report = train(growing, other, SMALL, MASK, Training(epochs=30, patience=2))
    assert len(report.losses) == report.best + 2 < 30


def test_a_wide_recording_holds_what_calibration_records() -> None:
    model = parity_model("llada-a")
    settings = DecodingSettings.parse(cache="dual", gen_length=8, block_length=4)
    prompt = random_prompt(model, 6)
    wide, usual = (
        Trace.of(decode(model, prompt, settings, drafter=recorder))
        for recorder in (Recorder(8), Recorder())
    )
    for ours, theirs in zip(wide.narrowed(TOKEN_RANKS).roots, usual.roots, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.equal(ours.candidates.tokens, theirs.candidates.tokens)
            assert torch.equal(ours.candidates.log_p, theirs.candidates.log_p)


def test_a_network_comes_back_from_its_file(tmp_path: Path) -> None:
    network, path = OrderNetwork(SMALL), tmp_path / "order.safetensors"
    save_order(network, path)
    again = load_order(path)
    assert again.shape == SMALL
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_the_published_size() -> None:
    network = OrderNetwork(OrderShape(32, ""))
    assert 0.60e6 < network.parameter_count < 0.63e6


def _rewritten(
    change: Callable[[dict[str, Tensor]], object], **about: str
) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        shape = '{"block_length": 4, "fingerprint": "", "ranks": 4, "width": 16, "layers": 1'
        save_file(tensors, path, {"format": FORMAT, "shape": shape + ', "heads": 2}', **about})

    return rewrite


def _nothing(tensors: dict[str, Tensor]) -> None:
    """Leave it as it is."""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"no safetensors"), "cannot be read"),
        (lambda path: path.unlink(), "cannot be read"),
        (_rewritten(_nothing, format="else"), "no order network"),
        (_rewritten(_nothing, shape="{"), "of which shape"),
        (_rewritten(_nothing, shape='{"width": 8}'), "of which shape"),
        (_rewritten(_nothing, shape='{"block_length": 1e9, "fingerprint": ""}'), "cannot be built"),
        (_rewritten(_nothing, shape='{"block_length": 8, "fingerprint": ""}'), "other tensors"),
        (_rewritten(lambda t: t.pop("place")), "other tensors"),
        (_rewritten(lambda t: t["place"].fill_(torch.nan)), "NaN"),
    ],
)
def test_a_spoilt_file_is_refused_in_one_line(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "order.safetensors"
    save_order(OrderNetwork(SMALL), path)
    spoil(path)
    with pytest.raises(SpiffyError, match=message) as caught:
        load_order(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "fingerprint", "message"),
    [
        ({"policy": "threshold"}, None, "one token per step"),
        ({"tokens_per_step": 2}, None, "one token per step"),
        ({"block_length": 8}, None, "blocks of 4, not of 8"),
        ({}, "another", "another model"),
    ],
)
def test_what_it_was_not_trained_for_is_refused(
    settings: dict[str, object], fingerprint: str | None, message: str
) -> None:
    given = DecodingSettings.parse(
        **{"cache": "none", "gen_length": 8, "block_length": 4, **settings}
    )
    with pytest.raises(SpiffyError, match=message):
        check_fits(SMALL, given, fingerprint)


def test_a_benchmark_has_it_where_there_is_one() -> None:
    model = parity_model("sdar-a")
    graph = a_graph_of(model)
    network = OrderNetwork(replace(SMALL, fingerprint=model.fingerprint))
    found = methods(model, graph.decoding, graph, ["order"], [1, 3], order=network)
    assert [method.name for method in found] == ["plain static", "order 1", "order 3"]
    assert len(methods(model, graph.decoding, graph, ["order"], [1, 3])) == 1
    with pytest.raises(SpiffyError, match="another model"):
        methods(model, graph.decoding, graph, ["order"], [1], order=OrderNetwork(SMALL))
