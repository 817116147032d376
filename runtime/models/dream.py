"""Dream (v0-Base, v0-Instruct), DiffuCoder, Dream-Coder: Qwen2, bidirectional, logits shifted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM

from spiffy.runtime.models.base import Architecture, Family


def _architecture(config: Mapping[str, Any]) -> Architecture:
    return Qwen2ForCausalLM, Qwen2Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        use_sliding_window=False,
        pad_token_id=None,
        attn_implementation="sdpa",
    )


DREAM = Family(
    name="dream",
    model_types=("Dream",),
    architecture=_architecture,
    key_mapping={},
    logit_shift=1,
    block_causal=False,
    threshold_strict=False,
    caches=("none", "dual", "prefix"),
)
