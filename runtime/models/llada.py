"""LLaDA (8B-Base, 8B-Instruct, 1.5): Llama with bidirectional attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from spiffy.runtime.models.base import Architecture, Family
from spiffy.runtime.models.fields import refuse_others

# Fields of the official config that select an architecture we would compute wrongly.
_SUPPORTED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
}


def _architecture(config: Mapping[str, Any]) -> Architecture:
    refuse_others("LLaDA", config, _SUPPORTED)
    heads = config["n_heads"]
    return LlamaForCausalLM, LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("n_kv_heads") or heads,
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=config.get("weight_tying", False),
        pad_token_id=None,
        attn_implementation="sdpa",
    )


_BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
_LAYER = r"model.layers.\1."

LLADA = Family(
    name="llada",
    model_types=("llada",),
    architecture=_architecture,
    key_mapping={
        r"^model\.transformer\.wte\.": "model.embed_tokens.",
        r"^model\.transformer\.ln_f\.": "model.norm.",
        r"^model\.transformer\.ff_out\.": "lm_head.",
        _BLOCK + r"q_proj\.": _LAYER + "self_attn.q_proj.",
        _BLOCK + r"k_proj\.": _LAYER + "self_attn.k_proj.",
        _BLOCK + r"v_proj\.": _LAYER + "self_attn.v_proj.",
        _BLOCK + r"attn_out\.": _LAYER + "self_attn.o_proj.",
        _BLOCK + r"ff_proj\.": _LAYER + "mlp.gate_proj.",
        _BLOCK + r"up_proj\.": _LAYER + "mlp.up_proj.",
        _BLOCK + r"ff_out\.": _LAYER + "mlp.down_proj.",
        _BLOCK + r"attn_norm\.": _LAYER + "input_layernorm.",
        _BLOCK + r"ff_norm\.": _LAYER + "post_attention_layernorm.",
    },
    logit_shift=0,
    block_causal=False,
    threshold_strict=False,
    caches=("none", "dual", "prefix", "prefix-shared"),
)
