"""Nodes and unmasking policies in words."""

from __future__ import annotations

from collections.abc import Sequence

from spiffy.schemas.decoding import DecodingSettings
from spiffy.schemas.records import Fill, Node


def written(fill: Fill) -> str:
    """A fill as "+position rank.token rank ..."."""
    return " ".join(f"+{i}.{j}" for i, j in fill)


def policy_in_words(settings: DecodingSettings) -> str:
    """The unmasking policy, with what it commits by."""
    if settings.policy == "threshold":
        return f"threshold {settings.threshold:g}"
    if settings.policy == "joint":
        return (
            f"joint {settings.threshold:g}, edits above {settings.edit_threshold:g}, at most "
            f"{settings.max_post_steps} steps of a full block"
        )
    if settings.policy == "entropy-bounded":
        return f"entropy-bounded, {settings.entropy_bound:g} nats"
    if settings.steps_per_block is not None:
        return f"{settings.policy}, {settings.steps_per_block} steps a block ({settings.schedule})"
    return f"{settings.policy}, tokens a step: {settings.tokens_per_step}"


def beyond_parent(nodes: Sequence[Node], number: int) -> str:
    """What node `number` (from 1) fills in beyond its first parent, written."""
    node = nodes[number - 1]
    parent = node.parents[0]
    known = nodes[parent - 1].fill if parent else ()
    return written(tuple(pair for pair in node.fill if pair not in known))
