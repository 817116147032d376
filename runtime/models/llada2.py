"""LLaDA2.0 (mini 16B-A1.4B, flash 100B-A6B): GLM-4's mixture of experts, block-causal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.fields import (
    BLOCK_SIZES,
    QK_NORM,
    USUAL,
    Entries,
    expert_shapes,
    usual_fields,
)

_ENTRIES = Entries(
    reads=USUAL
    | {"first_k_dense_replace", "head_dim", "moe_intermediate_size", "n_group", "num_experts"}
    | {"num_experts_per_tok", "num_shared_experts", "partial_rotary_factor"}
    | {"routed_scaling_factor", "topk_group", *BLOCK_SIZES},
    only={
        "moe_router_enable_expert_bias": (True,),
        "norm_topk_prob": (True,),
        "score_function": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        **dict.fromkeys(QK_NORM, (True,)),
    },
    idle=frozenset(
        # The shared experts' width and the part of the head that turns follow from what is read.
        {"moe_shared_expert_intermediate_size", "rotary_dim"}
        | {"mtp_loss_scaling_factor", "output_router_logits"}
        | {"router_dtype"}
    ),
)


class _Mixture(Glm4MoeForCausalLM):  # type: ignore[misc]
    """GLM's own checkpoints carry layers that their loader skips; here a surplus is an error."""

    def __init__(self, config: Glm4MoeConfig) -> None:
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected: set[str] = set()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As GLM's own class: transformers reads that off the file that a class stands in."""
        return bool(Glm4MoeForCausalLM._can_set_experts_implementation())


def _architecture(config: Mapping[str, Any]) -> Architecture:
    for entry in ("head_dim", "num_key_value_heads"):
        if config.get(entry) is None:  # transformers would take a default for it
            raise KeyError(entry)
    experts, groups, kept = (config[k] for k in ("num_experts", "n_group", "topk_group"))
    if experts % groups or experts // groups < 2 or kept > groups:
        raise ValueError(f"{experts} experts do not make {groups} groups of which {kept} are kept")
    if config["num_experts_per_tok"] > kept * (experts // groups):
        raise ValueError("num_experts_per_tok is more than the kept groups have")
    if config["num_shared_experts"] < 1:
        raise ValueError("num_shared_experts must be at least 1")
    fields = usual_fields(config, partial=True)
    return _Mixture, Glm4MoeConfig(
        **fields,
        head_dim=config["head_dim"],
        partial_rotary_factor=fields["rope_parameters"]["partial_rotary_factor"],
        use_qk_norm=True,
        first_k_dense_replace=config["first_k_dense_replace"],
        moe_intermediate_size=config["moe_intermediate_size"],
        n_routed_experts=experts,
        n_shared_experts=config["num_shared_experts"],
        num_experts_per_tok=config["num_experts_per_tok"],
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=True,
        routed_scaling_factor=config["routed_scaling_factor"],
    )


def _experts(config: Mapping[str, Any]) -> dict[str, list[int]]:
    layers = range(config["first_k_dense_replace"], config["num_hidden_layers"])
    return expert_shapes(config, layers)


def _split(config: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Rows of the heads' queries, then keys, then values, in one stored matrix."""
    queries, others = (
        config[field] * config["head_dim"]
        for field in ("num_attention_heads", "num_key_value_heads")
    )
    return {
        f"model.layers.{layer}.attention.query_key_value.weight": {
            f"model.layers.{layer}.self_attn.{part}_proj.weight": rows
            for part, rows in (("q", queries), ("k", others), ("v", others))
        }
        for layer in range(config["num_hidden_layers"])
    }


LLADA2 = Family(
    name="llada2",
    model_types=("llada2_moe",),
    computed_by=("glm4_moe",),
    architecture=_architecture,
    key_mapping={
        r"^model\.word_embeddings\.": "model.embed_tokens.",
        r"\.attention\.dense\.": ".self_attn.o_proj.",
        r"\.attention\.query_layernorm\.": ".self_attn.q_norm.",
        r"\.attention\.key_layernorm\.": ".self_attn.k_norm.",
        r"\.mlp\.gate\.expert_bias$": ".mlp.gate.e_score_correction_bias",
    },
    logit_shift=0,
    block_causal=True,
    threshold_strict=True,
    scores_drawn=True,
    caches=("block",),
    merged=_experts,
    split=_split,
    mask_token_id=156895,
    entries=_ENTRIES,
)
