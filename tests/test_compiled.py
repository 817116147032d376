"""Compiled once, a transformer decodes to the same tokens whatever rows its forwards hold.

CUDA graphs are pretended: what a forward gave is written over by the next one.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_cases import drafter, outcome, tasks_of
from helpers import PARITY, random_prompt
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from transformers.modeling_outputs import BaseModelOutput

from spiffy.runtime import DiffusionLM, decoding_settings, load_model
from spiffy.runtime.decode import make_task
from spiffy.runtime.models import compiled as ours
from spiffy.runtime.models import device
from spiffy.runtime.models.attention import Group
from spiffy.runtime.models.base import Compiled
from spiffy.runtime.models.compiled import Captured, compile_transformer
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


class Graphs:
    """Pretends to be captured as CUDA graphs: all that it gave is gone when it is called again."""

    def __init__(self, transformer: Callable[..., Any]) -> None:
        self.transformer = transformer
        self.given: list[Tensor] = []
        self.sizes: set[int] = set()

    def __call__(self, *, input_ids: Tensor, **others: Any) -> Any:
        assert ours._REPLAYING.locked()  # no other thread may replay meanwhile
        for before in self.given:
            before.fill_(torch.nan)
        self.sizes.add(input_ids.shape[1])
        found = self.transformer(input_ids=input_ids, **others)
        self.given.append(found.last_hidden_state)
        return found


class Stale(Graphs):
    """As if attention had been captured, too: of the first rows, whatever is asked later."""

    def __init__(self, transformer: Callable[..., Any]) -> None:
        super().__init__(transformer)
        self.first: dict[int, Tensor] = {}

    def __call__(self, *, input_ids: Tensor, **others: Any) -> Any:
        found = super().__call__(input_ids=input_ids, **others).last_hidden_state
        return BaseModelOutput(self.first.setdefault(input_ids.shape[1], found.clone()))


class Broken(Graphs):
    def __call__(self, **inputs: Any) -> Any:
        raise RuntimeError("no memory\nfor graphs")


@pytest.fixture
def plain() -> DiffusionLM:
    return load_model(str(PARITY / "sdar-a"), device="cpu", dtype="float64")


@pytest.mark.parametrize("way", WAYS)
def test_forwards_that_are_captured_give_the_same_tokens(
    plain: DiffusionLM, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded to a few sizes; longer ones are not captured."""
    monkeypatch.setattr(ours, "CAPTURED", (8, 24))
    longer: list[int] = []

    def usual(*, input_ids: Tensor, **others: Any) -> Any:
        longer.append(input_ids.shape[1])
        return plain.module.model(input_ids=input_ids, **others)  # type: ignore[operator]

    graphs = Graphs(plain.module.model)  # type: ignore[arg-type]
    captured = plain.replaced(compiled=Compiled(Captured(usual, graphs)))
    options = {"gen_length": 12, "block_length": 4}
    for sequences in (1, 3, 8):
        found = outcome(captured, tasks_of(captured, sequences, way, **options))
        assert found.values == outcome(plain, tasks_of(plain, sequences, way, **options)).values
    assert graphs.sizes == {8, 24}
    assert min(longer) > 24


@pytest.mark.parametrize("drafts", [0, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("others", [0, 1, 2])  # blocks that are stored, or begun behind a state
def test_forwards_over_blocks_of_32_are_captured_with_little_padding(
    drafts: int, others: int
) -> None:
    positions = (1 + drafts + others) * 32
    size = min(size for size in ours.CAPTURED if size >= positions)
    assert size - positions <= size / 8
    assert others or size == positions  # all that `dual` asks for


@torch.inference_mode()
def test_what_a_captured_forward_gave_outlasts_the_next_one(plain: DiffusionLM) -> None:
    transformer: Any = plain.module.model
    captured = plain.replaced(compiled=Compiled(Captured(transformer, Graphs(transformer))))
    prompts = [random_prompt(plain, 6, seed) for seed in (1, 2)]
    forwards = [(ids, torch.arange(6), [Group(1, 6, whole=6)]) for ids in prompts]
    found = [captured.hidden_states(*inputs) for inputs in forwards]
    for hidden, inputs in zip(found, forwards, strict=True):
        torch.testing.assert_close(hidden, plain.hidden_states(*inputs))


@pytest.mark.parametrize(
    ("kind", "replayed", "said"),
    [
        (Graphs, 0.001, "CUDA graphs: a forward over 8 positions 2.00 times as fast"),
        (Graphs, 0.003, "no CUDA graphs: 3.00 ms, without 2.00 ms"),
        (Stale, 0.001, "no CUDA graphs: 6 positions are off by"),
        (Broken, 0.001, "no CUDA graphs: RuntimeError: no memory for graphs"),
    ],
)
def test_cuda_graphs_are_used_where_they_are_right_and_faster(
    plain: DiffusionLM,
    kind: type[Graphs],
    replayed: float,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0  # of a clock that goes on where a forward is made
    sizes: set[int] = set()
    limits: set[int | None] = set()

    def whole(module: Any, *, capture: bool = False) -> Callable[..., Any]:
        transformer = kind(module.model) if capture else module.model
        seconds = replayed if capture else 0.002

        def timed(**inputs: Any) -> Any:
            nonlocal now
            now += seconds
            sizes.add(inputs["input_ids"].shape[1])
            limits.add(inductor.triton.cudagraph_dynamic_shape_warn_limit)
            return transformer(**inputs)

        return timed

    monkeypatch.setattr(ours, "launches_kernels", lambda device: True)
    monkeypatch.setattr(ours, "_whole", whole)
    monkeypatch.setattr(ours, "_masked", lambda model: None)
    monkeypatch.setattr(device, "perf_counter", lambda: now)
    compile_transformer(plain)
    assert plain.compiled is not None
    assert isinstance(plain.compiled.transformer, Captured) == ("as fast" in said)
    assert said in caplog.text
    if kind is Graphs:  # captured in all sizes, of which torch would warn otherwise
        assert sizes.issuperset(ours.CAPTURED)
        assert None in limits
    assert inductor.triton.cudagraph_dynamic_shape_warn_limit is not None


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_compiled_for_a_gpu_it_gives_what_the_cpu_gives(way: str, plain: DiffusionLM) -> None:
    """In float64; which of CUDA graphs and FlexAttention are used is said when it is loaded."""
    fast = load_model(str(PARITY / "sdar-a"), device="cuda", dtype="float64", compile=True)
    before = graphs()
    for sequences in (1, 3):
        options = {"gen_length": 12, "block_length": 4}
        found = outcome(fast, tasks_of(fast, sequences, way, **options))
        assert found.values == outcome(plain, tasks_of(plain, sequences, way, **options)).values
    assert graphs() == before
