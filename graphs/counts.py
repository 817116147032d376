"""Counting chains of any number of roots: a summary that merges, and growth straight from it.

A chain is packed into bytes: 16 bits for every pair that a step fills in (position rank, token
rank), the top bit on the last pair of a step. Equal chains are one row, so memory grows with
distinct chains and not with roots.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spiffy.graphs.chains import Chain, Fill, Prompt
from spiffy.graphs.grow import grow_with_margin

#: Ranks that a chain can hold; the future of a root is cut where it needs a higher one.
POSITION_RANKS, TOKEN_RANKS = 1 << 10, 1 << 5
_TOKEN_BITS = 5
_END = 1 << 15
_WAITING = 200_000  # chains that wait to be sorted in, at least
_BUCKETS = 1 << 22

_Array = np.ndarray[Any, Any]
_Rows = tuple[_Array, _Array]  # packed chains of one length, sorted, and their int64 counts


class ChainCounts:
    """How often each chain was seen.

    The order of adding and of merging changes nothing.
    """

    def __init__(self) -> None:
        self._rows: dict[int, _Rows] = {}  # by length in bytes
        self._waiting: defaultdict[int, list[_Rows]] = defaultdict(list)
        self._waits = 0

    @classmethod
    def of(cls, chains: Mapping[Chain, int]) -> ChainCounts:
        """From counted chains."""
        counts = cls()
        for chain, count in chains.items():
            counts._take(_rows([chain_to_bytes(chain)], count))
        return counts

    def add(self, prompt: Prompt) -> None:
        """Count the roots of one decoded prompt; empty chains teach nothing and are left out."""
        self.add_packed([chain_to_bytes(chain) for chain in prompt if chain])

    def add_packed(self, chains: Sequence[bytes]) -> None:
        """Count roots whose chains are packed already."""
        self._take(_rows(chains))

    def merge(self, other: ChainCounts) -> None:
        """Add what was counted elsewhere."""
        self._take(other._sorted())

    def _take(self, rows: Mapping[int, _Rows]) -> None:
        for length, (chains, counts) in rows.items():
            self._waiting[length].append((chains, counts))
            self._waits += len(counts)
        # Waiting for as many as there are makes sorting them in cost little per chain.
        if self._waits > max(_WAITING, sum(len(counts) for _, counts in self._rows.values())):
            self._sorted()

    def _sorted(self) -> dict[int, _Rows]:
        """All rows, with nothing left waiting."""
        for length, parts in sorted(self._waiting.items()):
            known = [self._rows[length]] if length in self._rows else []
            self._rows[length] = _summed([*known, *parts])
            parts.clear()
        self._waits = 0
        return self._rows

    def total(self) -> int:
        """Roots counted."""
        return sum(int(counts.sum()) for _, counts in self._sorted().values())

    def __len__(self) -> int:
        return sum(len(counts) for _, counts in self._sorted().values())

    def chains(self) -> Counter[Chain]:
        """Everything, unpacked: takes some kilobytes per distinct chain."""
        return _unpacked(self._sorted())

    def reduced(self, least: int) -> Counter[Chain]:
        """Chains cut before the first fill that can gain no more than `least`.

        No graph gains more by adding a fill than the fill's potential: the steps from it to the end
        of the chain, summed over all chains that reach it by fills not cut themselves.
        """
        if least <= 0:
            return self.chains()
        walk = _Walk(self._sorted())
        kept = np.zeros(len(walk.counts), dtype=np.int32)  # pairs of each chain
        steps_left = walk.steps()
        for pairs, ended, fill in walk:
            # Fills that share a bucket are judged together: more is kept than need be, never less.
            bucket = fill >> np.uint64(64 - _BUCKETS.bit_length() + 1)
            bucket = bucket.astype(np.int64)
            worth = walk.counts[ended] * steps_left[ended]
            keep = np.bincount(bucket, worth, _BUCKETS)[bucket] > least
            steps_left[ended] -= 1
            kept[ended[keep]] = pairs
            walk.stop(ended[~keep])
        cut: defaultdict[int, list[_Rows]] = defaultdict(list)
        start = 0
        for chains, counts in self._rows.values():
            pairs_kept = kept[start : start + len(counts)]
            start += len(counts)
            words = _words(chains)
            for pairs in np.unique(pairs_kept[pairs_kept > 0]).tolist():
                these = pairs_kept == pairs
                heads = np.ascontiguousarray(words[these, :pairs]).view(f"S{2 * pairs}")[:, 0]
                cut[2 * pairs].append((heads, counts[these]))
        return _unpacked({length: _summed(parts) for length, parts in cut.items()})

    def passages(self, fills: Sequence[Fill]) -> tuple[list[int], list[list[int]]]:
        """For each fill the roots that passed it, and the fills seen right before it.

        The latter are numbers: 0 stands for the root, k + 1 for `fills[k]`.
        """
        if not fills:
            return [], []
        walk = _Walk(self._sorted())
        hashes = np.array([_hash(fill) for fill in fills], dtype=np.uint64)
        order = np.argsort(hashes)
        passed = np.zeros(len(fills) + 1)
        before: list[set[int]] = [set() for _ in range(len(fills) + 1)]
        last = np.zeros(len(walk.counts), dtype=np.int32)  # number of the fill passed last, or -1
        for _, ended, fill in walk:
            place = np.searchsorted(hashes, fill, sorter=order)
            found = order[np.minimum(place, len(fills) - 1)]
            number = np.where(hashes[found] == fill, found + 1, -1)
            known = number > 0
            passed += np.bincount(number[known], walk.counts[ended[known]], len(fills) + 1)
            steps = (last[ended[known]].astype(np.int64) + 1) * (len(fills) + 1) + number[known]
            for step in np.unique(steps).tolist():
                parent, child = divmod(step, len(fills) + 1)
                if parent > 0:
                    before[child].add(parent - 1)
            last[ended] = number
        return [int(count) for count in passed[1:]], [sorted(parents) for parents in before[1:]]


class _Walk:
    """Runs along all chains at once, a pair at a time.

    Yields the number of pairs passed, the chains whose step ends there, and a hash of the fill
    reached: sums of random words, so it does not depend on the order of the pairs. All fills of a
    size are met together. That two fills share a hash has a chance of 1e-10 for 10 million chains;
    then their counts are added up.
    """

    def __init__(self, rows: Mapping[int, _Rows]) -> None:
        self.counts = np.concatenate([np.zeros(0, np.int64), *(c for _, c in rows.values())])
        self._words = [_words(chains) for chains, _ in rows.values()]
        self._starts = np.cumsum([0, *map(len, self._words)])
        self._going = np.ones(len(self.counts), dtype=bool)

    def steps(self) -> _Array:
        """Number of steps of each chain, int64."""
        ends = [(words >= _END).sum(1) for words in self._words]
        return np.concatenate([np.zeros(0, np.int64), *ends])

    def stop(self, chains: _Array) -> None:
        """Go no further along these."""
        self._going[chains] = False

    def __iter__(self) -> Iterator[tuple[int, _Array, _Array]]:
        hashes = np.zeros(len(self._going), dtype=np.uint64)
        for at in range(max((words.shape[1] for words in self._words), default=0)):
            found = []
            for start, words in zip(self._starts, self._words, strict=False):
                if at >= words.shape[1]:
                    continue
                active = np.flatnonzero(self._going[start : start + len(words)])
                here = words[active, at]
                hashes[active + start] += _WORDS[here & (_END - 1)]
                found.append(active[here >= _END] + start)
            ended = np.concatenate(found)
            if len(ended):
                yield at + 1, ended, hashes[ended]


_WORDS = np.random.Generator(np.random.PCG64(0)).integers(0, 1 << 64, _END, dtype=np.uint64)


def _hash(fill: Fill) -> int:
    return int(sum(int(_WORDS[i << _TOKEN_BITS | j]) for i, j in fill) % (1 << 64))


def chain_to_bytes(chain: Chain) -> bytes:
    """A chain as bytes, up to the first rank that has no room there."""
    words: list[int] = []
    before: Fill = ()
    for fill in chain:
        new = sorted(set(fill).difference(before))
        if any(i >= POSITION_RANKS or j >= TOKEN_RANKS for i, j in new):
            break
        words += [i << _TOKEN_BITS | j for i, j in new]
        words[-1] |= _END
        before = fill
    return np.array(words, dtype="<u2").tobytes()


def _rows(chains: Iterable[bytes], count: int = 1) -> dict[int, _Rows]:
    """Packed chains by length; those of no step are left out."""
    by_length: defaultdict[int, list[bytes]] = defaultdict(list)
    for chain in chains:
        by_length[len(chain)].append(chain)
    by_length.pop(0, None)
    return {
        length: (np.array(equal, dtype=f"S{length}"), np.full(len(equal), count, np.int64))
        for length, equal in by_length.items()
    }


def _summed(parts: Sequence[_Rows]) -> _Rows:
    """Rows of one length, equal ones added up, sorted."""
    chains = np.concatenate([chains for chains, _ in parts])
    counts = np.concatenate([counts for _, counts in parts])
    order = np.argsort(chains, kind="stable")
    chains, counts = chains[order], counts[order]
    first = np.flatnonzero(np.append(True, chains[1:] != chains[:-1]))
    return chains[first], np.add.reduceat(counts, first)


def _words(chains: _Array) -> _Array:
    """Packed chains as uint16 [chains, pairs]."""
    return chains.view("<u2").reshape(len(chains), -1)


def _unpacked(rows: Mapping[int, _Rows]) -> Counter[Chain]:
    pairs = (pair for chains, counts in rows.values() for pair in zip(chains, counts, strict=True))
    return Counter({chain_from_bytes(bytes(chain)): int(count) for chain, count in pairs})


def chain_from_bytes(packed: bytes) -> Chain:
    """The chain that was packed."""
    chain: list[Fill] = []
    pairs: list[tuple[int, int]] = []
    for word in memoryview(packed).cast("H"):
        pair = word & (_END - 1)
        pairs.append((pair >> _TOKEN_BITS, pair & (TOKEN_RANKS - 1)))
        if word & _END:
            chain.append(tuple(sorted(pairs)))
    return tuple(chain)


def grow_counted(counts: ChainCounts, budget: int) -> list[Fill]:
    """What `grow` chooses from all chains, without unpacking most of them.

    Growth never looks at a fill that can gain less than any fill it added, so such fills are cut
    away beforehand; if that turns out to have been too bold, again with more of them.
    """
    least = counts.total() // max(budget, 1)  # about half of what the last of them gains
    while True:
        fills, margin = grow_with_margin(counts.reduced(least), budget)
        if least <= 0 or margin > least:
            return fills
        least //= 4
