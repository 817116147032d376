"""Published configs of families beyond the first three against our modules, without weights.

LLaDA2.0's fields are those of the configs in inclusionAI/dFactory (its own training code), which
are of `model_type` llada2_moe_veomni; iLLaDA's are the architecture table of its model card.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers import PARITY
from safetensors import safe_open

from spiffy.cli.calibration_tables import shape_like
from spiffy.runtime.models.diffcoder import STABLE_DIFFCODER
from spiffy.runtime.models.family import Family
from spiffy.runtime.models.fast_dllm import FAST_DLLM
from spiffy.runtime.models.fields import check_entries
from spiffy.runtime.models.illada import ILLADA
from spiffy.runtime.models.llada2 import LLADA2

Shapes = dict[str, tuple[int, ...]]

MINI: dict[str, Any] = {
    "model_type": "llada2_moe",
    "num_hidden_layers": 20,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "norm_head": False,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_key_value_heads": 4,
    "rope_theta": 600000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_bias": False,
    "rms_norm_eps": 1e-06,
    "head_dim": 128,
    "num_shared_experts": 1,
    "use_qkv_bias": False,
    "vocab_size": 157184,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "score_function": "sigmoid",
    "partial_rotary_factor": 0.5,
    "use_sliding_window": False,
}
FLASH = MINI | {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
}


def on_meta(family: Family, config: Mapping[str, Any]) -> Shapes:
    architecture, module_config = family.architecture(config)
    with torch.device("meta"):
        module = architecture(module_config)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def gated_mlp(prefix: str, width: int, hidden: int) -> Shapes:
    names = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return {f"{prefix}.{name}.weight": shape for name, shape in names.items()}


def llada2_parameters(config: Mapping[str, Any]) -> Shapes:
    """What the official code calls its parameters, and how large they are."""
    hidden, head, vocab = (config[name] for name in ("hidden_size", "head_dim", "vocab_size"))
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    width = config["moe_intermediate_size"]
    shapes: Shapes = {
        "model.word_embeddings.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        shapes |= {
            f"{layer}.attention.query_key_value.weight": (queries + 2 * keys, hidden),
            f"{layer}.attention.dense.weight": (hidden, queries),
            f"{layer}.attention.query_layernorm.weight": (head,),
            f"{layer}.attention.key_layernorm.weight": (head,),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
        if number < config["first_k_dense_replace"]:
            shapes |= gated_mlp(f"{layer}.mlp", config["intermediate_size"], hidden)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (config["num_experts"], hidden)
        shapes[f"{layer}.mlp.gate.expert_bias"] = (config["num_experts"],)
        shared = width * config["num_shared_experts"]
        shapes |= gated_mlp(f"{layer}.mlp.shared_experts", shared, hidden)
        for expert in range(config["num_experts"]):
            shapes |= gated_mlp(f"{layer}.mlp.experts.{expert}", width, hidden)
    return shapes


def in_parts(config: Mapping[str, Any], stored: Shapes) -> Shapes:
    """Stored shapes, fused matrices split and names mapped."""
    shapes: Shapes = {}
    split = LLADA2.split(config)
    for name, shape in stored.items():
        if name in split:
            assert sum(split[name].values()) == shape[0]
            shapes |= {part: (rows, *shape[1:]) for part, rows in split[name].items()}
            continue
        for pattern, replacement in LLADA2.key_mapping.items():
            name = re.sub(pattern, replacement, name)
        assert name not in shapes
        shapes[name] = shape
    return shapes


def test_the_parity_checkpoint_has_the_official_names() -> None:
    config = json.loads((PARITY / "llada2-a" / "config.json").read_text())
    with safe_open(PARITY / "llada2-a" / "model.safetensors", framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert stored == llada2_parameters(config)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(MINI, 16_255_643_392), (FLASH, 102_889_705_216)],
    ids=["mini", "flash"],
)
def test_llada2_maps_one_to_one_and_has_the_size_of_what_it_was_made_from(
    config: dict[str, Any], parameters: int
) -> None:
    """Ling-mini-2.0 and Ling-flash-2.0, of the same architecture: "16B" and "100B"."""
    stored = llada2_parameters(config)
    ours = on_meta(LLADA2, config)
    assert size(stored) == size(ours) == parameters
    merged = {name: shape for name, shape in stored.items() if ".mlp.experts." in name}
    assert {name: tuple(shape) for name, shape in LLADA2.merged(config).items()} == merged
    single = {name: shape for name, shape in stored.items() if name not in merged}
    rest = {name: shape for name, shape in ours.items() if ".mlp.experts." not in name}
    assert in_parts(config, single) == rest


@pytest.mark.parametrize(("name", "config"), [("llada2-mini", MINI), ("llada2-flash", FLASH)])
def test_predictions_for_a_mixture_are_of_its_published_matrices(
    name: str, config: dict[str, Any]
) -> None:
    shape = shape_like(name)
    matrices = {n: s for n, s in llada2_parameters(config).items() if len(s) == 2}
    experts = {n: s for n, s in matrices.items() if ".mlp.experts." in n}
    head = config["vocab_size"] * config["hidden_size"]
    assert shape.experts == size(experts)
    assert shape.shared == size(matrices) - size(experts) - 2 * head  # without the embedding
    assert (shape.head, shape.experts_share) == (head, 8 / 256)
    assert (shape.layers, shape.kv_width) == (config["num_hidden_layers"], 4 * 128)
    assert shape.width == config["num_attention_heads"] * 128


def test_predictions_for_sdars_mixture_have_the_published_size() -> None:
    """Qwen3-30B-A3B's, which it was made from: 30.5 billion, 29.9 without embedding and head."""
    shape = shape_like("sdar-30b-a3b")
    assert round((shape.shared + shape.experts) / 1e9, 1) == 29.9
    assert round((shape.parameters + shape.head) / 1e9, 1) == 30.5
    used = shape.shared + shape.experts_share * shape.experts + 2 * shape.head
    assert 3.3e9 < used < 3.4e9  # "3.3B activated"


