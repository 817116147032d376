"""Weights in 8 bits by torchao: other numbers, the same promise."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, Oracle, chain_graph, decode, parity_model, random_prompt, states
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TorchAoConfig
from typer.testing import CliRunner

from spiffy.bench.grow import grow
from spiffy.calib.workdir import weights_digest
from spiffy.runtime import ALIASES, DiffusionLM, load_model, wrap
from spiffy.runtime.budget.cost import conditions
from spiffy.runtime.decode import make_task
from spiffy.runtime.draft import GraphDrafter
from spiffy.runtime.models.stored import stored_tensors
from spiffy.schemas import DecodingSettings, SpiffyError

torchao = pytest.importorskip("torchao", reason="pip install 'spiffy-dllm[quantize]'")

IDS = torch.tensor([[5, 9, 311, 311, 7, 42]])


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def quantized(name: str, dtype: str = "float32", **options: Any) -> DiffusionLM:
    return load_model(name, device="cpu", dtype=dtype, quantize="int8", **options)


@pytest.mark.parametrize("checkpoint", ["llada-a", "dream-a", "sdar-a"])
def test_linear_layers_are_rounded_per_row_and_the_rest_is_as_it_was(checkpoint: str) -> None:
    model = quantized(str(PARITY / checkpoint))
    before = parity_model(checkpoint).module.state_dict()
    for name, weight in model.module.named_parameters():
        parts = [*stored_tensors(weight)]
        if not name.endswith("_proj.weight"):
            assert torch.equal(weight, before[name]), name
            continue
        assert parts[0].dtype == torch.int8
        level = before[name].abs().amax(1, keepdim=True) / 127
        assert ((weight.dequantize() - before[name]).abs() <= 0.51 * level).all(), name
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.vocab_size == 320
    assert model.fingerprint == parity_model(checkpoint).fingerprint
    assert model.arithmetic == "float32, torchao.Int8Tensor"
    assert model.broken_weights() is None
    logits = parity_model(checkpoint).forward_logits(IDS)
    gap = (model.forward_logits(IDS) - logits).std()
    assert 0 < gap < 0.1 * logits.std()


@pytest.mark.parametrize(
    ("checkpoint", "cache"),
    [("llada-a", "none"), ("dream-a", "dual"), ("llada-a", "prefix"), ("sdar-a", "block")],
)
def test_drafts_leave_a_quantized_models_tokens_as_they_are(checkpoint: str, cache: str) -> None:
    model = quantized(str(PARITY / checkpoint))
    settings = DecodingSettings.parse(cache=cache, block_length=8, gen_length=16, stop_at_eos=False)
    plainly = decode(model, random_prompt(model, 11), settings)
    drafted = decode(model, plainly.prompt, settings, Oracle(plainly, depth=3))
    assert states(drafted) == states(plainly)
    assert drafted.stats.accepted > 0
    graph = [[(0, 0)], [(0, 0), (1, 0)], [(0, 1)]]
    assert states(decode(model, plainly.prompt, settings, GraphDrafter(graph, model))) == states(
        plainly
    )


def test_a_module_that_torchao_has_quantized_wraps() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = load_model(str(PARITY / "llada-a"), device="cpu").module
    quantize_(module, Int8WeightOnlyConfig(set_inductor_config=False))  # the head too
    config = json.loads((PARITY / "llada-a" / "config.json").read_text())
    model = wrap(module, None, "llada", config)
    assert (model.vocab_size, model.dtype, model.device.type) == (320, torch.float32, "cpu")
    assert model.head_of(torch.randn(1, 1, 64), torch.tensor([[1]])) is None
    settings = DecodingSettings.parse(cache="dual", block_length=8, gen_length=16)
    plainly = decode(model, random_prompt(model, 11), settings)
    drafted = decode(model, plainly.prompt, settings, Oracle(plainly, depth=3))
    assert states(drafted) == states(plainly)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at its own config
def test_a_checkpoint_that_transformers_loads_in_8_bits_wraps() -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    folder, loaded = ALIASES["tiny-sdar"], load_model("tiny-sdar", device="cpu")
    module = Qwen3ForCausalLM.from_pretrained(
        folder,
        config=Qwen3Config.from_pretrained(folder),
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False)),
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    model = wrap(module, PreTrainedTokenizerFast.from_pretrained(folder), "sdar")
    assert model.arithmetic == "float32, torchao.Int8Tensor"
    assert model.fingerprint == loaded.fingerprint
    assert model.default_block_length == loaded.default_block_length
    settings = DecodingSettings.parse(cache="block", block_length=8, gen_length=16)
    prompt = model.encode("Tom has 3 apples. He buys 4 more. How many now?")
    plainly = decode(model, prompt, settings)
    assert states(decode(model, prompt, settings, Oracle(plainly, depth=3))) == states(plainly)


def test_quantized_weights_count_as_other_weights_where_that_matters() -> None:
    """Recordings are of certain weights, and costs of certain kernels; graphs are of neither."""
    plain, ours = parity_model("sdar-a"), quantized(str(PARITY / "sdar-a"))
    assert weights_digest(ours) != weights_digest(plain)
    assert weights_digest(ours) == weights_digest(quantized(str(PARITY / "sdar-a")))
    settings = DecodingSettings.parse(cache="block", block_length=8, gen_length=16)
    prompt = random_prompt(plain, 11)
    costs = [conditions(make_task(model, prompt, settings)) for model in (plain, ours)]
    assert costs[0].pop("dtype") == "float32"
    assert costs[1].pop("dtype") == "float32, torchao.Int8Tensor"
    assert costs[0] == costs[1]


def test_broken_quantized_weights_are_named() -> None:
    model = quantized(str(PARITY / "sdar-a"))
    weight: Any = model.module.get_parameter(Q_PROJ)
    [*stored_tensors(weight)][1][3] = torch.nan
    assert model.broken_weights() == Q_PROJ


def test_a_quantized_model_can_be_pickled() -> None:
    model = quantized(str(PARITY / "llada-a"))
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other.forward_logits(IDS), model.forward_logits(IDS))


def test_threads_quantize_at_once_and_leave_torchs_compiler_as_it_was() -> None:
    from torch._inductor import config as inductor

    before = inductor.epilogue_fusion, inductor.coordinate_descent_tuning
    found: list[torch.Tensor] = []

    def load() -> None:
        found.append(quantized(str(PARITY / "sdar-a")).forward_logits(IDS))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert (inductor.epilogue_fusion, inductor.coordinate_descent_tuning) == before


def test_an_adapter_is_merged_before_its_model_is_quantized(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="pip install 'spiffy-dllm[adapters]'")
    layer = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    weights = {layer.format("A"): torch.full((2, 112), 0.1), layer.format("B"): torch.ones(64, 2)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "layers_to_transform": [0]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = quantized(str(PARITY / "sdar-a"), adapter=str(tmp_path))
    name = "model.layers.0.mlp.down_proj.weight"
    expected = parity_model("sdar-a").module.state_dict()[name] + 0.2
    weight: Any = model.module.get_parameter(name)
    level = expected.abs().amax(1, keepdim=True) / 127
    assert ((weight.dequantize() - expected).abs() <= 0.51 * level + 1e-6).all()


# ---------------------------------------------------------------- what is refused


def refusal(**options: Any) -> str:
    with pytest.raises(SpiffyError) as caught:
        load_model(**{"name": str(PARITY / "llada2-a"), "device": "cpu", **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    assert refusal(quantize="int3") == "unknown quantization 'int3': choose int8"


def test_a_mixture_whose_experts_would_stay_is_refused() -> None:
    assert "a mixture of experts cannot be quantized here" in refusal(quantize="int8")


def test_a_dtype_that_torchao_does_not_take_is_refused_before_weights_are_read(
    tmp_path: Path,
) -> None:
    shutil.copy(PARITY / "sdar-a" / "config.json", tmp_path)
    message = refusal(name=str(tmp_path), quantize="int8", dtype="float64")
    assert message == f"{tmp_path}: float64 cannot be quantized: drop --dtype (dtype= in Python)"


def test_layers_that_are_left_on_disk_are_refused() -> None:
    device_map = {"model": "cpu", "lm_head": "disk"}
    message = refusal(name=str(PARITY / "sdar-a"), quantize="int8", device_map=device_map)
    assert "device_map leaves layers off the devices" in message


# ---------------------------------------------------------------- commands


def test_verify_of_a_quantized_model_passes(tmp_path: Path) -> None:
    graph = chain_graph("tiny-sdar", 2, block_length=8, gen_length=16)
    graph.save(tmp_path / "graph.json")
    model = ["--graph", str(tmp_path / "graph.json"), "--quantize", "int8", "--device", "cpu"]
    prompt = ["--prompt", "Tom has 3 apples. He buys 4 more. How many now?"]
    app = import_module("spiffy.cli.decode").app
    done = CliRunner().invoke(app, [*model, *prompt, "--budget", "2", "--verify"])
    assert done.exit_code == 0, done.output


def test_commands_say_nothing_of_kernels_for_other_machines() -> None:
    """Wherever torchao is installed, transformers imports it, whatever is decoded."""
    script = "from spiffy.cli.common import run_app; run_app(lambda: __import__('torchao'))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["calibrate", "decode", "bench"])
def test_every_command_passes_both_options_on(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, **options: Any) -> DiffusionLM:
        raise SpiffyError(f"{name} {options['adapter']} {options['quantize']}")

    monkeypatch.setattr("spiffy.runtime.load_model", load)
    graph = chain_graph("tiny-sdar", 2, block_length=8, gen_length=16)
    graph.save(tmp_path / "graph.json")
    graph = [] if command == "calibrate" else ["--graph", str(tmp_path / "graph.json")]
    prompt = ["--prompt", "x"] if command == "decode" else []
    out = [] if command == "decode" else ["--out", str(tmp_path / "out")]
    options = ["--model", "m", "--adapter", "a", "--quantize", "q"]
    app = import_module(f"spiffy.cli.{command}").app
    done = CliRunner().invoke(app, [*graph, *prompt, *options, *out])
    assert str(done.exception) == "m a q"


def test_quantized_weights_cannot_be_grown() -> None:
    with pytest.raises(SpiffyError, match="cannot be grown: its weights are quantized"):
        grow(quantized(str(PARITY / "sdar-a")), "0.3b")
