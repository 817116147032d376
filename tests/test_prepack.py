"""Weights as oneDNN computes with them: nearly the same numbers, and the same promise."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, Oracle, a_graph_of, decode, parity_model, random_prompt, states
from torch import nn
from typer.testing import CliRunner

from spiffy.bench import grow as growing
from spiffy.bench.grow import Shape, grow
from spiffy.calib import workdir
from spiffy.cli import bench, options
from spiffy.integrations import loaded
from spiffy.runtime import DiffusionLM, decoding_settings, generate, load_model
from spiffy.runtime.budget import cost, roofline
from spiffy.runtime.models import prepack
from spiffy.runtime.models.prepack import PrepackedLinear, prepack_if_faster
from spiffy.schemas import DecodingSettings, SpiffyError
from spiffy.schemas.notes import note

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
SMALL = Shape("small", 6, 384, 12, 6, 128, 544, 1536, tied=True)
CHECKPOINTS = sorted(path.name for path in PARITY.iterdir() if (path / "config.json").is_file())


def prepacked(name: str, dtype: str = "float32", **options: Any) -> DiffusionLM:
    return load_model(str(PARITY / name), device="cpu", dtype=dtype, prepack=True, **options)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_it_computes_what_it_did_with_the_weights_that_it_had(checkpoint: str) -> None:
    plain, ours = parity_model(checkpoint), prepacked(checkpoint)
    before = dict(plain.module.named_parameters())
    after = dict(ours.module.named_parameters())
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.shape == before[name].shape
        assert torch.equal(weight.to_dense() if weight.is_mkldnn else weight, before[name])
    kept = {name for name, weight in after.items() if not weight.is_mkldnn}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= kept
    assert any(name.endswith("q_proj.weight") for name in after.keys() - kept)
    assert "lm_head.weight" not in after.keys() - kept
    ids = torch.randint(0, plain.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        ours.forward_logits(ids), plain.forward_logits(ids), rtol=1e-3, atol=1e-3
    )
    assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))
    assert (ours.kernels, plain.kernels) == ("float32, prepacked", "float32")
    assert roofline.Shape.of(ours) == roofline.Shape.of(plain)
    assert isinstance(ours.packed_head, PrepackedLinear)
    hidden = torch.randn(5, plain.module.config.hidden_size)
    passed: list[int] = []
    ours.packed_head.register_forward_hook(lambda *_: passed.append(1))
    for model in (ours, DiffusionLM.of(ours.module)):
        assert model is not None
        torch.testing.assert_close(model.head(hidden), plain.head(hidden), rtol=1e-4, atol=1e-4)
    assert len(passed) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("checkpoint", "cache"), [("llada-a", "none"), ("dream-a", "dual"), ("sdar-a", "block")]
)
def test_drafts_leave_its_tokens_as_they_are(checkpoint: str, cache: str, dtype: str) -> None:
    if dtype == "bfloat16" and not prepack._computes(torch.bfloat16):
        pytest.skip("this processor cannot compute with prepacked bfloat16")
    model = prepacked(checkpoint, dtype)
    settings = DecodingSettings.parse(cache=cache, block_length=8, gen_length=16, stop_at_eos=False)
    plainly = decode(model, random_prompt(model, 11), settings)
    drafted = decode(model, plainly.prompt, settings, Oracle(plainly, depth=3))
    assert states(drafted) == states(plainly)
    assert drafted.stats.accepted > 0


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream", "tiny-sdar"])
def test_a_trained_model_answers_as_it_does_without(name: str) -> None:
    plain = load_model(name, device="cpu", dtype="float32")
    ours = load_model(name, device="cpu", dtype="float32", prepack=True)
    question = "Tom has 3 apples. He buys 4 more. How many apples does Tom have?"
    found = [generate(model, question, gen_length=32) for model in (plain, ours)]
    assert found[0].token_ids == found[1].token_ids


def test_compiled_code_calls_it() -> None:
    model = prepacked("sdar-a", compile=True)
    ids = torch.arange(12)[None] + 5
    want = parity_model("sdar-a").forward_logits(ids)
    torch.testing.assert_close(model.forward_logits(ids), want, rtol=1e-3, atol=1e-3)
    assert model.kernels == "float32, compiled, prepacked"


def test_biases_count() -> None:
    layer = nn.Linear(24, 40)
    hidden = torch.randn(1, 5, 24)
    with torch.inference_mode():
        torch.testing.assert_close(PrepackedLinear(layer)(hidden), layer(hidden))


def test_what_is_broken_is_named() -> None:
    model = prepacked("llada-a")
    assert model.broken_weights() is None
    layer = nn.Linear(8, 8)
    layer.weight.data[3, 4] = math.nan
    model.module.model.layers[1].mlp.up_proj = PrepackedLinear(layer)  # type: ignore[union-attr, index]
    assert model.broken_weights() == "model.layers.1.mlp.up_proj.weight"


def test_it_cannot_be_copied_pickled_or_grown() -> None:
    model = prepacked("sdar-a")
    for way in (pickle.dumps, copy.deepcopy):
        with pytest.raises(SpiffyError, match="prepacked, a model cannot be pickled or copied"):
            way(model)
    with pytest.raises(SpiffyError, match="sdar-a is prepacked: grow it before"):
        grow(model, Shape.of(parity_model("sdar-a")))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float64"}, "float64 cannot be prepacked: drop --prepack"),
        ({"device_map": "cpu"}, "neither quantized nor spread by a device map: drop --prepack"),
        ({"prepack": "yes"}, "prepack 'yes': give True, False or 'auto'"),
        ({"prepack": 1}, "prepack 1: give True, False or 'auto'"),
    ],
)
def test_what_cannot_be_prepacked_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpiffyError, match=reason):
        load_model(str(PARITY / "sdar-a"), **{"device": "cpu", "prepack": True, **options})


@pytest.mark.parametrize("faster", [True, False])
def test_by_default_commands_prepack_what_is_large_if_it_is_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(*layers: nn.Module) -> list[float]:
        return [1.0 if faster == isinstance(layer, PrepackedLinear) else 2.0 for layer in layers]

    monkeypatch.setattr(prepack, "_seconds", seconds)
    auto = {"device": "cpu", "prepack": "auto"}
    small = load_model(str(PARITY / "sdar-a"), **auto)  # type: ignore[arg-type]
    assert not small.is_prepacked
    monkeypatch.setattr(prepack, "_WORTH", 1000)
    assert load_model(str(PARITY / "sdar-a"), **auto).is_prepacked == faster  # type: ignore[arg-type]
    exact = load_model(str(PARITY / "sdar-a"), dtype="float64", **auto)  # type: ignore[arg-type]
    assert not exact.is_prepacked


def test_a_layer_is_timed_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is faster is the machine's affair; that both were tried is not."""
    tried: list[type] = []
    timed = prepack._seconds
    monkeypatch.setattr(prepack, "_WORTH", 1000)
    monkeypatch.setattr(
        prepack, "_seconds", lambda *layers: (tried.extend(map(type, layers)), timed(*layers))[1]
    )
    model = load_model(str(PARITY / "sdar-a"), device="cpu")
    prepack_if_faster(model)
    assert {*tried} == {nn.Linear, PrepackedLinear}


