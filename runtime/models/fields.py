"""What several families' configs have in common: the usual fields, and the names of experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from spiffy.schemas import SpiffyError

_USUAL = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def usual_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that Llama, Qwen and their relatives call the same, for transformers' config."""
    return {field: config[field] for field in _USUAL} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }


def refuse_others(family: str, config: Mapping[str, Any], supported: Mapping[str, object]) -> None:
    """Refuse fields that select an architecture which the family's module does not compute.

    Raises
    ------
    SpiffyError
        Names the first field with a value other than the supported one (also taken if missing).
    """
    for field, value in supported.items():
        if config.get(field, value) != value:
            raise SpiffyError(f"{family} config: {field} = {config[field]!r} is not supported")


def expert_shapes(config: Mapping[str, Any], layers: Iterable[int]) -> dict[str, list[int]]:
    """Names and shapes of the experts' matrices, which checkpoints store one by one."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    shapes = {
        "gate_proj": [width, hidden],
        "up_proj": [width, hidden],
        "down_proj": [hidden, width],
    }
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight": shape
        for layer in layers
        for expert in range(config["num_experts"])
        for matrix, shape in shapes.items()
    }
