"""Decodes join and leave between forwards, fail alone, and do with the memory there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import Oracle, collected, decode, parity_model, random_prompt, states
from test_trust import Memory

from spiffy.bench.watch import Watch, Watched, WatchedAdviser
from spiffy.runtime.decode import Advice, Scheduler, Task, driver, loop, make_task, run
from spiffy.runtime.draft import Drafter, GraphDrafter
from spiffy.runtime.forward import cache
from spiffy.runtime.forward.pack import Row, RowOutput, forward
from spiffy.runtime.generate import generate, generate_many
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.lanes import Lane, Pool
from spiffy.runtime.models.slots import KeyValues, Slots
from spiffy.schemas import DecodingSettings, SpiffyError
from spiffy.schemas.records import MAX_NODES

LAYOUTS = {"none": "llada-a", "block": "sdar-a", "dual": "dream-a"}
LENGTHS = (3, 9, 8, 11, 1)


def begun(cache: Any, drafts: int = 0, **options: Any) -> tuple[list[Task], list[Task]]:
    """Tasks, and the same ones decoded plainly, each alone; in float64, so that no tie is near."""
    model = parity_model(LAYOUTS[cache], "float64")
    settings = DecodingSettings.parse(
        cache=cache, block_length=8, gen_length=16, stop_at_eos=False, **options
    )
    prompts = [random_prompt(model, length) for length in LENGTHS]
    plainly = [decode(model, prompt, settings) for prompt in prompts]
    tasks = [
        make_task(model, task.prompt, settings, Oracle(task, drafts) if drafts else None)
        for task in plainly
    ]
    return tasks, plainly


def decoded(scheduler: Scheduler) -> list[Task]:
    """Step to the end; what finished, in that order."""
    finished = []
    for _ in range(500):
        finished += scheduler.step()
        if not scheduler.busy:
            return finished
    raise AssertionError("it does not end")


@pytest.mark.parametrize("cache", LAYOUTS)
def test_decodes_join_and_leave_between_forwards(cache: Any) -> None:
    tasks, plainly = begun(cache, drafts=2)
    scheduler = Scheduler(tasks[0].model, batch_size=3)
    assert not scheduler.busy
    assert scheduler.step() == []
    for task in tasks[:4]:
        scheduler.add(task)
    for _ in range(3):
        scheduler.step()
    assert [scheduler.running[k] is tasks[k] for k in range(3)] == [True] * 3
    assert len(scheduler) - len(scheduler.running) == 1
    scheduler.remove(tasks[1])
    forwards = tasks[1].stats.nfe
    scheduler.add(tasks[4])
    finished = decoded(scheduler)
    assert tasks[1].stats.nfe == forwards == 3  # its rows were in no forward after that
    assert {id(task) for task in finished} == {id(tasks[k]) for k in (0, 2, 3, 4)}
    for k in (0, 2, 3, 4):
        assert states(tasks[k]) == states(plainly[k])


def test_what_waits_is_begun_in_order_and_can_be_given_up() -> None:
    tasks, _ = begun("block")
    scheduler = Scheduler(tasks[0].model, batch_size=1)
    for task in tasks:
        scheduler.add(task)
    scheduler.remove(tasks[2])
    scheduler.remove(tasks[2])  # not there: no matter
    assert [tasks.index(task) for task in decoded(scheduler)] == [0, 1, 3, 4]
    assert tasks[2].stats.nfe == 0


class Broken:
    """A drafter that fails."""

    token_ranks = 1
    asks_rejected = False

    def __call__(self, *_: Any) -> Any:
        raise RuntimeError("no drafts")


@pytest.mark.parametrize("cache", LAYOUTS)
def test_a_decode_that_fails_ends_alone(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, plainly = begun(cache)
    model, poisoned = tasks[0].model, tasks[1]
    tasks[3].drafter = Broken()
    hidden_states = model.hidden_states

    def overflowing(*args: Any) -> Any:
        hidden = hidden_states(*args)
        if poisoned.stats.nfe == 2:
            rows = [sum(len(row.ids) for row in rows) for _, _, rows in scheduler._running]
            parts = list(torch.split(hidden, rows))
            parts[scheduler.running.index(poisoned)] = torch.full_like(
                parts[scheduler.running.index(poisoned)], torch.nan
            )
            hidden = torch.cat(parts)
        return hidden

    monkeypatch.setattr(model, "hidden_states", overflowing)
    scheduler = Scheduler(model, batch_size=3)
    for task in tasks:
        scheduler.add(task)
    assert len(decoded(scheduler)) == len(tasks)
    assert isinstance(poisoned.error, SpiffyError)
    assert "NaN" in str(poisoned.error)
    assert str(tasks[3].error) == "no drafts"
    for k in (0, 2, 4):
        assert tasks[k].error is None
        assert states(tasks[k]) == states(plainly[k])


@pytest.mark.parametrize("cache", LAYOUTS)
@pytest.mark.parametrize("drafts", [0, 4])
def test_decodes_that_do_not_fit_wait_and_are_begun_anew(
    cache: Any, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, plainly = begun(cache, drafts)
    # The longest sequence as a whole fits, or a block with a few drafts; blocks of all do not.
    memory = Memory(max(task.canvas.length for task in tasks), torch.OutOfMemoryError("CUDA"))
    monkeypatch.setattr(driver, "forward", memory)
    scheduler = Scheduler(tasks[0].model, batch_size=5)
    for task in tasks:
        scheduler.add(task)
    assert len(decoded(scheduler)) == len(tasks)
    assert 0 < memory.failed < 8  # remembered: not tried again at every forward
    for ours, theirs in zip(tasks, plainly, strict=True):
        assert ours.error is None
        assert states(ours) == states(theirs)
        assert ours.stats.steps == theirs.stats.steps  # not also those that were given up
        assert ours.plain_nfe == theirs.stats.nfe


def test_of_an_answer_no_states_are_kept_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they are asked for: those of a long one take gigabytes."""
    tasks, _ = begun("block")
    collected_tasks = collected(monkeypatch)
    model, settings = tasks[0].model, tasks[0].settings.model_dump()
    prompts = [task.prompt for task in tasks]
    for trace in (False, True):
        list(generate_many(model, prompts, batch_size=3, trace=trace, **settings))
        generate(model, prompts[0], trace=trace, **settings)
    count = len(tasks) + 1
    assert [len(task.path) for task in collected_tasks[:count]] == [1] * count
    assert len(collected_tasks) == 2 * count
    for traced in collected_tasks[count:]:
        assert len(traced.path) == traced.stats.steps > 1


