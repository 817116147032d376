"""`config.json` says what is computed: every entry is declared, computed, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, parity_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spiffy.runtime import ALIASES, load_model
from spiffy.runtime.models import FAMILIES
from spiffy.runtime.models.architecture import checked_architecture
from spiffy.runtime.models.family import Family
from spiffy.runtime.models.fields import check_entries, rope
from spiffy.schemas import SpiffyError

REAL = [
    *sorted(PARITY.glob("*/config.json")),
    *sorted((Path(__file__).parent / "data").glob("*.config.json")),
    *sorted(Path(ALIASES["tiny-llada"]).parent.glob("*/config.json")),
]
BASE = {"rope_theta": 10000.0}


def parity_config(source: str) -> tuple[Family, dict[str, Any]]:
    config = json.loads((PARITY / source / "config.json").read_text())
    return parity_model(source).family, config


def refused(source: str, **entries: Any) -> str:
    family, config = parity_config(source)
    with pytest.raises(SpiffyError) as caught:
        check_entries("some/model", family.name, {**config, **entries}, family.entries)
    message = str(caught.value)
    assert message.startswith("some/model: config.json: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_real_configs_say_nothing_unknown(path: Path) -> None:
    config = json.loads(path.read_text())
    families = [family for family in FAMILIES if config["model_type"] in family.model_types]
    assert families
    for family in families:
        check_entries("x", family.name, config, family.entries)


# ---------------------------------------------------------------- entries


@pytest.mark.parametrize(
    ("source", "entry", "value"),
    [
        ("dream-a", "hidden_act", "gelu"),
        ("sdar-a", "hidden_activation", "gelu_pytorch_tanh"),
        ("sdc-a", "activation_function", "relu"),
        ("llada-a", "activation_type", "swiglu"),
        ("dream-a", "use_sliding_window", True),
        ("illada-a", "sliding_window", 16),
        ("sdar-a", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("sdar-a", "layer_types", 3),
        ("llada-a", "clip_qkv", 0.0),
        ("llada-a", "alibi", True),
        ("llada-a", "bias_for_layer_norm", True),
        ("llada-a", "layer_norm_with_affine", False),
        ("illada-a", "layer_norm_eps", 1e-5),
        ("sdc-a", "attention_bias", True),
        ("sdc-a", "mlp_bias", True),
        ("dream-a", "use_mrope", True),
        ("dream-a", "use_qk_norm", True),
        ("dream-a", "qkv_bias", "4.46.2"),
        ("sdar-a", "use_qk_norm", False),
        ("llada2-a", "score_function", "softmax"),
        ("llada2-a", "use_rmsnorm", False),
        ("sdar-a", "final_logit_softcapping", 30.0),
        ("sdar-a", "logit_scale", 0.0625),
        ("a2d-mdlm-a", "embedding_multiplier", 12.0),
        ("sdc-a", "partial_rotary_factor", 0.5),
        ("sdc-a", "position_embedding_type", "absolute"),
    ],
)
def test_what_selects_another_computation_is_refused_by_name(
    source: str, entry: str, value: Any
) -> None:
    shown = value[1] if isinstance(value, list) else value
    assert f"{entry} = {shown!r} is not supported" in refused(source, **{entry: value})


@pytest.mark.parametrize(
    ("source", "entry"),
    [("llada2-a", "head_dim"), ("llada2-a", "num_key_value_heads"), ("llada2-a", "num_experts")],
)
def test_what_is_null_and_needed_is_refused_in_one_line(source: str, entry: str) -> None:
    family, config = parity_config(source)
    with pytest.raises(SpiffyError) as caught:
        checked_architecture("x", family, {**config, entry: None})
    assert str(caught.value).startswith("x: config.json")


@pytest.mark.parametrize("source", ["llada-a", "dream-a", "sdar-a", "llada2-a", "sdc-a"])
def test_an_entry_that_nobody_knows_is_refused_by_name(source: str) -> None:
    message = refused(source, attention_sinks=4)
    assert "unknown entry 'attention_sinks' = 4 could change what" in message
    assert "remove it from config.json" in message


def test_a_block_size_is_unknown_to_families_without_blocks() -> None:
    """Models of Dream's type are published that decode in blocks."""
    assert "unknown entry 'block_size' = 32" in refused("dream-a", block_size=32)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_entry_that_says_nothing_is_none(value: Any) -> None:
    family, config = parity_config("sdar-a")
    stated = {**config, "attention_sinks": value, "_name_or_path": "x", "top_k": 20}
    check_entries("x", family.name, stated, family.entries)


@pytest.mark.parametrize(
    "value", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"load_in_4bit": True}]
)
@pytest.mark.parametrize("entry", ["quantization_config", "compression_config", "quantization"])
def test_quantized_weights_are_refused_as_such(entry: str, value: dict[str, Any]) -> None:
    message = refused("sdar-a", **{entry: value})
    assert f"{entry}: the weights are quantized" in message
    assert str(value.get("quant_method", "not named")) in message
    assert "give the checkpoint that they were made from" in message


def test_a_window_that_is_not_used_is_none() -> None:
    family, config = parity_config("sdar-a")
    stated = {"use_sliding_window": False, "sliding_window": 16, "layer_types": ["full_attention"]}
    check_entries("x", family.name, {**config, **stated}, family.entries)
    del config["use_sliding_window"]
    with pytest.raises(SpiffyError, match="sliding_window = 16 is not supported"):
        check_entries("x", family.name, {**config, "sliding_window": 16}, family.entries)


