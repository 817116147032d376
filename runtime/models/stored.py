"""What a checkpoint's safetensors hold, before any of it is read as weights, and a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import option

_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
# How quantized checkpoints (GPTQ, AWQ, bitsandbytes, FP8, HQQ, ...) call what stands for a weight.
_QUANTIZED = (
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".SCB", ".absmax", ".weight_scale"),
    *(".weight_scale_inv", ".weight_packed", ".quant_map", "._scale", "._data", ".zeros"),
)
# Who puts a word before every name, and what to save instead.
_WRAPPED: Mapping[str, str] = {
    "module.": "DistributedDataParallel does: save model.module",
    "_orig_mod.": "torch.compile does: save model._orig_mod",
    "_fsdp_wrapped_module.": "FSDP does: save its full state dict",
    "_forward_module.": "Lightning does: save the module inside",
    "base_model.model.": "peft does: merge_and_unload() before saving",
}


def stored_parameters(files: Iterable[Path]) -> dict[str, Any]:
    """Stored tensors by name, each read when transformers takes all of it (`[...]`).

    Read, not mapped: the pages of a mapped file stay resident next to the weights that were
    converted from them to another dtype, or merged, until the last shard is loaded.
    """
    stored: dict[str, Any] = {}
    for file in files:
        shard: Any = safe_open(file, framework="pt", backend="pread")
        stored |= {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
    return stored


def refuse_other_forms(name: str, stored: Mapping[str, Any]) -> None:
    """Refuse weights that are not a model's parameters as they are computed with.

    Raises
    ------
    SpiffyError
        If they are quantized, an adapter's, or have a wrapper's word before their names.
    """
    for key, tensor in stored.items():
        if ".lora_" in key:
            raise SpiffyError(
                f"{name}: {key} is an adapter's (LoRA): give the base model, and the adapter as "
                f"{option('adapter')}"
            )
        kind = str(tensor.get_dtype())
        if kind in _INTEGERS or kind.startswith(("F8", "F6", "F4")) or key.endswith(_QUANTIZED):
            raise SpiffyError(
                f"{name}: {key} (stored as {kind}) is of quantized weights, which are not "
                "supported: load them with transformers and spiffy.runtime.wrap() the module, or "
                "give the checkpoint that they were made from"
            )
    for word, wrapper in _WRAPPED.items():
        if stored and all(key.startswith(word) for key in stored):
            raise SpiffyError(f"{name}: every parameter's name starts with {word!r}, as {wrapper}")


def stored_tensors(parameter: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a parameter consists of: itself, or what a quantized one holds."""
    parts: Any = parameter
    if not is_traceable_wrapper_subclass(parts):
        yield parameter.to_dense() if parameter.is_mkldnn else parameter
        return
    for name in parts.__tensor_flatten__()[0]:
        yield from stored_tensors(getattr(parts, name))