def test_what_is_begun_anew_is_watched_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second, *_), plainly = begun("none")
    scheduler = Scheduler(first.model, batch_size=2)
    scheduler.add(first)
    scheduler.add(second)
    watch, seen = Watch(second), []
    for _ in range(3):
        scheduler.step()
        seen += watch.forward().reached
    assert len(seen) == 3
    longest = max(task.canvas.length for task in (first, second))
    monkeypatch.setattr(driver, "forward", Memory(longest, torch.OutOfMemoryError("CUDA")))
    while scheduler.busy:
        scheduler.step()
        if second.stats.nfe > len(seen):
            seen += watch.forward().reached
    assert [cursor.ids.tolist() for cursor in seen] == states(plainly[1])[:3] + states(plainly[1])
    assert second.given_up == 3
    assert second.stats.nfe == 3 + plainly[1].stats.nfe  # every one counts,
    assert second.stats.steps == plainly[1].stats.steps  # and no step twice
    assert second.plain_nfe == plainly[1].stats.nfe


def test_more_is_tried_again_after_many_forwards_that_fitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, _ = begun("none")
    memory = Memory(30, torch.OutOfMemoryError("CUDA"))
    monkeypatch.setattr(driver, "forward", memory)
    monkeypatch.setattr(driver, "_TRY_AGAIN", 4)
    scheduler = Scheduler(tasks[0].model, batch_size=3)
    for task in tasks:
        scheduler.add(task)
    scheduler.step()
    assert len(scheduler.running) == 1
    memory.most = 1000  # whoever had the memory gave it back
    together = 0
    while scheduler.busy:
        scheduler.step()
        together = max(together, len(scheduler.running))
    assert together == 3


def test_one_that_does_not_fit_alone_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, plainly = begun("none")
    longest = max(task.canvas.length for task in tasks)
    monkeypatch.setattr(driver, "forward", Memory(longest - 1, torch.OutOfMemoryError("CUDA")))
    scheduler = Scheduler(tasks[0].model, batch_size=2)
    for task in tasks:
        scheduler.add(task)
    decoded(scheduler)
    for ours, theirs in zip(tasks, plainly, strict=True):
        if ours.canvas.length == longest:
            assert isinstance(ours.error, torch.OutOfMemoryError)
        else:
            assert states(ours) == states(theirs)


