"""Pictures of a benchmark run and of an artifact; each says in words what it shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from spiffy.bench.plots.calibration import coefficients, cost, expected
from spiffy.bench.plots.draft_graph import draft_graph
from spiffy.bench.plots.drafts import acceptance
from spiffy.bench.plots.runs import nfe, positions, speed, time_split, tokens_per_second, trade
from spiffy.bench.plots.style import WHO, Picture
from spiffy.schemas.bench import Bench

__all__ = [
    "WHO",
    "Picture",
    "acceptance",
    "coefficients",
    "cost",
    "draft_graph",
    "expected",
    "nfe",
    "pictures_of",
    "positions",
    "speed",
    "time_split",
    "tokens_per_second",
    "trade",
]


def pictures_of(bench: Bench) -> dict[str, list[Picture]]:
    """All pictures of a run by section, those left out that have no data."""
    chosen = next((r.budget for r in bench.results if r.kind == "auto"), None)
    sections: Mapping[str, Iterable[Picture | None]] = {
        "charts": (
            speed(bench),
            tokens_per_second(bench),
            nfe(bench),
            positions(bench),
            trade(bench),
            time_split(bench),
        ),
        "acceptance": acceptance(bench),
        "cost": (() if bench.profile is None else (cost(bench.profile, chosen),)),
        "graph": (draft_graph(bench.nodes, bench.roots),),
    }
    return {name: [p for p in made if p is not None] for name, made in sections.items()}
