"""How a token is drawn at temperatures above 0, from its definition and nothing of the runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from math import exp, log

GROUP = 128
_ALL = (1 << 64) - 1


def splitmix64(seed: int) -> Iterator[int]:
    """SplitMix64 as it is published, one number after the other."""
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & _ALL
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _ALL
        yield z ^ (z >> 31)


def key_of(seed: int, sequence: int, committed: int, redraw: int, position: int) -> int:
    """The generator of a position's numbers: a number of another, down from the decode's own."""
    digest = hashlib.sha256(f"{seed} {sequence}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    for number in (committed, redraw, position):
        key = next(islice(splitmix64(key), number, None))
    return key


def exponentials(key: int) -> Iterator[float]:
    """-log(u), u in the middle of one of 2**52 equal parts of (0, 1)."""
    for bits in splitmix64(key):
        signed = bits - (bits >> 63 << 64)
        yield -log(((signed >> 12) + 2**51 + 0.5) / 2**52)


def drawn(logits: Sequence[float], temperature: float, key: int) -> int:
    """The token: first its group, by the sum of the weights, then the token in the group."""
    most = max(logits)
    weights = [exp((logit - most) / temperature) for logit in logits]
    groups = [weights[k : k + GROUP] for k in range(0, len(weights), GROUP)]
    noise = list(islice(exponentials(key), GROUP + len(groups)))

    def race(weights: Sequence[float], slowness: Sequence[float]) -> int:
        speeds = [weight / slow for weight, slow in zip(weights, slowness, strict=False)]
        return speeds.index(max(speeds))

    group = race([sum(weights) for weights in groups], noise[GROUP:])
    return group * GROUP + race(groups[group], noise)
