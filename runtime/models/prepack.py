"""Weights of linear layers in the layout that oneDNN, a library of torch's for CPUs, computes with.

Otherwise torch's libraries lay them out in every call, which counts beside the few positions of a
denoising step's forward (docs/cpu.md). The layout is kept in place of the weights, so it
takes no memory of its own; but for the output head, whose rows are looked up too, and which is held
both ways.
"""

from __future__ import annotations

import math
from itertools import count
from time import perf_counter
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from spiffy.runtime.models.base import DiffusionLM
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import option
from spiffy.schemas.notes import note

#: What oneDNN computes in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_POSITIONS = 16  # that the layout is chosen for; it holds for any number
_WORTH = 50_000_000  # parameters of linear layers, below which calls take longer than they save
_TRIED = (8, 32)  # positions
_FASTER = 0.95  # of the time without, at most
_TIMED = 12  # repetitions

_numbers = count()
_layers: WeakValueDictionary[int, PrepackedLinear] = WeakValueDictionary()


class PrepackedLinear(nn.Module):
    """`torch.nn.Linear` for inference on a CPU, its weight laid out for oneDNN.

    `weight.to_dense()` is the weight as it was, [out_features, in_features].

    Parameters
    ----------
    layer
        Of one of `DTYPES`, on the CPU.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        own = layer.weight.detach().contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(own, _POSITIONS)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self._number = next(_numbers)
        _layers[self._number] = self

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if torch.compiler.is_compiling():
            out: Tensor = _opaque(hidden, self._number, self.out_features)
            return out
        return self.compute(hidden)

    def compute(self, hidden: Tensor) -> Tensor:
        """As `forward`."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self.weight, self.bias, "none", [], ""
        )
        return out


@torch.library.custom_op("spiffy::prepacked_linear", mutates_args=())
def _opaque(hidden: Tensor, number: int, width: int) -> Tensor:
    """A layer as compiled code calls it, which cannot hold weights in this layout."""
    layer: PrepackedLinear = _layers[number]
    return layer.compute(hidden)


@_opaque.register_fake
def _(hidden: Tensor, number: int, width: int) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], width)


def check_prepack(name: str, device: torch.device, dtype: torch.dtype, others: bool) -> None:
    """Refuse what cannot be prepacked, before anything is loaded.

    Parameters
    ----------
    others
        Whether the weights are to be quantized, or spread by a device map.

    Raises
    ------
    SpiffyError
        If the weights are not whole ones on a CPU, or this torch has no oneDNN.
    """
    if device.type != "cpu" or others:
        raise SpiffyError(
            f"{name}: weights are prepacked for a CPU, and neither quantized nor spread by a "
            f"device map: drop {option('prepack')}"
        )
    if dtype not in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        raise SpiffyError(f"{name}: {kind} cannot be prepacked: drop {option('prepack')}")
    if not _has_onednn():
        raise SpiffyError(f"{name}: this torch has no oneDNN: drop {option('prepack')}")


def prepack(model: DiffusionLM) -> None:
    """Prepack the linear layers of a model's transformer, in place, and its output head beside it.

    Raises
    ------
    SpiffyError
        See `check_prepack`; or if this processor cannot compute with the layout.
    """
    check_prepack(model.name, model.device, model.dtype, others=False)
    transformer: Any = model.module.model
    if not _computes(model.dtype):
        kind = str(model.dtype).removeprefix("torch.")
        raise SpiffyError(
            f"{model.name}: this processor cannot compute with prepacked {kind}: drop "
            f"{option('prepack')}"
        )
    for part in transformer.modules():
        for name, layer in part.named_children():
            if type(layer) is nn.Linear:
                setattr(part, name, PrepackedLinear(layer))
    head: Any = model.module.lm_head
    if type(head) is nn.Linear and type(head.weight) is nn.Parameter:
        model.packed_head = PrepackedLinear(head)
        model.remember()


def prepack_if_faster(model: DiffusionLM) -> None:
    """Prepack what is large enough and can be, if a try on this machine is right and faster."""
    share = _share(model)
    if share is not None and share <= _FASTER:
        prepack(model)
        note(f"weights prepacked for the CPU: a layer takes {share:.2f} of the time")


def _share(model: DiffusionLM) -> float | None:
    """What the largest layer takes prepacked, of what it takes now; None: it is not to be."""
    transformer: Any = model.module.model
    layers = [layer for layer in transformer.modules() if type(layer) is nn.Linear]
    able = model.device.type == "cpu" and model.dtype in DTYPES and _has_onednn()
    if not able or sum(layer.weight.numel() for layer in layers) < _WORTH:
        return None
    if not _computes(model.dtype):
        return None
    largest = max(layers, key=lambda layer: layer.weight.numel())
    usual, ours = _seconds(largest, PrepackedLinear(largest))
    return ours / usual


def _computes(dtype: torch.dtype) -> bool:
    """Whether a prepacked layer computes here what it should."""
    layer = nn.Linear(256, 320, bias=False, dtype=dtype, device="meta").to_empty(device="cpu")
    with torch.no_grad():  # numbers of its own: global generators are the user's
        layer.weight.normal_(generator=torch.Generator().manual_seed(1))
    try:
        return _agree(layer, PrepackedLinear(layer))
    except RuntimeError:  # a dtype that this processor's oneDNN does not know
        return False


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _hidden(layer: nn.Linear | PrepackedLinear, positions: int) -> Tensor:
    """Numbers of a layer's input, [1, positions, in_features]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, positions, layer.in_features, generator=generator, device="cpu")
    return hidden.to(layer.weight.dtype)


@torch.inference_mode()
def _agree(usual: nn.Linear, ours: PrepackedLinear) -> bool:
    hidden = _hidden(usual, _TRIED[0])
    want, found = usual(hidden).float(), ours(hidden).float()
    near = torch.finfo(usual.weight.dtype).eps ** 0.5 * want.abs().max()
    return bool((want - found).abs().max() <= near)


@torch.inference_mode()
def _seconds(*layers: nn.Linear | PrepackedLinear) -> list[float]:
    """Of calls with few and with some positions, in turns; the fastest ones.

    What else the machine does makes calls longer, those of one layer as well as those of another.
    """
    total = [0.0 for _ in layers]
    for positions in _TRIED:
        hidden = _hidden(layers[0], positions)
        fastest = [math.inf for _ in layers]
        for _ in range(_TIMED):
            for k, layer in enumerate(layers):
                started = perf_counter()
                layer(hidden)
                fastest[k] = min(fastest[k], perf_counter() - started)
        total = [sum(pair) for pair in zip(total, fastest, strict=True)]
    return total
