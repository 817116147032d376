"""A2D (dllm): Qwen3 and Qwen2 made diffusion models, of two kinds that only a name tells apart.

mdlm attends everywhere; bd3lm is bidirectional in a block and causal across blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from spiffy.runtime.models.base import Architecture, Family
from spiffy.runtime.models.fields import refuse_others, usual_fields

_SUPPORTED = {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}


def _architecture(config: Mapping[str, Any]) -> Architecture:
    fields = usual_fields(config) | {"use_sliding_window": False}
    if config["model_type"] == "a2d-qwen3":
        refuse_others("A2D", config, _SUPPORTED)
        return Qwen3ForCausalLM, Qwen3Config(**fields, head_dim=config["head_dim"])
    # Qwen2 always has biases on queries, keys and values, and no field that says so.
    refuse_others("A2D", config, {k: v for k, v in _SUPPORTED.items() if k != "attention_bias"})
    return Qwen2ForCausalLM, Qwen2Config(**fields)


A2D_MDLM = Family(
    name="a2d-mdlm",
    model_types=("a2d-qwen3", "a2d-qwen2"),
    named="mdlm",
    architecture=_architecture,
    key_mapping={},
    logit_shift=0,
    block_causal=False,
    threshold_strict=False,
    caches=("none", "dual", "prefix", "prefix-shared"),
    splits_masks=True,
    mask_token_id=151669,
)
A2D_BD3LM = replace(
    A2D_MDLM,
    name="a2d-bd3lm",
    named="bd3lm",
    block_causal=True,
    caches=("block",),
    blocks_end_with_prompt=True,
    cuts_last_block=True,
)
