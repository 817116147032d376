"""Fast-dLLM v2 (1.5B, 7B): Qwen2, block-causal, logits shifted, blocks filled in sub-blocks.

Decoding follows the official `generate` without its block cache: a block's first token comes from
the forward that stores the blocks before it, the others sub-block by sub-block. The official loop
predicts one more token after the last block, which is past `gen_length` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM

from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.fields import BLOCK_SIZES, USUAL, Entries, check_head_dim, usual_fields


def _architecture(config: Mapping[str, Any]) -> Architecture:
    check_head_dim(config)
    return Qwen2ForCausalLM, Qwen2Config(**usual_fields(config), use_sliding_window=False)


FAST_DLLM = Family(
    name="fast-dllm",
    model_types=("Fast_dLLM_Qwen",),
    computed_by=("qwen2",),
    architecture=_architecture,
    key_mapping={},
    logit_shift=1,
    block_causal=True,
    threshold_strict=True,
    scores_drawn=True,
    caches=("block",),
    begins_blocks_alone=True,
    sub_block_length=8,
    mask_token_id=151665,
    entries=Entries(
        reads=USUAL | {"head_dim", *BLOCK_SIZES},
        # It always has biases on queries, keys and values, and the parameters say so; the other is
        # of training, spelled as it is there.
        idle=frozenset({"complementary_mask", "conplemenrary_mask"}),
        only=dict.fromkeys(("attention_bias", "qkv_bias"), (True, False)),
    ),
)
