"""The picture of a draft graph."""

from __future__ import annotations

from collections.abc import Sequence

from spiffy.bench.plots.style import (
    COLOURS,
    INK,
    MUTED,
    PAPER,
    Picture,
    legend_below,
    listed,
    new_figure,
    styled,
)
from spiffy.schemas import Node
from spiffy.schemas.drawing import layout
from spiffy.schemas.labels import beyond_parent, written

_LABELLED = 48  # nodes that get a label, the most often accepted first


@styled
def draft_graph(nodes: Sequence[Node], roots: int) -> Picture | None:
    """The draft graph from left (the root) to right, node area by share of roots."""
    if not nodes:
        return None
    place, edges = layout(nodes)
    deepest = max(x for x, _ in place)
    tallest = max(abs(y) for _, y in place)
    figure = new_figure(max(5.2, 1.35 * deepest + 1.2), min(9.0, max(2.4, 0.62 * tallest + 1.1)))
    axes = figure.add_subplot()
    shared = {number for number, node in enumerate(nodes, start=1) if len(node.parents) > 1}
    for parent, child, first in edges:
        (x0, y0), (x1, y1) = place[parent], place[child]
        axes.plot(
            [x0, x1],
            [y0, y1],
            color=MUTED,
            linewidth=1.1 if first else 0.7,
            linestyle="-" if first else (0, (2, 2)),
            zorder=1,
        )
    labelled = set(
        sorted(range(1, len(nodes) + 1), key=lambda k: (-nodes[k - 1].count, k))[:_LABELLED]
    )
    axes.scatter(*place[0], s=150, color=INK, zorder=2, marker="s")
    axes.annotate("root", place[0], (0, 11), textcoords="offset points", ha="center")
    tips = {}
    top = max(1, max(node.count for node in nodes))
    for number, node in enumerate(nodes, start=1):
        share = node.count / top
        colour = COLOURS["auto"] if number in shared else COLOURS["graph"]
        gid = f"node-{number}"
        axes.scatter(
            *place[number],
            s=14 + 340 * share,
            color=colour,
            edgecolor=PAPER,
            linewidth=0.8,
            zorder=2,
            gid=gid,
        )
        tips[gid] = f"node {number}: {written(node.fill)}, {_share(node, roots)}"
        if number in labelled:
            axes.annotate(
                beyond_parent(nodes, number),
                place[number],
                (0, 4.5 + 9.5 * share**0.5),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4, "alpha": 0.8},
                zorder=3,
            )
    axes.set_axis_off()
    axes.margins(x=0.06, y=0.14)
    for label, colour in (("one way there", "graph"), ("several ways there", "auto")):
        axes.scatter([], [], s=40, color=COLOURS[colour], label=label)
    legend_below(figure)
    said = [(k, f"{beyond_parent(nodes, k)} {_share(nodes[k - 1], roots)}") for k in labelled]
    text = (
        f"{len(nodes)} nodes over {deepest} steps; {len(shared)} are reached several ways. "
        f"{listed(sorted(said)[:16])}."
    )
    return Picture(
        "draft-graph",
        "Draft graph",
        text,
        figure,
        tips,
        wide=True,
        note="From the root on the left, a step per column. +2.0 fills in the best token (rank 0) "
        "at the third most confident position (rank 2); area is the share of calibration roots "
        "whose future passed through the state.",
    )


def _share(node: Node, roots: int) -> str:
    return f"{node.count / roots:.1%} of roots" if roots else f"{node.count} roots"
