"""Recording plain decodes: for every root, the chain of its true future in draft coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spiffy.graphs import Chain, Fill, Prompt
from spiffy.runtime.canvas import Cursor
from spiffy.runtime.decode import Task
from spiffy.runtime.draft import rank_candidates
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.policy import Distribution
from spiffy.schemas import DecodingSettings

# Deeper futures and rarer tokens are never worth a draft (docs/calibration.md).
MAX_DEPTH = 12
TOKEN_RANKS = 4


@dataclass(frozen=True)
class _Root:
    """Draft coordinates of one root: ranks by position, and how much a draft may fill."""

    ranks: dict[int, int]
    tokens: list[list[int]]
    room: int


class Recorder:
    """A drafter that drafts nothing and remembers the draft coordinates of every root."""

    def __init__(self, model: DiffusionLM, settings: DecodingSettings) -> None:
        self.mask_token_id = model.mask_token_id
        self.settings = settings
        self.roots: dict[int, _Root] = {}  # by number of denoising steps made before the root

    def __call__(self, root: Cursor, origin: Distribution, room: int) -> Tensor:
        """See `spiffy.runtime.draft.Drafter`."""
        candidates = rank_candidates(origin, self.settings, self.mask_token_id, TOKEN_RANKS)
        ranks = {position: rank for rank, position in enumerate(candidates.positions.tolist())}
        self.roots[root.step] = _Root(ranks, candidates.tokens.tolist(), room)
        return root.ids.new_empty((0, len(root.ids)))


def chains(task: Task) -> Prompt:
    """The chain of every forward of a finished plain decode whose drafter was a `Recorder`."""
    recorder = task.drafter
    assert isinstance(recorder, Recorder)
    sequence = [task.canvas.start(task.prompt, task.model.mask_token_id), *task.path]
    # A step that commits nothing (Dream's timesteps) needs no forward: the state stays the root.
    moved = [
        (step, cursor.ids.tolist())
        for step, cursor in enumerate(sequence)
        if step == 0 or not torch.equal(cursor.ids, sequence[step - 1].ids)
    ]
    states = [ids for _, ids in moved]
    # The last state is the finished answer: nothing is forwarded there.
    return [_chain(recorder.roots.get(step), states, k) for k, (step, _) in enumerate(moved[:-1])]


def _chain(root: _Root | None, states: list[list[int]], step: int) -> Chain | None:
    if root is None:
        return None
    chain: list[Fill] = []
    for state in states[step + 1 : step + 1 + MAX_DEPTH]:
        fill = _fill(root, states[step], state)
        if fill is None or len(fill) > root.room:
            break
        chain.append(fill)
    return tuple(chain)


def _fill(root: _Root, before: list[int], after: list[int]) -> Fill | None:
    """What was filled in since the root, or None if no draft node can say it."""
    pairs = []
    for position, (old, new) in enumerate(zip(before, after, strict=True)):
        if old == new:
            continue
        rank = root.ranks.get(position)
        if rank is None or new not in root.tokens[rank]:
            return None
        pairs.append((rank, root.tokens[rank].index(new)))
    return tuple(sorted(pairs))
