"""Nodes in words."""

from __future__ import annotations

from collections.abc import Sequence

from spiffy.schemas.records import Fill, Node


def written(fill: Fill) -> str:
    """A fill as "+position rank.token rank ..."."""
    return " ".join(f"+{i}.{j}" for i, j in fill)


def beyond_parent(nodes: Sequence[Node], number: int) -> str:
    """What node `number` (from 1) fills in beyond its first parent, written."""
    node = nodes[number - 1]
    parent = node.parents[0]
    known = nodes[parent - 1].fill if parent else ()
    return written(tuple(pair for pair in node.fill if pair not in known))
