"""The search of `expand`, compiled by numba (extra `fast`): the same drafts, sooner.

The host chooses drafts while the device waits. In NumPy that takes milliseconds, nearly all of them
for calling some thousand functions on small arrays. What is computed, and why, is said by
`features` and `expand`, which are used where numba is not installed; tests hold `loops` and
`layout` to them.
"""

from __future__ import annotations

import numba
import numpy as np

from spiffy.runtime.draft.acceptance import AcceptanceWeights
from spiffy.runtime.draft.compiled import layout, loops
from spiffy.runtime.draft.compiled.arrays import Facts, Model, Root
from spiffy.runtime.draft.expand import DEPTH, most_states
from spiffy.runtime.draft.ngrams import Floats, Ints
from spiffy.runtime.draft.outlook import LIKELY, TEXT, Rejected


def asked(
    held: Ints,
    ids: Ints,
    seen: int,
    positions: Ints,
    tokens: Ints,
    log_p: Floats,
    mask_token_id: int,
) -> Ints:
    """As `outlook.asked`, which says what it takes and returns."""
    held, ids = np.ascontiguousarray(held), np.ascontiguousarray(ids)
    numbers: Ints = layout.asked(held, ids, seen, positions, tokens, log_p, mask_token_id, LIKELY)
    return numbers


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
) -> Root:
    """As `Outlook.at`, which says what it takes."""
    (count, ranks), heard = tokens.shape, rejected
    if heard is None:
        nothing, no_number = np.empty((0, count), np.int64), np.empty((0, count, ranks))
        heard = Rejected(nothing, no_number, np.empty((0, len(fresh)), np.bool_))
    told = (ids, positions, tokens, log_p, fresh, heard.choice, heard.log_p, heard.unseen)
    # Arrays of another layout would be of another type, for which all is compiled once more.
    facts = Facts._make(map(np.ascontiguousarray, told))
    root: Root = layout.lay_out(facts, mask_token_id, eos_token_ids, TEXT, vocab)
    return root


def prepare(weights: AcceptanceWeights) -> Model:
    """An acceptance model as `expand` takes it."""
    pairs = weights.bigrams.pairs
    return Model.of(weights, layout.tabled(pairs.keys, np.diff(pairs.below)))


def expand(model: Model, root: Root, budget: int, room: int) -> tuple[Ints, Floats]:
    """As `expand.expand`, which says what it takes and returns, of what `prepare` made.

    Equal but for rounding; where that decides, the last of the drafts may be another one.
    """
    budget = min(budget, most_states(len(root.positions)))
    choice, p = loops.expand(model, root, budget, room, min(DEPTH, room))
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
    expand(nothing, root, budget=1, room=1)
    asked(ids[None], ids, 0, ids[1:], np.zeros((2, 1), dtype=np.int64), np.full((2, 1), -1.0), 1)
