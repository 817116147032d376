"""What rejected drafts say about states further on: their forward has been computed anyway."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from spiffy.runtime.draft.candidates import Candidates
from spiffy.runtime.draft.outlook import Rejected
from spiffy.runtime.draft.search import fastest_search
from spiffy.runtime.forward.evaluation import Evaluation
from spiffy.runtime.step.canvas import Cursor

_MOST_DRAFTS = 16  # that are asked
_MOST_POSITIONS = 1 << 13  # of all of them: 64 MB of hidden states of 4,096 bfloat16


def with_rejected(
    candidates: Candidates,
    evaluation: Evaluation,
    root: Cursor,
    states: Tensor,
    source: int,
    span: range,
    mask_token_id: int,
) -> Candidates:
    """The candidates with what the last forward's drafts say of the same tokens, as `rejected`.

    They come back as they were where no draft knows more than their source.

    A draft of the root before may turn out true yet, in part: once the root's new tokens, which it
    does not hold, are joined by its own. What it says then reaches further than the distribution
    that produced the root. Only the candidates' tokens are asked about.

    Parameters
    ----------
    root
        The new root.
    states
        int64 [n, length], evaluated by `evaluation`.
    source
        The state whose distribution the candidates come from.
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
    most = min(_MOST_DRAFTS, max(1, _MOST_POSITIONS // len(positions)))
    found = search.informative_drafts(held, ids, source, positions, tokens, log_p, mask_token_id)
    covering = [state for state in found.tolist() if evaluation.windows[state].covers(span)]
    drafts = np.array(covering[:most])
    if not len(drafts):
        return candidates
    logits = evaluation.cross_logits(
        source, drafts, candidates.positions, candidates.tokens, log_p, search.cross_logits_of
    )
    if logits is None:
        return candidates
    rejected = search.rejected_log_p(
        held[drafts], positions, fresh, tokens, log_p, *logits, mask_token_id
    )
    return Candidates(*known, Rejected(*rejected))
