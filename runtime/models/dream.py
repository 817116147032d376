"""Dream (v0-Base, v0-Instruct), DiffuCoder, Dream-Coder: Qwen2, bidirectional, logits shifted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM

from spiffy.runtime.models.family import Architecture, Family
from spiffy.runtime.models.fields import USUAL, Entries, check_head_dim, usual_fields


def _architecture(config: Mapping[str, Any]) -> Architecture:
    check_head_dim(config)
    return Qwen2ForCausalLM, Qwen2Config(**usual_fields(config), use_sliding_window=False)


DREAM = Family(
    name="dream",
    model_types=("Dream",),
    computed_by=("qwen2",),
    architecture=_architecture,
    key_mapping={},
    logit_shift=1,
    block_causal=False,
    threshold_strict=False,
    scores_drawn=True,
    caches=("none", "dual", "prefix", "prefix-shared"),
    entries=Entries(
        reads=USUAL | {"head_dim"},
        # Dream always has biases on queries, keys and values, and the parameters say so.
        only=dict.fromkeys(("attention_bias", "qkv_bias"), (True, False)),
    ),
)
