"""SDAR (1.7B to 30B-A3B) and TraDo: Qwen3, bidirectional in a block, causal across blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.fields import (
    BLOCK_SIZES,
    QK_NORM,
    USUAL,
    Entries,
    expert_shapes,
    usual_fields,
)

_MIXTURE_FIELDS = (
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
)


_ENTRIES = Entries(
    reads=USUAL
    | {"attention_bias", "decoder_sparse_step", "head_dim", "mlp_only_layers"}
    | {*BLOCK_SIZES, *_MIXTURE_FIELDS},
    only=dict.fromkeys(QK_NORM, (True,)),
    idle=frozenset(
        {"debug", "ep_size", "fuse_cross_entropy", "micro_forward", "skip_checkpoint"}
        | {"output_router_logits", "use_deepep"}
    ),
)


def _architecture(config: Mapping[str, Any]) -> Architecture:
    fields = usual_fields(config) | {
        "head_dim": config["head_dim"],
        "attention_bias": config.get("attention_bias") or False,
        "use_sliding_window": False,
    }
    if config["model_type"] == "sdar_moe":
        fields |= {field: config[field] for field in _MIXTURE_FIELDS}
        # Every layer is a mixture unless the config says otherwise.
        fields["decoder_sparse_step"] = config.get("decoder_sparse_step", 1)
        fields["mlp_only_layers"] = config.get("mlp_only_layers") or []
        if type(fields["decoder_sparse_step"]) is not int or fields["decoder_sparse_step"] < 1:
            raise ValueError("decoder_sparse_step must be a whole number, at least 1")
        if config["num_experts_per_tok"] > config["num_experts"]:
            raise ValueError("num_experts_per_tok is more than num_experts")
        return Qwen3MoeForCausalLM, Qwen3MoeConfig(**fields)
    return Qwen3ForCausalLM, Qwen3Config(**fields)


def _experts(config: Mapping[str, Any]) -> dict[str, list[int]]:
    if config["model_type"] != "sdar_moe":
        return {}
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = range(config["num_hidden_layers"])
    return expert_shapes(config, [k for k in layers if (k + 1) % step == 0 and k not in dense])


SDAR = Family(
    name="sdar",
    model_types=("sdar", "sdar_moe"),
    computed_by=("qwen3", "qwen3_moe"),
    architecture=_architecture,
    key_mapping={},
    logit_shift=0,
    block_causal=True,
    threshold_strict=True,
    scores_drawn=True,
    caches=("block",),
    block_size=4,
    merged=_experts,
    entries=_ENTRIES,
    block_size_varies=True,
)