def test_half_of_llada2s_head_turns() -> None:
    architecture, module_config = LLADA2.architecture(MINI)
    with torch.device("meta"):
        module: Any = architecture(module_config)
    assert module.model.rotary_emb.inv_freq.shape == (32,)  # pairs, of heads of 128


def test_illada_8b_has_the_published_size() -> None:
    config = {
        "vocab_size": 155136,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,  # not in the table, and no matter of sizes; nor is the next
        "rope_theta": 500000.0,
    }
    ours = on_meta(ILLADA, config)
    embedding = math.prod(ours.pop("lm_head.weight"))
    assert round(size(ours) / 1e9, 2) == 7.62
    assert round((size(ours) - embedding) / 1e9, 2) == 6.98


def test_stable_diffcoder_8b_has_the_published_size() -> None:
    """Its config as a copy of the base model on the hub shows it; Seed-Coder-8B's size."""
    config = {
        "architectures": ["StableDiffcoderForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.009882118,
        "intermediate_size": 14336,
        "layer_norm_eps": None,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "resid_pdrop": 0.1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "5.3.0",
        "use_cache": True,
        "vocab_size": 155136,
    }
    check_entries("model", "stable-diffcoder", config, STABLE_DIFFCODER.entries)
    assert size(on_meta(STABLE_DIFFCODER, config)) == 8_250_462_208


def test_fast_dllm_v2_7b_has_the_size_of_what_it_was_made_from() -> None:
    """Its config as the hub shows it, but for the vocabulary, which is taken to be Qwen2.5-7B's."""
    config = {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "attention_dropout": 0.0,
        "bd_size": 32,
        "bos_token_id": 151643,
        "conplemenrary_mask": True,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "layer_types": ["full_attention"] * 28,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "Fast_dLLM_Qwen",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "pad_token_id": 151645,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    check_entries("model", "fast-dllm", config, FAST_DLLM.entries)
    assert size(on_meta(FAST_DLLM, config)) == 7_615_616_512
