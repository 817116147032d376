"""Weights in fewer bits, by torchao: layers of the transformer, never the output head."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from spiffy.runtime.models.family import Family
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import option

#: What weights can be quantized to.
KINDS = ("int8",)


def check_quantize(
    name: str, kind: str, family: Family, config: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Refuse what cannot be quantized, before anything is loaded.

    Raises
    ------
    SpiffyError
        If the kind is unknown, torchao is not installed or knows no such dtype, or the model is a
        mixture of experts.
    """
    if kind not in KINDS:
        raise SpiffyError(f"unknown quantization {kind!r}: choose {' or '.join(KINDS)}")
    if find_spec("torchao") is None:
        raise SpiffyError(
            f"{option('quantize')} needs torchao: pip install 'spiffy-dllm[quantize]'"
        )
    if dtype == torch.float64:
        raise SpiffyError(f"{name}: float64 cannot be quantized: drop {option('dtype')}")
    if family.merged(config):
        raise SpiffyError(
            f"{name}: a mixture of experts cannot be quantized here: its experts, which are nearly "
            "all of it, would stay as they are"
        )


def quantize_layers(module: Any, device: torch.device | None) -> None:
    """Quantize the linear layers of a transformer to int8, one scale per row; in place.

    Parameters
    ----------
    module
        The family's transformers module; its `lm_head` stays as it is.
    device
        Where to put each layer before it is quantized; None leaves them where they are.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # Settings of torch's compiler are the whole process's: not ours to change.
    quantize_(module.model, Int8WeightOnlyConfig(set_inductor_config=False), device=device)
    for layer in module.model.modules():
        vars(layer).pop("extra_repr", None)  # torchao's, which cannot be pickled
