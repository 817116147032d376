"""What a forward and a step cost by each choice, as learned while decoding.

All seconds are those of the machine at its usual speed (`estimates.Slowdown`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median_low

from spiffy.runtime.budget.estimates import Choice, ForwardSeconds, ForwardSteps, Points, Slowdown
from spiffy.runtime.draft import Selection

_SHARE_KEPT = 0.9  # weight of the past in the share of sequences that drafts are chosen for
_DRAFTING_KEPT = 5  # forwards whose drafting counts
# Share of a plain forward's time that choosing drafts is taken to need, until it has been timed.
_DRAFTING_GUESS = 0.1
_DRAFTING_GUESS_WORST = 0.3


class LearnedCosts:
    """What forwards by each choice take, and how many steps they are worth.

    Where one with as many drafts has not been seen, both are guessed from others (`estimates`).

    Parameters
    ----------
    steps
        By who drafts: (drafts, steps per forward) as the artifact expects them.
    seconds
        (drafts, seconds) of a forward as measured before, if it was.
    worth
        What is learned of steps per forward; several may share it.
    slowdown
        How fast the machine is at present; several may share it.

    Attributes
    ----------
    curves
        Seconds of forwards by way and drafts. Every curve knows all plain forwards.
    """

    def __init__(
        self,
        steps: Mapping[Selection, Points],
        seconds: Points,
        worth: ForwardSteps,
        slowdown: Slowdown,
    ) -> None:
        # By the acceptance model a forward has fewer drafts than it may have: so a curve each.
        self.curves = {way: ForwardSeconds(seconds) for way in steps}
        self._plain = next(iter(self.curves.values()))
        self._worth, self._slowdown = worth, slowdown
        self._drafting: dict[Selection, deque[float]] = {}  # seconds at the machine's present speed
        self._share = 1.0  # of a forward's sequences, those that drafts are chosen for

    def observe_drafting(self, way: Selection, seconds: float, share: float) -> None:
        """Learn from the choosing of a forward's drafts, for a share of its sequences."""
        self._drafting.setdefault(way, deque(maxlen=_DRAFTING_KEPT)).append(seconds)
        self._share = _SHARE_KEPT * self._share + (1 - _SHARE_KEPT) * share

    def observe_steps(self, choice: Choice, steps: float, sequences: int) -> None:
        """Learn from the steps that a forward was worth, on average of so many sequences."""
        self._worth.observe(choice, steps, sequences)

    def curve_of(self, choice: Choice) -> ForwardSeconds:
        """Where the choice's own forwards are recorded."""
        return self._plain if choice.way is None else self.curves[choice.way]

    def _known_curve(self, choice: Choice) -> ForwardSeconds:
        """What predicts the choice's forwards: its own curve, or else the other way's."""
        curves = (self.curve_of(choice), *self.curves.values())
        return next((c for c in curves if c.knows(choice.drafts)), curves[0])

    @property
    def flattens(self) -> bool:
        """Whether the first drafts are the dear ones, whoever chose them."""
        return any(curve.flattens for curve in self.curves.values())

    @property
    def knows_plain(self) -> bool:
        """Whether a plain forward has been seen."""
        return self._plain.knows(0)

    @property
    def surely_knows_plain(self) -> bool:
        """Whether enough plain forwards have been seen to compare one more with them."""
        return self._plain.surely_knows(0)

    @property
    def plain(self) -> float:
        """Seconds of a plain forward."""
        return self._plain.expected(0)

    def plain_with(self, drafts: float) -> float:
        """Seconds of a forward with so many more states, whoever chose them."""
        return self._plain.expected(drafts)

    def forward_seconds(self, choice: Choice) -> list[float]:
        """Seconds of a forward with 0, 1, ... as many drafts as chosen."""
        return [self._known_curve(choice).expected(n) for n in range(choice.drafts + 1)]

    def seconds(self, choice: Choice) -> float:
        """Seconds of a forward by this choice and of choosing its drafts."""
        return self._known_curve(choice).expected(choice.drafts) + self._drafting_seconds(choice)

    def steps(self, choice: Choice) -> float:
        """Expected denoising steps of a forward, on average of all sequences in it."""
        return 1.0 + self._share * (self._worth.expected(choice) - 1.0)

    def per_step(self, choice: Choice) -> float:
        """Seconds of a step by this choice."""
        return self.seconds(choice) / self.steps(choice)

    def loss(self, choice: Choice, otherwise: float) -> float:
        """Seconds that a forward by this choice loses, where a step costs `otherwise` without."""
        return self.seconds(choice) - otherwise * self.steps(choice)

    def worst_loss(self, choice: Choice, otherwise: float) -> float:
        """The most that such a forward may lose."""
        forward = self._known_curve(choice).at_worst(choice.drafts)
        drafting = self._drafting_seconds(choice, worst=True)
        return forward + drafting - otherwise * self.steps(choice)

    def best_per_step(self, choice: Choice) -> float:
        """Seconds of a step if drafts cost nothing more than fewer of them do."""
        forward = self._known_curve(choice).at_best(choice.drafts)
        return (forward + self._drafting_seconds(choice)) / self.steps(choice)

    def longest(self, choice: Choice) -> float:
        """Seconds that a forward and its drafting may take; longer ones were interrupted."""
        return (1 + choice.drafts) * self.plain + self._drafting_seconds(choice)

    def _drafting_seconds(self, choice: Choice, worst: bool = False) -> float:
        """Seconds of choosing a forward's drafts; `worst`: what they may be at most."""
        if choice.way is None:
            return 0.0
        if recent := self._drafting.get(choice.way):
            # As it took: what slows forwards need not slow the host; it is soon seen if it does.
            took = median_low(recent) / self._slowdown.value
            return min(took, self.plain) if worst else took  # one delay must not bar all tries
        return self.plain * (_DRAFTING_GUESS_WORST if worst else _DRAFTING_GUESS)
