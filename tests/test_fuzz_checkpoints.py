"""Checkpoints that nobody meant to make: refused in one line, or computed as they say."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, parity_model, study
from safetensors.torch import load_file, save_file

from spiffy.runtime import load_model
from spiffy.schemas import SpiffyError

fuzz = study("fuzz_checkpoints")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with fuzz.whole_checkpoints() as folder:
        yield folder


def test_mutated_checkpoints_are_refused_or_computed_as_they_say(place: Path) -> None:
    """A few of `studies/fuzz_checkpoints.py`."""
    counts = Counter[str]()
    for seed in range(60):
        kind, found, _ = fuzz.judge(seed, place)
        assert found in ("loaded", "refused"), f"seed {seed} ({kind})"
        counts[found] += 1
    assert min(counts["loaded"], counts["refused"]) > 12


def altered(folder: Path, source: str, **entries: Any) -> Path:
    """A checkpoint with random weights, and with other entries."""
    folder /= source  # whose name says which kind of A2D it is
    folder.mkdir()
    shutil.copy(PARITY / source / "model.safetensors", folder)
    config = json.loads((PARITY / source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.mark.parametrize(
    ("source", "entries"),
    [
        ("dream-a", {"hidden_act": "gelu"}),
        ("llada-a", {"rope_theta": 500.0}),
        ("sdar-a", {"rms_norm_eps": 0.1}),
        ("llada2-a", {"routed_scaling_factor": 1.0}),
        ("illada-a", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_the_reference_tells_another_computation(
    tmp_path: Path, source: str, entries: dict[str, Any]
) -> None:
    """What is loaded of the one config, compared with what another says."""
    model = load_model(str(altered(tmp_path, source)), device="cpu", dtype="float32")
    shutil.rmtree(tmp_path / source)
    found = fuzz.difference(model, altered(tmp_path, source, **entries))
    assert found.startswith("LOGITS DIFFER")


def refused(folder: Path) -> str:
    with pytest.raises(SpiffyError) as caught:
        load_model(str(folder), device="cpu")
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert message.isprintable()
    return message


# ---------------------------------------------------------------- what it found


@pytest.mark.parametrize("source", ["sdar-a", "llada2-a", "a2d-mdlm-a", "a2d-bd3lm-a"])
@pytest.mark.parametrize("entry", ["use_qk_norm", "qk_norm", "qk_layernorm"])
def test_norms_of_queries_and_keys_cannot_be_denied(
    tmp_path: Path, source: str, entry: str
) -> None:
    assert f"{entry} = False is not supported" in refused(
        altered(tmp_path, source, **{entry: False})
    )
    shutil.rmtree(tmp_path / source)
    load_model(str(altered(tmp_path, source, **{entry: True})), device="cpu")


@pytest.mark.parametrize(
    ("source", "tied", "head"),
    [
        ("llada-a", "weight_tying", "model.transformer.ff_out.weight"),
        ("sdar-a", "tie_word_embeddings", "lm_head.weight"),
        ("llada2-a", "tie_word_embeddings", "lm_head.weight"),
    ],
)
def test_a_tied_head_that_is_stored_apart_is_computed_with_a_note(
    tmp_path: Path, source: str, tied: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers 5 does."""
    folder = altered(tmp_path, source, **{tied: True})
    apart = load_model(str(folder), device="cpu", dtype="float32")
    assert "the weights hold another one: the one stored is computed" in caplog.text
    assert fuzz.difference(apart, folder) is None
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(apart.forward_logits(ids), parity_model(source).forward_logits(ids))
    weights = load_file(folder / "model.safetensors")
    embedding = next(name for name in weights if "embed" in name or "wte" in name)
    save_file({**weights, head: weights[embedding].clone()}, folder / "model.safetensors")
    same = load_model(str(folder), device="cpu", dtype="float32")
    assert fuzz.difference(same, folder) is None


@pytest.mark.parametrize("part", [2, 0.3, 0.01])
def test_rope_turns_pairs_and_at_most_all_of_a_head(tmp_path: Path, part: float) -> None:
    message = refused(altered(tmp_path, "llada2-a", partial_rotary_factor=part))
    assert "config.json: RoPE would turn" in message
    assert "of the 24 dimensions of a head" in message


@pytest.mark.parametrize(
    ("source", "entry", "value", "words"),
    [
        ("llada-a", "weight_tying", 1, "must be true or false"),
        ("dream-a", "tie_word_embeddings", "no", "must be true or false"),
        ("sdar-a", "attention_bias", 0.0, "must be true or false"),
        ("llada2-a", "routed_scaling_factor", float("nan"), "must be a positive number"),
        ("llada2-a", "routed_scaling_factor", "2.5", "must be a positive number"),
    ],
)
def test_flags_are_flags_and_numbers_numbers(
    tmp_path: Path, source: str, entry: str, value: Any, words: str
) -> None:
    message = refused(altered(tmp_path, source, **{entry: value}))
    assert f"config.json: {entry} {value!r} {words}" in message


def test_no_more_experts_are_asked_than_there_are(tmp_path: Path, place: Path) -> None:
    shutil.copytree(place / "sdar-moe-a", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    load_model(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 7}))
    assert "num_experts_per_tok is more than num_experts" in refused(tmp_path)
