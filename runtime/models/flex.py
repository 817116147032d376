"""Attention under a mask by a kernel that leaves out what nobody attends to: FlexAttention.

In a forward over many drafts each state attends to the prefix, to itself and to few others. torch's
usual attention computes all of that square and then hides most of it. Compiled for a GPU,
FlexAttention knows the mask by tiles, leaves out the empty ones, and asks the mask only in those
that are neither empty nor full.

Whether that is faster is the machine's affair, and whether it is right has to be seen on it, so it
is tried on the machine beside torch's usual attention (`better_masked`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from spiffy.runtime.models.attention import Masked
from spiffy.runtime.models.device import median_seconds, without_cudnn
from spiffy.runtime.models.mask import Mask
from spiffy.schemas.errors import said
from spiffy.schemas.notes import note

_TIMED = 10  # repetitions
_ROOM = 5  # slots behind those that are attended to


class Flex:
    """FlexAttention as `attention.Masked`.

    Parameters
    ----------
    attend
        `flex_attention`, compiled or (slow, and the same) as it is.
    """

    def __init__(self, attend: Callable[..., Any] = flex_attention) -> None:
        self._attend = attend

    def prepared(self, mask: Mask) -> BlockMask:
        """A mask by tiles."""
        (queries, keys), seen = mask.shape, mask.dense()

        def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return seen[query, key]

        return create_block_mask(attends, None, None, queries, keys, device=seen.device)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float
    ) -> Tensor:
        """See `attention.Masked`."""
        out: Tensor = self._attend(query, key, value, block_mask=mask, scale=scaling)
        return out


class _Usual:
    """torch's usual attention, as `attention.Masked`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def prepared(self, mask: Mask) -> Tensor:
        return mask.added(self._dtype)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
    ) -> Tensor:
        return scaled_dot_product_attention(query, key, value, mask, scale=scaling)


class Shape(NamedTuple):
    """What a model's attention looks like; `shared` heads have the same keys and values."""

    heads: int
    shared: int
    width: int
    layers: int


class _Forward(NamedTuple):
    """One layer's attention in a forward over a root and some drafts, of random numbers."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    scaling: float

    @classmethod
    def over(cls, case: _Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> _Forward:
        """Every state sees the prefix, the root, and itself; heads that share keys lie below."""
        state = torch.arange(1 + case.drafts, device="cpu").repeat_interleave(case.block)
        own = (state[:, None] == state) | (state == 0)
        seen = torch.cat((own.new_ones(len(state), case.prefix), own), dim=1)
        mask = Mask.of(seen).repeated(shape.shared).to(device)
        queries, keys = mask.shape
        draw = torch.Generator("cpu").manual_seed(0)

        def drawn(positions: int, heads: int) -> Tensor:  # as layers make it
            numbers = torch.randn(1, positions, heads, shape.width, generator=draw, device="cpu")
            return numbers.to(device, dtype).transpose(1, 2)

        pairs = shape.heads // shape.shared
        query = drawn(len(state), shape.heads).reshape(1, pairs, queries, shape.width)
        # They lie in larger buffers (`attention.KeyValues`).
        buffers = (drawn(keys + _ROOM, pairs).contiguous() for _ in range(2))
        key, value = (buffer[:, :, :keys] for buffer in buffers)
        return cls(query, key, value, mask, shape.width**-0.5)

    def off(self, way: Masked) -> float:
        """How far a way of computing it is from float64's result, at most."""
        exact = scaled_dot_product_attention(
            self.query.double(),
            self.key.double(),
            self.value.double(),
            self.mask.dense(),
            scale=self.scaling,
        )
        return (self.through(way, way.prepared(self.mask)) - exact).abs().max().item()

    def seconds(self, way: Masked, layers: int) -> float:
        """Of all layers, and of what is made of the mask for them, the median."""

        def attended() -> None:
            prepared = way.prepared(self.mask)
            for _ in range(layers):
                self.through(way, prepared)

        return median_seconds(attended, self.query.device, _TIMED)

    def through(self, way: Masked, prepared: Any) -> Tensor:
        """Attention's result, with the mask as that way has prepared it."""
        return way(self.query, self.key, self.value, prepared, self.scaling)


class _Case(NamedTuple):
    """Sizes of a forward."""

    drafts: int
    block: int
    prefix: int


# Code is compiled apart for few queries and for many, and for one tile of keys (or queries) and for
# several; heads that share keys multiply the queries. These are compiled,
_COMPILED = (
    *(_Case(3, 3, 0), _Case(3, 3, 500), _Case(8, 8, 0), _Case(8, 8, 500)),
    *(_Case(32, 16, 0), _Case(32, 32, 500)),
)
# and have to do for others.
_OTHERS = (_Case(2, 4, 33), _Case(4, 3, 300), _Case(5, 7, 30), _Case(5, 7, 300), _Case(16, 32, 700))
_DRAFTING = _Case(32, 32, 500)  # timed


@torch.inference_mode()
def better_masked(shape: Shape, dtype: torch.dtype, device: torch.device) -> Flex | None:
    """FlexAttention, compiled, if it is as exact as torch's usual attention here, and faster.

    As exact: at most twice as far from what float64 gives. It must not be compiled for every shape
    anew.
    """
    flex = Flex(_compiled())
    try:
        with without_cudnn(device):  # as in forwards
            why = _against(flex, shape, dtype, device)
    except Exception as error:  # of any part of the compiler
        why = f"{type(error).__name__}: {said(error, 300)}"
    if why is None:
        note("attention under masks is FlexAttention's: as exact as torch's usual one, and faster")
        return flex
    note(f"attention under masks is torch's usual one; FlexAttention is not used: {why}")
    return None


def _against(flex: Flex, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """What speaks against it, if anything does."""
    usual = _Usual(dtype)
    for cases in (_COMPILED, _OTHERS):
        compiled = counters["stats"]["unique_graphs"]
        for case in cases:
            forward = _Forward.over(case, shape, dtype, device)
            off, usually = forward.off(flex), forward.off(usual)
            if not off <= 2 * usually:
                return f"it is off by {off:.2g}, the usual one by {usually:.2g}"
    if counters["stats"]["unique_graphs"] > compiled:
        return "it is compiled for every shape anew"
    forward = _Forward.over(_DRAFTING, shape, dtype, device)
    takes, usually = (1000 * forward.seconds(way, shape.layers) for way in (flex, usual))
    return None if takes < usually else f"it takes {takes:.2f} ms, the usual one {usually:.2f} ms"


def _compiled() -> Callable[..., Any]:
    """For any number of queries and keys."""
    return torch.compile(flex_attention, dynamic=True)
