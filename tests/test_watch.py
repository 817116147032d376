"""What is seen of a decode from outside: the drafts that held, and no more memory for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers import Oracle, decode, parity_model, random_prompt, states
from test_scheduler import LAYOUTS, Adviser
from test_trust import Memory
from torch import Tensor

from spiffy.bench import watch
from spiffy.bench.watch import Forward, Watch, Watched, WatchedAdviser, turn
from spiffy.integrations.serve.engine import Done, Event, Job
from spiffy.integrations.serve.engine import Seen as Told
from spiffy.runtime.decode import Scheduler, Task, driver, make_task, run
from spiffy.runtime.generate import collect
from spiffy.schemas import DecodingSettings


@cache
def plainly(name: Any) -> Task:
    """A plain decode with that cache; in float64, so that no tie is near."""
    model = parity_model(LAYOUTS[name], "float64")
    settings = DecodingSettings.parse(cache=name, block_length=8, gen_length=16, stop_at_eos=False)
    return decode(model, random_prompt(model, 9), settings)


def one(name: Any, drafts: int = 2) -> tuple[Task, Task]:
    """A task that is drafted for, and the same one decoded plainly."""
    plain = plainly(name)
    task = make_task(plain.model, plain.prompt, plain.settings, Oracle(plain, drafts))
    return task, plain


def seen_of(task: Task) -> tuple[Task, list[Watched]]:
    """The task, watched; and who drafts for it."""
    assert task.drafter is not None
    watched = Watched(task.drafter)
    task.drafter = watched
    return task, [watched]


def held(forward: Forward) -> list[list[int]]:
    return [cursor.ids.tolist() for cursor in forward.accepted]


def agrees(task: Task, forwards: list[Forward]) -> bool:
    """Whether what was seen is what decoding counted, and drafts that held are drafts."""
    drafted = [[] if f.states is None else f.states.tolist() for f in forwards]
    assert all(ids in given for f, given in zip(forwards, drafted, strict=True) for ids in held(f))
    accepted, verified = sum(len(held(f)) for f in forwards), sum(map(len, drafted))
    return (accepted, verified) == (task.stats.accepted, task.stats.drafted)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_watch_that_keeps_nothing_sees_the_same(name: Any) -> None:
    (task, (drafter,)), plain = seen_of(one(name)[0]), plainly(name)
    whole, _ = seen_of(one(name)[0])
    expected = watch.decode(whole)
    follower, forwards = Watch(task, keeps_path=False), []
    for _ in run(task.model, [task]):
        forwards.append(follower.forward())
        assert len(task.path) <= 1
        assert len(drafter.calls) <= 1
    assert [c.ids.tolist() for f in forwards for c in f.reached] == states(plain) == states(whole)
    assert list(map(held, forwards)) == list(map(held, expected))
    assert agrees(task, forwards)
    assert task.stats.accepted > 0


@pytest.mark.parametrize("advised", [False, True])
def test_a_watched_job_holds_the_states_of_one_forward(advised: bool) -> None:
    task, plain = one("block")
    if advised:
        task.adviser, task.drafter = Adviser(task.drafter), None
    events: list[Event] = []
    job = Job(task, events.append, watch=True)
    watched = task.adviser or task.drafter
    assert isinstance(watched, (Watched, WatchedAdviser))
    for _ in run(task.model, [task]):
        job.follow()
        assert len(task.path) <= 1
        assert len(watched.calls) <= 1
    done = job.end()
    assert isinstance(done, Done)
    assert done.ids == collect(plain).token_ids
    told = [event.forward for event in events if isinstance(event, Told)]
    assert len(told) == task.stats.nfe
    assert sum(len(event["steps"]) for event in told) == plain.stats.steps
    true = [draft for event in told for draft in event["drafts"] if draft["accepted"]]
    assert len(true) == task.stats.accepted > 0
    assert not task.keeps_path  # a copy of it, which is decoded plainly, keeps none either


class Folded(Oracle):
    """Drafts no state twice, nor the root."""

    def __call__(self, *args: Any) -> Tensor:
        states, root = super().__call__(*args), args[0].ids.tolist()
        rows = dict.fromkeys(tuple(ids) for ids in states.tolist() if ids != root)
        return torch.tensor([*rows]) if rows else states[:0]


def test_steps_that_commit_nothing_hide_no_draft_that_held() -> None:
    """Dream's timesteps may commit 0 tokens: the state stays, and the walk goes on."""
    model = parity_model("dream-a", "float64")
    settings = DecodingSettings.parse(
        block_length=8,
        gen_length=16,
        schedule="timestep",
        steps_per_block=14,
        stop_at_eos=False,
        cache="none",
    )
    prompt = random_prompt(model, 9)
    plain = decode(model, prompt, settings)
    task = make_task(model, prompt, settings, Watched(Folded(plain, 6)))
    forwards = watch.decode(task)
    assert states(task) == states(plain)
    idle = [
        f
        for f in forwards
        if len({tuple(c.ids.tolist()) for c in f.reached[:-1]}) < len(f.reached) - 1
    ]
    assert idle
    assert agrees(task, forwards)
    for forward in forwards:
        told = turn(model, task.canvas, forward)
        ids = held(forward)
        assert len({tuple(row) for row in ids}) == len(ids)
        assert sum(draft.accepted for draft in told.drafts) == len(ids)


@pytest.mark.parametrize("forwards", [1, 3])
def test_what_is_begun_anew_is_seen_from_its_start_with_its_drafts(forwards: int) -> None:
    (task, (drafter,)), plain = seen_of(one("none")[0]), plainly("none")
    scheduler, follower = Scheduler(task.model), Watch(task)
    scheduler.add(task)
    for _ in range(forwards):
        scheduler.step()
        follower.forward()
    scheduler.remove(task)  # as one for which there is no room
    task.begin_anew()
    scheduler.add(task)
    seen = []
    while scheduler.busy:
        scheduler.step()
        seen.append(follower.forward())
    assert [c.ids.tolist() for f in seen for c in f.reached] == states(plain)
    assert agrees(task, seen)
    assert task.stats.accepted > 0
    assert drafter.calls == []


def test_drafts_for_which_there_was_no_memory_were_not_verified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, _ = seen_of(one("block", drafts=4)[0])
    # Of blocks of 8: the root and some drafts fit, 4 do not.
    monkeypatch.setattr(driver, "forward", Memory(8 * 4, torch.OutOfMemoryError("CUDA")))
    forwards = watch.decode(task)
    assert task.stats.halvings > 0
    assert task.most_drafts > 0
    assert agrees(task, forwards)
    assert task.stats.accepted > 0
