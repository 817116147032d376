"""What is learned of forwards: how long they take, how many denoising steps they are worth.

Seconds are those of the machine at its usual speed (`Slowdown`): what counts is how one choice
compares with another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from spiffy.runtime.draft import Selection

# Seconds of forwards.
_KEPT = 24  # the last forwards with a number of drafts, by which it is judged
_STALE = 24  # forwards of any kind after which what was known of one kind is out of date
_ENOUGH = 3  # forwards with a number of drafts, with which one more can be compared
_CHANGED = 1.5  # times slower or faster: an odd forward, or another machine
# Where the first drafts are the dear ones, such as a mixture's, which has read most of its experts
# after a few: what one has to cost for that, in plain forwards, and the last ones at most of it.
_DEAR, _FLAT = 0.2, 0.5
# There, what each further draft may cost: so many times what the last ones did, so much of a plain
# forward at least; and the bound of a forward is lowered by so much at most.
_STEEPER, _LEAST, _MOST_LOWERED = 2.0, 0.05, 3.0
_DOUBLES_AT = 20  # drafts that make a forward twice as long, where nothing says how long it is

# The machine's speed.
SPEED_WINDOW = 5  # the last forwards, which say how fast the machine is at present
_TOLERANCE = 1.15  # times slower or faster than expected: up to there it is as usual
_LASTING = 12  # plain forwards in a row at another speed, which make it the usual one

# Accepted drafts, of which the sums below forget a share per forward.
_MEMORY = 0.985  # of all choices together: forgotten by half in 46 forwards
_LONG_MEMORY = 0.9995  # of one choice beside others: in 1,400 of its own
# Pseudo-counts, in accepted drafts, of what the artifact says. The number of accepted drafts varies
# by more than its mean from forward to forward, so it takes hundreds to tell two choices apart:
# until then the artifact's curve decides between them.
_PRIOR_ALL = 2.0  # how many drafts are accepted
_PRIOR_WAY = 300.0  # how graph and acceptance model compare
_PRIOR_CHOICE = 1500.0  # how numbers of drafts compare


class Choice(NamedTuple):
    """Who chooses the drafts of a forward (None: nobody) and how many there are at most."""

    way: Selection | None
    drafts: int

    def __str__(self) -> str:
        """As statistics name it."""
        return "plain" if self.way is None else f"{self.way} {self.drafts}"


PLAIN = Choice(None, 0)
Points = Sequence[tuple[int, float]]

#: Numbers of drafts that are tried, and told apart.
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def ladder(most: int) -> list[int]:
    """Numbers of drafts to try where there may be up to `most`, that one too."""
    return [*(drafts for drafts in LADDER if drafts < most), most]


class Slowdown:
    """How many times slower than usual the machine is at present: other processes come and go.

    They make all forwards longer by about the same factor, so that what was learned of one choice
    beside another outlives them. Small differences are taken for noise, and so is a forward or two.

    Attributes
    ----------
    value
        Times slower than usual at present.
    usual
        Times slower usually than it was at first.
    """

    def __init__(self) -> None:
        self.value = self.usual = 1.0
        self._recent: deque[float] = deque(maxlen=SPEED_WINDOW)
        self._reported = 1.0  # value at which a change was last reported
        self._unusual = 0  # plain forwards in a row at another speed

    def observe(self, ratio: float, plain: bool = False) -> bool:
        """Learn from a forward's seconds over those expected; returns whether much has changed."""
        self._recent.append(ratio)
        ordered = sorted(self._recent)
        middle = ordered[(len(ordered) - 1) // 2]
        full = len(ordered) == SPEED_WINDOW
        if 1 / _TOLERANCE < middle < _TOLERANCE:
            self.value = 1.0
        elif full and (ordered[1] > _TOLERANCE or ordered[-2] < 1 / _TOLERANCE):
            self.value = middle
        self._unusual = self._unusual + 1 if plain and self.value != 1.0 else 0
        if not 1 / _CHANGED < self.value / self._reported < _CHANGED:
            self._reported = self.value
            return True
        if self._unusual >= _LASTING:
            self._make_usual()
        return False

    def _make_usual(self) -> None:
        """Take the present speed for the usual one.

        While it differs, what is known of plain forwards is measured by a speed that is measured by
        it, and would wander off from what is known of others.
        """
        factor, self.value, self._unusual = self.value, 1.0, 0
        self.usual *= factor
        self._reported /= factor
        self._recent = deque((ratio / factor for ratio in self._recent), maxlen=SPEED_WINDOW)

    def set(self, value: float) -> None:
        """Take it to be so, whatever was thought before."""
        self._recent.extend([value] * SPEED_WINDOW)
        self.observe(value)
        self._reported = self.value


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
        self._mean: dict[int, float] = {}
        self._points: list[tuple[int, float]] = []
        self._odd: set[int] = set()
        self._forwards = 0

    def observe(self, drafts: int, seconds: float) -> None:
        """Learn from a forward; one that takes much longer or shorter than others did is odd."""
        self._forwards += 1
        seconds = max(seconds, 1e-9)
        recent = self._recent.setdefault(drafts, deque(maxlen=_KEPT))
        if recent and not 1 / _CHANGED < seconds / self._mean[drafts] < _CHANGED:
            self._odd.add(drafts)
        else:
            self._odd.discard(drafts)
        if self._forwards_since(drafts) > _STALE:  # the machine may have drifted
            recent.clear()
        recent.append(seconds)
        self._seen[drafts] = self._forwards
        self._refit(drafts)

    def _forwards_since(self, drafts: int) -> int:
        """Forwards of any kind since one with that many drafts; 0 if there was none."""
        return self._forwards - self._seen.get(drafts, self._forwards)

    def doubts(self, drafts: int) -> bool:
        """Whether the last forward with that many drafts was an odd one."""
        return drafts in self._odd

    def surely_knows(self, drafts: int) -> bool:
        """Whether one more forward with that many drafts can be compared with others."""
        return len(self._recent.get(drafts, ())) >= _ENOUGH

    def forget(self, *drafts: int) -> None:
        """Forwards with that many drafts do not take what they took; by default, none do."""
        for n in drafts or [*self._recent]:
            self._recent.pop(n, None)
        self._refit()

    def scale(self, factor: float) -> None:
        """Take another sequence's forwards to be longer by this factor."""
        for drafts, recent in self._recent.items():
            self._recent[drafts] = deque((value * factor for value in recent), maxlen=_KEPT)
        self._refit(*self._recent)

    def _refit(self, *changed: int) -> None:
        """Take in what was recorded anew, of these numbers of drafts, into what is expected."""
        for drafts in changed:
            self._mean[drafts] = _trimmed_mean(self._recent[drafts])
        most, self._points = 0.0, []
        for drafts in sorted(self._recent):  # more drafts never cost less: that would be noise
            most = max(most, self._mean[drafts])
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
        return seconds * (1 + drafts / _DOUBLES_AT) / (1 + nearest / _DOUBLES_AT)

    def at_best(self, drafts: int) -> float:
        """What a forward costs at least: what one with fewer drafts does."""
        at = bisect_left(self._points, (drafts, 0.0))
        return self._points[max(at - 1, 0)][1]

    def at_worst(self, drafts: int) -> float:
        """What a forward costs at most: no more than as many forwards as it has states.

        By those that were seen lately: others may be out of date.
        """
        fresh = [
            (n, s) for n, s in self._points if n <= drafts and self._forwards_since(n) <= _STALE
        ]
        known, seconds = fresh[-1] if fresh else self._points[0]
        most = seconds * max(1.0, (1 + drafts) / (1 + known))
        if not self.flattens:
            return most
        each = max(_STEEPER * self._of_each()[-1], _LEAST * self._points[0][1])
        return max(min(most, seconds + (drafts - known) * each), most / _MOST_LOWERED)

    @property
    def flattens(self) -> bool:
        """Whether the first drafts are the dear ones, by those that were seen in this order."""
        each = self._of_each()
        if len(each) < 2 or self._seen[self._points[-1][0]] < self._seen[self._points[-2][0]]:
            return False
        dearest = max(each[:-1])
        return dearest >= _DEAR * self._points[0][1] and each[-1] <= _FLAT * dearest

    def _of_each(self) -> list[float]:
        """What each draft costs between the numbers that were seen."""
        return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(self._points)]


