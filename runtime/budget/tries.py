"""Tries of other choices: what one was begun with and how far it is, and what all may lose."""

from __future__ import annotations

from dataclasses import dataclass

from spiffy.runtime.budget.estimates import Choice

_AT_FIRST = 2.0  # plain forwards that tries may lose before anything has been earned
_SHARE = 0.003  # of the time spent plainly or with tries: may be lost by tries
_SHARE_OF_DRAFTS = 0.006  # of the time spent with drafts that pay
_MOST_SAVED = 4.0  # plain forwards: no more are saved up, and no more are missing


@dataclass
class Try:
    """A choice that is tried for a few forwards.

    Attributes
    ----------
    fallback
        What would be chosen without the try.
    fallback_per_step
        Seconds per step of the fallback, when the try began.
    plain_seconds
        Seconds of a plain forward, when the try began.
    chosen
        Forwards that it was chosen for so far.
    learned
        Those of them that were learned of.
    waited
        Whether a forward was made already while the last of these was not learned of yet.
    """

    fallback: Choice
    fallback_per_step: float
    plain_seconds: float
    chosen: int = 0
    learned: int = 0
    waited: bool = False

    def scale(self, factor: float) -> None:
        """Take all forwards to be longer by this factor."""
        self.fallback_per_step *= factor
        self.plain_seconds *= factor


@dataclass
class Allowance:
    """Seconds that tries may lose: a small share of the time spent, less what they have lost.

    Attributes
    ----------
    balance
        Seconds earned less seconds lost.
    """

    balance: float = 0.0

    def earn(self, seconds: float, pays: bool = False) -> None:
        """Take in time that was spent; `pays`: with drafts that are not only tried."""
        self.balance += (_SHARE_OF_DRAFTS if pays else _SHARE) * seconds

    def lose(self, seconds: float, plain: float) -> None:
        """Take in what a try has lost, where a plain forward takes `plain` seconds."""
        self.balance = max(self.balance - seconds, -_MOST_SAVED * plain)

    def left(self, plain: float) -> float:
        """Seconds that the next try may lose; what was saved beyond the most is dropped."""
        self.balance = min(self.balance, _MOST_SAVED * plain)
        return max(0.0, _AT_FIRST * plain + self.balance)

    def scale(self, factor: float) -> None:
        """Take all forwards to be longer by this factor."""
        self.balance *= factor

    def clear(self) -> None:
        """Begin anew, on another machine."""
        self.balance = 0.0
