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

`choose` and `learn` are called for every forward. Once in a few, `_plan` ends a try, begins another
(`_pick_try`) or keeps to what is best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from spiffy.runtime.budget.estimates import (
    PLAIN,
    SPEED_WINDOW,
    Choice,
    ForwardSteps,
    Points,
    Slowdown,
    ladder,
)
from spiffy.runtime.budget.learned import LearnedCosts
from spiffy.runtime.budget.tries import Allowance, Try
from spiffy.runtime.draft import Selection

# How long a choice is kept, in forwards: planning takes time, too.
_HOLD = 6  # with drafts
_HOLD_PLAIN = (12, 36)  # without: as many as take this time, but so many at least and at most
_HOLD_PLAIN_SECONDS = 0.06

# Of plain forwards in a row one is recorded in as many as take this time for each sequence, but in
# so many at least and at most.
_RECORD_EVERY = (3, 8)
_RECORD_SECONDS = 0.02

# Tries.
_TRY = 2  # forwards of a try
_TRY_COSTLY = 1  # of one that is known to lose at least `_COSTLY`
_COSTLY = 0.3  # of a plain forward
_TRY_PLAIN = 3  # of plain forwards, by which all others are measured
_TRY_PLAIN_FAR = 2  # where a step by drafts takes less than `_FAR_BEHIND` of a plain one's time
_FAR_BEHIND = 0.7
_EARLY = 40  # up to this forward one try is enough, if it saves `_EARLY_GAIN`
_EARLY_GAIN = 0.25  # of a step's time
_OPTIMISM = 0.9  # of its expected time is what a choice may take that was never tried
_HOPEFUL = 0.8  # of its time is what a step may take with more drafts than were tried, at its best
_CHEAPER = 0.04  # share of a step's time that another number of drafts has to save, at its best

# What was tried before is tried again, for the machine may have changed.
_REVISIT = 32  # forwards after which a choice is due again, and between any two such tries
_MOST_BACKOFF = 64  # times that; the number doubles with every try in vain
_MOST_BACKOFF_PLAIN = 4  # the same between any two such tries, where no drafts pay
_PLAIN_SHARE = 0.01  # of the time, which tries of plain forwards may lose

# Share of a plain step's time that drafts must promise to save.
_MARGIN = 0.04
_MARGIN_SHARED = 0.08  # where sequences share forwards, whose seconds vary more
_MARGIN_KEPT = 0.0  # where drafts are what it keeps to, and one sequence has them
_MARGIN_BEHIND = 0.06  # where drafts have lost more than `_MOST_BEHIND`

# What drafts have lost against plain decoding, in plain forwards.
_MOST_BEHIND = 1.5  # above it nothing is tried
_MOST_AHEAD = 2.0  # gains beyond it are not kept
_FORGET = 0.995  # per forward: a loss fades to half in 138