class Adviser:
    """Counts the forwards that it hears of, and what they were worth."""

    rests = False

    def __init__(self, drafter: Drafter | None = None) -> None:
        self.turns: list[int] = []
        self.heard: list[int] = []
        self.drafter = drafter

    def begin(self, canvas: Any) -> None:
        pass

    def after_forward(self, sequences: int, seconds: float) -> None:
        self.turns.append(sequences)

    def advise(self) -> Advice:
        return Advice(self.drafter, None)

    def learn(self, advice: Advice, steps: int, seconds: float) -> None:
        self.heard.append(steps)

    def why(self) -> str:
        return ""


def test_an_adviser_hears_of_a_forward_once_also_if_one_of_its_tasks_is_watched() -> None:
    tasks, _ = begun("block")
    adviser = Adviser()
    for task in tasks:
        task.adviser = adviser
    tasks[1].adviser = WatchedAdviser(adviser)
    tasks[2].adviser = WatchedAdviser(adviser)
    scheduler = Scheduler(tasks[0].model, batch_size=5)
    for task in tasks:
        scheduler.add(task)
    for _ in range(3):
        scheduler.step()
    assert adviser.turns == [5, 5, 5]


def test_steps_that_commit_nothing_are_no_gain_of_drafts() -> None:
    """Dream's timesteps: without drafts they need no forward either."""
    model = parity_model("dream-a", "float64")
    setting = DecodingSettings.parse(
        gen_length=16, block_length=8, cache="dual", schedule="timestep", steps_per_block=12
    )
    task = make_task(model, random_prompt(model, 11), setting)
    task.adviser = adviser = Adviser(GraphDrafter([[(0, 19)]], model))
    for _ in run(model, [task]):
        pass
    stats = task.stats
    assert stats.steps > stats.nfe + stats.accepted  # some commit nothing
    assert 0 < len(adviser.heard) <= sum(adviser.heard) <= len(adviser.heard) + stats.accepted


