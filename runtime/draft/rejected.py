"""What rejected drafts say about states further on: their forward has been computed anyway."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from spiffy.runtime.draft.candidates import Candidates
from spiffy.runtime.draft.outlook import Rejected
from spiffy.runtime.draft.search import fastest_search
from spiffy.runtime.forward.evaluation import Evaluation
from spiffy.runtime.step.canvas import Cursor

_MOST_ASKED = 16  # rejected drafts
_MOST_HEARD = 1 << 13  # positions of all of them: 64 MB of hidden states of 4,096 bfloat16


def with_rejected(
    candidates: Candidates,
    evaluation: Evaluation,
    root: Cursor,
    states: Tensor,
    seen: int,
    span: range,
    mask_token_id: int,
) -> Candidates:
    """Ask those of the last forward's states that hold more than the source of the candidates.

    A draft of the root before may turn out true yet, in part: once the root's new tokens, which it
    does not hold, are joined by its own. What it says then reaches further than the distribution
    that produced the root. Only the candidates' tokens are asked about.

    Parameters
    ----------
    root
        The new root.
    states
        int64 [n, length], evaluated by `evaluation`.
    seen
        The state that the candidates are of.
    span
        Positions of the root's block.
    """
    if len(states) == 1 or not len(candidates.positions):
        return candidates
    known = (candidates.positions, candidates.tokens, candidates.log_p, candidates.fresh)
    positions, tokens, log_p, fresh = (part.numpy() for part in known)
    positions, fresh = positions - span.start, fresh - span.start
    search, block = fastest_search(), slice(span.start, span.stop)
    ids, held = root.ids.numpy()[block], states.numpy()[:, block]
    likely = search.asked(held, ids, seen, positions, tokens, log_p, mask_token_id)
    heard = [state for state in likely.tolist() if evaluation.windows[state].covers(span)]
    asked = np.array(heard[: min(_MOST_ASKED, max(1, _MOST_HEARD // len(positions)))])
    if not len(asked):
        return candidates
    said = evaluation.quoted(
        seen, asked, candidates.positions, candidates.tokens, log_p, search.quotes_of
    )
    if said is None:
        return candidates
    told = search.heard(held[asked], positions, fresh, tokens, log_p, *said, mask_token_id)
    return Candidates(*known, Rejected(*told))
