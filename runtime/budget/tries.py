"""Tries of other choices: what one was begun with and how far it is, and what all may lose."""

from __future__ import annotations

from dataclasses import dataclass

from spiffy.runtime.budget.estimates import Choice

_AT_FIRST = 2.0  # plain forwards that tries may lose before anything has been earned
_SHARE = 0.003  # of the time spent without drafts, or with drafts that are tried, may be lost
_SHARE_AHEAD = 0.006  # of the time spent with drafts that pay
_MOST_SAVED = 4.0  # plain forwards: no more are saved up, and no more are missing


@dataclass
class Try:
    """A look at a choice, for a few forwards.

    Attributes
    ----------
    instead
        What would be chosen without it.
    otherwise
        Seconds per step of that,
    plain
        and of a plain forward, as far as was known when it began.
    forwards, asked
        Learned of, and chosen so far.
    waited
        Whether its end has been waited for.
    """

    instead: Choice
    otherwise: float
    plain: float
    forwards: int = 0
    asked: int = 0
    waited: bool = False


@dataclass
class Allowance:
    """Seconds that tries may lose: a small share of the time spent, less what they have lost.

    Attributes
    ----------
    balance
        Seconds earned less seconds lost.
    """

    balance: float = 0.0

    def earn(self, seconds: float, ahead: bool = False) -> None:
        """Take in time that was spent; `ahead`: with drafts that pay."""
        self.balance += (_SHARE_AHEAD if ahead else _SHARE) * seconds

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
