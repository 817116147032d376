"""A pretend accelerator: importing this module adds a second torch device, "far".

A tensor on "far" wraps one of the CPU, whose kernels compute on it: results are equal bit by bit.
The rest is as on a GPU. An operation that mixes devices fails (CPU tensors of no dimension may take
part, and CPU indices may index), so do `numpy()` and a CPU generator; and it is counted whatever
makes the host wait for the device. Use `device="far"` where "cuda" would stand, and read

crossings   how often the host waited, by kind: "copy to host", "copy from host" (there CUDA waits
            too, unless memory is pinned), "host index", "mask index", or the kernel (nonzero, ...);
sources     the same by kind and line, the innermost one of `packages` on the Python stack;
calls       how often each kernel ran, about the launches on a GPU;
sent        bytes that copies from the host sent there, by what they hold (a dtype).

`reset()` clears them all.

A device type stays until the process ends, and libraries ask for it: `device_cases.py` runs in a
process of its own.

What it cannot show: times; whether results survive another order of summation, or another dtype;
streams and races; memory that ends; kernels that a GPU lacks, integer matrix products apart; code
that asks for "cuda" by name, such as `torch.cuda.synchronize`; several devices; autograd.
What registers it is experimental in torch: made with 2.13.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils import backend_registration

backend_registration._setup_privateuseone_for_python_backend("far")
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="far"): built here, then moved

packages = {"spiffy", "transformers"}
crossings: Counter[str] = Counter()
sources: Counter[tuple[str, str]] = Counter()
calls: Counter[str] = Counter()
sent: Counter[str] = Counter()

_MOVES = {"_to_copy", "copy_", "_copy_from"}
_INDEXES = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_FLOATS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}  # no integers on a GPU
_WAITS = {"_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select", "bincount"} | {
    *("repeat_interleave", "_unique", "_unique2", "unique_dim", "unique_consecutive")
}  # for a value, or for the shape of a result


def reset() -> None:
    """Start counting anew."""
    for counter in (crossings, sources, calls, sent):
        counter.clear()


def _cross(kind: str) -> None:
    crossings[kind] += 1
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] not in packages:
        frame = frame.f_back
    line = f"{frame.f_globals['__name__']}:{frame.f_lineno}" if frame else "elsewhere"
    sources[kind, line] += 1


class Far(torch.Tensor):
    """A tensor on "far"; `raw` is the CPU's. Views of the one are views of the other."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Far:
        layout = (raw.shape, raw.stride(), raw.storage_offset())
        made = torch.Tensor._make_wrapper_subclass(cls, *layout, dtype=raw.dtype, device="far:0")
        made.raw = raw
        return made

    def __repr__(self) -> str:
        return f"far({self.raw})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert far device type tensor to numpy: copy it to the host first")

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, (bool, int, float)):  # for CUDA, torch makes a CPU tensor of it
            value = torch.tensor(value, dtype=self.dtype)
        super().__setitem__(index, value)

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In inference mode compositions arrive whole: run their parts.
        whole = op is _ATTENTION or not op._can_decompose()
        return (partial(_kernel, op) if whole else op.decompose)(*args, **(kwargs or {}))


def _each(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The same arguments, or results, with their tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_each(change, part) for part in value])
    return value


@torch.inference_mode(False)  # where torch refuses to make such tensors views of each other
@torch.no_grad()
def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Check devices, count, compute on the CPU."""
    name = op._schema.name.removeprefix("aten::")
    calls[name] += 1
    tensors: list[torch.Tensor] = []
    _each(tensors.append, (args, list(kwargs.values())))
    ours = {id(t.raw): t for t in tensors if isinstance(t, Far)}
    device = kwargs.get("device")
    to_host = device is not None and torch.device(device).type == "cpu"
    if name in _MOVES:
        to_host |= name != "_to_copy" and not isinstance(args[name != "copy_"], Far)
        if not to_host:
            for part in tensors:
                if not isinstance(part, Far):
                    sent[str(part.dtype)] += part.numel() * part.itemsize
        if to_host:
            _cross("copy to host")
        elif len(ours) < len(tensors) and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            _cross("copy from host")
    else:
        _check(name, args, kwargs, tensors)
    raw_args = _each(_raw, args)
    raw_kwargs = {key: _each(_raw, value) for key, value in kwargs.items()}
    if device is not None:
        raw_kwargs |= {"device": "cpu", "pin_memory": None}
    if name == "histc":  # mixtures of experts count integers, which the CPU's kernel does not know
        result = op(args[0].raw.double(), *raw_args[1:], **raw_kwargs).to(args[0].dtype)
    else:
        result = op(*raw_args, **raw_kwargs)
    if any(t.shape != t.raw.shape for t in ours.values()):
        raise NotImplementedError(f"{name}: tensors on far cannot change their shape")
    if to_host:
        return args[0] if name == "copy_" else result
    # In place: the argument.
    return _each(lambda part: ours[id(part)] if id(part) in ours else Far(part), result)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.raw if isinstance(tensor, Far) else tensor


def _check(name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
    """Fail where a GPU's kernel fails, and count where it makes the host wait."""
    indexes = name in _INDEXES and isinstance(args[0], Far)
    indices = [t for t in args[1] if t is not None] if indexes else []
    if not all(isinstance(t, Far) for t in indices):
        _cross("host index")
    host = [t for t in tensors if not isinstance(t, Far) and not any(t is k for k in indices)]
    if any(t.dim() for t in host):
        raise RuntimeError(f"{name}: expected all tensors on the same device, found far and cpu")
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: expected a generator of far, found one of cpu")
    if name in _FLOATS and not tensors[0].is_floating_point():
        raise RuntimeError(f"{name}: not implemented for {tensors[0].dtype}")
    if name in _WAITS:
        _cross(name.strip("_"))
    masks = sum(t.dtype in (torch.bool, torch.uint8) for t in indices)
    if host and (name == "where" or masks < len(indices)):
        _cross("copy from host")  # most kernels take a number as an argument, these do not
    elif masks and not host:  # masks and a number make a `masked_fill`
        _cross("mask index")


_all, _some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_all.fallback(_kernel, "PrivateUse1")  # tensors out of nothing
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default  # its parts depend on the device
_some.impl(_ATTENTION, partial(_kernel, _ATTENTION), "AutogradPrivateUse1")
for _factory in map(torch.ops.aten.__getattr__, ("arange", "linspace", "eye", "randperm")):
    for _kind in _factory.overloads():
        if not _kind.endswith("out"):  # torch's own make an empty tensor, and let it grow
            _op = getattr(_factory, _kind)
            _some.impl(_op, partial(_kernel, _op), "PrivateUse1")
