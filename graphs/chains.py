"""Chains: what the calibration data says about the futures of a root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

Fill = tuple[tuple[int, int], ...]
Chain = tuple[Fill, ...]

#: One decoded prompt: the chain of the state after every denoising step; None where a forward has
#: no drafts (nothing is known yet of what it decodes, or the forward only holds the root).
Prompt = Sequence[Chain | None]


def count_chains(prompts: Iterable[Prompt]) -> Counter[Chain]:
    """Count equal chains over all roots; empty chains teach nothing and are left out."""
    return Counter(chain for prompt in prompts for chain in prompt if chain)


def transitions(chains: Mapping[Chain, int]) -> dict[Fill, Counter[Fill]]:
    """For every fill, how often each fill came right before it; `()` stands for the root."""
    before: dict[Fill, Counter[Fill]] = {}
    for chain, count in chains.items():
        for parent, fill in zip(((), *chain), chain, strict=False):
            before.setdefault(fill, Counter())[parent] += count
    return before
