"""Dynamic RoPE: frequencies of the whole sequence, whatever a forward holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import PARITY, Oracle, decode, random_prompt, states
from transformers import LlamaConfig, LlamaForCausalLM

from spiffy.runtime import DiffusionLM, load_model, wrap
from spiffy.runtime.decode import make_task, run
from spiffy.runtime.models.rotary import reach
from spiffy.schemas import DecodingSettings

TRAINED = 16
LAYOUTS = [
    ("llada-a", "none"),
    ("llada-a", "dual"),
    ("llada-a", "prefix"),
    ("dream-a", "dual"),
    ("sdar-a", "block"),
]


def dynamic_model(source: str, folder: Path) -> DiffusionLM:
    """The parity checkpoint, stretched from 16 positions to 64."""
    config = json.loads((PARITY / source / "config.json").read_text())
    for entry in ("max_sequence_length", "max_position_embeddings"):
        if entry in config:
            config[entry] = TRAINED
    config["rope_scaling"] = {"type": "dynamic", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(PARITY / source / "model.safetensors")
    return load_model(str(folder), device="cpu", dtype="float64")


@pytest.mark.parametrize(("source", "cache"), LAYOUTS)
def test_drafts_and_company_change_no_state_beyond_the_trained_length(
    tmp_path: Path, source: str, cache: str
) -> None:
    """In each layout forwards hold other positions than plain ones, and batches other lengths."""
    model = dynamic_model(source, tmp_path)
    setting = DecodingSettings(cache=cache, gen_length=16, block_length=8)
    plain, batch = [], []
    for length in (3, 30, 11, 2):
        prompt = random_prompt(model, length)
        plain.append(decode(model, prompt, setting))
        drafted = decode(model, prompt, setting, Oracle(plain[-1], 3))
        assert states(drafted) == states(plain[-1])
        assert drafted.stats.nfe < plain[-1].stats.nfe
        batch.append(make_task(model, prompt, setting, Oracle(plain[-1], 3)))
    for _ in run(model, batch, batch_size=3):
        pass
    assert [states(task) for task in batch] == [states(task) for task in plain]


def test_a_wrapped_module_computes_for_others_as_it_did(tmp_path: Path) -> None:
    """Its own forward depends on those before it; ours does not, and does not change that."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TRAINED,
        rope_scaling={"rope_type": "dynamic", "factor": 4.0},
        mask_token_id=63,
    )
    module = LlamaForCausalLM(config).eval()
    ids = torch.arange(40)[None]
    everywhere = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    with torch.inference_mode():
        # What was 40 positions long keeps its frequencies for 20: transformers' rule.
        fresh = module(input_ids=ids[:, :20], attention_mask=everywhere[..., :20, :20]).logits
        long = module(input_ids=ids, attention_mask=everywhere).logits
        stale = module(input_ids=ids[:, :20], attention_mask=everywhere[..., :20, :20]).logits
        assert (fresh - stale).abs().max() > 1e-4
        model = wrap(module, None, family="llada")
        assert model.max_length == 64
        for _ in range(2):
            torch.testing.assert_close(model.forward_logits(ids[:, :20]), fresh)
            torch.testing.assert_close(model.forward_logits(ids), long)
        again = module(input_ids=ids[:, :20], attention_mask=everywhere[..., :20, :20]).logits
        assert torch.equal(again, stale)
    assert wrap(module, None, family="llada").max_length == 64  # a second time


@pytest.mark.parametrize(
    ("rope", "reached"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "llama3", "factor": 8.0}, 100),
        ({"rope_type": "linear", "factor": 2.5}, 250),
        ({"rope_type": "dynamic", "factor": 2.0}, 200),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}, 100),
        ({"rope_type": "yarn", "factor": 0.5}, 100),
    ],
)
def test_scaled_rope_reaches_as_far_as_its_factor_says(
    rope: dict[str, object], reached: int
) -> None:
    assert reach(100, rope) == reached
    assert reach(None, rope) is None
