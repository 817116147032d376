"""Pure algorithms on draft coordinates: count chains, grow and prune graphs, replay them.

A `Fill` is a draft state: (position rank, token rank) pairs, sorted. A `Chain` is the true future
of a root: the fills of the states that followed it, each containing the one before.
"""

from spiffy.graphs.chains import Chain, Fill, Prompt, count_chains, edges
from spiffy.graphs.grow import grow, grow_paper
from spiffy.graphs.replay import Replay, replay

__all__ = [
    "Chain",
    "Fill",
    "Prompt",
    "Replay",
    "count_chains",
    "edges",
    "grow",
    "grow_paper",
    "replay",
]