def _trimmed_mean(values: Sequence[float]) -> float:
    """Their mean, without those that are far from the median."""
    middle = sorted(values)[(len(values) - 1) // 2]
    kept = [value for value in values if middle / _CHANGED <= value <= _CHANGED * middle]
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

    def ratio(self, prior: float) -> float:
        """As far as observed; 1 where nothing was, with a weight of so many accepted drafts."""
        return (self.accepted + prior) / (self.expected + prior)


class ForwardSteps:
    """How many denoising steps a forward is worth, by who drafts and by how many there may be.

    The artifact says it for its held-out prompts; here, drafts may be accepted more or less often,
    with which all numbers of drafts go up or down together, and each of its own a little.
    """

    def __init__(self, prior: Mapping[Selection, Points]) -> None:
        self._prior = prior
        self._all = _Gain()
        self._by_way: dict[Selection, _Gain] = {way: _Gain(_LONG_MEMORY) for way in prior}
        self._by_choice: dict[Choice, _Gain] = {}

    def observe(self, choice: Choice, steps: float, sequences: int = 1) -> None:
        """Learn from a forward with drafts: steps on average of so many sequences."""
        if choice.way is None:
            return
        accepted, expected = sequences * (steps - 1), sequences * self._artifact(choice)
        self._by_choice.setdefault(choice, _Gain(_LONG_MEMORY)).observe(
            accepted, expected * self._ratio(choice.way)
        )
        self._by_way[choice.way].observe(accepted, expected * self._all.ratio(_PRIOR_ALL))
        self._all.observe(accepted, expected)

    def expected(self, choice: Choice) -> float:
        """Steps per forward."""
        if choice.way is None:
            return 1.0
        own = self._by_choice.get(choice)
        residual = 1.0 if own is None else own.ratio(_PRIOR_CHOICE)
        return 1.0 + self._artifact(choice) * self._ratio(choice.way) * residual

    def _ratio(self, way: Selection) -> float:
        return self._all.ratio(_PRIOR_ALL) * self._by_way[way].ratio(_PRIOR_WAY)

    def _artifact(self, choice: Choice) -> float:
        assert choice.way is not None
        return max(interpolated(self._prior[choice.way], choice.drafts) - 1.0, 1e-3)
