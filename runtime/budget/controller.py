"""How many drafts pay, learned from the forwards that decoding makes anyway.

Decoding S steps takes S / E x (forward + drafting) seconds, where E is the number of denoising
steps that a forward is worth; what a step itself costs (output head, unmasking policy) is the same
with and without drafts. So the best choice has the fewest seconds per step, and both sides of that
fraction are estimated while decoding: robustly (from few recent forwards), forgetting slowly,
and at once anew where the machine has changed. Plain decoding is one of the choices.

Trying something costs time. What a try may lose at worst is bounded beforehand (a forward over
1 + n states takes at most as long as (1 + n) / (1 + m) forwards over 1 + m) and has to fit into an
allowance: one plain forward, and a hundredth of the time spent so far. And where drafts have lost
more than a forward or two against plain decoding, only much better ones are used. Nothing here can
change a token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import NamedTuple

from spiffy.runtime.draft import Selection

#: Numbers of drafts that are tried.
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

_KEPT = 9  # forwards that count
_PLAN_EVERY = 6  # forwards
_LOOK_AGAIN = 32  # forwards between two looks at what was not tried for long,
_SELDOM = 8  # up to so many times as many where the looks before were in vain
_STALE = 24  # forwards after which what was known is out of date
_MARGIN = 0.03  # drafts must promise this much over plain decoding,
_DOUBTED = 0.1  # or this much if they did not keep it
_ALLOWED = 0.01  # share of the time spent that may be lost
_MOST_OWED = 1.5  # plain forwards that may be lost,
_CREDIT = -2.0  # or gained and lost again
_FORGIVEN = 0.995  # per forward
_CHANGED = 1.5  # times slower or faster: another machine
_STRIKES = 3  # such forwards in a row
_MEMORY = 0.985  # per forward: accepted drafts are forgotten by half in 46
# The number of accepted drafts varies by more than its mean from forward to forward, so it takes
# hundreds to tell two choices apart: until then the artifact's curve decides between them.
_BELIEF = 2.0  # accepted drafts' worth of belief that all is as the artifact says,
_WAY_BELIEF = 300.0  # that graph and model compare as it says,
_OWN_BELIEF = 1500.0  # and numbers of drafts
_HOPE = 0.9  # an unknown choice may cost this much of what is expected


class Choice(NamedTuple):
    """Who chooses the drafts of a forward (None: nobody) and how many there are at most."""

    way: Selection | None
    drafts: int

    def __str__(self) -> str:
        """As statistics name it."""
        return "plain" if self.way is None else f"{self.way} {self.drafts}"


PLAIN = Choice(None, 0)
Points = Sequence[tuple[int, float]]


class ForwardSeconds:
    """What a forward takes by how many drafts it may have: by the last ones, and a guess between.

    Some hold fewer drafts, some store a block besides: what counts is their mean, without those
    that were interrupted.

    Parameters
    ----------
    prior
        (drafts, seconds) as measured before; only its shape counts, where nothing is known.
    """

    def __init__(self, prior: Points = ()) -> None:
        self._prior = prior
        self._recent: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}  # number of the forward
        self._usually: dict[int, float] = {}
        self._points: list[tuple[int, float]] = []
        self._odd: dict[int, int] = {}  # odd forwards in a row
        self._out_of_date = False
        self._forwards = 0

    def observe(self, drafts: int, seconds: float) -> bool:
        """Learn from a forward; whether the machine has changed, so that all else is forgotten.

        One that takes much longer or shorter than others did is an odd one. Several in a row are
        news: of the machine, or, where the others were long ago, of this number of drafts.
        """
        self._forwards += 1
        seconds = max(seconds, 1e-9)
        recent = self._recent.setdefault(drafts, deque(maxlen=_KEPT))
        ratio = seconds / self._usually[drafts] if recent else 1.0
        if 1 / _CHANGED < ratio < _CHANGED:
            self._odd[drafts] = 0
            if self._age(drafts) > _STALE:  # the machine may have drifted
                recent.clear()
        elif self._odd.get(drafts, 0) == 0:
            self._odd[drafts], self._out_of_date = 1, self._age(drafts) > _STALE
        else:
            self._odd[drafts] += 1
        recent.append(seconds)
        self._seen[drafts] = self._forwards
        news = self._odd[drafts] >= _STRIKES - self._out_of_date
        if news:
            kept = list(recent)[-self._odd[drafts] :]
            recent.clear()
            recent.extend(kept)
            self._odd[drafts] = 0
            if not self._out_of_date:
                self._recent = {drafts: recent}
        self._draw(drafts)
        return news and not self._out_of_date

    def _age(self, drafts: int) -> int:
        return self._forwards - self._seen.get(drafts, self._forwards)

    def doubts(self, drafts: int) -> bool:
        """Whether the last forward with that many drafts was an odd one."""
        return self._odd.get(drafts, 0) > 0

    def forget_all_but(self, drafts: int, seconds: float) -> None:
        """Another machine: what was known does not hold, but for what was just seen."""
        if drafts not in self._recent or len(self._recent) > 1:
            self._recent = {drafts: deque([seconds], maxlen=_KEPT)}
            self._draw(drafts)

    def scale(self, factor: float) -> None:
        """Take another sequence's forwards to be longer by this factor."""
        for drafts, recent in self._recent.items():
            self._recent[drafts] = deque((value * factor for value in recent), maxlen=_KEPT)
        self._draw(*self._recent)

    def _draw(self, *changed: int) -> None:
        for drafts in changed:
            self._usually[drafts] = _usual(self._recent[drafts])
        most, self._points = 0.0, []
        for drafts in sorted(self._recent):  # more drafts never cost less: that would be noise
            most = max(most, self._usually[drafts])
            self._points.append((drafts, most))

    def knows(self, drafts: int) -> bool:
        """Whether a forward with that many drafts was seen since the machine last changed."""
        return drafts in self._recent

    def expected(self, drafts: float) -> float:
        """Seconds of a forward; needs at least one to have been seen."""
        points = self._points
        at = bisect_left(points, (drafts, 0.0))
        if at < len(points) and points[at][0] == drafts:
            return points[at][1]
        if 0 < at < len(points):
            return _between(points[at - 1], points[at], drafts)
        nearest, seconds = points[min(at, len(points) - 1)]
        if self._prior:
            return seconds * interpolated(self._prior, drafts) / interpolated(self._prior, nearest)
        if at and len(points) > 1:
            return max(seconds, _between(points[-2], points[-1], drafts))
        return seconds * (1 + drafts / 20) / (1 + nearest / 20)

    def at_best(self, drafts: int) -> float:
        """What a forward costs at least: what one with fewer drafts does."""
        at = bisect_left(self._points, (drafts, 0.0))
        return self._points[max(at - 1, 0)][1]

    def at_worst(self, drafts: int) -> float:
        """What a forward costs at most: no more than as many forwards as it has states.

        By those that were seen lately: others may be out of date.
        """
        fresh = [(n, s) for n, s in self._points if n <= drafts and self._age(n) <= _STALE]
        known, seconds = fresh[-1] if fresh else self._points[0]
        return seconds * max(1.0, (1 + drafts) / (1 + known))


