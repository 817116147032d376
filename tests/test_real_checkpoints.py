"""Published checkpoints against our modules, without weights: names one to one, sizes exact.

The modules are built on the meta device. What a checkpoint stores is spelled out here from the
official code's names, or read from the published index (tests/data).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY
from safetensors.torch import load_file

from spiffy.runtime import ALIASES
from spiffy.runtime.models.dream import DREAM
from spiffy.runtime.models.family import Family
from spiffy.runtime.models.llada import LLADA
from spiffy.runtime.models.sdar import SDAR

DATA = Path(__file__).parent / "data"
Shapes = dict[str, tuple[int, ...]]

# Qwen3-30B-A3B's sizes, which SDAR-30B-A3B shares; in the layout of SDAR's other configs.
SDAR_30B_A3B: dict[str, Any] = {
    "model_type": "sdar_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
}


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((DATA / f"{name}.config.json").read_text())
    return config


def on_meta(family: Family, config: Mapping[str, Any]) -> Shapes:
    architecture, module_config = family.architecture(config)
    with torch.device("meta"):
        module = architecture(module_config)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def renamed(family: Family, name: str) -> str:
    for pattern, replacement in family.key_mapping.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    return name


def mapped(family: Family, stored: Shapes) -> Shapes:
    """Stored shapes under the module's names, of which no two may be the same."""
    shapes = {renamed(family, name): shape for name, shape in stored.items()}
    assert len(shapes) == len(stored)
    return shapes


def size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def llada_parameters(config: Mapping[str, Any]) -> Shapes:
    """What the official LLaDA code calls its parameters, and how large they are."""
    d, mlp, vocab = config["d_model"], config["mlp_hidden_size"], config["vocab_size"]
    shapes: Shapes = {"wte.weight": (vocab, d), "ln_f.weight": (d,), "ff_out.weight": (vocab, d)}
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            shapes[f"{block}{name}.weight"] = (d, d)
        shapes |= {f"{block}{name}.weight": (mlp, d) for name in ("ff_proj", "up_proj")}
        shapes[f"{block}ff_out.weight"] = (d, mlp)
        shapes |= {f"{block}{name}.weight": (d,) for name in ("attn_norm", "ff_norm")}
    return {f"model.transformer.{name}": shape for name, shape in shapes.items()}


def qwen_parameters(
    config: Mapping[str, Any], head_dim: int, bias: bool, head_norms: bool, mlp: Shapes
) -> Shapes:
    """Qwen's parameters: Dream's with biases on q, k and v; SDAR's with norms of q and k."""
    d = config["hidden_size"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer: Shapes = {
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }
    layer |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
    if bias:
        widths = {"q": q, "k": kv, "v": kv}
        layer |= {f"self_attn.{name}_proj.bias": (width,) for name, width in widths.items()}
    if head_norms:
        layer |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    shapes: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], d),
        "model.norm.weight": (d,),
        "lm_head.weight": (config["vocab_size"], d),
    }
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def gated_mlp(width: int, d: int, prefix: str = "") -> Shapes:
    names = {"gate_proj": (width, d), "up_proj": (width, d), "down_proj": (d, width)}
    return {prefix + name: shape for name, shape in names.items()}


def test_llada_8b_maps_one_to_one_and_has_the_published_size() -> None:
    config = published("llada-8b")
    stored = llada_parameters(config)
    assert mapped(LLADA, stored) == on_meta(LLADA, config)
    assert size(stored) == 8_015_581_184


def test_the_parity_checkpoint_has_the_official_llada_names() -> None:
    config = json.loads((PARITY / "llada-a" / "config.json").read_text())
    weights = load_file(PARITY / "llada-a" / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in weights.items()} == llada_parameters(config)


def test_dream_7b_maps_one_to_one_and_has_the_published_size() -> None:
    config = published("dream-7b")
    d, mlp = config["hidden_size"], config["intermediate_size"]
    stored = qwen_parameters(config, 128, bias=True, head_norms=False, mlp=gated_mlp(mlp, d))
    assert mapped(DREAM, stored) == on_meta(DREAM, config)
    assert size(stored) == 7_615_616_512


@pytest.mark.parametrize(
    ("name", "published_bytes"),
    [("sdar-4b-chat", 8_822_848_512), ("sdar-8b-chat", 16_381_470_720)],
)
def test_sdar_maps_one_to_one_and_has_the_published_size(name: str, published_bytes: int) -> None:
    """The bytes are `total_size` of the published index, in bfloat16: the head is not tied."""
    config = published(name)
    ours = on_meta(SDAR, config)
    names = (DATA / f"{name}.parameters.txt").read_text().split()
    assert len(set(names)) == len(names)
    assert sorted(renamed(SDAR, stored) for stored in names) == sorted(ours)
    d, mlp = config["hidden_size"], config["intermediate_size"]
    mlps = gated_mlp(mlp, d)
    assert ours == qwen_parameters(config, 128, bias=False, head_norms=True, mlp=mlps)
    assert 2 * size(ours) == published_bytes


def test_sdar_30b_a3b_stores_its_experts_one_by_one_and_has_qwens_size() -> None:
    config = SDAR_30B_A3B
    d, width, experts = 2048, 768, 128
    mixture: Shapes = {"gate": (experts, d)}
    for expert in range(experts):
        mixture |= gated_mlp(width, d, f"experts.{expert}.")
    stored = qwen_parameters(config, 128, bias=False, head_norms=True, mlp=mixture)
    assert size(stored) == 30_532_122_624

    merged = {name: shape for name, shape in stored.items() if ".experts." in name}
    assert {name: tuple(shape) for name, shape in SDAR.merged(config).items()} == merged
    ours = on_meta(SDAR, config)
    assert size(ours) == size(stored)
    single = {name: shape for name, shape in stored.items() if name not in merged}
    assert single == {name: shape for name, shape in ours.items() if ".experts." not in name}


def test_aliases_are_hub_ids_or_ship_with_the_package() -> None:
    for alias, place in ALIASES.items():
        assert alias == alias.lower()
        if not Path(place).is_dir():
            assert re.fullmatch(r"[\w-]+/[\w.-]+", place)
    assert len(set(ALIASES.values())) == len(ALIASES)
