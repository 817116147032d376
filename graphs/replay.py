"""What a graph would have saved, exactly, from recorded chains and without the model.

Greedy decoding is deterministic and so is decoding with a fixed noise seed: the true states are the
same whatever is drafted, and a walk ends where the chain leaves the graph.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from spiffy.graphs.chains import Chain, Fill, Prompt


@dataclass(frozen=True)
class Replay:
    """Counts over all prompts: denoising steps, the forwards that made them, and their drafts."""

    steps: int
    forwards: int
    drafts: int = 0

    def __add__(self, other: Replay) -> Replay:
        """Counts over the prompts of both."""
        return Replay(
            self.steps + other.steps, self.forwards + other.forwards, self.drafts + other.drafts
        )

    @property
    def steps_per_forward(self) -> float:
        """Mean denoising steps that one forward was worth; 1 without drafts."""
        return self.steps / self.forwards if self.forwards else 1.0


def accepted_steps(chain: Chain | None, graph: Collection[Fill]) -> int:
    """Hops of the walk at a root with this chain."""
    accepted = 0
    for fill in chain or ():
        if fill not in graph:
            break
        accepted += 1
    return accepted


def replay(prompts: Iterable[Prompt], graph: Collection[Fill]) -> Replay:
    """Replay whole decodes with real hop semantics: only where a walk ends is the next root."""
    steps = forwards = 0
    for prompt in prompts:
        at = 0
        while at < len(prompt):
            at += 1 + accepted_steps(prompt[at], graph)
            forwards += 1
        steps += len(prompt)
    return Replay(steps, forwards)


def replay_prefixes(prompts: Iterable[Prompt], fills: Sequence[Fill]) -> list[Replay]:
    """`replay` of the first 0, 1, ... all of the fills, without a graph for each.

    One prompt is looked at at a time, and only where a fill more can change where a walk ends.
    """
    numbers = {fill: number for number, fill in enumerate(fills, start=1)}
    found = [Replay(0, 0)] * (len(fills) + 1)
    for prompt in prompts:
        needed = [_needed(chain, numbers) for chain in prompt]
        matters = {0, *(number for hops in needed for number in hops)}
        forwards = 0
        for budget in range(len(found)):
            if budget in matters:
                forwards = _forwards(needed, budget)
            found[budget] += Replay(len(prompt), forwards)
    return found


def _needed(chain: Chain | None, numbers: Mapping[Fill, int]) -> list[int]:
    """How many fills must be there for the walk to make 1, 2, ... hops; ascending."""
    most, needed = 0, []
    for fill in chain or ():
        if fill not in numbers:
            break
        most = max(most, numbers[fill])
        needed.append(most)
    return needed


def _forwards(needed: Sequence[Sequence[int]], budget: int) -> int:
    at = forwards = 0
    while at < len(needed):
        at += 1 + bisect_right(needed[at], budget)
        forwards += 1
    return forwards
