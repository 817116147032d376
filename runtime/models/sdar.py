"""SDAR (1.7B to 30B-A3B) and TraDo: Qwen3, bidirectional in a block, causal across blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from spiffy.runtime.models.base import Architecture, Family

_MOE_FIELDS = (
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
)


def _architecture(config: Mapping[str, Any]) -> Architecture:
    fields: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "max_position_embeddings": config["max_position_embeddings"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "attention_bias": config.get("attention_bias", False),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "use_sliding_window": False,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    if config["model_type"] == "sdar_moe":
        fields |= {field: config[field] for field in _MOE_FIELDS if field in config}
        return Qwen3MoeForCausalLM, Qwen3MoeConfig(**fields)
    return Qwen3ForCausalLM, Qwen3Config(**fields)


SDAR = Family(
    name="sdar",
    model_types=("sdar", "sdar_moe"),
    architecture=_architecture,
    key_mapping={},
    logit_shift=0,
    block_causal=True,
    threshold_strict=True,
    caches=("block",),
)
