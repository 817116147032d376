"""Searching a root for drafts: by NumPy, or by what numba compiled where that is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

from spiffy.runtime.draft.acceptance import AcceptanceWeights
from spiffy.runtime.draft.expand import expand
from spiffy.runtime.draft.ngrams import Bools, Floats, Ints
from spiffy.runtime.draft.outlook import Outlook
from spiffy.runtime.draft.primitives import (
    cross_logits_of,
    fill_in,
    informative_drafts,
    rank,
    rejected_log_p,
)
from spiffy.schemas.errors import said


class Search(NamedTuple):
    """What the host does for an acceptance model's drafts, of one root after the other.

    Compiled functions take and return the same, but for what only they pass to each other: roots
    and prepared models.

    Attributes
    ----------
    rank, informative_drafts, cross_logits_of, rejected_log_p, fill_in
        The functions of these names in `primitives`.
    lay_out, expand
        `Outlook.at` and `expand.expand`.
    prepare
        From an acceptance model to what `expand` takes.
    """

    rank: Callable[..., tuple[Ints, Ints, Floats]]
    informative_drafts: Callable[..., Ints]
    cross_logits_of: Callable[..., Floats]
    rejected_log_p: Callable[..., tuple[Ints, Floats, Bools]]
    lay_out: Callable[..., Any]
    prepare: Callable[[AcceptanceWeights], Any]
    expand: Callable[[Any, Any, int, int], tuple[Ints, Floats]]
    fill_in: Callable[[Ints, Ints, Ints, Ints], Ints]


def _as_it_is(weights: AcceptanceWeights) -> AcceptanceWeights:
    return weights


IN_NUMPY = Search(
    rank,
    informative_drafts,
    cross_logits_of,
    rejected_log_p,
    Outlook.at,
    _as_it_is,
    expand,
    fill_in,
)


@cache
def fastest_search() -> Search:
    """The search for drafts, compiled where numba is installed (extra `fast`).

    The first call on a machine compiles, for half a minute; numba keeps the result. Where numba
    does not work, a warning says why, and NumPy does the same. `NUMBA_DISABLE_JIT=1` is respected:
    NumPy is faster than loops that nobody compiles.
    """
    if find_spec("numba") is None:
        return IN_NUMPY
    try:
        from spiffy.runtime.draft import compiled

        if not compiled.allowed():
            return IN_NUMPY
        compiled.warm_up()
    except Exception as error:  # of the compiler, or of where it keeps its work
        warnings.warn(
            f"numba does not work here, drafts are searched by NumPy: {said(error, 300)}",
            stacklevel=2,
        )
        return IN_NUMPY
    return Search._make(getattr(compiled, name) for name in Search._fields)
