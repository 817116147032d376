"""Procedural word problems in GSM8K's format: the data that `tiny-llada` was trained to solve.

A story starts with one quantity, passes through one to three changes, and asks for the last value.
Questions and worked steps are phrased in several ways at random, so that a model that knows the
answer still has wording to decide. Everything is drawn from `random.Random.random`, whose sequence
Python guarantees, so a (split, seed) pair names the same problems on every machine.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Split = Literal["train", "calibration", "test"]
Item = TypeVar("Item")

MAX_VALUE = 40
"""No value in a problem, given or computed, exceeds this."""

_HELD_OUT_PERCENT = 10  # of all question texts, for calibration and for test each

PEOPLE = (
    ("Tom", "he"),
    ("Ben", "he"),
    ("Sam", "he"),
    ("Max", "he"),
    ("Leo", "he"),
    ("Jack", "he"),
    ("Ana", "she"),
    ("Mia", "she"),
    ("Eva", "she"),
    ("Lily", "she"),
    ("Rosa", "she"),
    ("Jane", "she"),
)
THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "cookies",
    "eggs",
    "flowers",
    "marbles",
    "pencils",
    "pens",
    "shells",
    "stamps",
    "stickers",
    "toys",
)
CONTAINERS = ("bags", "boxes", "packs", "baskets")

_OPENINGS = (
    "{name} has {a} {things}.",
    "{name} has a box with {a} {things}.",
    "There are {a} {things} on the desk of {name}.",
    "In the morning {name} has {a} {things}.",
    "{name} starts the day with {a} {things}.",
)
_GAINS = (
    "{He} buys {b} more.",
    "Then {he} finds {b} more.",
    "{other} gives {name} {b} more {things}.",
    "{He} gets {b} {things} from {other}.",
    "Later {name} buys {b} more {things}.",
)
_LOSSES = (
    "{He} gives {b} of them to {other}.",
    "Then {he} loses {b} of them.",
    "{He} sells {b} {things}.",
    "{other} takes {b} of the {things}.",
    "Later {name} gives away {b} {things}.",
)
_NOW_QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} does {he} have in the end?",
    "How many {things} are there now?",
)
_GAIN_STEPS = (
    "{name} now has {sum} {things}.",
    "Then {he} has {sum} {things}.",
    "That makes {sum} {things}.",
    "After that there are {sum} {things}.",
)
_LOSS_STEPS = (
    "{name} has {sum} {things} left.",
    "Then {he} has {sum} {things}.",
    "That leaves {sum} {things}.",
    "After that there are {sum} {things}.",
)

_PACKED_OPENINGS = (
    "{name} buys {a} {containers} with {b} {things} in each.",
    "{name} has {a} {containers} of {b} {things} each.",
    "There are {b} {things} in each of the {a} {containers} of {name}.",
)
_PACKED_STEPS = (
    "{name} has {sum} {things} in the {containers}.",
    "In all {he} has {sum} {things}.",
    "The {containers} hold {sum} {things}.",
)
_MIXED_OPENINGS = (
    "{name} has {a} red {things} and {b} blue {things}.",
    "{name} has {a} old {things} and buys {b} new {things}.",
    "{name} buys {a} {things} on Monday and {b} on Friday.",
)
_MIXED_STEPS = (
    "{name} has {sum} {things} in all.",
    "Together that is {sum} {things}.",
    "In all {he} has {sum} {things}.",
)

_SALES = (
    "{He} sells all the {things} for {b} dollars each. How much money does {he} get?",
    "Then {name} sells them for {b} dollars each. How many dollars does {he} earn?",
)
_SALE_STEPS = (
    "{name} gets {sum} dollars.",
    "{He} earns {sum} dollars.",
    "The {things} bring {sum} dollars.",
)
_COMPARISONS = (
    "{other} has {b} more {things} than {name}. How many {things} does {other} have?",
    "If {other} has {b} more than {name}, how many {things} does {other} have?",
)
_COMPARISON_STEPS = (
    "{other} has {sum} {things}.",
    "So {other} has {sum} {things}.",
    "That means {other} has {sum} {things}.",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One word problem; `answer` holds a worked step a line and ends in a line `#### number`."""

    question: str
    answer: str


def problems(split: Split, seed: int = 0) -> Iterator[Problem]:
    """Yield problems of one split without end, the same ones for the same seed.

    The split of a problem is decided by a hash of its question, so no question is in two splits
    whatever the seeds. Within a split a question may come up again.
    """
    if split not in ("train", "calibration", "test"):
        raise ValueError(f"unknown split {split!r}: use train, calibration or test")
    return _problems(split, seed)


