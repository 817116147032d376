"""LoRA adapters are merged whole, or refused in one line; nothing of them is passed over.

What merging has to give is computed here from the files: W + alpha / r * B A.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, Oracle, decode, parity_model, random_prompt, refusal, states
from safetensors.torch import load_file, save_file
from torch import Tensor

from spiffy.runtime import DiffusionLM, load_model, wrap
from spiffy.schemas import DecodingSettings

peft = pytest.importorskip("peft", reason="pip install 'spiffy-dllm[adapters]'")

IDS = torch.tensor([[5, 9, 311, 311, 7, 42]])
RANK, ALPHA = 4, 6
# peft's own wrapper asks transformers for something by its old name, and says what it stores.
OLD_NAMES = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*embedding|.*config file")


class Adapter:
    """An adapter in peft's files, to be changed."""

    def __init__(self, folder: Path, layers: dict[str, tuple[int, int]], **config: Any) -> None:
        """`layers`: the names of linear layers, with their outputs and inputs."""
        self.folder = folder
        kinds = sorted({layer.rpartition(".")[2] for layer in layers})
        self.config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": kinds,
            "bias": "none",
            "lora_dropout": 0.1,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "org/base",
            **config,
        }
        generator = torch.Generator().manual_seed(0)
        self.weights: dict[str, Tensor] = {}
        for layer, (outputs, inputs) in layers.items():
            for part, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                name = f"base_model.model.{layer}.lora_{part}.weight"
                self.weights[name] = torch.randn(shape, generator=generator) / 4

    def write(self) -> str:
        (self.folder / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.weights, self.folder / "adapter_model.safetensors")
        return str(self.folder)

    def delta(self, layer: str, scale: float = ALPHA / RANK) -> Tensor:
        parts = [self.weights[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB"]
        return scale * (parts[1] @ parts[0])

    def load(self, checkpoint: str, **options: Any) -> DiffusionLM:
        folder = str(PARITY / checkpoint)
        return load_model(folder, device="cpu", adapter=self.write(), **options)


def layers(prefix: str, parts: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Names and shapes in all three layers of a checkpoint."""
    return {f"{prefix}.{k}.{part}": shape for k in range(3) for part, shape in parts.items()}


# The same layers of llada-a by transformers' names and by the official code's.
NATIVE = layers(
    "model.layers",
    {"self_attn.q_proj": (64, 64), "self_attn.o_proj": (64, 64), "mlp.down_proj": (64, 96)},
)
OFFICIAL = layers(
    "model.transformer.blocks", {"q_proj": (64, 64), "attn_out": (64, 64), "ff_out": (64, 96)}
)
DREAM = layers("model.layers", {"self_attn.v_proj": (32, 64), "mlp.up_proj": (112, 64)})
SDAR = layers("model.layers", {"self_attn.k_proj": (48, 64), "self_attn.o_proj": (64, 96)})
LLADA2 = layers("model.layers", {"attention.dense": (48, 96)})
# Checkpoint, and the layers as the adapter and as the module call them.
LAYOUTS = {
    "native": ("llada-a", NATIVE, NATIVE),
    "official": ("llada-a", OFFICIAL, NATIVE),
    "dream": ("dream-a", DREAM, DREAM),
    "sdar": ("sdar-a", SDAR, SDAR),
    "llada2": ("llada2-a", LLADA2, layers("model.layers", {"self_attn.o_proj": (48, 96)})),
}


@pytest.fixture
def llada(tmp_path: Path) -> Adapter:
    return Adapter(tmp_path, NATIVE)


# ---------------------------------------------------------------- what is merged


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_adapter_adds_its_product_to_the_weights_and_to_nothing_else(
    tmp_path: Path, layout: str
) -> None:
    checkpoint, adapted, native = LAYOUTS[layout]
    adapter = Adapter(tmp_path, adapted)
    model, before = adapter.load(checkpoint), parity_model(checkpoint).module.state_dict()
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    merged = dict(zip((f"{layer}.weight" for layer in native), adapted, strict=True))
    for name, weight in after.items():
        change = adapter.delta(merged[name]) if name in merged else torch.zeros(())
        assert torch.allclose(weight, before[name] + change, atol=1e-6), name
    assert model.fingerprint == parity_model(checkpoint).fingerprint
    assert model.arithmetic == "float32"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts_leave_an_adapted_models_tokens_as_they_are(tmp_path: Path, layout: str) -> None:
    checkpoint, adapted, _ = LAYOUTS[layout]
    model = Adapter(tmp_path, adapted).load(checkpoint, dtype="float64")
    cache = "block" if model.family.block_causal else "dual"
    settings = DecodingSettings.parse(cache=cache, block_length=8, gen_length=16, stop_at_eos=False)
    plainly = decode(model, random_prompt(model, 11), settings)
    unadapted = decode(parity_model(checkpoint), plainly.prompt, settings)
    assert states(plainly) != states(unadapted)
    drafted = decode(model, plainly.prompt, settings, Oracle(plainly, depth=3))
    assert states(drafted) == states(plainly)
    assert drafted.stats.accepted > 0


def test_a_rank_and_a_scale_of_its_own_are_those_of_the_layer_as_it_was_named(
    tmp_path: Path,
) -> None:
    adapter = Adapter(tmp_path, OFFICIAL, alpha_pattern={"attn_out": 12}, use_rslora=True)
    key = "base_model.model.model.transformer.blocks.1.attn_out.lora_{}.weight"
    adapter.weights[key.format("A")] = torch.randn(2, 64)
    adapter.weights[key.format("B")] = torch.randn(64, 2)
    adapter.config["rank_pattern"] = {r"blocks\.1\.attn_out": 2}
    after = adapter.load("llada-a").module.state_dict()
    before = parity_model("llada-a").module.state_dict()
    for layer, name, scale in (
        (1, "attn_out", 12 / 2**0.5),
        (2, "attn_out", 12 / RANK**0.5),
        (1, "q_proj", ALPHA / RANK**0.5),
    ):
        mine = f"model.layers.{layer}.self_attn.{'o' if name == 'attn_out' else 'q'}_proj.weight"
        change = adapter.delta(f"model.transformer.blocks.{layer}.{name}", scale)
        assert torch.allclose(after[mine], before[mine] + change, atol=1e-5), mine


@OLD_NAMES
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*\.1\..*_proj", "use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "k_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    ],
)
def test_what_peft_saves_computes_what_peft_computes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    base = load_model(str(PARITY / "dream-a"), device="cpu")
    adapted = peft.get_peft_model(base.module, peft.LoraConfig(r=RANK, **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 8
    adapted.save_pretrained(tmp_path)
    config = json.loads((PARITY / "dream-a" / "config.json").read_text())
    apart = wrap(adapted, None, "dream", config)
    merged = load_model(str(PARITY / "dream-a"), device="cpu", adapter=str(tmp_path))
    logits = merged.forward_logits(IDS)
    assert torch.allclose(logits, apart.forward_logits(IDS), atol=1e-3)
    assert not torch.allclose(logits, parity_model("dream-a").forward_logits(IDS), atol=0.1)
    assert apart.fingerprint == parity_model("dream-a").fingerprint
    assert "peft.Linear" in apart.arithmetic  # computing it costs more than merged
    assert merged.arithmetic == "float32"
    settings = DecodingSettings.parse(cache="dual", block_length=8, gen_length=16)
    plainly = decode(apart, random_prompt(apart, 11), settings)
    assert states(decode(apart, plainly.prompt, settings, Oracle(plainly, 3))) == states(plainly)


@OLD_NAMES
def test_an_adapted_embedding_of_another_model_is_refused(tmp_path: Path) -> None:
    base = load_model(str(PARITY / "dream-a"), device="cpu")
    adapted = peft.get_peft_model(base.module, peft.LoraConfig(target_modules=["embed_tokens"]))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    stored["base_model.model.model.embed_tokens.base_layer.weight"][7, 7] += 1
    save_file(stored, tmp_path / "adapter_model.safetensors")
    message = refusal(lambda: load_model(str(PARITY / "dream-a"), adapter=str(tmp_path)))
    assert "embed_tokens.base_layer.weight is not the model.embed_tokens of the model" in message


@OLD_NAMES
def test_adapters_learned_as_prompts_are_refused_by_wrap() -> None:
    base = load_model(str(PARITY / "sdar-a"), device="cpu")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapted = peft.get_peft_model(base.module, settings)
    assert "such an adapter cannot be wrapped" in refusal(lambda: wrap(adapted, None, "sdar"))


# ---------------------------------------------------------------- what is refused


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


def renamed(old: str, new: str) -> Callable[[Adapter], None]:
    def change(adapter: Adapter) -> None:
        adapter.weights = {k.replace(old, new): v for k, v in adapter.weights.items()}

    return change


def without(key: str) -> Callable[[Adapter], Any]:
    return lambda adapter: [adapter.weights.pop(key)]


def entry(**entries: Any) -> Callable[[Adapter], None]:
    return lambda adapter: adapter.config.update(entries)


def tensor(key: str, *shape: int) -> Callable[[Adapter], None]:
    return lambda adapter: adapter.weights.update({key: torch.ones(shape)})


def untrained(adapter: Adapter) -> None:
    for key, value in adapter.weights.items():
        if ".lora_B." in key:
            value.zero_()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (renamed("q_proj", "c_attn"), "adapts model.layers.0.self_attn.c_attn, and there is no"),
        (renamed("base_model.model.", ""), "is no tensor of peft's"),
        (renamed(".layers.", ".layers.1"), "and there is no such layer: is it an adapter of"),
        (without(KEY.format("B")), "model.layers.1.self_attn.q_proj.lora_B.weight is missing"),
        (
            lambda a: [a.weights.pop(KEY.format(part)) for part in "AB"],
            "the weights of model.layers.1.self_attn.q_proj are missing",
        ),
        (
            entry(target_modules=["q_proj", "o_proj", "down_proj", "w1"]),
            "target module 'w1', of wh",
        ),
        (tensor(KEY.format("A"), RANK, 65), "of shape [4, 65] does not fit model.layers.1.self_at"),
        (tensor(KEY.format("B"), 65, RANK), "of shape [65, 4] does not fit model.layers.1.self_at"),
        (tensor(KEY.format("A"), 3, 64), "has rank 3, adapter_config.json says 4"),
        (tensor(KEY.format("C"), 3, 64), "adapts model.layers.1.self_attn.q_proj.lora_C, and the"),
        (lambda a: a.weights.clear(), "holds nothing"),
        (untrained, "the adapter changes nothing that"),
        (entry(peft_type="IA3"), "peft_type = 'IA3' is not supported, only 'LORA' is"),
        (entry(init_lora_weights="pissa"), "init_lora_weights = 'pissa' is not supported, only T"),
        (entry(bias="all"), "bias = 'all' is not supported, only 'none' is"),
        (entry(use_something_new=True), "use_something_new = True is not supported, only null is"),
        (entry(megatron_config={"a": 1}), "megatron_config = {'a': 1} is not supported"),
        (entry(r="many"), "r 'many' is no rank or scale"),
        (entry(rank_pattern={"(": 2}), "adapter_config.json: rank_pattern: "),
        (entry(alpha_pattern=[1]), "adapter_config.json: alpha_pattern: it must be an object"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    llada: Adapter, spoil: Callable[[Adapter], Any], words: str
) -> None:
    spoil(llada)
    message = refusal(lambda: llada.load("llada-a"))
    assert message.startswith(str(llada.folder))
    assert words in message


def test_an_adapter_of_a_matrix_that_is_split_here_is_refused(tmp_path: Path) -> None:
    fused = layers("model.layers", {"attention.query_key_value": (192, 48)})
    message = refusal(lambda: Adapter(tmp_path, fused).load("llada2-a"))
    assert "model.layers.0.attention.query_key_value is adapted as one" in message
    assert "model.layers.0.self_attn.q_proj.weight" in message


@pytest.mark.parametrize("layer", ["lm_head", "model.embed_tokens"])
def test_an_adapter_of_a_tied_head_is_refused(tmp_path: Path, layer: str) -> None:
    adapter = Adapter(tmp_path, {}, modules_to_save=[layer.rpartition(".")[2]])
    adapter.weights[f"base_model.model.{layer}.weight"] = torch.ones(320, 64)
    message = refusal(lambda: adapter.load("a2d-mdlm-a"))
    assert f"it adapts {layer}, and in {PARITY / 'a2d-mdlm-a'} head and embedding are" in message


def test_a_pickled_adapter_is_refused(llada: Adapter) -> None:
    llada.write()
    torch.save(llada.weights, llada.folder / "adapter_model.bin")
    (llada.folder / "adapter_model.safetensors").unlink()
    message = refusal(lambda: load_model(str(PARITY / "llada-a"), adapter=str(llada.folder)))
    assert "pickled adapters are refused because loading them can run code" in message


@pytest.mark.parametrize("missing", ["adapter_config.json", None])
def test_a_folder_without_an_adapter_is_refused(llada: Adapter, missing: str | None) -> None:
    folder = llada.write() if missing else f"{llada.folder}/absent"
    (llada.folder / "adapter_config.json").unlink(missing_ok=True)
    words = f"has no {missing}" if missing else "no such directory"
    assert words in refusal(lambda: load_model(str(PARITY / "llada-a"), adapter=folder))


def test_a_broken_adapter_file_is_refused(llada: Adapter) -> None:
    folder = llada.write()
    (llada.folder / "adapter_model.safetensors").write_bytes(b"x" * 99)
    message = refusal(lambda: load_model(str(PARITY / "llada-a"), adapter=folder))
    assert "adapter_model.safetensors: cannot be read" in message


def test_layers_that_are_left_on_disk_take_no_adapter(llada: Adapter) -> None:
    device_map = {"model": "cpu", "lm_head": "disk"}
    options = {"adapter": llada.write(), "device_map": device_map}
    message = refusal(lambda: load_model(str(PARITY / "llada-a"), **options))
    assert "device_map leaves layers off the devices" in message


@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_an_adapter_that_lies_beside_the_weights_is_not_applied(
    tmp_path: Path, device_map: str | None
) -> None:
    for file in (PARITY / "sdar-a").iterdir():
        (tmp_path / file.name).symlink_to(file)
    Adapter(tmp_path, SDAR).write()
    found = load_model(str(tmp_path), dtype="float32", device_map=device_map).module.state_dict()
    expected = parity_model("sdar-a").module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_that_were_trained_whole_have_to_be_there(llada: Adapter) -> None:
    llada.config["modules_to_save"] = ["lm_head"]
    message = refusal(lambda: llada.load("llada-a"))
    assert (
        "names 'lm_head' in modules_to_save, of which adapter_model.safetensors has no" in message
    )
    head = parity_model("llada-a").module.lm_head.weight
    llada.weights["base_model.model.lm_head.weight"] = torch.ones_like(head)
    assert torch.equal(llada.load("llada-a").module.lm_head.weight, torch.ones_like(head))
