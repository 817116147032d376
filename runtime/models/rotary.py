"""RoPE that depends on how long a sequence is, and how many positions scaled RoPE reaches.

`dynamic` RoPE of transformers takes its frequencies from the furthest position of a forward, and of
the forwards before it. A decode's forwards hold parts of one sequence, and drafts change which. So
here they are those of the whole sequence, prompt and answer, in every forward of its decode: what
transformers' module computes when it is given all of it at once. Sequences that share a forward
keep their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spiffy.runtime.models.attention import Group
from spiffy.runtime.models.batch import Batch

_DYNAMIC = "dynamic"
_REMEMBERED = 64  # lengths; the prompts of a batch, or of a set, have a few

# Of consecutive positions of a forward: how long their sequence is, and how many they are.
_LENGTHS: ContextVar[list[tuple[int, int]] | None] = ContextVar("lengths", default=None)


class LengthRotary(nn.Module):
    """Dynamic RoPE of the lengths that `whole_lengths` states; elsewhere the module's own.

    Parameters
    ----------
    own
        transformers' rotary embedding of type `dynamic`.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self._fixed: dict[int, nn.Module] = {}

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [batch, query, dimensions] at positions (int64 [batch, query])."""
        lengths = _LENGTHS.get()
        if lengths is None:  # a caller of the module that knows nothing of this
            cosines, sines = self.own(hidden, position_ids)
            return cosines, sines
        found, start = [], 0
        for length, count in lengths:
            part = slice(start, start + count)
            found.append(self._of_length(length)(hidden[:, part], position_ids[:, part]))
            start = part.stop
        if len(found) == 1:
            return found[0]  # type: ignore[no-any-return]
        cosines, sines = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return cosines, sines

    def _of_length(self, length: int) -> nn.Module:
        """The same embedding with the frequencies of one length, which no forward changes."""
        known = self._fixed.get(length)
        if known is not None:
            return known
        fixed: Any = deepcopy(self.own)
        frequencies, scaling = ROPE_INIT_FUNCTIONS[_DYNAMIC](fixed.config, None, seq_len=length)
        fixed.rope_type = "default"  # so that transformers leaves them alone
        fixed.inv_freq = frequencies.to(fixed.inv_freq.device)
        fixed.attention_scaling = scaling
        if len(self._fixed) >= _REMEMBERED:
            self._fixed = {}
        self._fixed[length] = fixed
        return fixed  # type: ignore[no-any-return]


def install(module: Any) -> None:
    """Put `LengthRotary` into a module with dynamic RoPE."""
    stated = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if stated.get("rope_type") == _DYNAMIC and not isinstance(
        module.model.rotary_emb, LengthRotary
    ):
        module.model.rotary_emb = LengthRotary(module.model.rotary_emb)


@contextmanager
def whole_lengths(groups: Sequence[Group | Batch]) -> Iterator[None]:
    """Say of sequences of which lengths the positions of a forward are parts."""
    found = [
        (length, sum(positions for _, positions in alike))
        for length, alike in groupby(
            chain.from_iterable(group.wholes for group in groups), itemgetter(0)
        )
    ]
    before = _LENGTHS.set(None if any(length is None for length, _ in found) else found)
    try:
        yield
    finally:
        _LENGTHS.reset(before)


def reach(trained: int | None, rope: Mapping[str, Any]) -> int | None:
    """Positions that a model may be asked about, from those that its config states and its RoPE.

    As serving engines have it: the scaling's factor times the length before scaling, which is the
    stated one where nothing else is named; `llama3` and unscaled RoPE reach as far as stated.
    """
    factor = rope.get("factor", 1)
    if trained is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return trained
    return max(trained, int(rope.get("original_max_position_embeddings", trained) * factor))
