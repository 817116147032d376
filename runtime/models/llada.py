"""LLaDA (8B-Base, 8B-Instruct, 1.5): Llama with bidirectional attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.fields import ROPE, Entries, rope

_ENTRIES = Entries(
    reads=ROPE
    | {"d_model", "embedding_size", "max_sequence_length", "mlp_hidden_size", "mlp_ratio"}
    | {"multi_query_attention", "n_heads", "n_kv_heads", "n_layers", "rms_norm_eps", "vocab_size"}
    | {"weight_tying"},
    only={
        "activation_type": ("silu",),
        "block_group_size": (1,),  # of other parameter names
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
    },
    same={
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "num_key_value_heads": "n_kv_heads",
    },
    idle=frozenset(
        {"alibi_bias_max", "attention_layer_norm_with_affine", "block_length", "init_cutoff_factor"}
        | {"init_device", "init_fn", "precision", "rope_full_precision"}
    ),
)


def _architecture(config: Mapping[str, Any]) -> Architecture:
    heads = config["n_heads"]
    shared = 1 if config.get("multi_query_attention") else heads
    ratio = config.get("mlp_ratio") or 4
    return LlamaForCausalLM, LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config.get("mlp_hidden_size") or int(ratio * config["d_model"]),
        num_hidden_layers=config["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("n_kv_heads") or shared,
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters=rope(config),
        tie_word_embeddings=config.get("weight_tying", False),
        pad_token_id=None,
        attn_implementation="sdpa",
    )


_BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
_LAYER = r"model.layers.\1."

LLADA = Family(
    name="llada",
    model_types=("llada",),
    computed_by=("llama",),
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
    entries=_ENTRIES,
)
