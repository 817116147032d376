"""One budget for many sequences: simulated with invented clocks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import study

from spiffy.runtime.budget.estimates import PLAIN, Choice
from spiffy.runtime.budget.shared import BATCHES, SharedController

regret = study("regret")
World = regret.World
Machine = Callable[[int], float]  # seconds of a forward by how many states it holds

MACHINES: dict[str, Machine] = {
    "computing": lambda states: 0.2 + 0.8 * states,
    "waits for memory": lambda states: 1 + 0.002 * states,
    "room for 16 states": lambda states: max(1.0, states / 16),
    "in between": lambda states: 1 + 0.1 * states,
}


def served(
    machine: Machine, batches: Sequence[int], seed: int, share: float = 1.0
) -> tuple[SharedController, list[tuple[int, Choice, float]]]:
    """Forwards with so many sequences each; for each their number, the choice, expected seconds."""
    rng = random.Random(seed)
    world = World(lambda n, t: 1.0, share)
    budget = SharedController(regret.EXPECTED, regret.MOST)
    forwards = []
    for sequences in batches:
        rests = budget.rests
        chosen = {PLAIN if rests else budget.choose() for _ in range(sequences)}
        (choice,) = chosen
        seconds = machine(sequences * (1 + choice.drafts))
        measured = seconds * rng.lognormvariate(0, 0.03)
        drafting = 0.0 if choice.way is None else 0.01
        budget.after_forward(sequences, measured)
        for _ in range(0 if rests else sequences):
            mean = world.steps(choice) - 1
            steps = 1 + (regret._accepted(rng, mean, choice.drafts) if choice.way else 0)
            budget.learn(choice, steps, drafting / sequences)
        forwards.append((sequences, choice, seconds + drafting))
    return budget, forwards


def seconds_per_step(machine: Machine, sequences: int, choice: Choice, share: float) -> float:
    drafting = 0.0 if choice.way is None else 0.01
    return (machine(sequences * (1 + choice.drafts)) + drafting) / World(
        lambda n, t: 1.0, share
    ).steps(choice)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sequences", [2, 8, 32])
@pytest.mark.parametrize("name", MACHINES)
def test_as_many_drafts_as_the_machine_has_room_for(
    name: str, sequences: int, share: float
) -> None:
    machine = MACHINES[name]
    _, forwards = served(machine, [sequences] * 300, 0, share)
    spent = {
        choice: seconds_per_step(machine, sequences, choice, share) for choice in regret.CHOICES
    }
    late = forwards[100:]
    steps = sum(seconds / spent[choice] for _, choice, seconds in late)
    mean = sum(seconds for *_, seconds in late) / steps
    assert mean < 1.05 * min(spent.values())
    whole = sum(seconds / spent[choice] for _, choice, seconds in forwards)
    assert sum(seconds for *_, seconds in forwards) < 1.03 * whole * spent[PLAIN]


def test_drafts_fill_what_the_sequences_leave() -> None:
    """Many alone, some among four, none among thirty-two, and many again."""
    machine = MACHINES["room for 16 states"]
    batches = [1] * 150 + [4] * 150 + [32] * 150 + [1] * 60
    _, forwards = served(machine, batches, 1)
    used = {
        at: Counter(choice.drafts for _, choice, _ in forwards[at : at + 50]).most_common(1)[0][0]
        for at in (100, 250, 400, 460)
    }
    assert used[100] >= 12
    assert 2 <= used[250] <= 4
    assert used[400] == 0
    assert used[460] >= 12


def test_what_is_known_of_one_batch_helps_the_next() -> None:
    """The first forwards of a batch go by those of another: few tries of what cannot pay."""
    machine = MACHINES["computing"]
    budget, forwards = served(machine, [4] * 100 + [16] * 40, 2)
    tries = [choice.drafts for _, choice, _ in forwards[100:] if choice != PLAIN]
    assert len(tries) <= 4
    assert max(tries, default=0) <= 2
    assert set(budget.by_batch) == {1, 4, 16}


def test_a_batch_that_changes_by_one_stays_the_same() -> None:
    budget, _ = served(MACHINES["in between"], [8, 7, 8, 9, 8, 7] * 20, 3)
    assert set(budget.by_batch) == {1, 8}
    # All but the first one, which was chosen for before so many had been seen.
    assert budget.by_batch[8].forwards == 6 * 20 - 1
    assert list(BATCHES) == sorted(BATCHES)


def test_a_batch_outlasts_forwards_in_which_some_of_it_are_missing() -> None:
    """Answers end and others are asked for at once, but join a forward or two later."""
    closed_loop = [8, 8, 8, 8, 5, 8, 8, 8, 4, 6, 8, 8] * 20
    budget, _ = served(MACHINES["in between"], closed_loop, 4)
    assert set(budget.by_batch) == {1, 8}
    fewer, _ = served(MACHINES["in between"], closed_loop + [4] * 8, 4)
    assert fewer.current is fewer.by_batch[4]
    more, _ = served(MACHINES["in between"], [*closed_loop, 16, 16], 4)
    assert more.current is more.by_batch[16]


@pytest.mark.parametrize("sequences", [127, 200])
def test_batches_of_any_size_learn_what_forwards_take(sequences: int) -> None:
    budget, _ = served(MACHINES["computing"], [sequences] * 8, 5)
    assert budget.current is not budget.by_batch[1]
    assert budget.current.costs.knows_plain


def test_what_a_thread_chose_goes_with_its_own_forward() -> None:
    """Two decode with one budget; while one walks, the other's forward comes back."""
    budget = SharedController(regret.EXPECTED, 8)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        choices = [thread.submit(budget.choose).result() for thread in (one, other)]
        for thread, seconds in ((one, 1.0), (other, 3.0)):
            thread.submit(budget.after_forward, 1, seconds).result()
        for thread, choice in zip((one, other), choices, strict=True):
            thread.submit(budget.learn, choice, 1, 0.0).result()
    assert choices == [PLAIN, PLAIN]
    assert budget.by_batch[1].forwards == 2
    assert budget.by_batch[1].costs.plain < 3.0  # of both, and not of the last one twice


