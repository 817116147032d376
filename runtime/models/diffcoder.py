"""Stable-DiffCoder (8B-Base, 8B-Instruct): Llama, bidirectional in a block, causal across."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.fields import BLOCK_SIZES, USUAL, Entries, usual_fields


def _architecture(config: Mapping[str, Any]) -> Architecture:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return LlamaForCausalLM, LlamaConfig(**usual_fields(config), head_dim=head_dim)


STABLE_DIFFCODER = Family(
    name="stable-diffcoder",
    model_types=("llama",),
    computed_by=("llama",),
    architectures=("StableDiffcoderForCausalLM", "SeedDiffcoderForCausalLM"),
    architecture=_architecture,
    key_mapping={},
    logit_shift=0,
    block_causal=True,
    threshold_strict=False,
    caches=("block",),
    block_size=4,
    cuts_last_block=True,
    splits_masks=True,
    mask_token_id=5,
    entries=Entries(reads=USUAL | {"head_dim", *BLOCK_SIZES}),
)