def test_one_that_does_not_fit_alone_costs_the_others_nothing_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that was given up on its account comes back with its error."""
    tasks, plainly = begun("none", drafts=1)
    model, settings = tasks[0].model, tasks[0].settings
    long = settings.model_copy(update={"gen_length": 64})
    large = make_task(model, random_prompt(model, 60), long)
    room = large.canvas.length - 1
    assert room >= 2 * 2 * 27  # for the others there is
    monkeypatch.setattr(driver, "forward", Memory(room, torch.OutOfMemoryError()))
    scheduler = Scheduler(model, batch_size=2)
    for task in (tasks[0], large, *tasks[1:]):
        scheduler.add(task)
    finished = decoded(scheduler)
    assert isinstance(large.error, torch.OutOfMemoryError)
    assert scheduler.most_decodes == 2
    assert scheduler._most_drafts == MAX_NODES
    assert finished.index(large) == 1  # after the one that was there before it
    assert tasks[0].given_up == 0
    for ours, theirs in zip(tasks, plainly, strict=True):
        assert states(ours) == states(theirs)
    assert all(task.stats.accepted for task in tasks[2:])


@pytest.mark.parametrize("way", ["ends", "given up", "fails when it begins anew"])
def test_what_a_far_longer_one_took_comes_back_when_it_is_gone(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    tasks, plainly = begun("none", drafts=1)
    model, settings = tasks[0].model, tasks[0].settings
    large = make_task(
        model, random_prompt(model, 60), settings.model_copy(update={"gen_length": 24})
    )
    room = 150  # for the others there is, also for some of their drafts
    others = sum(task.canvas.length for task in tasks)
    assert others < room < large.canvas.length + others
    monkeypatch.setattr(driver, "forward", Memory(room, torch.OutOfMemoryError()))
    scheduler = Scheduler(model, batch_size=6)
    for task in (large, *tasks):
        scheduler.add(task)
    scheduler.step()
    assert scheduler.most_decodes < 6
    if way == "given up":
        scheduler.remove(large)
    else:
        if way != "ends":

            def denoise(task: Task, kv: Slots | None = None) -> loop.Decoding:
                if task is large:
                    raise RuntimeError("of the host's memory")
                yield from loop.denoise(task, kv)

            monkeypatch.setattr(driver, "denoise", denoise)
        while large.error is None and not (large.path and large.path[-1].finished):
            scheduler.step()
    assert scheduler.most_decodes == 6
    assert scheduler._most_drafts == MAX_NODES
    decoded(scheduler)
    for ours, theirs in zip(tasks, plainly, strict=True):
        assert states(ours) == states(theirs)


def test_half_the_drafts_are_half_of_the_most_that_a_decode_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, plainly = begun("none")
    tasks[0].drafter = Oracle(plainly[0], 1)
    tasks[1].drafter = Oracle(plainly[1], 8)
    scheduler = Scheduler(tasks[0].model, batch_size=2)
    for task in tasks[:2]:
        scheduler.add(task)
    scheduler.step()  # the first forward has no drafts
    sent = [len(rows) - 1 for _, _, rows in scheduler._running]
    assert sent == [1, 8]
    memory = Memory(2 * 19 + 7 * 25, torch.OutOfMemoryError())
    monkeypatch.setattr(driver, "forward", memory)
    scheduler.step()
    assert memory.failed == scheduler.halvings == 1
    assert scheduler._most_drafts == 4
    assert [task.most_drafts for task in tasks[:2]] == [4, 4]


def test_nothing_is_learned_of_drafts_that_were_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, plainly = begun("none")
    task = tasks[1]
    task.adviser = adviser = Adviser(Oracle(plainly[1], 4))
    alone = Scheduler(task.model)
    alone.add(task)
    alone.step()
    room = task.canvas.length
    monkeypatch.setattr(driver, "forward", Memory(room, torch.OutOfMemoryError()))
    decoded(alone)
    assert task.most_drafts == 0
    assert adviser.heard == []  # nor is anything asked from here on
    assert states(task) == states(plainly[1])


def test_sequences_of_equal_length_wait_and_are_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parity_model("llada-a", "float64")
    settings = DecodingSettings.parse(block_length=8, gen_length=16, stop_at_eos=False)
    plainly = [decode(model, random_prompt(model, 8, seed % 3), settings) for seed in range(4)]
    tasks = [make_task(model, task.prompt, settings) for task in plainly]
    monkeypatch.setattr(driver, "forward", Memory(2 * 24, torch.OutOfMemoryError("CUDA")))
    scheduler = Scheduler(model, batch_size=4)
    for task in tasks:
        scheduler.add(task)
    assert len(decoded(scheduler)) == 4
    for ours, theirs in zip(tasks, plainly, strict=True):
        assert states(ours) == states(theirs)


def test_what_one_took_comes_back_however_long_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, _ = begun("none")
    model, settings = tasks[0].model, tasks[0].settings
    longer = settings.model_copy(update={"gen_length": 64})
    large = make_task(model, random_prompt(model, 60), longer)
    monkeypatch.setattr(
        driver, "forward", Memory(large.canvas.length - 1, torch.OutOfMemoryError())
    )
    monkeypatch.setattr(driver, "_TRY_AGAIN", 6)
    scheduler = Scheduler(model, batch_size=2)
    for task in (tasks[0], large, *tasks[1:]):
        scheduler.add(task)
    tasks[0].drafter = Oracle(plainly_of(tasks[0]), 1)
    decoded(scheduler)
    assert isinstance(large.error, torch.OutOfMemoryError)
    assert scheduler.most_decodes == 2
    assert scheduler._most_drafts == MAX_NODES


def test_one_that_is_too_long_beside_others_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though others wait, and many of its forwards have fitted: it would be begun anew for ever."""
    tasks, plainly = begun("none")
    model, settings = tasks[0].model, tasks[0].settings
    longer = settings.model_copy(update={"gen_length": 64})
    large = make_task(model, random_prompt(model, 8), longer)
    memory = Memory(large.canvas.length, torch.OutOfMemoryError())
    monkeypatch.setattr(driver, "forward", memory)
    monkeypatch.setattr(driver, "_TRY_AGAIN", 6)
    scheduler = Scheduler(model, batch_size=2)
    for task in (tasks[0], large, *tasks[1:]):
        scheduler.add(task)
    decoded(scheduler)
    assert states(large) == states(plainly_of(large))
    assert memory.failed <= 1 + 16 // 6  # while the first one was alone, it was tried again
    assert [states(task) for task in tasks] == [states(task) for task in plainly]


