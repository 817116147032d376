"""The transformer, compiled by torch once for forwards of any size.

Compiled code calls attention as one opaque operation (`attention`), so it knows of positions and
nothing of rows, prefixes and masks. Only their number varies, and that it leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from spiffy.runtime.models.attention import Group
from spiffy.runtime.models.base import DiffusionLM
from spiffy.schemas import SpiffyError
from spiffy.schemas.notes import note

_TRIED = (64, 8)  # positions: the first is compiled, which has to do for the second
_LONG = 2.0  # seconds


def compile_transformer(model: DiffusionLM) -> None:
    """Compile a model's transformer, in place, and try it.

    What torch remembers between processes (`TORCHINDUCTOR_CACHE_DIR`) makes the next time shorter.

    Raises
    ------
    SpiffyError
        If torch cannot compile it as a whole, or has no compiler to do it with.
    """
    note(f"compiling {model.name}: up to a minute the first time")
    started = perf_counter()
    model.compiled = _whole(model.module)
    try:
        for positions in _TRIED:
            ids = torch.arange(positions, device=model.device) % model.vocab_size
            model.hidden_states(ids, ids, [Group(1, positions, whole=positions)])
    except Exception as error:  # of any part of the compiler
        reason = " ".join(str(error).split())[:300]
        raise SpiffyError(
            f"{model.name} cannot be compiled: load it without ({type(error).__name__}: {reason})"
        ) from None
    model.remember()
    if (took := perf_counter() - started) > _LONG:
        note(f"compiled in {took:.0f} s")


def _whole(module: Any) -> Callable[..., Any]:
    """Without breaks, for any number of positions."""
    return torch.compile(module.model, fullgraph=True, dynamic=True)
