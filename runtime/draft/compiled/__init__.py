"""The search for drafts, compiled by numba (extra `fast`): the same drafts, sooner.

The host chooses drafts while the device waits. In NumPy that takes milliseconds, nearly all of them
for calling some thousand functions on small arrays. What is computed, and why, is said by
`primitives`, `outlook`, `features` and `expand` of `draft`, which are used where numba is not
installed; tests hold the `primitives` here, `layout` and `loops` to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from spiffy.runtime.draft.acceptance import AcceptanceWeights
from spiffy.runtime.draft.compiled import layout, loops, primitives
from spiffy.runtime.draft.compiled.arrays import Facts, Outlook, Weights
from spiffy.runtime.draft.expand import DEPTH, most_states
from spiffy.runtime.draft.ngrams import Floats, Ints
from spiffy.runtime.draft.outlook import TEXT, Rejected
from spiffy.runtime.draft.primitives import LIKELY, SURE


def _contiguous(function: Callable[..., Any], *constants: float) -> Callable[..., Any]:
    """A compiled function as its namesake in `draft.primitives`, which says what it takes.

    Arrays of another layout would be of another type, for which all is compiled once more.
    """

    def called(*facts: Any) -> Any:
        given = (np.ascontiguousarray(f) if isinstance(f, np.ndarray) else f for f in facts)
        return function(*given, *constants)

    return called


rank = _contiguous(primitives.rank)
informative_drafts = _contiguous(primitives.informative_drafts, LIKELY)
cross_logits_of = _contiguous(primitives.cross_logits_of)
rejected_log_p = _contiguous(primitives.rejected_log_p, SURE)
fill_in = _contiguous(primitives.fill_in)


def lay_out(
    ids: Ints,
    positions: Ints,
    tokens: Ints,
    log_p: Floats,
    fresh: Ints,
    *,
    mask_token_id: int,
    eos_token_ids: Ints,
    vocab: int,
    rejected: Rejected | None = None,
) -> Outlook:
    """As `Outlook.at`, which says what it takes."""
    count, ranks = tokens.shape
    if rejected is None:
        nothing, no_number = np.empty((0, count), np.int64), np.empty((0, count, ranks))
        rejected = Rejected(nothing, no_number, np.empty((0, len(fresh)), np.bool_))
    facts = (ids, positions, tokens, log_p, fresh, rejected.choice, rejected.log_p, rejected.unseen)
    contiguous = Facts._make(map(np.ascontiguousarray, facts))
    root: Outlook = layout.lay_out(contiguous, mask_token_id, eos_token_ids, TEXT, vocab)
    return root


def prepare(weights: AcceptanceWeights) -> Weights:
    """An acceptance model as `expand` takes it."""
    pairs = weights.bigrams.pairs
    return Weights.of(weights, layout.tabled(pairs.keys, np.diff(pairs.below)))


def expand(model: Weights, outlook: Outlook, budget: int, room: int) -> tuple[Ints, Floats]:
    """As `expand.expand`, which says what it takes and returns, of what `prepare` made.

    Equal but for rounding; where that decides, the last of the drafts may be another one.
    """
    budget = min(budget, most_states(len(outlook.positions)))
    choice, p = loops.expand(model, outlook, budget, room, min(DEPTH, room))
    return choice, p


def allowed() -> bool:
    """Whether numba may compile (`NUMBA_DISABLE_JIT`)."""
    return not numba.config.DISABLE_JIT


def warm_up() -> None:
    """Compile, or load what was compiled before."""
    nothing = prepare(AcceptanceWeights.of({}, None, {}, (), vocab=2))
    ids = np.array([0, 1, 1])
    root = lay_out(
        ids,
        positions=ids.nonzero()[0],
        tokens=np.zeros((2, 1), dtype=np.int64),
        log_p=np.full((2, 1), -1.0),
        fresh=ids[:1],
        mask_token_id=1,
        eos_token_ids=ids[:0],
        vocab=2,
    )
    choice, _ = expand(nothing, root, budget=1, room=1)
    fill_in(ids, root.positions, root.tokens, choice)
    one, tokens, log_p = ids[1:2], ids[:1, None], np.full((1, 1), -1.0)
    rank(one, ids[None, :2], np.full((1, 2), -1.0), log_p[0], one, 1, 1, True)
    informative_drafts(ids[None], ids, 0, one, tokens, log_p, 1)
    pair = np.zeros_like(ids[:2, None])
    cross_logits_of(tokens, 0, ids[:1], pair, ids[:1], log_p, ids[:1], tokens)
    rejected_log_p(ids[None], one, ids[:1], tokens, log_p, log_p[0], log_p[None], 1)
