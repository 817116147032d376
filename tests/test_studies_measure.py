"""That studies measure what they say."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import chain_graph, study
from torch import Tensor

from spiffy.bench import measure
from spiffy.bench.methods import methods
from spiffy.calib.pipeline import prepare
from spiffy.calib.prompts import PromptSet
from spiffy.runtime import decoding_settings, load_model
from spiffy.runtime.decode import loop
from spiffy.runtime.decode.task import Stats
from spiffy.runtime.draft import GraphDrafter, confidence_chain
from spiffy.runtime.forward.pack import forward
from spiffy.runtime.generate import Output
from spiffy.runtime.models import DiffusionLM
from spiffy.schemas import SpiffyError


def test_the_head_of_a_walk_is_what_the_walk_asks_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several states at once, where it is expensive; what drafting asks of it is drafting's."""
    overhead, model = study("overhead"), load_model("tiny-llada", device="cpu")
    settings = decoding_settings(
        model, gen_length=32, block_length=8, cache="none", stop_at_eos=False
    )
    asked, drafting, seconds = [0], [False], [0.0]  # calls by turn
    by_drafting = [0]  # calls by turn
    head, candidates = model.head, loop._candidates

    def heard(hidden: Tensor) -> Tensor:
        seconds[0] += 1
        by_drafting[-1] += drafting[0]
        asked[-1] += not drafting[0]
        return head(hidden)

    def ranked(*args: Any) -> Any:
        drafting[0] = True
        try:
            return candidates(*args)
        finally:
            drafting[0] = False

    def forwarded(*args: Any) -> Any:
        asked.append(0)
        by_drafting.append(0)
        return forward(*args)

    monkeypatch.setattr(DiffusionLM, "head_is_expensive", True)
    monkeypatch.setattr(model, "head", heard)
    monkeypatch.setattr(loop, "_candidates", ranked)
    monkeypatch.setattr(overhead, "forward", forwarded)
    monkeypatch.setattr(overhead.timed.__wrapped__, "__defaults__", (lambda: seconds[0],))
    prompt = model.encode("Tom has 3 pens and buys 4 pens. How many pens are there now?")
    drafter = GraphDrafter(confidence_chain(4), model)
    turns = overhead.take_apart(model, settings, prompt, drafter, 32)
    calls = asked[2 : 2 + len(turns)]  # without what came before the first forward, and that one
    assert [turn.ms["head"] for turn in turns] == [1000 * number for number in calls]
    assert any(number < turn.steps for number, turn in zip(calls, turns, strict=True))
    drafted = by_drafting[2 : 2 + len(turns)]  # of the forward that comes next, in this turn
    assert [turn.ms["draft"] for turn in turns] == [1000 * number for number in drafted]
    assert sum(drafted) > 0


def test_in_races_each_way_follows_each_as_often() -> None:
    """Which one goes right before may make a decode slower."""
    auto = study("auto")
    pairs: Counter[tuple[int, int]] = Counter()
    orders = set()
    for race in product(range(4), range(5)):
        order = auto.order(*race)
        pairs.update(pairwise([0, *order]))
        assert order[-1] == 0  # as what comes before the next race
        orders.add(tuple(order))
    assert pairs == dict.fromkeys(product(range(3), repeat=2), 20)
    assert len(orders) > 5


def test_regret_counts_the_forwards_that_switching_makes_longer() -> None:
    regret = study("regret")
    world = regret.World(lambda drafts, forward: 1.0 + drafts + 10 * forward, 1.0, {"graph": 0.5})
    one = regret.Choice("graph", 1)
    forwards = [(regret.PLAIN, 1), (one, 2), (one, 2), (regret.PLAIN, 1)]
    assert world.switching(forwards) == pytest.approx(0.1 * (12 + 31))
    assert world.switching(forwards, 2) == pytest.approx(0.1 * 31)
    assert world.switching([(one, 2)] * 3) == 0
    plain = 1 + 2 * 11 + 2 * 21 + 31
    ours = 1 + 12.5 + 22.5 + 31 + 0.1 * (12 + 31)
    assert regret.over_plain(world, forwards) == pytest.approx(ours / plain)