@pytest.mark.parametrize("fault", ["wrong", "refused"])
def test_what_this_machine_computes_wrongly_or_not_at_all_is_left(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(layer: PrepackedLinear, hidden: torch.Tensor) -> torch.Tensor:
        if fault == "refused":
            raise RuntimeError("no such dtype here")
        return hidden.new_zeros(*hidden.shape[:-1], layer.out_features)

    monkeypatch.setattr(prepack, "_WORTH", 1000)
    monkeypatch.setattr(prepack, "_FASTER", math.inf)
    model = load_model(str(PARITY / "sdar-a"), device="cpu", dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr(PrepackedLinear, "compute", compute)
        prepack_if_faster(model)
        with pytest.raises(SpiffyError, match="cannot compute with prepacked float32: drop --prep"):
            prepack.prepack(model)
    assert not model.is_prepacked
    prepack_if_faster(model)
    assert model.is_prepacked


def test_doors_that_only_decode_prepack_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(name: str, **options: Any) -> DiffusionLM:
        asked.append(options["prepack"])
        return load_model(name, **options)

    monkeypatch.setattr(loaded, "load_model", load)
    name = str(PARITY / "sdar-a")
    for given in ({}, {"prepack": False}):
        loaded.Loaded(name, None, device="cpu", **given)  # type: ignore[arg-type]
    assert asked == ["auto", False]


@pytest.mark.parametrize("option", ["--prepack", "--no-prepack"])
def test_the_benchmark_prepacks_what_it_has_grown(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    methods = bench.set_threads

    def spy(model: DiffusionLM, *rest: Any) -> None:
        seen.append(model.is_prepacked)
        methods(model, *rest)

    monkeypatch.setattr(bench, "set_threads", spy)
    monkeypatch.setattr(growing, "SHAPES", {"small": SMALL})
    graph = tmp_path / "graph.json"
    a_graph_of(load_model("tiny-sdar", device="cpu", dtype="float32")).save(graph)
    words = ["--graph", graph, "--shape", "small", option, "--samples", 1, "--repeats", 1]
    words += ["--methods", "graph", "--budgets", 1]
    done = CliRunner().invoke(bench.app, [*map(str, words), "--out", str(tmp_path / "out")])
    assert (done.exit_code, seen) == (0, [option == "--prepack"]), done.output


@pytest.mark.parametrize(
    ("how", "large", "dtype", "said"),
    [
        ("AMX", True, "auto", True),
        ("AVX-512 BF16", True, "auto", True),
        ("AMX", True, "float32", False),
        ("AMX", False, "auto", False),
        (None, True, "auto", False),
    ],
)
def test_commands_say_that_a_large_model_is_faster_in_bfloat16(
    how: str | None,
    large: bool,
    dtype: str,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cost, "multiplies_bfloat16", lambda: how)
    if large:
        monkeypatch.setattr(options, "_LARGE", 1000)
    note.cache_clear()
    options.ModelOfGraph(model="tiny-sdar", device="cpu", dtype=dtype).load(None, None)
    assert (f"({how}): try --dtype bfloat16" in caplog.text) == said


def test_recording_goes_on_with_and_without() -> None:
    """What is faster on one machine, or one day, need not be so on another."""
    ours, plain = (workdir.weights_digest(m) for m in (prepacked("sdar-a"), parity_model("sdar-a")))
    assert ours == plain
    assert prepacked("sdar-a").arithmetic == parity_model("sdar-a").arithmetic


def test_decoding_settings_do_not_depend_on_it() -> None:
    assert decoding_settings(prepacked("sdar-a")) == decoding_settings(parity_model("sdar-a"))
