"""A draft graph per phase of a block, beside one for all: a part of `studies/graphs.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from spiffy.calib.record import Trace
from spiffy.graphs import Chain, Fill, grow, replay


# What may tell one phase of a block from another, known before the forward; higher is earlier.
def _share(trace: Trace, at: int) -> float:
    root = trace.roots[at]
    return 0.0 if root is None else float(len(root.candidates.positions))


def _confidence(trace: Trace, at: int) -> float:
    root = trace.roots[at]
    return 0.0 if root is None else float(root.candidates.log_p[0, 0])


def _median_confidence(trace: Trace, at: int) -> float:
    root = trace.roots[at]
    return 0.0 if root is None else float(root.candidates.log_p[:, 0].median())


PHASES: dict[str, Callable[[Trace, int], float]] = {
    "positions still masked": _share,
    "confidence of the best position": _confidence,
    "median confidence": _median_confidence,
}


def phased(
    calibration: Sequence[Trace],
    held_out: Sequence[Trace],
    feature: Callable[[Trace, int], float],
    parts: int,
    numbers: Sequence[int],
) -> list[float]:
    """Steps per forward on the held-out prompts with one graph per phase, by number of drafts."""
    seen = [
        (feature(trace, at), chain)
        for trace in calibration
        for at, chain in enumerate(trace.chains)
        if chain
    ]
    values = sorted(value for value, _ in seen)
    limits = [values[len(values) * k // parts] for k in range(1, parts)]

    def phase(value: float) -> int:
        return sum(value >= limit for limit in limits)

    counts = [Counter(chain for value, chain in seen if phase(value) == k) for k in range(parts)]
    grown = [grow(chains, max(numbers)) for chains in counts]
    found = []
    for drafts in numbers:
        graphs = [set(fills[:drafts]) for fills in grown]
        # A state's chain as far as the graph of its own phase goes: then any graph accepts it.
        prompts = [
            [
                None if chain is None else _inside(chain, graphs[phase(feature(trace, at))])
                for at, chain in enumerate(trace.chains)
            ]
            for trace in held_out
        ]
        everything = {fill for graph in graphs for fill in graph}
        found.append(replay(prompts, everything).steps_per_forward)
    return found


def _inside(chain: Chain, graph: set[Fill]) -> Chain:
    length = next((k for k, fill in enumerate(chain) if fill not in graph), len(chain))
    return chain[:length]


def phases(
    calibration: Sequence[Trace],
    held_out: Sequence[Trace],
    one: Sequence[float],
    numbers: Sequence[int],
) -> Iterator[tuple[str, list[float]]]:
    """What graphs per phase gain over `one` graph, as shares, by split and number of drafts."""
    for label, feature in PHASES.items():
        for parts in (2, 3):
            several = phased(calibration, held_out, feature, parts, numbers)
            gains = [b / a - 1 for a, b in zip(one, several, strict=True)]
            yield f"{parts} by {label}", gains