# What forwards say.
_SWITCHED = (0.9, 1.5)  # of the expected: in between, a forward after another kind says nothing new
_APART = 1.25  # times: plain forwards and others did not become slower alike


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
    slowdown
        How fast the machine is at present, where several controllers share that.

    Attributes
    ----------
    costs
        What it has learned.
    forwards
        Made so far with its choices.
    """

    steps: Mapping[Selection, Points]
    most: int
    seconds: Points = ()
    sequences: int = 1
    worth: ForwardSteps | None = None
    slowdown: Slowdown | None = None

    def __post_init__(self) -> None:
        self._choices = [PLAIN, *(Choice(way, n) for way in self.steps for n in ladder(self.most))]
        self._margin = _MARGIN if self.sequences == 1 else _MARGIN_SHARED
        worth = ForwardSteps(self.steps) if self.worth is None else self.worth
        self._slowdown = Slowdown() if self.slowdown is None else self.slowdown
        self.costs = LearnedCosts(self.steps, self.seconds, worth, self._slowdown)
        self._usual = self._slowdown.usual  # speed that all seconds kept here are of
        self._size = 0.0  # positions of a plain forward that they are of

        # The plan.
        self._current, self._remaining = PLAIN, 2  # the choice, for so many forwards to come
        self._record_every = _RECORD_EVERY[0]  # of plain forwards in a row
        self._try: Try | None = None  # of the current choice, if it is one

        # What has been.
        self.forwards = 0
        self._previous = PLAIN  # the last forward's choice
        self._last_forward: dict[Choice, int] = {}  # number of the last one by each choice
        self._last_revisit = 0  # number of the forward
        self._fruitless: Counter[Choice | None] = Counter()  # tries in a row; None: of all drafts
        self._allowance = Allowance()
        self._behind = 0.0  # plain forwards that drafts have lost against plain decoding

    def start(self, size: float) -> None:
        """Begin a sequence; its plain forwards, of so many positions, take time in proportion.

        Small changes of length count once they have added up.
        """
        if not self._size or not 0.9 < size / self._size < 1.1:
            self._scale(size / (self._size or size))
            self._size = size

    def _scale(self, factor: float) -> None:
        """Take all forwards to be longer by this factor."""
        for curve in self.costs.curves.values():
            curve.scale(factor)
        self._allowance.scale(factor)
        if self._try is not None:
            self._try.scale(factor)

    def _rescale(self) -> None:
        """Keep to the usual speed, which another controller may have changed."""
        if self._usual != self._slowdown.usual:
            self._scale(self._slowdown.usual / self._usual)
            self._usual = self._slowdown.usual

    # Every forward

    def choose(self) -> Choice:
        """Who drafts the next forward, and up to how many."""
        self._rescale()
        if self._remaining <= 0:
            if not self.forwards:  # several sequences ask before the first forward has been made
                return PLAIN
            # Where sequences share forwards, the first asks before all have reported on the try's
            # last one. That is waited for by one more forward, but no longer: some never report.
            tried = self._try
            if tried is not None and tried.learned < tried.chosen and not tried.waited:
                tried.waited = True
                return tried.fallback
            self._plan()
        self._remaining -= 1
        if self._try is not None:
            self._try.chosen += 1
        return self._current

    def learn(
        self,
        choice: Choice,
        steps: float,
        seconds: float,
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
        seconds, drafting
            Seconds of the forward, and of choosing its drafts.
        sequences
            How many of those in the forward had this choice.
        share
            Of all in the forward (1.0: all). The others, which had just begun, waited for its
            drafts too.
        """
        self._rescale()
        self.forwards += 1
        self._last_forward[choice] = self.forwards
        usual, counts, changed = self._observe_seconds(choice, seconds)
        if choice.way is not None:
            self.costs.observe_drafting(choice.way, drafting, share)
        self.costs.observe_steps(choice, steps, sequences)
        pays = choice.way is not None and self._try is None
        self._allowance.earn(usual + drafting / self._slowdown.value, pays)
        # Expected seconds here and below: what an interrupted forward took says nothing.
        took = min(self.costs.seconds(choice), self.costs.longest(choice))
        made = 1.0 + share * (steps - 1.0)
        behind = _FORGET * self._behind + took / self.costs.plain - made
        self._behind = max(-_MOST_AHEAD, behind)
        if self._try is not None and self.is_tried(choice):
            self._try.learned += 1
            odd = counts and self.costs.curve_of(choice).doubts(choice.drafts)
            if odd and self._remaining == 0:  # one more before it is believed
                self._remaining, self._try.waited = 1, False
        if changed:
            self._forget_change(choice)

    def _observe_seconds(self, choice: Choice, seconds: float) -> tuple[float, bool, bool]:
        """Take in a forward's seconds.

        The first forward after one of another kind is left out unless it is far off: the CPU
        caches still hold what the other kind left there.

        Returns
        -------
        tuple[float, bool, bool]
            Its seconds at the machine's usual speed; whether they counted; whether the machine has
            changed.
        """
        curve, slowdown, drafts = self.costs.curve_of(choice), self._slowdown, choice.drafts
        switched = choice != self._previous and curve.knows(drafts)
        self._previous, counts, changed = choice, True, False
        if switched:
            if choice != PLAIN and self.costs.surely_knows_plain:
                least = self.costs.plain  # no forward takes less
                if seconds < slowdown.value * least:
                    slowdown.set(seconds / least)
            ratio = seconds / slowdown.value / curve.expected(drafts)
            counts = not _SWITCHED[0] < ratio < _SWITCHED[1]
        elif curve.surely_knows(drafts):
            changed = slowdown.observe(seconds / curve.expected(drafts), choice == PLAIN)
            self._rescale()
        usual = seconds / slowdown.value
        if counts:
            for known in self.costs.curves.values() if choice.way is None else (curve,):
                known.observe(drafts, usual)
        return usual, counts, changed

    @property
    def resting(self) -> int:
        """How many forwards behind the one just chosen for are plain and not recorded.

        Where no drafts pay, a few plain forwards say what all do. Those of small models take
        milliseconds, beside which it counts what learning from one takes, when it has emptied the
        CPU caches, and for every sequence.
        """
        plain = self._current == self._previous == PLAIN
        known = plain and self._try is None and self.costs.surely_knows_plain
        return min(self._record_every - 1, self._remaining) if known else 0

    def rest(self, seconds: float) -> None:
        """Take in that one of these was made."""
        self._rescale()
        self._remaining -= 1
        self.forwards += 1
        self._last_forward[PLAIN] = self.forwards
        self._allowance.earn(seconds / self._slowdown.value)
        self._behind *= _FORGET

    def is_tried(self, choice: Choice) -> bool:
        """Whether a choice is the one that is being tried, with all its drafts."""
        return self._try is not None and choice == self._current

    def why(self) -> str:
        """What it would choose now and what that rests on, in words."""
        if not self.costs.knows_plain:
            return "nothing is known about plain forwards yet"
        best, drafts = self._best(self._kept), self._known_drafts()
        ms = 1000 * self._slowdown.value
        plain = f"{ms * self.costs.per_step(PLAIN):.3g} ms"
        if not drafts:
            return f"plain: {plain} a step; no drafts were worth trying"
        ours = min(drafts, key=self.costs.per_step)
        step = f"{ms * self.costs.per_step(ours):.3g} ms"
        if best == PLAIN:
            return f"plain: {plain} a step, {ours} {step}"
        return f"{ours}: {step} a step, plain {plain}"

    # Every few forwards

    def _plan(self) -> None:
        """Choose for the next forwards: end a try, then begin another or keep to what is best."""
        kept = self._kept
        if self._try is not None and not self._end_try(self._try):
            return
        best, found = self._best(kept), None
        if self._behind <= _MOST_BEHIND:
            found = self._pick_try(best)
        elif not self._promises(best, max(_MARGIN_BEHIND, self._margin)):
            best = PLAIN
        if found is not None:
            self._begin_try(found, best)
        elif best != PLAIN:
            self._current, self._remaining = best, _HOLD
        else:
            plain = self._slowdown.value * self.costs.plain
            recorded = self.sequences * _RECORD_SECONDS / plain
            self._record_every = _within(recorded, _RECORD_EVERY)
            self._current = PLAIN
            self._remaining = _within(_HOLD_PLAIN_SECONDS / plain, _HOLD_PLAIN)

    def _known_drafts(self) -> list[Choice]:
        """Choices with drafts that were tried since the machine last changed."""
        return [c for c in self._choices if c.way is not None and c in self._last_forward]

    @property
    def _kept(self) -> Choice:
        """What it keeps to: the current choice, or what would be chosen without the try."""
        return self._current if self._try is None else self._try.fallback

    def _best(self, kept: Choice) -> Choice:
        """The cheapest of what is known; drafts only where they promise something.

        Less where drafts are what was `kept` to: a gain of some percent would be lost for long by
        a forward or two that took longer. Not where sequences share forwards, which vary more.
        """
        best = min(self._known_drafts(), key=self.costs.per_step, default=PLAIN)
        keeps = kept != PLAIN and self.sequences == 1
        return best if self._promises(best, _MARGIN_KEPT if keeps else self._margin) else PLAIN

    def _promises(self, choice: Choice, margin: float) -> bool:
        """Whether its steps take less than plain ones by this share."""
        return self.costs.per_step(choice) < (1 - margin) * self.costs.per_step(PLAIN)

    def _begin_try(self, choice: Choice, fallback: Choice) -> None:
        """Try a choice for a few forwards; without it, `fallback` would be chosen."""
        per_step = self.costs.per_step(fallback)
        self._try = Try(fallback, per_step, self.costs.plain)
        self._current, self._remaining = choice, self._length(choice, per_step)

    def _length(self, choice: Choice, fallback_per_step: float) -> int:
        """Forwards of a try, where a step costs so much without it."""
        plain = self.costs.plain
        if choice == PLAIN:
            return _TRY_PLAIN_FAR if fallback_per_step < _FAR_BEHIND * plain else _TRY_PLAIN
        known = self.costs.curve_of(choice).knows(choice.drafts)
        costly = known and self.costs.loss(choice, fallback_per_step) > _COSTLY * plain
        return _TRY_COSTLY if costly else _TRY

    def _end_try(self, tried: Try) -> bool:
        """End the try under way and take in what it lost; False: it goes on, or is made again."""
        choice, costs = self._current, self.costs
        if choice == PLAIN:
            ratio = costs.plain / tried.plain_seconds
            apart = not 1 / _APART < ratio < _APART
            if apart and not costs.surely_knows_plain:  # one more before it is believed
                self._remaining = 1
                return False
            if apart:
                self._plain_changed(tried.plain_seconds, ratio)
        else:
            lost = min(costs.loss(choice, tried.fallback_per_step), costs.longest(choice))
            self._allowance.lose(tried.learned * max(0.0, lost), tried.plain_seconds)
        self._try = None
        best = self._best(tried.fallback)
        if best == choice != PLAIN and self._needs_another_try(best, tried.fallback_per_step):
            self._begin_try(best, fallback=best)
            return False
        for what in (choice,) if choice == PLAIN else (choice, None):
            self._fruitless[what] = self._fruitless[what] + 1 if best != choice else 0
        return True

    def _needs_another_try(self, best: Choice, fallback_per_step: float) -> bool:
        """Whether to try once more before it is believed that a choice is the best.

        Not where much is saved: a first answer would be over by then.
        """
        saves_much = self.costs.per_step(best) < (1 - _EARLY_GAIN) * fallback_per_step
        early = saves_much and self.forwards <= _EARLY
        return not early and not self.costs.curve_of(best).surely_knows(best.drafts)

    def _pick_try(self, best: Choice) -> Choice | None:
        """A choice to be tried now, if any: a promising new one, or an old one that is due."""
        costs, now = self.costs, self.costs.per_step(best)
        allowance = self._allowance.left(costs.plain)
        others = [c for c in self._choices if c not in (best, PLAIN)]

        def is_promising(choice: Choice) -> bool:
            # Where drafts pay, other numbers of them may cost no more: costs grow by steps.
            return choice not in self._last_forward and (
                _OPTIMISM * costs.per_step(choice) < now
                or (best != PLAIN and costs.best_per_step(choice) < (1 - _CHEAPER) * now)
            )

        def is_due(choice: Choice) -> bool:
            # What seemed to cost much more is tried more seldom.
            ratio = costs.best_per_step(choice) / now
            return self._age(choice) > _REVISIT * ratio**2 * self._backoff(choice, _MOST_BACKOFF)

        def is_affordable(choice: Choice) -> bool:
            return self._length(choice, now) * costs.worst_loss(choice, now) <= allowance

        if promising := [c for c in others if is_promising(c) and is_affordable(c)]:
            return min(promising, key=costs.per_step)
        if best != PLAIN and self._age(PLAIN) > self._plain_interval(best):
            return PLAIN
        # Where the first drafts are the dear ones, tries of these in vain say little of more.
        new = (costs.best_per_step(c) for c in others if c not in self._last_forward)
        hopeful = costs.flattens and min(new, default=now) < _HOPEFUL * now
        patience = 1 if best != PLAIN or hopeful else self._backoff(None, _MOST_BACKOFF_PLAIN)
        if self.forwards - self._last_revisit < _REVISIT * patience:
            return None
        found = [c for c in others if is_due(c) and is_affordable(c)]
        if not found:
            return None
        self._last_revisit = self.forwards
        return min(found, key=costs.best_per_step)

    def _plain_interval(self, best: Choice) -> float:
        """Forwards between two tries of plain ones, so that these lose no more than allowed.

        All is measured by them: one that was measured wrongly must not hide that drafts lose.
        """
        lost = self.costs.per_step(PLAIN) / self.costs.per_step(best) - 1  # in steps by `best`
        between = _TRY_PLAIN * lost / (_PLAIN_SHARE * self.costs.steps(best))
        return self._backoff(PLAIN, _MOST_BACKOFF) * max(_REVISIT, between)

    def _backoff(self, choice: Choice | None, most: int) -> int:
        """How many times as long it waits for its next try; doubled by every one in vain."""
        return min(1 << min(self._fruitless[choice], 10), most)

    def _age(self, choice: Choice) -> int:
        """Forwards since the last one by this choice; all, if there was none."""
        return self.forwards - self._last_forward.get(choice, 0)

    # Another machine

    def _forget_change(self, choice: Choice) -> None:
        """The machine has changed: what was learned of others while it did does not hold."""
        self._fruitless.clear()
        for other in [c for c in self._last_forward if c not in (choice, PLAIN)]:
            if self._age(other) <= 2 * SPEED_WINDOW:
                self.costs.curve_of(other).forget(other.drafts)
                del self._last_forward[other]
        # Did plain ones become as slow? Those before the change do not say it, however late they
        # were. But a try under way is not cut off for that, as long as plain ones are known well.
        lately = 2 * SPEED_WINDOW < self._age(PLAIN) <= _REVISIT
        if choice != PLAIN and not (lately and self._try is not None):
            self._begin_try(PLAIN, self._current)

    def _plain_changed(self, before: float, ratio: float) -> None:
        """Plain forwards have changed apart from others, of which nothing is known any more.

        `before` is what a plain one was thought to take, and `ratio` how many times that it takes.
        """
        self._slowdown.set(self._slowdown.value * ratio)
        for curve in self.costs.curves.values():
            curve.forget()
            curve.observe(0, before)
        self._last_forward = {PLAIN: self.forwards}
        self._fruitless.clear()
        self._allowance.clear()
        self._behind = min(self._behind, 0.0)


def _within(number: float, bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(round(number), bounds[1]))
