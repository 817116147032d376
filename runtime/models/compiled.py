"""The transformer, compiled by torch once for forwards of any size.

Compiled code calls attention as one opaque operation (`attention`), so it knows of positions and
nothing of rows, prefixes and masks. Only their number varies, and that it leaves open.

On a GPU short forwards wait for the host to launch their kernels. There the parts between two
attentions are captured as CUDA graphs, for a few numbers of positions (`Captured`), and attention
under a mask may be FlexAttention's (`flex`): each only if, tried on the machine, it is right and
faster.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutput

from spiffy.runtime.models.attention import Group, Masked
from spiffy.runtime.models.base import Compiled, DiffusionLM
from spiffy.runtime.models.device import median_seconds
from spiffy.runtime.models.fields import head_dim
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import said
from spiffy.schemas.notes import note

#: Numbers of positions that CUDA graphs are captured of; a forward over fewer is padded to the
#: next, and one over more has enough to do. With blocks of 32 and 1, 2, 4, 8 or 16 drafts a forward
#: has 64, 96, 160, 288 or 544, and 32 more for each block that is stored or begun in it.
CAPTURED = (8, 16, 32, 64, 96, 128, 160, 192, 256, 288, 320, 384, 448, 544, 608)

_TRIED = (64, 8)  # positions: the first is compiled, which has to do for the second
_LONG = 2.0  # seconds
_REPLAYS = 3  # warming up, capturing, replaying
_TIMED = 20  # repetitions
# Threads share the graphs, and the memory that these compute in: between two parts of one forward,
# attention reads it.
_REPLAYING = Lock()


def compile_transformer(model: DiffusionLM) -> None:
    """Compile a model's transformer, in place, and try it.

    What torch remembers between processes (`TORCHINDUCTOR_CACHE_DIR`) makes the next time shorter.

    Raises
    ------
    SpiffyError
        If torch cannot compile it as a whole, or has no compiler to do it with.
    """
    note(f"compiling {model.name}: up to a minute the first time, on a GPU a few")
    started = perf_counter()
    model.compiled = Compiled(_whole(model.module))
    try:
        for positions in _TRIED:
            ids = torch.arange(positions, device=model.device) % model.vocab_size
            model.hidden_states(ids, ids, [Group(1, positions, whole=positions)])
    except Exception as error:  # of any part of the compiler
        raise SpiffyError(
            f"{model.name} cannot be compiled: load it without ({_said(error)})"
        ) from None
    if launches_kernels(model.device):
        model.compiled = Compiled(_captured(model), _masked(model))
    model.remember()
    if (took := perf_counter() - started) > _LONG:
        note(f"compiled in {took:.0f} s")


def launches_kernels(device: torch.device) -> bool:
    """Whether a device computes what the host launches on it, and captures that as CUDA graphs."""
    return device.type == "cuda"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {said(error, 300)}"


def _whole(module: Any, *, capture: bool = False) -> Callable[..., Any]:
    """Without breaks, for any number of positions."""
    mode = "reduce-overhead" if capture else None
    return torch.compile(module.model, fullgraph=True, dynamic=True, mode=mode)


@dataclass(frozen=True)
class Captured:
    """A compiled transformer, as CUDA graphs where forwards are short.

    Parameters
    ----------
    usual, replayed
        Compiled without and with CUDA graphs.
    """

    usual: Callable[..., Any]
    replayed: Callable[..., Any]

    def __call__(self, *, input_ids: Tensor, position_ids: Tensor, **others: Any) -> Any:
        """As the transformer, which is called by the same names."""
        positions = input_ids.shape[1]
        size = next((size for size in CAPTURED if size >= positions), None)
        if size is None:
            return self.usual(input_ids=input_ids, position_ids=position_ids, **others)
        padding = (0, size - positions)
        with _REPLAYING:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            found = self.replayed(
                input_ids=pad(input_ids, padding), position_ids=pad(position_ids, padding), **others
            )
            # Of its own: the next forward of this size is written over what this one gave.
            return BaseModelOutput(found.last_hidden_state[:, :positions].clone())


def _captured(model: DiffusionLM) -> Callable[..., Any]:
    """The transformer with CUDA graphs, if they give what they should and are faster."""
    from torch._inductor import config as inductor

    assert model.compiled is not None
    usual = model.compiled.transformer
    captured = Captured(usual, _whole(model.module, capture=True))
    try:
        # torch warns of many sizes, because it does not know that there will be no more.
        with (
            inductor.patch({"triton.cudagraph_dynamic_shape_warn_limit": None}),
            ThreadPoolExecutor(1) as other,  # servers decode in another thread
        ):
            wrong = _difference(model, captured)
            wrong = wrong or other.submit(_difference, model, captured).result()
    except Exception as error:
        wrong = _said(error)
    if wrong is not None:
        return _refused(usual, wrong)
    seconds, usually = (_seconds(model, way) for way in (captured, usual))
    if seconds >= usually:
        return _refused(usual, f"{1000 * seconds:.2f} ms, without {1000 * usually:.2f} ms")
    note(
        f"CUDA graphs: a forward over {CAPTURED[0]} positions {usually / seconds:.2f} times as fast"
    )
    return captured


def _refused(usual: Callable[..., Any], why: str) -> Callable[..., Any]:
    note(f"no CUDA graphs: {why}")
    return usual


def _difference(model: DiffusionLM, captured: Captured) -> str | None:
    """What is wrong with forwards of every size, captured and replayed, if anything is.

    The last one has other rows than those before it: a captured attention would be theirs.
    """
    for size in CAPTURED:
        for positions, rows in (*[(size, 1)] * _REPLAYS, (size - 2, 2)):
            groups = [Group(rows, positions // rows, whole=positions // rows)]
            found, right = (_hidden(model, way, groups) for way in (captured, captured.usual))
            off, scale = (found - right).abs().max().item(), right.abs().max().item()
            if not off <= torch.finfo(right.dtype).eps ** 0.5 * scale:
                return f"{positions} positions are off by {off:.2g}"
    return None


@torch.inference_mode()
def _hidden(model: DiffusionLM, way: Callable[..., Any], groups: list[Group]) -> Tensor:
    """What a transformer gives for some tokens, in rows."""
    positions = sum(group.positions for group in groups)
    ids = torch.arange(positions, device=model.device) % model.vocab_size
    places = torch.arange(positions, device=model.device) % groups[0].length
    return model.replaced(compiled=Compiled(way)).hidden_states(ids, places, groups)


def _seconds(model: DiffusionLM, way: Callable[..., Any]) -> float:
    """Of a short forward, the median."""
    groups = [Group(1, CAPTURED[0], whole=CAPTURED[0])]
    return median_seconds(lambda: _hidden(model, way, groups), model.device, _TIMED)


def _masked(model: DiffusionLM) -> Masked | None:
    """What computes attention under masks, if torch's usual attention should not."""
    from spiffy.runtime.models.flex import Shape, better_masked

    config: Any = model.module.config
    heads = config.num_attention_heads
    shape = Shape(
        heads,
        heads // (getattr(config, "num_key_value_heads", None) or heads),
        head_dim(config),
        config.num_hidden_layers,
    )
    return better_masked(shape, model.dtype, model.device)
