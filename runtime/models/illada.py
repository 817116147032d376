"""iLLaDA (8B-Base, 8B-Instruct): Llama with its own names, bidirectional, head tied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.fields import USUAL, Entries, check_head_dim, usual_fields


def _architecture(config: Mapping[str, Any]) -> Architecture:
    check_head_dim(config)
    return LlamaForCausalLM, LlamaConfig(**usual_fields(config))


ILLADA = Family(
    name="illada",
    model_types=("illada",),
    computed_by=("llama",),
    architecture=_architecture,
    key_mapping={},
    logit_shift=0,
    block_causal=False,
    threshold_strict=False,
    caches=("none", "dual", "prefix", "prefix-shared"),
    mask_token_id=5,
    entries=Entries(reads=USUAL | {"head_dim"}),
)
