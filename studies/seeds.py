"""What the fuzzers share: cases by seed, for a number or a time, a bar, and what became of them."""

from __future__ import annotations

import argparse
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

from rich.console import Console
from rich.progress import track

_SHOWN = 20  # bugs


def arguments(doc: str, cases: int) -> argparse.ArgumentParser:
    """Options of a fuzzer, whose cases are made from a seed each."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=cases)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; others follow")
    parser.add_argument("--minutes", type=float, help="stop after so long, and say with which seed")
    return parser


@dataclass
class Tally:
    """What became of the cases.

    Attributes
    ----------
    outcomes
        Those that are right; every other outcome is a bug.
    next_seed
        The case to go on with.
    """

    outcomes: tuple[str, ...]
    next_seed: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    bugs: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "none")
    began: float = field(default_factory=perf_counter)

    def seeds(self, options: argparse.Namespace) -> Iterator[int]:
        """Seeds of the cases to run, under a bar, until there are enough or time is up.

        An interrupt (Ctrl-C) ends them after the case at hand, so that the counts are printed.
        """
        interrupted = False

        def interrupt(*_: object) -> None:
            nonlocal interrupted
            interrupted = True

        before = signal.signal(signal.SIGINT, interrupt)
        console = Console(stderr=True)
        numbers = range(options.seed, options.seed + options.cases)
        self.next_seed = options.seed
        for seed in track(numbers, "cases", console=console, disable=not console.is_terminal):
            late = options.minutes and perf_counter() - self.began > 60 * options.minutes
            if late or interrupted:
                break
            yield seed
            self.next_seed = seed + 1
        signal.signal(signal.SIGINT, before)

    def add(self, kind: str, found: str, name: str, seconds: float) -> None:
        """Count a case of a kind, and print it if it is a bug."""
        self.slowest = max(self.slowest, (seconds, name))
        good = found in self.outcomes
        self.counts[kind, found if good else "bugs"] += 1
        if not good:
            self.bugs.append(f"{name}: {found}")
            if len(self.bugs) <= _SHOWN:
                print(self.bugs[-1], flush=True)

    def table(self) -> str:
        """Markdown: what became of which kind."""
        columns = (*self.outcomes, "bugs")
        lines = [f"| kind | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
        for kind in sorted({kind for kind, _ in self.counts}):
            cells = [str(self.counts[kind, what]) for what in columns]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def line(self) -> str:
        """All of it in a line."""
        sums = [
            f"{sum(n for (_, found), n in self.counts.items() if found == what)} {what}"
            for what in self.outcomes
        ]
        return (
            f"{self.counts.total()} cases: {', '.join(sums)}, {len(self.bugs)} bugs; "
            f"{perf_counter() - self.began:.0f} s, slowest {self.slowest[0]:.2f} s "
            f"({self.slowest[1]}); go on with --seed {self.next_seed}"
        )
