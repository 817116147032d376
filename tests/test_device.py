"""Decoding on a device that is not the CPU: to the CPU's tokens, and waiting for it seldom.

On a pretend accelerator (`far.py`) in a process of its own, and with `-m gpu` on CUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import device_cases
import pytest
import torch

CASES = dict(device_cases.cases())
COUNTED = [name for name in CASES if ":" in name]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "device_cases.py", "far"],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    cases: dict[str, Any] = json.loads(ended.stdout)
    return cases


@pytest.mark.parametrize("case", CASES)
def test_a_pretend_accelerator_gives_what_the_cpu_gives(case: str, found: dict[str, Any]) -> None:
    assert found[case]["device"]["values"] == found[case]["cpu"]["values"]
    assert found[case]["device"]["waits"]  # it did compute there


@pytest.mark.parametrize("case", COUNTED)
def test_a_forward_waits_twice_for_the_device(case: str, found: dict[str, Any]) -> None:
    """Once for what goes there, once for what comes back, however many sequences, drafts, steps.

    What waits inside of transformers (for mixtures of experts) is not ours to change.
    """
    ours = found[case]["device"]
    waits = {tuple(place): count for place, count in ours["waits"]}
    own = {(kind, line): n for (kind, line), n in waits.items() if line.startswith("spiffy")}
    assert 0 < sum(own.values()) <= 2 * ours["forwards"], own


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_cuda_gives_what_the_cpu_gives(case: str) -> None:
    assert CASES[case]("cuda").values == CASES[case]("cpu").values