@pytest.mark.parametrize("in_lanes", [False, True])
@pytest.mark.parametrize("name", ["llada-a", "sdar-a"])
def test_what_drafts_took_comes_back_before_a_decode_fails(
    name: str, in_lanes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for a whole sequence and its keys and values, but not for what drafts left, too."""
    model = parity_model(name, "float64")
    cache = "dual" if name == "llada-a" else "block"
    settings = DecodingSettings.parse(block_length=8, gen_length=32, stop_at_eos=False, cache=cache)
    prompt = random_prompt(model, 32)
    plainly = decode(model, prompt, settings)
    task = make_task(model, prompt, settings, Oracle(plainly, 4))
    most, failed = task.canvas.length * 2, 0

    def short(model: DiffusionLM, rows: Sequence[Row], *rest: Any) -> list[RowOutput]:
        nonlocal failed
        (row,) = rows
        assert isinstance(row.kv, KeyValues)
        held = max((b[0].shape[2] for b in row.kv._buffers.values()), default=0)
        held = row.kv.lanes.slots if isinstance(row.kv, Lane) else held
        if len(row.ids) + held > most:
            failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, rows, *rest)

    monkeypatch.setattr(driver, "forward", short)
    scheduler = Scheduler(model)
    scheduler._pool = Pool(2) if in_lanes else None
    scheduler.add(task)
    decoded(scheduler)
    assert task.error is None
    assert failed > 0
    assert task.stats.drafted > 0
    assert states(task) == states(plainly)


def plainly_of(task: Task) -> Task:
    return decode(task.model, task.prompt, task.settings)


def test_a_decode_gets_its_drafts_back_after_a_shortage_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (task, *_), (plainly, *_) = begun("block", drafts=4)
    memory = Memory(1000, torch.OutOfMemoryError("CUDA"))
    monkeypatch.setattr(driver, "forward", memory)
    monkeypatch.setattr(driver, "_TRY_AGAIN", 1)
    scheduler = Scheduler(task.model)
    scheduler.add(task)
    usual = task.most_drafts
    memory.most = 8 * 2
    while not task.stats.halvings:
        scheduler.step()
    halved = task.most_drafts
    assert halved < usual
    memory.most = 1000  # whoever had the memory gave it back
    for _ in range(3):
        scheduler.step()
    assert task.most_drafts > halved
    decoded(scheduler)
    assert states(task) == states(plainly)


def test_a_decode_that_fails_as_its_drafts_are_halved_ends_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, plainly = begun("block", drafts=4)
    memory, pack = Memory(1000, torch.OutOfMemoryError("CUDA")), cache.pack
    failing: list[bool] = []

    def packed(*args: Any) -> Any:
        if memory.failed and not failing:
            failing.append(True)
            raise MemoryError
        return pack(*args)

    monkeypatch.setattr(driver, "forward", memory)
    monkeypatch.setattr(cache, "pack", packed)
    scheduler = Scheduler(tasks[0].model, batch_size=3)
    for task in tasks:
        scheduler.add(task)
    scheduler.step()
    memory.most = 8 * 6
    decoded(scheduler)
    assert failing
    assert [type(task.error) for task in tasks] == [MemoryError, *[type(None)] * 4]
    for ours, theirs in zip(tasks[1:], plainly[1:], strict=True):
        assert states(ours) == states(theirs)


def test_a_decode_that_was_closed_is_no_answer() -> None:
    (task, *_), _ = begun("block")
    scheduler = Scheduler(task.model)
    scheduler.add(task)
    scheduler.step()
    scheduler._running[0][1].close()
    assert scheduler.step() == [task]
    assert "before its answer was whole" in str(task.error)


def test_answers_come_before_the_error_of_the_same_forward() -> None:
    (good, bad, *_), _ = begun("block")
    for task in (good, bad):
        task.prompt, task.canvas = good.prompt, good.canvas

    def fails(_: list[int]) -> bool:
        raise RuntimeError("of the caller")

    good.until, bad.until = (lambda _: True), fails
    finished: list[Task] = []

    def take() -> None:
        for tasks in run(good.model, [bad, good], 2):
            finished.extend(tasks)

    with pytest.raises(RuntimeError, match="of the caller"):
        take()
    assert finished == [good]


@pytest.mark.parametrize("size", [0, -1])
def test_a_forward_of_no_sequence_is_refused(size: int) -> None:
    tasks, _ = begun("block")
    with pytest.raises(SpiffyError, match=f"batch size {size}: at least 1 sequence"):
        Scheduler(tasks[0].model, size)


def test_what_is_watched_was_verified_when_memory_came_and_went(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (task, *_), _ = begun("block", drafts=4)
    assert task.drafter is not None
    task.drafter = Watched(task.drafter)
    memory = Memory(1000, torch.OutOfMemoryError("CUDA"))
    monkeypatch.setattr(driver, "forward", memory)
    monkeypatch.setattr(driver, "_TRY_AGAIN", 1)
    scheduler = Scheduler(task.model)
    scheduler.add(task)
    watch, seen = Watch(task), 0
    while scheduler.busy:
        memory.most = 1000 if task.stats.nfe % 2 else 8 * 2
        scheduler.step()
        forward = watch.forward()
        seen += 0 if forward.states is None else len(forward.states)
    assert task.stats.halvings
    assert seen == task.stats.drafted > 0
