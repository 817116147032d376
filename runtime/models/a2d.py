"""A2D (dllm): Qwen3 and Qwen2 made diffusion models, of two kinds that only a name tells apart.

mdlm attends everywhere; bd3lm is bidirectional in a block and causal across blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.fields import (
    BLOCK_SIZES,
    QK_NORM,
    USUAL,
    Entries,
    check_head_dim,
    check_qk_norm,
    usual_fields,
)

_ENTRIES = Entries(
    reads=USUAL | {"head_dim", *QK_NORM},
    # Of Qwen3; Qwen2 always has biases on queries, keys and values, and the parameters say so.
    idle=frozenset({"attention_bias"}),
)


def _architecture(config: Mapping[str, Any]) -> Architecture:
    fields = usual_fields(config) | {"use_sliding_window": False}
    check_qk_norm(config, config["model_type"] == "a2d-qwen3")
    if config["model_type"] == "a2d-qwen3":
        return Qwen3ForCausalLM, Qwen3Config(
            **fields,
            head_dim=config["head_dim"],
            attention_bias=config.get("attention_bias") or False,
        )
    check_head_dim(config)
    return Qwen2ForCausalLM, Qwen2Config(**fields)


A2D_MDLM = Family(
    name="a2d-mdlm",
    model_types=("a2d-qwen3", "a2d-qwen2"),
    computed_by=("qwen3", "qwen2"),
    named="mdlm",
    architecture=_architecture,
    key_mapping={},
    logit_shift=0,
    block_causal=False,
    threshold_strict=False,
    caches=("none", "dual", "prefix", "prefix-shared"),
    splits_masks=True,
    mask_token_id=151669,
    masked_types=("a2d-qwen3", "qwen3"),  # others have another vocabulary
    entries=_ENTRIES,
)
A2D_BD3LM = replace(
    A2D_MDLM,
    name="a2d-bd3lm",
    named="bd3lm",
    block_causal=True,
    caches=("block",),
    blocks_end_with_prompt=True,
    cuts_last_block=True,
    entries=replace(_ENTRIES, reads=_ENTRIES.reads | set(BLOCK_SIZES)),
)
