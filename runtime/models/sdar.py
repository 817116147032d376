"""SDAR (1.7B to 30B-A3B) and TraDo: Qwen3, bidirectional in a block, causal across blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from spiffy.runtime.models.base import Architecture, Family

_MIXTURE_FIELDS = (
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
        fields |= {field: config[field] for field in _MIXTURE_FIELDS}
        # Every layer is a mixture unless the config says otherwise.
        fields["decoder_sparse_step"] = config.get("decoder_sparse_step", 1)
        fields["mlp_only_layers"] = config.get("mlp_only_layers") or []
        if fields["decoder_sparse_step"] < 1:
            raise ValueError("decoder_sparse_step must be at least 1")
        return Qwen3MoeForCausalLM, Qwen3MoeConfig(**fields)
    return Qwen3ForCausalLM, Qwen3Config(**fields)


def _experts(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of the experts' matrices, which checkpoints store one by one."""
    if config["model_type"] != "sdar_moe":
        return {}
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    shapes = {
        "gate_proj": [width, hidden],
        "up_proj": [width, hidden],
        "down_proj": [hidden, width],
    }
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight": shape
        for layer in range(config["num_hidden_layers"])
        if (layer + 1) % step == 0 and layer not in dense
        for expert in range(config["num_experts"])
        for matrix, shape in shapes.items()
    }


SDAR = Family(
    name="sdar",
    model_types=("sdar", "sdar_moe"),
    architecture=_architecture,
    key_mapping={},
    logit_shift=0,
    block_causal=True,
    threshold_strict=True,
    caches=("block",),
    merged=_experts,
)
