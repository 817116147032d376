"""Pure algorithms on draft coordinates: count chains, grow and prune graphs, replay them.

A `Fill` is a draft state: (position rank, token rank) pairs, sorted. A `Chain` is the true future
of a root: the fills of the states that followed it, each containing the one before.
"""

from spiffy.graphs.baselines import (
    grow_by_all_parents,
    grow_by_children,
    grow_by_chosen_parents,
    grow_by_count,
    grow_by_nodes_and_transitions,
    grow_by_transitions,
    grow_paper,
)
from spiffy.graphs.chains import Chain, Fill, Prompt, count_chains, transitions
from spiffy.graphs.counts import ChainCounts, chain_from_bytes, chain_to_bytes, grow_counted
from spiffy.graphs.grow import grow, grow_on_replay
from spiffy.graphs.replay import Replay, replay, replay_prefixes

__all__ = [
    "Chain",
    "ChainCounts",
    "Fill",
    "Prompt",
    "Replay",
    "chain_from_bytes",
    "chain_to_bytes",
    "count_chains",
    "grow",
    "grow_by_all_parents",
    "grow_by_children",
    "grow_by_chosen_parents",
    "grow_by_count",
    "grow_by_nodes_and_transitions",
    "grow_by_transitions",
    "grow_counted",
    "grow_on_replay",
    "grow_paper",
    "replay",
    "replay_prefixes",
    "transitions",
]
