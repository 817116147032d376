"""A draft graph as a picture that needs no library: where nodes stand, and SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from spiffy.schemas.labels import beyond_parent, written
from spiffy.schemas.records import Node

Point = tuple[float, float]

_DRAWN = 128  # nodes
_LABELLED = 48  # of them, those in most chains
_COLUMN, _ROW, _EDGE = 92, 34, 40  # pixels
_ONE_WAY, _SEVERAL = "#00785a", "#c4430b"


def layout(nodes: Sequence[Node]) -> tuple[list[Point], list[tuple[int, int, bool]]]:
    """Where nodes stand, by number, and edges as (parent, child, whether it is the first parent).

    A column per step from the root, by the longest way there; a first child stands beside its
    parent, the others below.
    """
    edges = [
        (parent, number, parent == node.parents[0])
        for number, node in enumerate(nodes, start=1)
        for parent in node.parents
    ]
    column = [0]
    for node in nodes:
        column.append(1 + max(column[parent] for parent in node.parents))
    place: dict[int, Point] = {}
    siblings: Counter[int] = Counter()
    for at in range(max(column) + 1):
        numbers = [k for k, its in enumerate(column) if its == at]
        # Parents from above to below, so that no two edges to first parents cross.
        first = {k: nodes[k - 1].parents[0] for k in numbers if k}
        above = -1.0
        for number in sorted(numbers, key=lambda k: (-place[first[k]][1] if k else 0.0, k)):
            if number:
                beside = -place[first[number]][1] + siblings[first[number]]
                siblings[first[number]] += 1
                above = max(beside, above + 1)
            place[number] = (float(at), -max(above, 0.0))
    return [place[k] for k in range(len(nodes) + 1)], edges


def svg(nodes: Sequence[Node], roots: int) -> str:
    """The first nodes as an SVG element, from left (the root) to right.

    Area is the share of calibration roots, a second colour says that several ways lead there, and
    a pointer over a node shows what it fills in.

    Parameters
    ----------
    roots
        Of the calibration; 0: shares are not known.
    """
    drawn = f"{len(nodes)} nodes"
    if len(nodes) > _DRAWN:
        drawn = f"the first {_DRAWN} of {drawn}"
    nodes = nodes[:_DRAWN]
    places, edges = layout(nodes)
    spots = [(_EDGE + x * _COLUMN, _EDGE - y * _ROW) for x, y in places]
    width = max(x for x, _ in spots) + 2 * _EDGE
    height = max(y for _, y in spots) + _EDGE
    most = max((node.count for node in nodes), default=0) or 1
    by_count = sorted(range(1, len(nodes) + 1), key=lambda k: (-nodes[k - 1].count, k))
    labelled = {*by_count[:_LABELLED]}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="Draft graph, {drawn}" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        'style="max-width:100%;height:auto" font-family="sans-serif" font-size="10">'
    ]
    for parent, child, is_first in edges:
        (x0, y0), (x1, y1) = spots[parent], spots[child]
        dashes = "" if is_first else ' stroke-dasharray="3 3"'
        parts.append(
            f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="#8a949e"{dashes}/>'
        )
    x, y = spots[0]
    parts.append(f'<rect x="{x - 6:g}" y="{y - 6:g}" width="12" height="12" fill="currentColor"/>')
    parts.append(_text(x, y - 12, "root"))
    for number, node in enumerate(nodes, start=1):
        x, y = spots[number]
        radius = 3 + 8 * (node.count / most) ** 0.5
        colour = _SEVERAL if len(node.parents) > 1 else _ONE_WAY
        share = f"{node.count / roots:.1%} of roots" if roots else f"{node.count} roots"
        title = escape(f"node {number}: {written(node.fill)}, {share}")
        parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:.1f}" fill="{colour}">'
            f"<title>{title}</title></circle>"
        )
        if number in labelled:
            parts.append(_text(x, y - radius - 3, beyond_parent(nodes, number)))
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="middle" fill="currentColor">{escape(text)}</text>'
    )
