"""What rejected drafts say about states further on: their forward has been computed anyway."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from spiffy.runtime.draft.candidates import Candidates
from spiffy.runtime.draft.ngrams import Floats
from spiffy.runtime.draft.outlook import LIKELY, Rejected
from spiffy.runtime.draft.search import fastest_search
from spiffy.runtime.forward.evaluation import Evaluation
from spiffy.runtime.step.canvas import Cursor

_MOST_ASKED = 16  # rejected drafts
_MOST_HEARD = 1 << 13  # positions of all of them: 64 MB of hidden states of 4,096 bfloat16
_SURE = 1 - 1e-12


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
    that produced the root. Only the candidates' tokens are asked about; all others together are
    taken to have the weight (the sum of exponentiated logits) that they have there.

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
    log_p = candidates.log_p.numpy()
    if len(states) == 1 or log_p.max(initial=-np.inf) <= LIKELY:
        return candidates
    block = slice(span.start, span.stop)
    ids, held = root.ids[block].numpy(), states[:, block].numpy()
    tokens = candidates.tokens.numpy()
    positions = candidates.positions.numpy() - span.start
    fresh = candidates.fresh.numpy() - span.start
    likely = fastest_search().asked(held, ids, seen, positions, tokens, log_p, mask_token_id)
    heard = [state for state in likely.tolist() if evaluation.windows[state].covers(span)]
    asked = np.array(heard[: min(_MOST_ASKED, max(1, _MOST_HEARD // len(positions)))])
    if not len(asked):
        return candidates
    said = evaluation.quoted(seen, asked.tolist(), candidates.positions, candidates.tokens, log_p)
    if said is None:
        return candidates
    there = held[asked]
    filled, same = there[:, positions] != mask_token_id, tokens == there[:, positions, None]
    quoted = _log_p_of(*said, log_p)
    quoted = np.where(filled[:, :, None], log_p, quoted)  # nobody asks of those
    numbers = np.isfinite(quoted).all((1, 2))  # a draft may overflow where the truth does not
    choice = np.where(filled, same.argmax(-1), -1)
    unseen = there[:, fresh] == mask_token_id
    rejected = Rejected(choice[numbers], quoted[numbers], unseen[numbers])
    return replace(candidates, rejected=rejected)


def _log_p_of(log_total: Floats, logits: Floats, known: Floats) -> Floats:
    """Log-probabilities of some tokens' logits [R, M, J].

    All tokens that are not among the J have the weight that they have at the source of the
    candidates, where all together have `log_total` [M], and the J log-probabilities `known` [M, J].
    """
    others = log_total + np.log1p(-np.minimum(np.exp(known).sum(-1), _SURE))
    log_p: Floats = logits - np.logaddexp(np.logaddexp.reduce(logits, -1), others)[:, :, None]
    return log_p