def test_another_spelling_must_say_the_same() -> None:
    family, config = parity_config("llada-a")
    check_entries("x", family.name, {**config, "hidden_size": 64}, family.entries)
    assert "hidden_size = 65 contradicts d_model = 64" in refused("llada-a", hidden_size=65)


# ---------------------------------------------------------------- RoPE

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-more": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
LIMITS = {"llada-a": "max_sequence_length"}  # others: max_position_embeddings
OFFICIAL: dict[str, tuple[Any, Any]] = {
    "llada-a": (LlamaForCausalLM, LlamaConfig),
    "dream-a": (Qwen2ForCausalLM, Qwen2Config),
    "sdar-a": (Qwen3ForCausalLM, Qwen3Config),
}
IDS = torch.arange(5, 45)[None]


def with_config(folder: Path, source: str, **entries: Any) -> Path:
    """The parity checkpoint with other entries; None takes one out."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").symlink_to(PARITY / source / "model.safetensors")
    config = json.loads((PARITY / source / "config.json").read_text())
    stated = {key: value for key, value in {**config, **entries}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


@pytest.mark.parametrize("source", OFFICIAL)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_rope_is_computed_as_transformers_computes_it(
    tmp_path: Path, source: str, scaling: str
) -> None:
    limit = {LIMITS.get(source, "max_position_embeddings"): 16}
    folder = with_config(tmp_path, source, rope_scaling=SCALINGS[scaling], **limit)
    model = load_model(str(folder), device="cpu", dtype="float32")
    assert model.max_length == (16 if scaling == "llama3" else 64)
    ours = model.forward_logits(IDS, 64 if model.family.block_causal else None)

    architecture, configuration = OFFICIAL[source]
    loaded, config = model.module.config, model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    official = architecture(
        configuration(
            **{name: getattr(loaded, name) for name in names},
            **({"head_dim": config["head_dim"]} if "head_dim" in config else {}),
            max_position_embeddings=16,
            rope_theta=config["rope_theta"],
            rope_scaling=dict(SCALINGS[scaling]),
            tie_word_embeddings=False,
        )
    ).eval()
    official.load_state_dict(model.module.state_dict())
    everywhere = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool)
    with torch.inference_mode():
        expected = official(input_ids=IDS, attention_mask=everywhere, use_cache=False).logits
    rows = (torch.arange(IDS.shape[1]) - model.family.logit_shift).clamp_min(0)
    plainly = parity_model(source).forward_logits(IDS, 64 if model.family.block_causal else None)
    assert (ours - plainly).abs().max() > 1e-3
    assert (ours - expected[:, rows]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "stated",
    [
        {"rope_theta": 10000, "rope_scaling": None},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    ],
)
def test_one_rope_has_one_meaning_in_every_spelling(stated: dict[str, Any]) -> None:
    assert rope(stated) == {"rope_type": "default", "rope_theta": 10000.0}


def test_the_part_of_a_head_that_turns_is_stated_where_a_family_has_one() -> None:
    flat = {"rope_theta": 1.5, "partial_rotary_factor": 0.5}
    assert rope(flat, partial=True) == {"rope_type": "default", **flat}
    assert rope({"rope_parameters": flat}, partial=True) == {"rope_type": "default", **flat}
    with pytest.raises(KeyError, match="partial_rotary_factor"):
        rope(BASE, partial=True)


def test_scaling_has_one_meaning_in_every_spelling() -> None:
    inside = {"rope_type": "linear", "factor": 2, "rope_theta": 10000.0}
    spellings: list[dict[str, Any]] = [
        BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        BASE | {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
        {"rope_parameters": inside},
        BASE | {"rope_parameters": {"full_attention": inside, "sliding_attention": inside}},
        BASE | {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": inside},
    ]
    assert [rope(stated) for stated in spellings] == [inside] * len(spellings)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (
            BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
            "rope_parameters.rope_theta 500000.0 contradicts rope_theta 10000.0",
        ),
        (
            BASE
            | {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "contradicts rope_scaling",
        ),
        (
            BASE | {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
            "rope_scaling.type 'yarn' contradicts rope_scaling.rope_type 'linear'",
        ),
        (
            BASE
            | {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            "rope_parameters.sliding_attention is not supported",
        ),
        (
            BASE | {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 3}},
            "rope_scaling.alpha = 3 is not supported for type 'dynamic'",
        ),
        (
            BASE | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "RoPE of type 'longrope' is not supported: default, dynamic, linear, llama3, yarn are",
        ),
        (BASE | {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope' is not suppor"),
        (BASE | {"rope_scaling": {"type": "linear"}}, "rope_scaling lacks 'factor'"),
        (
            BASE | {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}},
            "rope_scaling.alpha = 3 is not supported for type 'linear'",
        ),
        (
            BASE | {"rope_scaling": {"type": "linear", "factor": -1}},
            "rope_scaling.factor -1 must be a positive number",
        ),
        (BASE | {"rope_scaling": "linear"}, "rope_scaling 'linear' must be an object"),
        ({"rope_theta": True}, "rope_theta True must be a positive number"),
        (
            BASE | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 is not supported: whole heads turn",
        ),
    ],
)
def test_rope_that_is_not_computed_or_contradicts_itself_is_refused(
    tmp_path: Path, stated: dict[str, Any], words: str
) -> None:
    """By the loader too, whose line names the file."""
    with_config(tmp_path, "sdar-a", **{"rope_theta": None, **stated})
    with pytest.raises(SpiffyError) as caught:
        load_model(str(tmp_path), device="cpu")
    assert f"{tmp_path}: config.json: " in str(caught.value)
    assert words in str(caught.value)