def test_sequences_that_end_without_a_word_hold_nothing_up() -> None:
    """One that failed never tells; the others' forwards are learned from all the same."""
    budget = SharedController(regret.EXPECTED, 8)
    for _ in range(30):
        choices = [] if budget.rests else [budget.choose() for _ in range(4)]
        budget.after_forward(4, 3.0)
        for choice in choices[:3]:
            budget.learn(choice, 1, 0.0)
    assert budget.current.costs.plain == pytest.approx(3.0)


def test_nobody_chooses_for_plain_forwards_or_tells_of_them_where_nothing_pays() -> None:
    """And then they are looked at again: many that become cheap are noticed."""
    budget = SharedController(regret.EXPECTED, 8)
    asked = []
    for forward in range(600):
        cheap = forward >= 300
        asked.append(not budget.rests)
        chosen = [] if budget.rests else [budget.choose() for _ in range(16)]
        drafts = chosen[0].drafts if chosen else 0
        budget.after_forward(16, 0.016 * (1.0 if cheap else 1.0 + drafts))
        for choice in chosen:
            budget.learn(choice, 1 + choice.drafts, 0.0)
    assert sum(asked[100:300]) < 60
    assert sum(asked[500:]) > 80


def test_a_thread_prices_its_drafts_by_its_own_forwards() -> None:
    """Another one's forwards hold sixteen sequences, of which nothing is known yet."""
    budget, _ = served(MACHINES["waits for memory"], [1] * 60, 6)
    with ThreadPoolExecutor(1) as other:
        for _ in range(16):
            other.submit(budget.choose).result()
        other.submit(budget.after_forward, 16, 5.0).result()
        assert budget.current is budget.by_batch[1]
        assert other.submit(lambda: budget.current).result() is budget.by_batch[16]
        assert budget.current.costs.per_step(Choice("model", 8)) > 0


def test_a_batch_that_leaves_is_seen_while_it_rests() -> None:
    budget = SharedController(regret.EXPECTED, 8)

    def forward(sequences: int) -> None:
        chosen = [] if budget.rests else [budget.choose() for _ in range(sequences)]
        drafts = chosen[0].drafts if chosen else 0
        budget.after_forward(sequences, 0.001 * sequences * (1 + drafts))
        for choice in chosen:
            budget.learn(choice, 1, 0.0)

    for _ in range(60):
        forward(16)
    for _ in range(100):
        forward(16)
        if budget.rests and budget._thread.resting > 4:
            break
    assert budget.rests
    assert budget.current is budget.by_batch[16]
    for _ in range(4):
        forward(1)
    assert budget.current is budget.by_batch[1]