class _Unhurried(asyncio.SelectorEventLoop):
    """Time passes only while nobody has anything to do."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


@pytest.mark.parametrize("seconds", [8, 40])
def test_a_turn_that_answers_outlast_measures_a_full_server(seconds: int) -> None:
    """With each sequence a forward takes longer; an answer of 16 tokens takes 20 seconds."""
    load, clients, lengths = study("load"), 8, (16, 8, 12)
    measured = load.Measured()

    async def turn() -> None:
        left: dict[int, int] = {}
        done: dict[int, asyncio.Future[None]] = {}
        loop = asyncio.get_running_loop()

        async def serve() -> None:
            while True:
                for _ in range(5):  # who has an answer asks again
                    await asyncio.sleep(0)
                await asyncio.sleep(0.25 + 0.125 * len(left))
                for number in list(left):
                    left[number] -= 1
                    if not left[number]:
                        del left[number]
                        done.pop(number).set_result(None)

        async def answer(number: int) -> tuple[int, str]:
            left[number], done[number] = lengths[number % 3], loop.create_future()
            await done[number]
            return lengths[number % 3], ""

        serving = loop.create_task(serve())
        start, answers = await load.closed_loop(answer, clients, seconds)
        serving.cancel()
        assert len({each.number for each in answers}) == len(answers)
        measured.begin(seconds)
        for each in answers:
            measured.add(each.began, each.ended, start, start + seconds, each.tokens)

    with asyncio.Runner(loop_factory=_Unhurried) as runner:
        runner.run(turn())
    forward = 0.25 + 0.125 * clients
    assert measured.rate == pytest.approx(clients / forward, rel=1e-3)
    assert measured.latencies
    assert {round(took / forward) for took in measured.latencies} <= set(lengths)


def test_an_answer_counts_with_the_share_of_it_that_is_in_the_turn() -> None:
    measured = study("load").Measured()
    measured.begin(10)
    assert not measured.add(90, 110, 100, 110, 20)  # half of it; not a latency of this turn
    assert measured.add(105, 125, 100, 110, 20)  # a quarter
    assert not measured.add(111, 113, 100, 110, 20)
    assert not measured.add(80, 99, 100, 110, 20)
    assert measured.tokens == [15.0]
    assert measured.latencies == [20.0]


def test_intervals_of_throughput_are_over_turns_and_not_of_few() -> None:
    load = study("load")

    def of(*tokens: float) -> Any:
        return load.Measured(len(tokens), tokens=list(tokens))

    assert load.ratio(of(2, 4, 6), of(1, 2, 3), 1) == "2.00x"
    assert load.ratio(of(2, 4, 6, 8), of(1, 2, 3, 4), 1) == "2.00x, 2.00 to 2.00"
    # Of one pair each: the mean of 1, 1, 1, 2, whose standard error is 0.25, times Student's 3.18.
    low, high = load.ratio(of(1, 1, 1, 2), of(1, 1, 1, 1), 1).split(", ")[1].split(" to ")
    assert float(low) < 1 < 1.25 < float(high)
    assert load.ratio(of(1, 1, 1, 2), of(1, 1, 1, 1), 4) == load.ratio(
        of(1, 1, 1, 2), of(1, 1, 1, 1), 1
    )


def test_percentiles_are_values_that_enough_do_not_exceed() -> None:
    percentile = study("serving").percentile
    assert percentile(range(1, 101), 0.95) == 95
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([3, 1, 2, 4], 0.5) == 2
    assert percentile([7], 0.95) == 7


def test_a_speedup_at_a_real_size_is_that_of_all_seconds_and_says_where_prompts_lie() -> None:
    speedup = study("real_sizes").speedup
    assert speedup([(6.0, 2.0), (2.0, 2.0)]) == "2.00x (1.00 to 3.00)"  # their mean: 2
    assert speedup([(9.0, 3.0), (1.0, 2.0)]) == "2.00x (0.50 to 3.00)"  # their mean: 1.75
    assert speedup([(3.0, 2.0)]) == "1.50x"


def test_the_order_of_methods_can_be_another_one_for_the_same_prompts() -> None:
    model, graph = load_model("tiny-sdar", device="cpu"), chain_graph("tiny-sdar", gen_length=4)
    budgets = range(1, 1 + min(3, graph.budget))
    found = methods(model, decoding_settings(model, graph), graph, ("chain", "graph"), budgets)
    orders = set()
    for seed in range(4):
        measured = measure.measure(model, found, ["Hi"], [{}], repeats=1, warm_up=0, seed=seed)
        orders.add(tuple(row.method for row in measured.rows))
    assert len(orders) > 1


def test_caches_beside_each_other_begin_with_a_drafter_that_has_learned_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losslessness = study("losslessness")
    made: list[object] = []
    used: list[tuple[str, object]] = []

    def drafter_of(*_: object) -> object:
        made.append(object())
        return made[-1]

    def decode_all(
        model: object, settings: Any, questions: list[str], drafter: object, edges: object
    ) -> list[Output]:
        used.append((settings.cache, drafter))
        stats = Stats(nfe=1, positions_computed=1)
        return [Output("", [], stats) for _ in questions]

    for name in ("prepare", "record", "build_graph"):
        monkeypatch.setattr(losslessness, name, lambda *_: None)
    monkeypatch.setattr(losslessness, "graph_drafter", drafter_of)
    monkeypatch.setattr(losslessness, "decode_all", decode_all)
    args = argparse.Namespace(calibrate=1, near_samples=2, dataset=None, gen_length=32)
    rows = [*losslessness.share("tiny-llada", args)]
    assert len(rows) == 2
    drafted = [(cache, drafter) for cache, drafter in used if drafter is not None]
    assert [cache for cache, _ in drafted] == 2 * ["prefix", "prefix-shared"]
    assert len({id(drafter) for _, drafter in drafted}) == 4
    assert [*losslessness.share("tiny-sdar", args)] == []  # has no such caches


def test_prompts_of_which_none_fits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    losslessness, model = study("losslessness"), load_model("tiny-sdar", device="cpu")
    settings = decoding_settings(model, gen_length=8)
    texts = ["Hi", "many " * 1000]
    drawn = PromptSet("p", tuple(texts))
    monkeypatch.setattr(losslessness, "load_prompts", lambda *_, **__: drawn)
    assert losslessness.fitting("p", 2, model, settings) == PromptSet("p (1 of 2)", ("Hi",))
    drawn = PromptSet("p", tuple(texts[1:]))
    with pytest.raises(SystemExit, match="none"):
        losslessness.fitting("p", 2, model, settings)
    with pytest.raises(SpiffyError, match="there is none"):
        prepare(model, PromptSet("p", ()), settings)


def test_too_few_problems_for_an_acceptance_model_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs, model = study("graphs"), load_model("tiny-sdar", device="cpu")
    case = graphs.Case(model, decoding_settings(model, gen_length=8), [], [])
    for name in ("grow", "grow_on_replay", "replay"):  # nothing is measured before
        monkeypatch.setattr(graphs, name, None)
    with pytest.raises(SystemExit, match="--calibrate"):
        graphs.held_out(case)


def test_walks_that_an_edit_ended_are_not_those_that_the_answer_ended() -> None:
    mixture, mask = study("mixture"), 9
    empty, one, other, both = (Tensor(ids).long() for ids in ([9, 9], [9, 1], [9, 2], [3, 2]))
    filled, replacing = [empty, one], [empty, one, other]
    assert mixture.ended_by_edit([[filled, replacing, [other, both]]], mask) == (2, 1)
    assert mixture.ended_by_edit([[filled], [replacing]], mask) == (0, 0)  # the answers end so
    row = mixture.Row("static", 0, 4, 4, 4, 4, 1, 0, 1, 3, 1)
    drafted = mixture.Row("static", 8, 2, 4, 4, 4, 1, 0, 1, 4, 1)
    lines = [*mixture.table([row, drafted], 1)][2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["-", "25.0%"]


def test_lines_of_the_headline_that_ran_on_other_machines_are_named(tmp_path: Path) -> None:
    bench = study("bench")

    def ran(device: str, repeats: int = 3) -> Any:
        machine = SimpleNamespace(
            device=device,
            threads=1,
            dtype="float32",
            versions={"torch": "2"},
            git_revision="3f0069d123",
        )
        data = SimpleNamespace(samples=8, repeats=repeats, left_out=0)
        return SimpleNamespace(machine=machine, data=data, decoding=SimpleNamespace(gen_length=64))

    alike = bench.machines([ran("Xeon"), ran("Xeon")])
    assert (
        alike
        == "8 prompts, 3 repeats, up to 64 tokens, Xeon, 1 thread, float32, torch 2, commit 3f0069d"
    )
    told = bench.machines([ran("Xeon"), ran("Xeon with AMX"), ran("Xeon"), ran("Xeon", 1)])
    assert [part.split(":")[0] for part in told.split("; ")] == ["lines 1, 3", "lines 2", "lines 4"]
    case = bench.Case("tiny-sdar", "block", "static", "synthetic", samples=8)
    assert bench.same(ran("Xeon"), case, 64)
    assert not bench.same(ran("Xeon"), case, 32)
    assert not bench.same(ran("Xeon", 1), case, 64)
