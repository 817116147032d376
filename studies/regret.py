"""What learning costs: simulated decodes under `--budget auto`, against the best fixed choice.

    python studies/regret.py                    # a table; --into docs/auto.md

No model and no clock: a forward takes what a cost curve says, a little more or less, now and then
several times as long; it accepts a random number of drafts, on average as many as an artifact
expects or a share of that. Three figures count: the expected time of a first answer of 64 steps and
that of all after the first 50 forwards, each over that of the best fixed choice, and the expected
time of a whole decode of 200 steps over plain decoding's. A forward that follows one of another
kind takes a tenth longer in all three; plain decoding and a fixed choice have none.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median

from pages import add_into, at_least, expect, fill, start

from spiffy.runtime.budget.controller import Controller
from spiffy.runtime.budget.estimates import LADDER, PLAIN, Choice, interpolated

#: Steps per forward by drafts, as an artifact of tiny-llada expects them.
EXPECTED = {
    "graph": [(0, 1.0), (1, 1.6), (2, 1.9), (4, 2.4), (8, 2.95), (16, 3.5), (32, 4.2)],
    "model": [(0, 1.0), (1, 1.6), (2, 1.95), (4, 2.5), (8, 3.2), (16, 4.0), (32, 4.8)],
}
MOST = 32
FIRST = 64  # steps of a first answer
SWITCHING = 0.1  # of a forward: what one takes longer that follows one of another kind

#: What a data sheet says of LLaDA2.0-mini on an H100 (docs/what-pays.md): few positions leave most
#: experts unread, so the first drafts are the dear ones.
MIXTURE = [(0, 1.0), (1, 1.34), (2, 1.46), (4, 1.52), (8, 1.53), (32, 1.56)]

#: Seconds of a forward by drafts and number of the forward, in plain forwards.
Curve = Callable[[int, int], float]
CURVES: dict[str, Curve] = {
    "flat": lambda n, t: 1.0,
    "1% a draft": lambda n, t: 1 + 0.01 * n,
    "10% a draft": lambda n, t: 1 + 0.1 * n,
    "30% a draft": lambda n, t: 1 + 0.3 * n,
    "100% a draft": lambda n, t: 1.0 + n,
    "a mixture's": lambda n, t: interpolated(MIXTURE, n),
    "steps at 4 and 16": lambda n, t: 1.0 + (n >= 4) + 2 * (n >= 16),
    "3 times slower from forward 100": lambda n, t: (1 + 0.02 * n) * (3 if t >= 100 else 1),
    "10% a draft, all of it doubled now and then": lambda n, t: (1 + 0.1 * n) * (1 + t // 60 % 2),
    "drifts from 1% to 30% a draft": lambda n, t: 1 + (0.01 + 0.29 * min(t / 300, 1)) * n,
}


@dataclass
class World:
    """A machine, a prompt and an acceptance, that a controller meets.

    Attributes
    ----------
    curve
        Seconds of a forward.
    share
        Accepted drafts over those expected.
    drafting
        Seconds of choosing drafts.
    noise
        Spread of the seconds (log-normal); one forward in 50 also takes 2 to 6 times as long, and
        one that follows forwards of another kind a tenth longer.
    """

    curve: Curve
    share: float = 1.0
    drafting: dict[str, float] = field(default_factory=lambda: {"graph": 0.03, "model": 0.3})
    noise: float = 0.03

    def steps(self, choice: Choice) -> float:
        """Expected denoising steps of a forward."""
        if choice.way is None:
            return 1.0
        return 1 + self.share * (interpolated(EXPECTED[choice.way], choice.drafts) - 1)

    def seconds(self, choice: Choice, forward: int) -> float:
        """Expected seconds of a forward and its drafting."""
        drafting = 0.0 if choice.way is None else self.drafting[choice.way]
        return self.curve(choice.drafts, forward) + drafting

    def seconds_per_step(self, choice: Choice, forward: int) -> float:
        """Expected seconds of a step."""
        return self.seconds(choice, forward) / self.steps(choice)

    def switching(self, forwards: Sequence[tuple[Choice, int]], after: int = 0) -> float:
        """Expected seconds that forwards, but for the first ones, take longer for switching."""
        pairs = enumerate(pairwise(choice for choice, _ in forwards), start=1)
        return sum(
            SWITCHING * self.curve(choice.drafts, t)
            for t, (before, choice) in pairs
            if t >= after and choice != before
        )


CHOICES = [PLAIN, *(Choice(way, n) for way in EXPECTED for n in LADDER if n <= MOST)]


def decode(world: World, steps: int, seed: int) -> tuple[Controller, list[tuple[Choice, int]]]:
    """Decode until that many steps are made; what was chosen for each forward and its steps."""
    rng = random.Random(seed)
    controller = Controller(EXPECTED, MOST)
    controller.start(1.0)
    forwards: list[tuple[Choice, int]] = []
    left, resting = steps, 0
    while left > 0:
        choice = PLAIN if resting else controller.choose()
        seconds = world.curve(choice.drafts, len(forwards)) * rng.lognormvariate(0, world.noise)
        if rng.random() < 0.02:
            seconds *= rng.uniform(2, 6)
        if forwards and choice != forwards[-1][0]:
            seconds *= 1 + SWITCHING
        made = 1 + (_accepted(rng, world.steps(choice) - 1, choice.drafts) if choice.way else 0)
        drafting = 0.0 if choice.way is None else world.drafting[choice.way]
        if resting:
            controller.rest(seconds)
            resting -= 1
        else:
            controller.learn(choice, min(made, left), seconds, drafting)
            resting = controller.resting
        forwards.append((choice, min(made, left)))
        left -= made
    return controller, forwards


def _accepted(rng: random.Random, mean: float, drafts: int) -> int:
    """A number of accepted drafts that varies as widely as real ones do (beta-binomial)."""
    p = min(1.0, mean / drafts)
    if 0 < p < 1:
        p = rng.betavariate(3 * p, 3 * (1 - p))
    return sum(rng.random() < p for _ in range(drafts))


def regret(world: World, forwards: list[tuple[Choice, int]], after: int = 50) -> float:
    """Expected time of the steps made after some forwards, over the best fixed choice's."""
    late = list(enumerate(forwards))[after:]
    if not late:
        return 1.0
    ours = sum(world.seconds_per_step(c, t) * made for t, (c, made) in late)
    ours += world.switching(forwards, after)
    fixed = (sum(world.seconds_per_step(c, t) * made for t, (_, made) in late) for c in CHOICES)
    return ours / min(fixed)


