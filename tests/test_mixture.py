"""SDAR's mixtures of experts, from the official layout: one matrix per expert and projection."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from helpers import PARITY, Oracle, decode, random_prompt, states
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu, softmax

from spiffy.runtime import DiffusionLM, load_model
from spiffy.runtime.draft import GraphDrafter
from spiffy.schemas import DecodingSettings, SpiffyError

EXPERTS, CHOSEN, WIDTH, BLOCK = 6, 2, 24, 4
UP_3 = "model.layers.1.mlp.experts.3.up_proj.weight"
Weights = dict[str, Tensor]


def official(folder: Path, **changes: Any) -> tuple[dict[str, Any], Weights]:
    """The dense parity checkpoint with random experts for its MLPs, in the official layout."""
    config = json.loads((PARITY / "sdar-a" / "config.json").read_text())
    config |= {
        "model_type": "sdar_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "moe_intermediate_size": WIDTH,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    } | changes
    dense = load_file(PARITY / "sdar-a" / "model.safetensors")
    weights = {name: value for name, value in dense.items() if ".mlp." not in name}
    generator = torch.Generator().manual_seed(0)
    hidden = config["hidden_size"]
    shapes = {"gate_proj": (WIDTH, hidden), "up_proj": (WIDTH, hidden)}
    shapes["down_proj"] = (hidden, WIDTH)
    for layer in range(config["num_hidden_layers"]):
        mlp = f"model.layers.{layer}.mlp"
        weights[f"{mlp}.gate.weight"] = torch.randn(EXPERTS, hidden, generator=generator)
        for expert in range(EXPERTS):
            for name, shape in shapes.items():
                value = 0.2 * torch.randn(shape, generator=generator)
                weights[f"{mlp}.experts.{expert}.{name}.weight"] = value
    save(folder, config, weights)
    return config, weights


def save(folder: Path, config: dict[str, Any], weights: Weights) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@cache
def mixture() -> DiffusionLM:
    with TemporaryDirectory() as folder:
        official(Path(folder))
        return load_model(folder, device="cpu", dtype="float64")


# ---------------------------------------------------------------- an independent forward


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of [heads, length, head_dim]: dimension i turns with i + head_dim / 2."""
    half = x.shape[-1] // 2
    speed = base ** -(torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * speed
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def expert_layer(x: Tensor, weights: Callable[[str], Tensor], normalised: bool) -> Tensor:
    """One position [hidden] after the other, one expert after the other."""
    rows = []
    for row in x:
        share, expert = softmax(weights("gate") @ row, 0).topk(CHOSEN)
        if normalised:
            share = share / share.sum()
        total = torch.zeros_like(row)
        for weight, k in zip(share, expert.tolist(), strict=True):
            gate, up = (weights(f"experts.{k}.{name}_proj") for name in ("gate", "up"))
            total += weight * (weights(f"experts.{k}.down_proj") @ (silu(gate @ row) * (up @ row)))
        rows.append(total)
    return torch.stack(rows)


def reference_logits(ids: Tensor, config: dict[str, Any], stored: Weights) -> Tensor:
    """Logits [length, vocab] in float64 of ids [length], from the stored tensors alone."""
    weights = {name: value.double() for name, value in stored.items()}
    eps, dim = config["rms_norm_eps"], config["head_dim"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    block = torch.arange(len(ids)) // BLOCK
    hidden_from = block[:, None] < block[None, :]
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):

        def at(name: str, prefix: str = f"model.layers.{layer}.") -> Tensor:
            return weights[f"{prefix}{name}.weight"]

        y = norm(x, at("input_layernorm"), eps)
        q, k, v = (
            (y @ at(f"self_attn.{name}_proj").T).view(len(ids), -1, dim).transpose(0, 1)
            for name in "qkv"
        )
        q = rotate(norm(q, at("self_attn.q_norm"), eps), config["rope_theta"])
        k = rotate(norm(k, at("self_attn.k_norm"), eps), config["rope_theta"])
        k, v = (value.repeat_interleave(heads // shared, 0) for value in (k, v))
        scores = (q @ k.transpose(1, 2) / dim**0.5).masked_fill(hidden_from, -torch.inf)
        mixed = (softmax(scores, -1) @ v).transpose(0, 1).reshape(len(ids), -1)
        x = x + mixed @ at("self_attn.o_proj").T
        y = norm(x, at("post_attention_layernorm"), eps)

        def of_mlp(name: str, at: Callable[[str], Tensor] = at) -> Tensor:
            return at(f"mlp.{name}")

        x = x + expert_layer(y, of_mlp, config["norm_topk_prob"])
    x = norm(x, weights["model.norm.weight"], eps)
    return x @ weights["lm_head.weight"].T


@pytest.mark.parametrize("dtype", ["float64", "float32"])  # transformers runs them by other code
@pytest.mark.parametrize("normalised", [True, False])
def test_the_forward_is_that_of_the_stored_experts(
    tmp_path: Path, normalised: bool, dtype: str
) -> None:
    config, weights = official(tmp_path, norm_topk_prob=normalised)
    model = load_model(str(tmp_path), device="cpu", dtype=dtype)
    ids = random_prompt(model, 14)
    logits = model.forward_logits(ids[None], BLOCK)[0]
    expected = reference_logits(ids, config, weights)
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-3  # of logits in the tens, in float32


def test_every_expert_lands_in_its_place(tmp_path: Path) -> None:
    _, weights = official(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu").module.state_dict()
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp"
        assert torch.equal(loaded[f"{mlp}.gate.weight"], weights[f"{mlp}.gate.weight"])
        for expert in range(EXPERTS):
            gate, up, down = (
                weights[f"{mlp}.experts.{expert}.{name}_proj.weight"]
                for name in ("gate", "up", "down")
            )
            both = loaded[f"{mlp}.experts.gate_up_proj"][expert]
            assert torch.equal(both, torch.cat((gate, up)))
            assert torch.equal(loaded[f"{mlp}.experts.down_proj"][expert], down)


def test_a_device_map_loads_the_same_mixture(tmp_path: Path) -> None:
    official(tmp_path)
    model = load_model(str(tmp_path), device_map="cpu", dtype="float64")
    ids = random_prompt(model, 9)[None]
    assert torch.equal(model.forward_logits(ids), mixture().forward_logits(ids))


# ---------------------------------------------------------------- what is refused


def refusal(folder: Path, config: dict[str, Any], weights: Weights) -> str:
    save(folder, config, weights)
    with pytest.raises(SpiffyError) as caught:
        load_model(str(folder), device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_expert_parameter_is_named(tmp_path: Path) -> None:
    config, weights = official(tmp_path)
    del weights[UP_3]
    assert f"missing parameter {UP_3} (1 in all)" in refusal(tmp_path, config, weights)


def test_an_expert_of_a_wrong_number_is_refused(tmp_path: Path) -> None:
    """As many as there should be: stacked in order, they would load as another model."""
    config, weights = official(tmp_path)
    for name in ("gate_proj", "up_proj", "down_proj"):
        moved = UP_3.replace("up_proj", name)
        weights[moved.replace("experts.3", f"experts.{EXPERTS}")] = weights.pop(moved)
    assert "missing parameter model.layers.1.mlp.experts.3." in refusal(tmp_path, config, weights)


def test_more_experts_than_the_config_says_are_refused(tmp_path: Path) -> None:
    config, weights = official(tmp_path)
    config["num_experts"] = EXPERTS - 1
    message = refusal(tmp_path, config, weights)
    assert "unexpected parameter model.layers.0.mlp.experts.5.down_proj.weight (9 in" in message


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    config, weights = official(tmp_path)
    weights[UP_3] = weights[UP_3][:-1].clone()
    assert f"mismatched parameter {UP_3}" in refusal(tmp_path, config, weights)


def test_a_missing_router_is_named(tmp_path: Path) -> None:
    config, weights = official(tmp_path)
    del weights["model.layers.2.mlp.gate.weight"]
    message = refusal(tmp_path, config, weights)
    assert "missing parameter model.layers.2.mlp.gate.weight" in message


@pytest.mark.parametrize("field", ["num_experts", "num_experts_per_tok", "norm_topk_prob"])
def test_a_mixture_config_that_lacks_a_field_is_refused(tmp_path: Path, field: str) -> None:
    """Their defaults elsewhere differ from what these checkpoints need."""
    config, weights = official(tmp_path)
    del config[field]
    assert f"config.json lacks {field!r}" in refusal(tmp_path, config, weights)


def test_a_sparse_step_of_zero_is_refused(tmp_path: Path) -> None:
    config, weights = official(tmp_path)
    config["decoder_sparse_step"] = 0
    assert "decoder_sparse_step must be" in refusal(tmp_path, config, weights)


def test_experts_in_a_dense_checkpoint_are_unexpected(tmp_path: Path) -> None:
    config, weights = official(tmp_path)
    config["model_type"] = "sdar"
    assert "unexpected parameter" in refusal(tmp_path, config, weights)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    "policy", [{"tokens_per_step": 1}, {"policy": "threshold", "threshold": 0.5}], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_change_no_state(policy: dict[str, Any], temperature: float) -> None:
    model = mixture()
    settings = DecodingSettings.parse(
        cache="block",
        block_length=8,
        gen_length=16,
        temperature=temperature,
        stop_at_eos=False,
        **policy,
    )
    prompt = random_prompt(model, 11)
    plain = decode(model, prompt, settings)
    rng = random.Random(0)
    graph = [
        sorted({rng.randrange(6): rng.randrange(4) for _ in range(depth)}.items())
        for depth in (1, 1, 1, 2, 2, 3)
    ]
    graphed = decode(model, prompt, settings, GraphDrafter(graph, model))
    foreseen = decode(model, prompt, settings, Oracle(plain, depth=3))
    assert graphed.stats.drafted > 0
    assert foreseen.stats.accepted > 0
    assert foreseen.stats.nfe < plain.stats.nfe
    assert states(graphed) == states(foreseen) == states(plain)
