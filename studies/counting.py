"""How many roots calibration can count, and grow from: seconds and memory.

Roots are synthetic: a block of 32 masks, some already filled, whose next positions have ranks drawn
geometrically (the best-scored one is next with `--top`) and whose token is the likeliest one with
`--right`; a future ends where a token beyond the 4 likeliest would be needed, at the end of the
block, or after 12 steps. Making them is not timed. Two halves are counted apart and merged, and a
graph of 32 nodes is grown.

    python studies/counting.py --roots 1000000 --roots 10000000
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np

from spiffy.graphs import ChainCounts, grow_counted

BLOCK, DEPTH, TOKENS, BUDGET, CHUNK = 32, 12, 4, 32, 100_000


def chains(roots: int, seed: int, top: float, right: float) -> Iterator[list[bytes]]:
    """Packed chains, some thousands at a time."""
    draw = np.random.default_rng(seed)
    for start in range(0, roots, CHUNK):
        n = min(CHUNK, roots - start)
        masked = draw.integers(1, BLOCK + 1, n)
        left = np.tile(np.arange(BLOCK), (n, 1))  # ranks not filled in yet, front first
        words = np.zeros((n, DEPTH), dtype="<u2")
        alive = np.ones(n, dtype=bool)
        for step in range(DEPTH):
            token = draw.geometric(right, n) - 1
            alive &= (token < TOKENS) & (step < masked)
            place = np.minimum(draw.geometric(top, n) - 1, np.maximum(masked - step - 1, 0))
            rank = left[np.arange(n), place]
            words[alive, step] = (rank << 5 | token | 1 << 15)[alive]
            behind = np.arange(BLOCK - 1)[None] >= place[:, None]  # close the gap
            left[:, :-1] = np.where(behind, left[:, 1:], left[:, :-1])
        yield [chain for chain in words.view(f"S{2 * DEPTH}")[:, 0].tolist() if chain]


def count(roots: int, seed: int, top: float, right: float) -> tuple[ChainCounts, float]:
    """Counts of synthetic roots, and the seconds that counting took."""
    counts, seconds = ChainCounts(), 0.0
    for part in chains(roots, seed, top, right):
        started = time.perf_counter()
        counts.add_packed(part)
        seconds += time.perf_counter() - started
    return counts, seconds


def measure(roots: int, top: float, right: float, send: Connection) -> None:
    """One run, in a process of its own: peak memory is a process's."""
    counts, counting = count(roots // 2, 0, top, right)
    other, more = count(roots - roots // 2, 1, top, right)
    started = time.perf_counter()
    counts.merge(other)
    del other
    merging = time.perf_counter() - started
    started = time.perf_counter()
    fills = grow_counted(counts, BUDGET)
    growing = time.perf_counter() - started
    started = time.perf_counter()
    counts.passages(fills)
    passages = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    send.send((len(counts), counting + more, merging, growing, passages, peak))


def main() -> None:
    """Print a table row per number of roots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--roots", type=int, action="append")
    parser.add_argument("--top", type=float, default=0.5)
    parser.add_argument("--right", type=float, default=0.9)
    options = parser.parse_args()
    print("| roots | distinct | count s | merge s | grow s | node counts s | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for roots in options.roots or [1_000_000, 10_000_000]:
        context = get_context("spawn")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(roots, options.top, options.right, send))
        process.start()
        send.close()
        distinct, *seconds, peak = receive.recv()
        process.join()
        cells = " | ".join(f"{value:.1f}" for value in seconds)
        print(f"| {roots:,} | {distinct:,} | {cells} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
