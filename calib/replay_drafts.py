"""What a drafter would have saved, exactly, from recorded decodes and without the model.

The true states are the same whatever is drafted, so a recorded plain decode tells where every walk
would have ended. The drafter that is replayed is the very object that decodes. What a plain decode
does not record is what rejected drafts say: about states of the same block, which an acceptance
model asks for, and about the next block (block-causal models, `BlockEdges.first`). The replay does
without, and leaves out what that gains.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from spiffy.calib.record import Trace, narrowed
from spiffy.graphs import Replay
from spiffy.runtime.draft import Chooser, Drafter, Walk


def replay_drafter(traces: Iterable[Trace], drafter: Drafter) -> Replay:
    """Replay whole decodes: only where a walk ends is the next root. A `Chooser` learns from it."""
    chooser = drafter if isinstance(drafter, Chooser) else None
    steps = forwards = drafts = 0
    for trace in traces:
        last = len(trace.path) - 1
        at = 0
        while at < last:
            forwards += 1
            reached = at + 1
            root = trace.roots[at]
            if root is not None:
                known = narrowed(root.candidates, drafter.token_ranks)
                led = drafter if chooser is None else chooser.leader
                states = led(trace.path[at], known, root.room)
                drafts += len(states)
                while reached < last and (states == trace.path[reached].ids).all(1).any():
                    reached += 1
                if chooser is not None:
                    true = torch.stack([state.ids for state in trace.path[at + 1 : reached + 1]])
                    walk = Walk(led, trace.path[at], known, root.room, states, true)
                    chooser.learn(walk)
            at = reached
        steps += last
    return Replay(steps, forwards, drafts)
