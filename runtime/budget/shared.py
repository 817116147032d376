"""One budget for all sequences that share forwards: as many drafts as the machine has room for.

What a forward takes depends on how many sequences it holds. Alone, one that waits for memory has
room for many drafts; among sixteen, that room is theirs. So costs are learned by the number of
sequences, and what drafts are worth is learned in common. All sequences of a forward get the same
choice: the fewest seconds per step for each of them are the most steps per second for all together.
Which of its drafts a sequence then sends along is decided by how probable they are (`auto.Pays`):
one is worth the same steps and costs the same share of the forward whosever it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from threading import local

from spiffy.runtime.budget.controller import Controller
from spiffy.runtime.budget.estimates import Choice, ForwardSteps, Pace, Points, ladder
from spiffy.runtime.draft import Selection

#: Numbers of sequences that are told apart; others count as the next smaller one,
CROWDS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
_SAME = 1.3  # or as the one at hand, if they differ by less: it has tries under way
_SOON = 4  # forwards until as many join as have ended, where they do
_MOST = 0.75  # of a forward's sequences; others have just begun


@dataclass
class _Told:
    """Sums over the sequences that had the same choice for a forward."""

    sequences: int = 0
    steps: int = 0
    drafting: float = 0.0


class _Turn(local):
    """Where one thread is: what it hears of a forward goes with what it chose for that.

    Attributes
    ----------
    crowd
        Number of sequences that counts as the last forward's, `sequences`.
    seconds
        Of the last forward.
    recent
        Numbers of sequences.
    asked, due
        Sequences with a choice for the next forward; of the last one, those that have not told yet.
    told, choice
        What was learned of the last forward, and the choice for the next one.
    chose, planned
        For how many the last and the next choice were made.
    resting
        Plain forwards to come.
    """

    def __init__(self) -> None:
        self.crowd = self.sequences = self.chose = self.planned = 1
        self.seconds = 0.0
        self.recent: deque[int] = deque(maxlen=_SOON)
        self.asked = self.due = self.resting = 0
        self.told: dict[Choice, _Told] = {}
        self.choice: Choice | None = None


class SharedController:
    """A `Controller` for every number of sequences.

    A driver calls `turn` after every forward, and every sequence then `learn`s of that forward and
    `choose`s for the next one. The first choice holds for all of them. But while it `rests`, the
    next forward is plain, and no sequence chooses for it or learns of it.

    Parameters
    ----------
    steps, most, seconds
        As `Controller` takes them; `seconds` are of forwards that hold one sequence.
    """

    def __init__(self, steps: Mapping[Selection, Points], most: int, seconds: Points = ()) -> None:
        self.steps, self.most = steps, most
        self.worth = ForwardSteps(steps)
        self.pace = Pace()
        self.crowds = {1: Controller(steps, most, seconds, worth=self.worth, pace=self.pace)}
        self._own = _Turn()

    @property
    def mine(self) -> Controller:
        """The controller for as many sequences as this thread's last forward held."""
        return self.crowds[self._own.crowd]

    @property
    def rests(self) -> bool:
        """Whether the next forward is plain, and not worth a word."""
        return self._own.resting > 0

    def turn(self, sequences: int, seconds: float) -> None:
        """Hear of a forward that so many sequences shared, and how long it took."""
        own = self._own
        own.recent.append(sequences)
        most = max(own.recent)
        alike = own.crowd / _SAME < most < own.crowd * _SAME
        if own.resting:
            self.mine.rest(seconds)
            own.resting = own.resting - 1 if alike else 0
            if own.resting:
                return
        self._settle()
        chosen = own.choice is not None
        own.seconds = seconds
        own.due, own.asked, own.choice = own.asked, 0, None
        own.chose, own.sequences = own.planned, sequences
        if alike:
            own.resting = self.mine.resting if chosen else 0
            return
        crowd = CROWDS[bisect_right(CROWDS, most) - 1]
        if crowd not in self.crowds:
            likely = self._likely_seconds(crowd)
            self.crowds[crowd] = Controller(
                self.steps, self.most, likely, crowd, worth=self.worth, pace=self.pace
            )
        own.crowd = crowd

    def choose(self) -> Choice:
        """Who drafts the next forward, and up to how many for each sequence."""
        own = self._own
        if own.choice is None:
            own.choice, own.planned = self.mine.choose(), own.crowd
        own.asked += 1
        return own.choice

    def learn(self, choice: Choice, steps: int, drafting: float) -> None:
        """Take in what the last forward was worth to one sequence, and its seconds of drafting."""
        told = self._own.told.setdefault(choice, _Told())
        told.sequences += 1
        told.steps += steps
        told.drafting += drafting
        self._own.due -= 1
        if self._own.due <= 0:
            self._settle()

    @property
    def _is_lost(self) -> bool:
        """Whether the last choice was made for others, and nothing is known of so many yet."""
        return self._own.chose != self._own.crowd and not self.mine.has_seen_plain

    def _settle(self) -> None:
        """Learn from the last forward; mostly all had the same choice.

        Few did, for example, if many had just joined one.
        """
        own = self._own
        choices, own.told = own.told, {}
        for choice, told in choices.items():
            alike, share = told.sequences, told.sequences / own.sequences
            steps = told.steps / alike
            fewer = own.sequences <= own.crowd / _SAME  # others join soon
            if share < _MOST or fewer or self._is_lost:
                self.worth.observe(choice, steps, alike)  # seconds compare with nothing here
                continue
            # Who drafts first waits until all have. (Walks are the same with and without drafts.)
            seconds, drafting = own.seconds, told.drafting
            if choice.way is None:  # all there is to pack
                seconds, drafting = seconds + drafting, 0.0
            self.mine.learn(choice, steps, seconds, drafting, alike, min(share, 1.0))

    def _likely_seconds(self, crowd: int) -> Points:
        """What forwards of so many sequences may take, by those of the most similar number.

        As if a state cost the same whichever sequence it is of; only the shape of it counts.
        """
        nearest = min(self.crowds, key=lambda known: max(known / crowd, crowd / known))
        known = self.crowds[nearest]
        if not known.has_seen_plain:
            return ()
        numbers = [0, *ladder(self.most)]
        return [(n, known.plain_seconds((1 + n) * crowd / nearest - 1)) for n in numbers]
