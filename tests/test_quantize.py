"""Weights in 8 bits by torchao: other numbers, the same promise."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, Oracle, decode, parity_model, random_prompt, states
from typer.testing import CliRunner

from spiffy.calib.workdir import _weights_digest
from spiffy.cli.decode import app
from spiffy.runtime import DiffusionLM, load_model, wrap
from spiffy.runtime.models.base import stored_tensors
from spiffy.schemas import DecodingSettings, SpiffyError

torchao = pytest.importorskip("torchao", reason="pip install 'spiffy-dllm[quantize]'")

IDS = torch.tensor([[5, 9, 311, 311, 7, 42]])
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def quantised(name: str, dtype: str = "float32", **options: Any) -> DiffusionLM:
    return load_model(name, device="cpu", dtype=dtype, quantize="int8", **options)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """To 255 levels per row, as int8 with one symmetric scale per row does."""
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("checkpoint", ["llada-a", "dream-a", "sdar-a"])
def test_linear_layers_are_rounded_per_row_and_the_rest_is_as_it_was(checkpoint: str) -> None:
    model = quantised(str(PARITY / checkpoint))
    before = parity_model(checkpoint).module.state_dict()
    for name, weight in model.module.named_parameters():
        parts = [*stored_tensors(weight)]
        if not name.endswith("_proj.weight"):
            assert torch.equal(weight, before[name]), name
            continue
        assert parts[0].dtype == torch.int8
        assert torch.allclose(weight.dequantize(), rounded(before[name]), atol=2e-3), name
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.vocab_size == 320
    assert model.fingerprint == parity_model(checkpoint).fingerprint
    assert model.arithmetic == "float32, torchao.Int8Tensor"
    assert model.broken_weights() is None
    logits = parity_model(checkpoint).forward_logits(IDS)
    gap = (model.forward_logits(IDS) - logits).std()
    assert 0 < gap < 0.05 * logits.std()
