"""The search of `expand`, compiled by numba (extra `fast`): the same drafts, some ten times sooner.

The host chooses drafts while the device waits. In NumPy that takes milliseconds, nearly all of them
for calling some thousand functions on small arrays. What is computed, and why, is said by
`features` and `expand`, which are used where numba is not installed; tests hold `loops` to them.
"""

from __future__ import annotations

import numba
import numpy as np

from spiffy.runtime.draft.acceptance import AcceptanceWeights
from spiffy.runtime.draft.compiled import loops
from spiffy.runtime.draft.compiled.arrays import Model, Root
from spiffy.runtime.draft.expand import DEPTH, most_states
from spiffy.runtime.draft.ngrams import Floats, Ints
from spiffy.runtime.draft.outlook import Outlook


def expand(
    weights: AcceptanceWeights, outlook: Outlook, budget: int, room: int
) -> tuple[Ints, Floats]:
    """As `expand.expand`, which says what it takes and returns.

    Equal but for rounding; where that decides, the last of the drafts may be another one.
    """
    budget = min(budget, most_states(outlook))
    choice, p = loops.expand(Model.of(weights), Root.of(outlook), budget, room, min(DEPTH, room))
    return choice, p


def allowed() -> bool:
    """Whether numba may compile (`NUMBA_DISABLE_JIT`)."""
    return not numba.config.DISABLE_JIT


def warm_up() -> None:
    """Compile, or load what was compiled before."""
    nothing = AcceptanceWeights.of({}, None, {}, (), vocab=2)
    ids = np.array([0, 1, 1])
    outlook = Outlook.at(
        ids,
        positions=ids.nonzero()[0],
        tokens=np.zeros((2, 1), dtype=np.int64),
        log_p=np.full((2, 1), -1.0),
        fresh=ids[:1],
        mask_token_id=1,
        eos_token_ids=ids[:0],
        vocab=2,
    )
    expand(nothing, outlook, budget=1, room=1)
