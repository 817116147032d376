"""One budget for all sequences that share forwards: as many drafts as the machine has room for.

What a forward takes depends on how many sequences it holds, its batch. Alone, one that waits for
memory has room for many drafts; among sixteen, that room is theirs. So costs are learned by the
size of the batch, and what drafts are worth is learned in common. All sequences of a forward get
the same choice: the fewest seconds per step for each of them are the most steps per second for all
together. Which of its drafts a sequence then sends along is decided by how probable they are
(`auto.Cutoff`): one is worth the same steps and costs the same share of the forward whosever it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from threading import local

from spiffy.runtime.budget.controller import Controller
from spiffy.runtime.budget.estimates import Choice, ForwardSteps, Points, Slowdown, ladder
from spiffy.runtime.draft import Selection

#: Sizes of batches that have a controller of their own; others use that of the next smaller one.
BATCHES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
_ALIKE = 1.3  # times: batches that differ by less use the controller at hand, whose tries go on
_RECENT = 4  # last forwards, the largest batch of which counts: others join soon for those that end
#: Share of a forward's sequences that must have had a choice, for its seconds to say something of
#: that choice: the others have just begun.
_MOST_OF_FORWARD = 0.75


@dataclass
class _Sums:
    """Sums over the sequences that had the same choice for a forward."""

    sequences: int = 0
    steps: int = 0
    drafting: float = 0.0


class _ThreadState(local):
    """What one thread's last forward was, and what was chosen for its next one.

    Made anew in every thread: what it learns of a forward goes with what it chose for that.

    Attributes
    ----------
    batch, seconds
        Of the last forward: its sequences, and what it took.
    recent_batches
        Those of the last forwards.
    bucket
        Which of `BATCHES` counts as the size of the last ones: whose controller is in use.
    bucket_of_last, bucket_of_next
        For which of them the last and the next forward's choice was made.
    choice
        Of the next forward; None until it is made.
    choosers, unreported
        Sequences that have asked for it; of the last forward, those that have not yet reported.
    sums
        What was reported of the last forward.
    resting
        Plain forwards to come of which nothing is recorded.
    """

    def __init__(self) -> None:
        self.batch = self.bucket = self.bucket_of_last = self.bucket_of_next = 1
        self.seconds = 0.0
        self.recent_batches: deque[int] = deque(maxlen=_RECENT)
        self.choosers = self.unreported = self.resting = 0
        self.sums: dict[Choice, _Sums] = {}
        self.choice: Choice | None = None


class SharedController:
    """A `Controller` for every size of a batch.

    A driver calls `after_forward`, and every sequence then `learn`s of that forward and `choose`s
    for the next one. The first choice holds for all of them. But while it `rests`, the next forward
    is plain, and no sequence chooses for it or learns of it.

    Parameters
    ----------
    steps, most, seconds
        As `Controller` takes them; `seconds` are of forwards that hold one sequence.

    Attributes
    ----------
    by_batch
        The controllers, by the size of the batch.
    """

    def __init__(self, steps: Mapping[Selection, Points], most: int, seconds: Points = ()) -> None:
        self.steps, self.most = steps, most
        self.worth = ForwardSteps(steps)
        self.slowdown = Slowdown()
        self.by_batch = {1: self._controller(1, seconds)}
        self._thread = _ThreadState()

    def _controller(self, batch: int, seconds: Points) -> Controller:
        return Controller(
            self.steps, self.most, seconds, batch, worth=self.worth, slowdown=self.slowdown
        )

    @property
    def current(self) -> Controller:
        """The controller for as many sequences as this thread's last forward held."""
        return self.by_batch[self._thread.bucket]

    @property
    def rests(self) -> bool:
        """Whether the next forward is plain, and nothing is recorded of it."""
        return self._thread.resting > 0

    def after_forward(self, sequences: int, seconds: float) -> None:
        """A forward that so many sequences shared is done, before they `learn` of it."""
        ours = self._thread
        ours.recent_batches.append(sequences)
        largest = max(ours.recent_batches)
        alike = ours.bucket / _ALIKE < largest < ours.bucket * _ALIKE
        if ours.resting:
            self.current.rest(seconds)
            ours.resting = ours.resting - 1 if alike else 0
            if ours.resting:
                return
        self._learn_from_last()
        chosen = ours.choice is not None
        ours.batch, ours.seconds = sequences, seconds
        ours.bucket_of_last = ours.bucket_of_next
        ours.unreported, ours.choosers, ours.choice = ours.choosers, 0, None
        if alike:
            ours.resting = self.current.resting if chosen else 0
            return
        bucket = BATCHES[bisect_right(BATCHES, largest) - 1]
        if bucket not in self.by_batch:
            self.by_batch[bucket] = self._controller(bucket, self._likely_seconds(bucket))
        ours.bucket = bucket

    def choose(self) -> Choice:
        """Who drafts the next forward, and up to how many for each sequence."""
        ours = self._thread
        if ours.choice is None:
            ours.choice, ours.bucket_of_next = self.current.choose(), ours.bucket
        ours.choosers += 1
        return ours.choice

    def learn(self, choice: Choice, steps: int, drafting: float) -> None:
        """Take in what the last forward was worth to one sequence, and its seconds of drafting."""
        sums = self._thread.sums.setdefault(choice, _Sums())
        sums.sequences += 1
        sums.steps += steps
        sums.drafting += drafting
        self._thread.unreported -= 1
        if self._thread.unreported <= 0:
            self._learn_from_last()

    @property
    def _is_of_another_batch(self) -> bool:
        """Whether the last choice was made for another size, and nothing is known of this one."""
        ours = self._thread
        return ours.bucket_of_last != ours.bucket and not self.current.costs.knows_plain

    def _learn_from_last(self) -> None:
        """Learn from the last forward; mostly all its sequences had the same choice.

        Few had, for example, if many had just joined one.
        """
        ours = self._thread
        choices, ours.sums = ours.sums, {}
        for choice, sums in choices.items():
            share = sums.sequences / ours.batch
            steps = sums.steps / sums.sequences
            fewer = ours.batch <= ours.bucket / _ALIKE  # others join soon
            if share < _MOST_OF_FORWARD or fewer or self._is_of_another_batch:
                self.worth.observe(choice, steps, sums.sequences)  # its seconds say nothing
                continue
            # Who drafts first waits until all have. (Walks are the same with and without drafts.)
            seconds, drafting = ours.seconds, sums.drafting
            if choice.way is None:  # all there is to pack
                seconds, drafting = seconds + drafting, 0.0
            self.current.learn(choice, steps, seconds, drafting, sums.sequences, min(share, 1.0))

    def _likely_seconds(self, batch: int) -> Points:
        """What forwards of so many sequences may take, by those of the most similar number.

        As if a state cost the same whichever sequence it is of; only the shape of it counts.
        """
        nearest = min(self.by_batch, key=lambda known: max(known / batch, batch / known))
        known = self.by_batch[nearest].costs
        if not known.knows_plain:
            return ()
        numbers = [0, *ladder(self.most)]
        return [(n, known.plain_with((1 + n) * batch / nearest - 1)) for n in numbers]