def over_plain(world: World, forwards: list[tuple[Choice, int]]) -> float:
    """Expected time of the forwards made, over plain decoding's for the same steps."""
    ours = sum(world.seconds(choice, t) for t, (choice, _) in enumerate(forwards))
    ours += world.switching(forwards)
    plain = sum(world.seconds(PLAIN, t) * made for t, (_, made) in enumerate(forwards))
    return ours / plain


def followed(before: float, then: float, at: int, seed: int) -> int:
    """Forwards until it is done differently in 7 of 8, once the price of a draft changes.

    Prices are in plain forwards: dear drafts are those that do not pay, cheap ones do.
    """
    world = World(lambda n, t: 1 + (before if t < at else then) * n)
    _, forwards = decode(world, 5 * at + 4000, seed)
    right = [(choice == PLAIN) == (then > before) for choice, _ in forwards[at:]]
    return next((k for k in range(len(right) - 8) if sum(right[k : k + 8]) > 6), len(right))


def changes(seeds: int) -> str:
    """Markdown: how soon a change of the machine is followed."""
    lines = ["| a draft costs | at forward 100 | 300 | 1000 |", "| --- | ---: | ---: | ---: |"]
    for before, then in ((1.0, 0.01), (0.01, 1.0)):
        cells = []
        for at in (100, 300, 1000):
            waits = [followed(before, then, at, seed) for seed in range(seeds)]
            cells.append(f"{median(waits):.0f} (at most {max(waits)})")
        lines.append(f"| {before:.0%}, then {then:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(seeds: int) -> str:
    """Markdown: a line per curve, both regrets and time over plain for several acceptances."""
    shares = (0.0, 0.5, 1.0, 1.4)
    lines = [
        "| cost of a forward | " + " | ".join(f"accepted x {share:g}" for share in shares) + " |",
        "| --- |" + " ---: |" * len(shares),
    ]
    for name, curve in CURVES.items():
        cells = []
        for share in shares:
            world = World(curve, share)
            late = [regret(world, decode(world, 1200, seed)[1]) for seed in range(seeds)]
            whole = [over_plain(world, decode(world, 200, seed)[1]) for seed in range(seeds)]
            first = [regret(world, decode(world, FIRST, seed)[1], 0) for seed in range(seeds)]
            cells.append(f"{fmean(first) - 1:+.0%}, {fmean(late) - 1:+.1%}, {max(whole):.3f}x")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into a Markdown file between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=20)
    add_into(parser)
    args = parser.parse_args()
    expect(parser, args.into, "regret")
    block = (
        f"`python studies/regret.py --seeds {args.seeds}` (simulated; mean regret of a first "
        f"answer of {FIRST} steps, and after 50 forwards of decodes of 1,200 steps; slowest decode "
        f"of 200 steps over plain decoding; a forward after one of another kind takes "
        f"{SWITCHING:.0%} longer)\n\n{table(args.seeds)}\n\n"
        "Forwards until a change of the machine is followed:\n\n"
        f"{changes(args.seeds)}"
    )
    print(block)
    fill(args.into, "regret", block)


if __name__ == "__main__":
    start(main)
