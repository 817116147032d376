"""A look at a choice: what it was begun with, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass

from spiffy.runtime.budget.estimates import Choice


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