def final_answer(text: str) -> str | None:
    """Return what follows the last `####` on its line, or None if there is nothing."""
    _, marker, rest = text.rpartition("####")
    lines = rest.strip().splitlines()
    return lines[0].strip() if marker and lines else None


def _problems(split: Split, seed: int) -> Iterator[Problem]:
    rng = random.Random(f"spiffy synthetic {split} {seed}")
    while True:
        problem = _Story(rng).tell(1 + _below(rng, 3))
        if _split_of(problem.question) == split:
            yield problem


def _split_of(question: str) -> Split:
    digest = hashlib.sha256(question.encode()).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    if percent < _HELD_OUT_PERCENT:
        return "test"
    return "calibration" if percent < 2 * _HELD_OUT_PERCENT else "train"


class _Story:
    """A problem in the making: the words fixed for the story, and what has been told so far."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        name, he = _pick(rng, PEOPLE)
        self._words = {
            "name": name,
            "he": he,
            "He": he.capitalize(),
            "other": _pick(rng, [other for other, _ in PEOPLE if other != name]),
            "things": _pick(rng, THINGS),
            "containers": _pick(rng, CONTAINERS),
        }
        self._value = 0
        self._question: list[str] = []
        self._answer: list[str] = []

    def tell(self, steps: int) -> Problem:
        """Tell a story whose answer takes `steps` steps."""
        taken = self._open()
        while taken < steps - 1:
            self._change()
            taken += 1
        if taken < steps:
            taken += self._close()
        else:
            self._ask()
        self._answer.append(f"#### {self._value}")
        return Problem(" ".join(self._question), "\n".join(self._answer))

    def _open(self) -> int:
        """Introduce the first quantity; return how many steps it takes to compute it."""
        kind = self._rng.random()
        if kind < 0.6:
            self._value = _between(self._rng, 3, 20)
            self._say(_OPENINGS, a=self._value)
            return 0
        if kind < 0.8:
            a, b = _between(self._rng, 2, 5), _between(self._rng, 2, 6)
            self._say(_PACKED_OPENINGS, a=a, b=b)
            self._work(_PACKED_STEPS, a, "*", b)
        else:
            a, b = _between(self._rng, 2, 12), _between(self._rng, 2, 12)
            self._say(_MIXED_OPENINGS, a=a, b=b)
            self._work(_MIXED_STEPS, a, "+", b)
        return 1

    def _change(self) -> None:
        """Add to the quantity or take from it: one step."""
        low, high = 2, 12
        can_gain = self._value + high <= MAX_VALUE
        can_lose = self._value > low
        if can_gain and (not can_lose or self._rng.random() < 0.5):
            b = _between(self._rng, low, high)
            self._say(_GAINS, b=b)
            self._work(_GAIN_STEPS, self._value, "+", b)
        else:
            b = _between(self._rng, low, min(high, self._value - 1))
            self._say(_LOSSES, b=b)
            self._work(_LOSS_STEPS, self._value, "-", b)

    def _close(self) -> int:
        """Take the last step together with the question; return the steps taken (one)."""
        kind = self._rng.random()
        largest_price = min(5, MAX_VALUE // self._value)
        if kind < 0.2 and largest_price >= 2:
            b = _between(self._rng, 2, largest_price)
            self._say(_SALES, b=b)
            self._work(_SALE_STEPS, self._value, "*", b)
        elif kind < 0.4 and self._value + 12 <= MAX_VALUE:
            b = _between(self._rng, 2, 12)
            self._say(_COMPARISONS, b=b)
            self._work(_COMPARISON_STEPS, self._value, "+", b)
        else:
            self._change()
            self._ask()
        return 1

    def _ask(self) -> None:
        self._say(_NOW_QUESTIONS)

    def _say(self, sentences: Sequence[str], **numbers: int) -> None:
        self._question.append(self._phrase(sentences, **numbers))

    def _work(self, sentences: Sequence[str], a: int, sign: str, b: int) -> None:
        """Write a worked step and make its result the story's current value."""
        self._value = _OPERATIONS[sign](a, b)
        expression = f"{a}{sign}{b}"
        annotated = f"{expression}=<<{expression}={self._value}>>{self._value}"
        self._answer.append(self._phrase(sentences, sum=annotated))

    def _phrase(self, sentences: Sequence[str], **more: int | str) -> str:
        return _pick(self._rng, sentences).format(**self._words, **more)


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def _below(rng: random.Random, stop: int) -> int:
    return int(rng.random() * stop)


def _between(rng: random.Random, low: int, high: int) -> int:
    return low + _below(rng, high - low + 1)


def _pick(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[_below(rng, len(items))]
