"""Compiled once, a transformer decodes to the same tokens whatever rows its forwards hold."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from device_cases import drafter, outcome, tasks_of
from helpers import PARITY, random_prompt
from torch._dynamo.utils import counters

from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import make_task
from spiffy.schemas import SpiffyError

WAYS = ("plain", "graph", "model")


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(scope="module")
def compiled() -> DiffusionLM:
    return load_model(str(PARITY / "sdar-a"), device="cpu", dtype="float64", compile=True)


def test_compiled_code_gives_the_same_tokens_and_is_compiled_once(compiled: DiffusionLM) -> None:
    """With prompts, numbers of drafts and of sequences that differ from forward to forward."""
    plain = load_model(str(PARITY / "sdar-a"), device="cpu", dtype="float64")
    before = graphs()
    assert before > 0
    accepted = 0
    for way in WAYS:
        for sequences in (1, 3, 4):
            options = {"gen_length": 12, "block_length": 4}
            found = outcome(compiled, tasks_of(compiled, sequences, way, **options))
            assert found.values == outcome(plain, tasks_of(plain, sequences, way, **options)).values
            accepted += found.accepted
    assert accepted > 0
    assert graphs() == before


def test_a_hundred_prompts_of_different_lengths_compile_nothing(compiled: DiffusionLM) -> None:
    """One after the other and without drafts, or with."""
    settings = decoding_settings(compiled, gen_length=4, block_length=4, stop_at_eos=False)
    drafts = drafter("graph", compiled, sets=False)
    before, accepted, positions = graphs(), 0, set()
    for length in range(1, 101):
        prompt = random_prompt(compiled, length, seed=length)
        task = make_task(compiled, prompt, settings, drafts if length % 3 else None)
        outcome(compiled, [task])
        accepted += task.stats.accepted
        positions.add(task.stats.positions_computed)
    assert accepted > 0
    assert len(positions) > 20  # blocks of 4
    assert graphs() == before


def test_a_block_of_one_position_needs_no_code_of_its_own(compiled: DiffusionLM) -> None:
    before = graphs()
    outcome(compiled, tasks_of(compiled, 1, gen_length=3, block_length=1))
    assert graphs() == before


def test_a_model_that_is_known_stays_compiled(compiled: DiffusionLM) -> None:
    known = DiffusionLM.of(compiled.module)
    assert known is not None
    assert known.compiled is compiled.compiled
    assert known.arithmetic == "float64, compiled"


def test_compiled_models_stay_in_their_process(compiled: DiffusionLM) -> None:
    with pytest.raises(SpiffyError, match="compiled, a model cannot be pickled"):
        pickle.dumps(compiled)


def test_what_torch_cannot_compile_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(SpiffyError, match=r"sdar-a cannot be compiled: .*no C\+\+ compiler found"):
        load_model(str(PARITY / "sdar-a"), device="cpu", compile=True)
    with pytest.raises(SpiffyError, match="compile 'no': give True or False"):
        load_model(str(PARITY / "sdar-a"), compile="no")  # type: ignore[arg-type]
