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
from spiffy.runtime.draft.told import asked, filled, heard, quotes_of, ranked
from spiffy.schemas.errors import said


class Search(NamedTuple):
    """What the host does for an acceptance model's drafts, of one root after the other.

    Attributes
    ----------
    ranked, asked, quotes_of, heard, lay_out, expand, filled
        `Outlook.at`, `expand.expand` and what is called so in `told`, or what does the same.
    prepare
        From an acceptance model to what `expand` takes.
    """

    ranked: Callable[..., tuple[Ints, Ints, Floats]]
    asked: Callable[..., Ints]
    quotes_of: Callable[..., Floats]
    heard: Callable[..., tuple[Ints, Floats, Bools]]
    lay_out: Callable[..., Any]
    prepare: Callable[[AcceptanceWeights], Any]
    expand: Callable[[Any, Any, int, int], tuple[Ints, Floats]]
    filled: Callable[[Ints, Ints, Ints, Ints], Ints]


def _as_it_is(weights: AcceptanceWeights) -> AcceptanceWeights:
    return weights


IN_NUMPY = Search(ranked, asked, quotes_of, heard, Outlook.at, _as_it_is, expand, filled)


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