def _usual(values: Sequence[float]) -> float:
    """Their mean, without those that are far from the median."""
    middle = sorted(values)[(len(values) - 1) // 2]
    kept = [value for value in values if middle / 2 <= value <= 2 * middle]
    return sum(kept) / len(kept)


def _between(a: tuple[int, float], b: tuple[int, float], at: float) -> float:
    """On the line through two points."""
    return a[1] + (b[1] - a[1]) * (at - a[0]) / (b[0] - a[0])


def interpolated(points: Points, at: float) -> float:
    """Piecewise linear through points, constant beyond the ends."""
    k = bisect_left(points, (at, float("-inf")))
    if k == 0:
        return points[0][1]
    if k == len(points):
        return points[-1][1]
    return _between(points[k - 1], points[k], at)


class _Gain:
    """Accepted drafts over those that the artifact expects, slowly forgotten."""

    def __init__(self, memory: float = _MEMORY) -> None:
        self.memory = memory
        self.accepted = self.expected = 0.0

    def observe(self, accepted: float, expected: float) -> None:
        self.accepted = self.accepted * self.memory + accepted
        self.expected = self.expected * self.memory + expected

    def ratio(self, belief: float, otherwise: float) -> float:
        return (self.accepted + belief * otherwise) / (self.expected + belief)


class ForwardSteps:
    """How many denoising steps a forward is worth, by who drafts and by how many there may be.

    The artifact says it for its held-out prompts; here, drafts may be accepted more or less often,
    with which all numbers of drafts go up or down together, and each of its own a little.
    """

    def __init__(self, prior: Mapping[Selection, Points]) -> None:
        self._prior = prior
        self._all = _Gain()
        self._by_way: dict[Selection, _Gain] = {way: _Gain(memory=1.0) for way in prior}
        self._by_choice: dict[Choice, _Gain] = {}

    def observe(self, choice: Choice, steps: float, sequences: int = 1) -> None:
        """Learn from a forward with drafts: steps on average of so many sequences."""
        if choice.way is None:
            return
        accepted, expected = sequences * (steps - 1), sequences * self._artifact(choice)
        self._by_choice.setdefault(choice, _Gain(memory=1.0)).observe(
            accepted, expected * self._ratio(choice.way)
        )
        self._by_way[choice.way].observe(accepted, expected * self._all.ratio(_BELIEF, 1.0))
        self._all.observe(accepted, expected)

    def expected(self, choice: Choice) -> float:
        """Steps per forward."""
        if choice.way is None:
            return 1.0
        own = self._by_choice.get(choice)
        residual = 1.0 if own is None else own.ratio(_OWN_BELIEF, 1.0)
        return 1.0 + self._artifact(choice) * self._ratio(choice.way) * residual

    def _ratio(self, way: Selection) -> float:
        return self._all.ratio(_BELIEF, 1.0) * self._by_way[way].ratio(_WAY_BELIEF, 1.0)

    def _artifact(self, choice: Choice) -> float:
        assert choice.way is not None
        return max(interpolated(self._prior[choice.way], choice.drafts) - 1.0, 1e-3)


@dataclass
class Controller:
    """Chooses the drafts of every forward that holds a certain number of sequences.

    Parameters
    ----------
    steps
        By who drafts: (drafts, steps per forward) as the artifact expects them.
    most
        Most drafts per forward and sequence.
    seconds
        (drafts, seconds) of a forward as measured before, if it was.
    worth
        What is learned of steps per forward, where several controllers share that.
    """

    steps: Mapping[Selection, Points]
    most: int
    seconds: Points = ()
    worth: ForwardSteps | None = None
    used: Counter[Choice] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        numbers = [*(n for n in LADDER if n < self.most), self.most]
        self._choices = [PLAIN, *(Choice(way, n) for way in self.steps for n in numbers)]
        # By the acceptance model a forward has fewer drafts than it may have; plain ones are alike.
        self._forward = {way: ForwardSeconds(self.seconds) for way in self.steps}
        self._plain = next(iter(self._forward.values()))
        self._worth = ForwardSteps(self.steps) if self.worth is None else self.worth
        self._drafting: dict[Selection, deque[float]] = {}
        self._tried: dict[Choice, int] = {}  # number of the forward
        self._vain: dict[Choice, int] = {}  # looks in a row after which something else was best
        self._forwards = 0
        self._now, self._left = PLAIN, 2  # the first forwards say what plain ones cost
        self._trying, self._tries, self._before = False, 0, 0.0
        self._spent = self._lost = 0.0
        self._owed = 0.0  # plain forwards that would have made the same steps sooner
        self._looked = 0
        self._before_this = PLAIN
        self._size = 0.0

    def start(self, size: float) -> None:
        """Begin a sequence whose plain forwards are of this size (positions)."""
        if self._size and not 0.9 < size / self._size < 1.1:
            for forward in self._forward.values():
                forward.scale(size / self._size)
        self._size = size

    def choose(self) -> Choice:
        """Who drafts the next forward, and up to how many."""
        if self._left <= 0:
            if not self._forwards:  # several sequences ask before the first forward has been made
                return PLAIN
            self._plan()
        self._left -= 1
        return self._now

    def learn(
        self, choice: Choice, steps: float, forward: float, drafting: float, sequences: int = 1
    ) -> None:
        """Take in what came of a forward.

        Parameters
        ----------
        choice
            What was chosen for it.
        steps
            Denoising steps that it was worth, on average of the sequences.
        forward, drafting
            Seconds.
        sequences
            How many of those in the forward had this choice.
        """
        self._forwards += 1
        self.used[choice] += sequences
        self._tried[choice] = self._forwards
        # Right after forwards of another kind, the processor's caches are still theirs.
        settled = choice == self._before_this or not self._own(choice).knows(choice.drafts)
        self._before_this = choice
        changed = settled and self._observe(choice, forward)
        if choice.way is not None:
            recent = self._drafting.setdefault(choice.way, deque(maxlen=_KEPT))
            recent.append(drafting)
        self._worth.observe(choice, steps, sequences)
        self._spent += forward + drafting
        self._tries += self._trying
        # Expected seconds here and below: what an interrupted forward took says nothing.
        took = self.seconds_per_step(choice) * self._worth.expected(choice)
        owed = _FORGIVEN * self._owed + took / self._plain.expected(0) - steps
        self._owed = max(_CREDIT, owed)
        if self._trying and self._left == 0 and self._own(choice).doubts(choice.drafts):
            self._left = 1  # look again before believing it
        if changed:  # what plain forwards cost now has to be seen first
            self._tried.clear()
            self._vain.clear()
            self._spent = self._lost = 0.0
            self._owed = min(self._owed, 0.0)
            self._now, self._left, self._trying = PLAIN, 2, False
            self._looked = self._forwards

    def seconds_per_step(self, choice: Choice) -> float:
        """What a step costs by this choice, as far as is known."""
        forward = self._of(choice).expected(choice.drafts)
        return (forward + self._drafting_seconds(choice)) / self._worth.expected(choice)

    def forward_seconds(self, choice: Choice) -> list[float]:
        """Seconds of a forward with 0, 1, ... as many drafts as chosen, as far as is known."""
        return [self._of(choice).expected(n) for n in range(choice.drafts + 1)]

    @property
    def has_seen_plain(self) -> bool:
        """Whether it knows what a forward without drafts takes."""
        return self._plain.knows(0)

    def plain_seconds(self, drafts: float) -> float:
        """Seconds of a forward with that many drafts or sequences more, as far as is known."""
        return self._plain.expected(drafts)

    @property
    def trying(self) -> bool:
        """Whether the present choice is a try, to be made in full."""
        return self._trying

    def why(self) -> str:
        """What it would choose now and what that rests on, in words."""
        if not self.has_seen_plain:
            return "nothing is known about plain forwards yet"
        best = self._best()
        plain, ours = (1000 * self.seconds_per_step(choice) for choice in (PLAIN, best))
        if best.way is None:
            rivals = [c for c in self._choices if c.way is not None and c in self._tried]
            if not rivals:
                return f"plain: {plain:.3g} ms a step; no drafts were worth trying"
            rival = min(rivals, key=self.seconds_per_step)
            ours = 1000 * self.seconds_per_step(rival)
            return f"plain: {plain:.3g} ms a step, {rival} {ours:.3g} ms"
        return f"{best}: {ours:.3g} ms a step, plain {plain:.3g} ms"

    def _plan(self) -> None:
        if self._trying:
            lost = self.seconds_per_step(self._now) - self._before
            self._lost += max(0.0, lost) * self._tries * self._worth.expected(self._now)
        best = self._best()
        if self._trying:
            vain = best != self._now
            self._vain[self._now] = self._vain.get(self._now, 0) + 1 if vain else 0
        found = self._worth_trying(best)
        if self._owed > _MOST_OWED:  # what was promised was not kept: promise more, try nothing
            found = None
            if self.seconds_per_step(best) > (1 - _DOUBTED) * self.seconds_per_step(PLAIN):
                best = PLAIN
        self._trying, self._tries = found is not None, 0
        self._before = self.seconds_per_step(best)
        if found is None:
            self._now, self._left = best, _PLAN_EVERY
        else:  # the first forward of its kind is a slow one; what all is measured by is surer
            self._now, self._left = found, 3 if found == PLAIN else 2

    def _best(self) -> Choice:
        """The cheapest of what is known; drafts only where they promise something."""
        known = [c for c in self._choices if c.way is not None and c in self._tried]
        best = min(known, key=self.seconds_per_step, default=PLAIN)
        promised = self.seconds_per_step(best) < (1 - _MARGIN) * self.seconds_per_step(PLAIN)
        return best if promised else PLAIN

    def _worth_trying(self, best: Choice) -> Choice | None:
        """A choice to be tried now: one that is unknown and promising, or one for a change.

        What was not tried for long gets a look now and then; what it might cost is judged by what a
        forward with fewer drafts does.
        """
        now = self.seconds_per_step(best)
        allowance = max(0.0, self._plain.expected(0) + _ALLOWED * self._spent - self._lost)
        affordable = [c for c in self._choices if c != best and self._at_worst(c, now) <= allowance]
        unknown = [c for c in affordable if c not in self._tried]
        found = min(unknown, key=self.seconds_per_step, default=None)
        if found is not None and _HOPE * self.seconds_per_step(found) < now:
            return found
        if self._forwards - self._looked < _LOOK_AGAIN:
            return None
        # The machine may have drifted meanwhile; what seemed much dearer is looked at more seldom.
        due = [
            c
            for c in affordable
            if self._age(c)
            > _LOOK_AGAIN * (self._at_best(c) / now) ** 2 * min(2 ** self._vain.get(c, 0), _SELDOM)
        ]
        found = min(due, key=self._at_best, default=None)
        if found is not None:
            self._looked = self._forwards
        return found

    def _age(self, choice: Choice) -> int:
        """Forwards since it was last tried."""
        return self._forwards - self._tried.get(choice, 0)

    def _at_worst(self, choice: Choice, now: float) -> float:
        """Seconds that one forward by this choice may lose, where a step costs `now` otherwise."""
        forward = self._of(choice).at_worst(choice.drafts) + self._drafting_seconds(
            choice, worst=True
        )
        return forward - self._worth.expected(choice) * now

    def _at_best(self, choice: Choice) -> float:
        """Seconds per step if drafts cost nothing more than fewer of them do."""
        forward = self._of(choice).at_best(choice.drafts) + self._drafting_seconds(choice)
        return forward / self._worth.expected(choice)

    def _own(self, choice: Choice) -> ForwardSeconds:
        return self._plain if choice.way is None else self._forward[choice.way]

    def _of(self, choice: Choice) -> ForwardSeconds:
        """What is known of a choice's forwards: its own, or else the other way's."""
        curves = (self._own(choice), *self._forward.values())
        return next((c for c in curves if c.knows(choice.drafts)), curves[0])

    def _observe(self, choice: Choice, seconds: float) -> bool:
        """Learn a forward's seconds; whether the machine has changed."""
        curves = [self._own(choice)] if choice.way is not None else [*self._forward.values()]
        news = [curve.observe(choice.drafts, seconds) for curve in curves]
        if any(news):
            for curve in self._forward.values():
                curve.forget_all_but(choice.drafts, seconds)
        return any(news)

    def _drafting_seconds(self, choice: Choice, worst: bool = False) -> float:
        if choice.way is None:
            return 0.0
        if recent := self._drafting.get(choice.way):
            return median_low(recent)
        return self._plain.expected(0) * (0.5 if worst else 0.1)
