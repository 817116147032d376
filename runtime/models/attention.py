"""Where keys and values live, and who attends to whom in a forward.

A forward's positions, of one sequence or of many, run through the transformer as one row, without
padding. Attention alone has to know which of them belong together (`Group`). It puts a sequence's
keys and values into their slots (`KeyValues`) and reads them there, so that what was computed
before is neither copied nor padded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spiffy.runtime.models.batch import Batch, BatchMask
from spiffy.runtime.models.mask import Mask
from spiffy.runtime.models.slots import KeyValues

_NAME = "spiffy"  # of this module's attention, in transformers' register


class Group(NamedTuple):
    """Rows of a forward that attend alike, each within itself.

    Attributes
    ----------
    rows, length
        Number of rows, and positions of each. They follow one another.
    mask
        Which of the `kv_end` slots (without `kv`, of the `length` positions) each position attends
        to; None: to all.
    kv
        Where the row's keys and values go, and what it attends to lies (one row only); None: rows
        attend to their own positions.
    slots
        The slots of `kv` that they go to, run by run.
    kv_end
        Slots before this one are attended to.
    whole
        Length of the sequence that each row is a part of, where RoPE depends on it.
    at
        The slots on the device (int64), where several runs are put there at once.
    """

    rows: int
    length: int
    mask: Mask | None = None
    kv: KeyValues | None = None
    slots: Sequence[range] = ()
    kv_end: int = 0
    whole: int | None = None
    at: Tensor | None = None

    @property
    def positions(self) -> int:
        """How many there are, of all rows."""
        return self.rows * self.length

    @property
    def wholes(self) -> tuple[tuple[int | None, int], ...]:
        """See `Batch.wholes`; all rows are alike."""
        return ((self.whole, self.positions),)

    def tensors(self) -> Iterator[Tensor]:
        """What has to be on the device."""
        if self.at is not None:
            yield self.at
        if self.mask is not None:
            yield from (self.mask.query, self.mask.key, self.mask.allowed)

    def with_tensors(self, tensors: Iterator[Tensor]) -> Group:
        """The same with the tensors that `tensors` has, on a device."""
        at = None if self.at is None else next(tensors)
        mask = self.mask
        if mask is not None:
            mask = Mask(next(tensors), next(tensors), next(tensors), mask.keys)
        return self._replace(at=at, mask=mask)


class Masked(Protocol):
    """A kernel for attention under a mask."""

    def prepared(self, mask: Mask) -> Any:
        """What it makes of a mask, once for all layers."""
        ...

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float
    ) -> Tensor:
        """From [rows, heads, query or keys, head_dim] each to [rows, heads, query, head_dim]."""
        ...


class _Arrangement:
    """The groups of one forward, and the attention that computes each of them."""

    def __init__(
        self, groups: Sequence[Group | Batch], attention: str, masked: Masked | None
    ) -> None:
        self.groups = groups
        self.attention = attention
        self.masked = masked
        self.layers = 0  # that attended
        self._masks: dict[tuple[Any, ...], Any] = {}  # made once, for all layers
        for group in groups:
            if isinstance(group, Group) and group.kv is not None:
                group.kv.reserve(group.kv_end)

    def attend(
        self,
        number: int,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **options: Any,
    ) -> Tensor:
        """From [1, heads, query, head_dim] to [1, query, heads, head_dim], group by group.

        `layer` is transformers' module, for attention that is not torch's, and `number` its number.
        """
        self.layers += 1
        # Heads that share keys and values are put below each other, so that these are not repeated.
        shared = query.shape[1] // key.shape[1] if self.attention == "sdpa" else 1
        below = _below(query, shared)
        found, start = [], 0
        for which, group in enumerate(self.groups):
            stop = start + group.positions
            own = [below, key, value]
            if start or stop < query.shape[2]:
                own = [part[:, :, start:stop] for part in (key, value)]
                own.insert(0, below[:, :, shared * start : shared * stop])
            start = stop
            if isinstance(group, Batch):
                found.append(self._together(which, group, number, shared, own, options["scaling"]))
                continue
            if group.kv is not None:
                own[1:] = group.kv.put(number, own[1:], group.slots, group.kv_end, group.at)
            elif group.rows > 1:
                own = [_apart(part, group.rows) for part in own]
            found.append(self._attended(layer, group, which, shared, *own, **options).flatten(0, 1))
        if padding := query.shape[2] - start:  # whose values nobody reads
            found.append(found[-1].new_zeros(padding, *found[-1].shape[1:]))
        # All that was moved about is copied once, here.
        return (found[0] if len(found) == 1 else torch.cat(found)).flatten(1, -2)[None]

    def _together(
        self,
        which: int,
        batch: Batch,
        number: int,
        shared: int,
        own: Sequence[Tensor],
        scaling: float,
    ) -> Tensor:
        """A batch's, [positions, ...]; the queries come as `_below` gives them."""
        query = batch.queries(own[0], shared)
        key, value = batch.put(number, own[1:])
        mask = None
        if batch.mask is not None:
            made = (which, shared, query.device, query.dtype)
            if made not in self._masks:
                there = BatchMask(*(part.to(query.device) for part in batch.mask))
                self._masks[made] = there.added(query.dtype, batch.kv_end, shared)
            mask = self._masks[made]
        return batch.outputs(
            scaled_dot_product_attention(query, key, value, mask, scale=scaling), shared
        )

    def _attended(
        self,
        layer: Any,
        group: Group,
        which: int,
        shared: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **options: Any,
    ) -> Tensor:
        """One group's, [rows, length, ..., head_dim]; the queries come as `_below` gives them."""
        if self.attention != "sdpa":
            compute = _function(layer, self.attention)
            if self.attention == "eager":
                mask = self._added(group, which, 1, query)
            else:  # some take none for a causal one
                mask = self._seen(group, which, query, key)
            out, _ = compute(layer, query, key, value, mask, is_causal=False, **options)
            return out  # type: ignore[no-any-return]
        if self.masked is not None and group.mask is not None:
            prepared = self._prepared(group, which, shared, query)
            out = self.masked(query, key, value, prepared, options["scaling"])
        else:
            mask = self._added(group, which, shared, query)
            out = scaled_dot_product_attention(query, key, value, mask, scale=options["scaling"])
        rows, heads, below, width = out.shape
        return out.view(rows, heads, below // shared, shared, width).permute(0, 2, 1, 3, 4)

    def _prepared(self, group: Group, which: int, shared: int, query: Tensor) -> Any:
        """A group's mask as `masked` wants it, for [.., shared * length, keys]."""
        mask = group.mask
        assert self.masked is not None
        assert mask is not None
        made = (which, shared, "prepared")
        if made not in self._masks:
            self._masks[made] = self.masked.prepared(mask.to(query.device).repeated(shared))
        return self._masks[made]

    def _seen(self, group: Group, which: int, query: Tensor, key: Tensor) -> Tensor:
        """What a group attends to, bool [1, 1, length, keys]."""
        made = (which, query.device)
        if made not in self._masks:
            mask = group.mask
            if mask is None:
                seen = query.new_ones((query.shape[2], key.shape[2]), dtype=torch.bool)
            else:
                seen = mask.to(query.device).dense()
            self._masks[made] = seen[None, None]
        return self._masks[made]  # type: ignore[no-any-return]

    def _added(self, group: Group, which: int, shared: int, query: Tensor) -> Tensor | None:
        """A group's mask, to be added to scores [.., shared * length, keys]."""
        mask = group.mask
        if mask is None:
            return None
        made = (which, shared, query.device, query.dtype)
        if made not in self._masks:
            # Elsewhere than the other inputs only where a device map spreads the model.
            mask = mask.to(query.device).repeated(shared)
            self._masks[made] = mask.added(query.dtype)[None, None]
        return self._masks[made]  # type: ignore[no-any-return]


def _below(query: Tensor, shared: int) -> Tensor:
    """From [1, heads, query, head_dim] to [1, heads / shared, query * shared, head_dim].

    Position by position, so that those of a group lie together.
    """
    if shared == 1:
        return query
    _, heads, positions, width = query.shape
    apart = query.view(1, heads // shared, shared, positions, width)
    return apart.transpose(2, 3).flatten(2, 3)


def _apart(part: Tensor, rows: int) -> Tensor:
    """From [1, heads, rows * length, head_dim] to [rows, heads, length, head_dim]."""
    _, heads, positions, width = part.shape
    return part.view(heads, rows, positions // rows, width).transpose(0, 1)


_ARRANGED: ContextVar[_Arrangement | None] = ContextVar("arranged", default=None)


class _Lent(NamedTuple):
    own: str | None  # what the config says otherwise
    forwards: int  # under way


_LENT: dict[int, _Lent] = {}  # by the identity of a config
_LOCK = Lock()


def attention_of(config: Any) -> str | None:
    """The attention that a module's config names, whether a forward is under way or not."""
    with _LOCK:
        lent = _LENT.get(id(config))
        return getattr(config, "_attn_implementation", None) if lent is None else lent.own


@contextmanager
def arranged(
    config: Any, groups: Sequence[Group | Batch], masked: Masked | None
) -> Iterator[_Arrangement]:
    """Let the layers of a module (`config` is theirs) attend by groups, in this thread.

    For as long as this lasts the config names this module's attention; whoever else calls the
    module meanwhile gets its own. Where there is a mask, `masked` stands for torch's usual
    attention, if it is given.
    """
    with _LOCK:
        own, forwards = _LENT.get(id(config)) or (config._attn_implementation, 0)
        _LENT[id(config)] = _Lent(own, forwards + 1)
        if not forwards:
            config._attn_implementation = _NAME
    before = _ARRANGED.get()
    try:
        arrangement = _Arrangement(groups, own or "eager", masked)  # for which memory may not do
        _ARRANGED.set(arrangement)
        yield arrangement
    finally:
        _ARRANGED.set(before)
        with _LOCK:
            own, forwards = _LENT.pop(id(config))
            if forwards > 1:
                _LENT[id(config)] = _Lent(own, forwards - 1)
            elif config._attn_implementation == _NAME:  # nobody set another one meanwhile
                config._attn_implementation = own


def _attend(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """What transformers' layers call while a config names this module's attention."""
    if torch.compiler.is_compiling():
        return _opaque(query, key, value, layer.layer_idx, options["scaling"]), None
    arrangement = _ARRANGED.get()
    if arrangement is not None:
        return arrangement.attend(layer.layer_idx, layer, query, key, value, **options), None
    compute = _function(layer, attention_of(layer.config))
    out, weights = compute(layer, query, key, value, mask, **options)
    return out, weights


# CUDA graphs end before it and begin after it: captured, it would read the slots of one forward.
@torch.library.custom_op("spiffy::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _opaque(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    """Attention as compiled code calls it, which knows nothing of rows, slots, or prefixes.

    So a compiled transformer holds for all of them. The compiler cannot see that keys and values
    are put away, and need not: layers follow one another by what they compute.
    """
    arrangement = _ARRANGED.get()
    assert arrangement is not None  # compiled code runs in forwards only
    return arrangement.attend(layer, None, query, key, value, scaling=scaling).contiguous()


@_opaque.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    _, heads, positions, _ = query.shape
    return query.new_empty(1, positions, heads, value.shape[3])


def _function(layer: Any, attention: str | None) -> Callable[..., Any]:
    """What computes an attention for a layer."""
    if attention in (None, "eager"):  # every file of transformers' models has its own
        return sys.modules[type(layer).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[attention]  # type: ignore[no-any-return]


def _mask_of(*args: Any, config: Any, **options: Any) -> Any:
    """The mask that the attention which a config names otherwise wants."""
    own = attention_of(config)
    return ALL_MASK_ATTENTION_FUNCTIONS[own](*args, config=config, **options)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _mask_of)
