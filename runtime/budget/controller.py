"""How many drafts pay, learned from the forwards that decoding makes anyway.

Decoding S steps takes S / E x (forward + drafting) seconds, where E is the number of denoising
steps that a forward is worth; what a step itself costs (output head, unmasking policy) is the same
with and without drafts. So the best choice has the fewest seconds per step, and both sides of that
fraction are estimated while decoding (`estimates`). Plain decoding is one of the choices.

Trying something costs time. What a try may lose at worst is bounded beforehand (a forward over
1 + n states takes at most as long as (1 + n) / (1 + m) forwards over 1 + m) and has to fit into an
allowance: two plain forwards, and a small share of the time spent so far, a larger one where drafts
pay. And where drafts have lost more than a forward or two against plain decoding, nothing is tried,
and they have to promise more. Nothing here can change a token.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low

from spiffy.runtime.budget.estimates import (
    PACED,
    PLAIN,
    Choice,
    ForwardSeconds,
    ForwardSteps,
    Pace,
    Points,
    ladder,
)
from spiffy.runtime.budget.tries import Allowance, Try
from spiffy.runtime.draft import Selection

_KEPT = 5  # forwards whose drafting counts
_PLAN_EVERY = 6  # forwards,
_PLAN_PLAIN = 12  # where no drafts pay: planning takes time, too,
_PLAN_SECONDS = 0.06  # so small models plan less often,
_PLAN_SELDOM = 36  # but at least once in so many,
_LEARN_EVERY = 3  # and of plain forwards in a row learn from one of so many, or,
_LEARN_SECONDS = 0.02  # as many as this takes for each of its sequences,
_LEARN_SELDOM = 8  # but no more
_TRY = 2  # forwards of a try,
_DEAR = 0.3  # but a single one where it is known to lose this much of a plain forward,
_EARLY = 40  # forwards up to which one try is enough
_MUCH = 0.25  # where it saves this share of a step's time;
_PLAIN_LOOK = 3  # and of plain ones, by which all others are measured,
_FAR_BEHIND = 0.7  # but one less where others take less than this share of their time
_LOOK_AGAIN = 32  # forwards between two looks at what was not tried for long,
_SELDOM = 64  # up to so many times as many where looks at it were in vain,
_PATIENT = 4  # and between any two looks, where no drafts pay
_MARGIN = 0.04  # drafts must promise this much over plain decoding,
_DOUBTED = 0.06  # or this much if they did not keep it,
_SHARED = 0.08  # or this much where sequences share forwards, whose seconds vary more
_PLAIN_SHARE = 0.01  # of the time, which looks at plain forwards may lose
_MOST_OWED = 1.5  # plain forwards that may be lost,
_CREDIT = -2.0  # or gained and lost again
_FORGIVEN = 0.995  # per forward
_LASTING = 0.9  # weight of the past in the share of sequences that drafts are chosen for
_APART = 1.25  # times: plain forwards and others did not become slower alike
_OPTIMISM = 0.9  # of what is expected: a choice that was never tried may take so little
_CHEAPER = 0.04  # and another number of drafts, at its best, has to take this much less to be tried
_SWITCHED = (0.9, 1.5)  # of the expected: in between, a forward after another kind says nothing new


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
    sequences
        About how many share a forward.
    worth
        What is learned of steps per forward, where several controllers share that.
    pace
        How fast the machine is at present, where several controllers share that.

    Attributes
    ----------
    forwards
        Made so far with its choices.
    """

    steps: Mapping[Selection, Points]
    most: int
    seconds: Points = ()
    sequences: int = 1
    worth: ForwardSteps | None = None
    pace: Pace | None = None

    def __post_init__(self) -> None:
        self._choices = [PLAIN, *(Choice(way, n) for way in self.steps for n in ladder(self.most))]
        # By the acceptance model a forward has fewer drafts than it may have; plain ones are alike.
        self._forward = {way: ForwardSeconds(self.seconds) for way in self.steps}
        self._plain = next(iter(self._forward.values()))
        self._worth = ForwardSteps(self.steps) if self.worth is None else self.worth
        self._drafting: dict[Selection, deque[float]] = {}
        self._tried: dict[Choice, int] = {}  # number of the forward
        self._vain: Counter[Choice | None] = Counter()  # tries in a row; None: all drafts'
        self._margin = _MARGIN if self.sequences == 1 else _SHARED
        self._share = 1.0
        self.forwards = 0
        self._now, self._left = PLAIN, 2  # the first forwards say what plain ones cost
        self._every = _LEARN_EVERY
        self._try: Try | None = None
        self._allowance = Allowance()
        self._owed = 0.0  # plain forwards that would have made the same steps sooner
        self._looked = 0
        self._before_this = PLAIN
        self._pace = Pace() if self.pace is None else self.pace
        self._usual = self._pace.usual  # that all seconds here are of
        self._size = 0.0

    def start(self, size: float) -> None:
        """Begin a sequence; its plain forwards, of so many positions, take time in proportion.

        Small changes of length count once they have added up.
        """
        if not self._size or not 0.9 < size / self._size < 1.1:
            self._scale(size / (self._size or size))
            self._size = size

    def _scale(self, factor: float) -> None:
        """Take all forwards to be longer by this factor."""
        for forward in self._forward.values():
            forward.scale(factor)
        self._allowance.scale(factor)
        if self._try is not None:
            self._try.otherwise *= factor
            self._try.plain *= factor

    def _keep_up(self) -> None:
        """Hear whether the machine is usually of another pace by now."""
        if self._usual != self._pace.usual:
            self._scale(self._pace.usual / self._usual)
            self._usual = self._pace.usual

    def choose(self) -> Choice:
        """Who drafts the next forward, and up to how many."""
        self._keep_up()
        if self._left <= 0:
            if not self.forwards:  # several sequences ask before the first forward has been made
                return PLAIN
            # Where sequences share forwards, one asks before all have told of the try's last one:
            # wait a forward, and no longer, for some end without a word.
            tried = self._try
            if tried is not None and tried.forwards < tried.asked and not tried.waited:
                tried.waited = True
                return tried.instead
            self._plan()
        self._left -= 1
        if self._try is not None:
            self._try.asked += 1
        return self._now

    def learn(
        self,
        choice: Choice,
        steps: float,
        forward: float,
        drafting: float,
        sequences: int = 1,
        share: float = 1.0,
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
        share
            Of all in the forward: the others, which had just begun, waited for its drafts too.
        """
        self._keep_up()
        self.forwards += 1
        self._tried[choice] = self.forwards
        # Right after forwards of another kind, the processor's caches are theirs; what differs
        # by far more than that is news even so.
        own, plain = self._own(choice), self._plain
        settled = choice == self._before_this or not own.knows(choice.drafts)
        self._before_this, changed = choice, False
        if not settled and choice != PLAIN and plain.surely_knows(0):
            least = plain.expected(0)
            if forward < self._pace.value * least:
                self._pace.set(forward / least)  # none takes less than a plain one
        ratio = forward / self._pace.value / own.expected(choice.drafts) if not settled else 1.0
        if settled and own.surely_knows(choice.drafts):
            slower = forward / own.expected(choice.drafts)
            changed = self._pace.observe(slower, choice == PLAIN)
            self._keep_up()
        settled |= not _SWITCHED[0] < ratio < _SWITCHED[1]
        forward /= self._pace.value
        if settled:
            for curve in self._forward.values() if choice.way is None else (own,):
                curve.observe(choice.drafts, forward)
        if choice.way is not None:
            self._drafting.setdefault(choice.way, deque(maxlen=_KEPT)).append(drafting)
            self._share = _LASTING * self._share + (1 - _LASTING) * share
        self._worth.observe(choice, steps, sequences)
        ahead = choice.way is not None and self._try is None
        self._allowance.earn(forward + drafting / self._pace.value, ahead)
        tried = self._try if self.is_tried(choice) else None
        if tried is not None:
            tried.forwards += 1
        # Expected seconds here and below: what an interrupted forward took says nothing.
        took = min(self._seconds(choice), self._most(choice))
        made = 1.0 + share * (steps - 1.0)
        owed = _FORGIVEN * self._owed + took / plain.expected(0) - made
        self._owed = max(_CREDIT, owed)
        if tried is not None and self._left == 0 and settled and own.doubts(choice.drafts):
            self._left, tried.waited = 1, False  # look again before believing it
        if changed:
            self._start_anew(choice)

    @property
    def resting(self) -> int:
        """How many forwards behind the one just chosen for are plain and not worth a word.

        Where no drafts pay, a few plain forwards say what all do. Those of small models take
        milliseconds, beside which it counts what learning from one takes, when it has emptied the
        processor's caches, and for every sequence.
        """
        plain = self._now == self._before_this == PLAIN
        known = plain and self._try is None and self._plain.surely_knows(0)
        return min(self._every - 1, self._left) if known else 0

    def rest(self, seconds: float) -> None:
        """Take in that one of these was made."""
        self._keep_up()
        self._left -= 1
        self.forwards += 1
        self._tried[PLAIN] = self.forwards
        self._allowance.earn(seconds / self._pace.value)
        self._owed *= _FORGIVEN

    def seconds_per_step(self, choice: Choice) -> float:
        """What a step costs by this choice, as far as is known."""
        return self._seconds(choice) / self._steps(choice)

    def _seconds(self, choice: Choice) -> float:
        """Seconds of a forward by this choice and of choosing its drafts, as far as is known."""
        return self._of(choice).expected(choice.drafts) + self._drafting_seconds(choice)

    def _steps(self, choice: Choice) -> float:
        """Expected denoising steps of a forward, on average of all sequences in it."""
        return 1.0 + self._share * (self._worth.expected(choice) - 1.0)

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

    def is_tried(self, choice: Choice) -> bool:
        """Whether a choice is the one that is being tried, in full."""
        return self._try is not None and choice == self._now

    def why(self) -> str:
        """What it would choose now and what that rests on, in words."""
        if not self.has_seen_plain:
            return "nothing is known about plain forwards yet"
        best = self._best()
        ms = 1000 * self._pace.value
        plain, ours = (ms * self.seconds_per_step(choice) for choice in (PLAIN, best))
        if best.way is None:
            rivals = [c for c in self._choices if c.way is not None and c in self._tried]
            if not rivals:
                return f"plain: {plain:.3g} ms a step; no drafts were worth trying"
            rival = min(rivals, key=self.seconds_per_step)
            ours = ms * self.seconds_per_step(rival)
            return f"plain: {plain:.3g} ms a step, {rival} {ours:.3g} ms"
        return f"{best}: {ours:.3g} ms a step, plain {plain:.3g} ms"

    def _plan(self) -> None:
        tried = self._try
        if tried is not None and self._now == PLAIN and self._hardly_believes(tried):
            self._left = 1
            return
        self._try = None
        if tried is not None:
            self._account(tried)
        best = self._best()
        if tried is not None:
            if best == self._now != PLAIN and self._is_in_doubt(best, tried.otherwise):
                self._look_at(best, best)  # look again before believing it
                return
            self._count(self._now, in_vain=best != self._now)
        found = None
        if self._owed <= _MOST_OWED:
            found = self._worth_trying(best)
        # What was promised was not kept: promise more, try nothing.
        elif not self._promises(best, max(_DOUBTED, self._margin)):
            best = PLAIN
        if found is not None:
            self._look_at(found, best)
        elif best != PLAIN:
            self._now, self._left = best, _PLAN_EVERY
        else:
            plain = self._pace.value * self._plain.expected(0)
            self._now, self._left = best, _within(_PLAN_PLAIN, _PLAN_SECONDS / plain, _PLAN_SELDOM)
            every = self.sequences * _LEARN_SECONDS / plain
            self._every = _within(_LEARN_EVERY, every, _LEARN_SELDOM)

    def _look_at(self, choice: Choice, best: Choice) -> None:
        """Try a choice for a few forwards; `best` is what would be chosen as far as is known."""
        otherwise, plain = self.seconds_per_step(best), self._plain.expected(0)
        self._try = Try(best, otherwise, plain)
        self._now, self._left = choice, self._length(choice, otherwise)

    def _length(self, choice: Choice, otherwise: float) -> int:
        """Forwards of a try, where a step costs `otherwise` without it.

        The first forward of its kind is a slow one; what all is measured by is surer.
        """
        plain = self._plain.expected(0)
        if choice == PLAIN:
            return _PLAIN_LOOK - (otherwise < _FAR_BEHIND * plain)
        loses = self._loss(choice, otherwise)
        known = self._own(choice).knows(choice.drafts)
        return 1 if known and loses > _DEAR * plain else _TRY

    def _count(self, choice: Choice, in_vain: bool) -> None:
        """Count tries in vain in a row: the more there were, the more seldom are others."""
        for what in (choice,) if choice == PLAIN else (choice, None):
            self._vain[what] = self._vain[what] + 1 if in_vain else 0

    def _account(self, tried: Try) -> None:
        """Take in what a try has lost; plain forwards are what all others are measured by."""
        if self._now == PLAIN:
            self._compare(tried.plain)
            return
        lost = max(0.0, min(self._loss(self._now, tried.otherwise), self._most(self._now)))
        self._allowance.lose(tried.forwards * lost, tried.plain)

    def _most(self, choice: Choice) -> float:
        """Seconds that a forward may take, and its drafting; longer ones were interrupted."""
        return (1 + choice.drafts) * self._plain.expected(0) + self._drafting_seconds(choice)

    def _is_in_doubt(self, best: Choice, otherwise: float) -> bool:
        """Whether to look again: where much is saved, a first answer would be over by then."""
        saves_much = self.seconds_per_step(best) < (1 - _MUCH) * otherwise
        early = saves_much and self.forwards <= _EARLY
        return not early and not self._own(best).surely_knows(best.drafts)

    def _hardly_believes(self, tried: Try) -> bool:
        """Whether too few plain forwards say that all has changed."""
        ratio = self._plain.expected(0) / tried.plain
        return not 1 / _APART < ratio < _APART and not self._plain.surely_knows(0)

    def _start_anew(self, choice: Choice) -> None:
        """Another machine: what was learned while it changed does not hold."""
        self._vain.clear()
        for other in [c for c in self._tried if c not in (choice, PLAIN)]:
            if self._age(other) <= 2 * PACED:
                self._own(other).forget(other.drafts)
                del self._tried[other]
        if choice != PLAIN and not 2 * PACED < self._age(PLAIN) <= _LOOK_AGAIN:
            self._look_at(PLAIN, self._now)  # did plain ones become as slow?

    def _compare(self, before: float) -> None:
        """After a look at plain forwards: beside them, what is known of others may not hold.

        `before` is what one was thought to take.
        """
        ratio = self._plain.expected(0) / before
        if 1 / _APART < ratio < _APART:
            return
        self._pace.set(self._pace.value * ratio)
        for curve in self._forward.values():
            curve.forget()
            curve.observe(0, before)
        self._tried = {PLAIN: self.forwards}
        self._vain.clear()
        self._allowance.clear()
        self._owed = min(self._owed, 0.0)

    def _best(self) -> Choice:
        """The cheapest of what is known; drafts only where they promise something."""
        known = [c for c in self._choices if c.way is not None and c in self._tried]
        best = min(known, key=self.seconds_per_step, default=PLAIN)
        return best if self._promises(best, self._margin) else PLAIN

    def _promises(self, choice: Choice, margin: float) -> bool:
        """Whether it takes less than plain decoding by this share."""
        return self.seconds_per_step(choice) < (1 - margin) * self.seconds_per_step(PLAIN)

    def _worth_trying(self, best: Choice) -> Choice | None:
        """A choice to be tried now: one that is unknown and promising, or one for a change.

        What was not tried for long gets a look now and then; what it might cost is judged by what a
        forward with fewer drafts does.
        """
        now = self.seconds_per_step(best)
        allowance = self._allowance.left(self._plain.expected(0))
        others = [c for c in self._choices if c not in (best, PLAIN)]
        # Where drafts pay, other numbers of them may be no dearer: costs grow by steps.
        hopeful = [
            c
            for c in others
            if c not in self._tried
            and (
                _OPTIMISM * self.seconds_per_step(c) < now
                or (best != PLAIN and self._at_best(c) < (1 - _CHEAPER) * now)
            )
            and self._length(c, now) * self._at_worst(c, now) <= allowance
        ]
        if hopeful:
            return min(hopeful, key=self.seconds_per_step)
        if best != PLAIN and self._age(PLAIN) > self._seldom_enough(best):
            return PLAIN
        patience = min(1 << min(self._vain[None], 10), _PATIENT) if best == PLAIN else 1
        if self.forwards - self._looked < _LOOK_AGAIN * patience:
            return None
        # The machine may have drifted meanwhile; what seemed much dearer is looked at more seldom.
        due = [
            c
            for c in others
            if self._age(c) > _LOOK_AGAIN * (self._at_best(c) / now) ** 2 * self._in_vain(c)
            and self._length(c, now) * self._at_worst(c, now) <= allowance
        ]
        found = min(due, key=self._at_best, default=None)
        if found is not None:
            self._looked = self.forwards
        return found

    def _seldom_enough(self, best: Choice) -> float:
        """Forwards between two looks at plain ones, so that these lose no more than allowed.

        All is measured by them: one that was measured wrongly must not hide that drafts lose.
        """
        lost = self.seconds_per_step(PLAIN) / self.seconds_per_step(best) - 1  # in steps by `best`
        between = _PLAIN_LOOK * lost / (_PLAIN_SHARE * self._steps(best))
        return self._in_vain(PLAIN) * max(_LOOK_AGAIN, between)

    def _in_vain(self, choice: Choice) -> int:
        """How many times as seldom it is looked at."""
        return min(1 << min(self._vain[choice], 10), _SELDOM)

    def _age(self, choice: Choice) -> int:
        """Forwards since it was last tried."""
        return self.forwards - self._tried.get(choice, 0)

    def _loss(self, choice: Choice, otherwise: float) -> float:
        """Seconds that a forward by this choice loses, where a step costs `otherwise` without."""
        return self._seconds(choice) - otherwise * self._steps(choice)

    def _at_worst(self, choice: Choice, now: float) -> float:
        """Seconds that one forward by this choice may lose, where a step costs `now` otherwise."""
        forward = self._of(choice).at_worst(choice.drafts) + self._drafting_seconds(
            choice, worst=True
        )
        return forward - self._steps(choice) * now

    def _at_best(self, choice: Choice) -> float:
        """Seconds per step if drafts cost nothing more than fewer of them do."""
        forward = self._of(choice).at_best(choice.drafts) + self._drafting_seconds(choice)
        return forward / self._steps(choice)

    def _own(self, choice: Choice) -> ForwardSeconds:
        return self._plain if choice.way is None else self._forward[choice.way]

    def _of(self, choice: Choice) -> ForwardSeconds:
        """What is known of a choice's forwards: its own, or else the other way's."""
        curves = (self._own(choice), *self._forward.values())
        return next((c for c in curves if c.knows(choice.drafts)), curves[0])

    def _drafting_seconds(self, choice: Choice, worst: bool = False) -> float:
        if choice.way is None:
            return 0.0
        if recent := self._drafting.get(choice.way):
            # As it took: what slows forwards need not slow the host; it is soon seen if it does.
            took = median_low(recent) / self._pace.value  # but to be held up once bars no later try
            return min(took, self._plain.expected(0)) if worst else took
        return self._plain.expected(0) * (0.3 if worst else 0.1)


def _within(least: int, number: float, most: int) -> int:
    return max(least, min(round(number), most))
