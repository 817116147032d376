"""Loading checkpoints in the official layouts, and refusing everything else in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, parity_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from spiffy.runtime import DiffusionLM, load_model
from spiffy.runtime.models.base import Family
from spiffy.runtime.models.dream import DREAM
from spiffy.runtime.models.llada import LLADA
from spiffy.runtime.models.sdar import SDAR
from spiffy.schemas import SpiffyError

IDS = torch.tensor([[5, 9, 311, 311, 7, 42]])
Q_PROJ = "model.transformer.blocks.1.q_proj.weight"

# The fields of the published configs that decide shapes (LLaDA-8B-Instruct, Dream-v0-Instruct-7B,
# SDAR-4B-Chat).
LLADA_8B = {
    "model_type": "llada",
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "weight_tying": False,
}
DREAM_7B = {
    "model_type": "Dream",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
SDAR_4B = {
    "model_type": "sdar",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


class Checkpoint:
    """A copy of a checkpoint in tests/parity, to be changed."""

    def __init__(self, folder: Path, source: str = "llada-a") -> None:
        self.folder = folder
        for file in (PARITY / source).glob("*config.json"):
            shutil.copy(file, folder)
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = load_file(PARITY / source / "model.safetensors")

    def load(self, **options: Any) -> DiffusionLM:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.weights, self.folder / "model.safetensors", {"format": "pt"})
        return load_model(str(self.folder), device="cpu", **options)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(SpiffyError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what cannot be loaded


def test_an_unknown_alias_is_refused_with_the_known_ones() -> None:
    message = refusal(lambda: load_model("tiny-lama"))
    assert "unknown model 'tiny-lama'" in message
    assert "tiny-llada" in message


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "a/b/c"])
def test_a_missing_directory_is_refused(name: str) -> None:
    assert "no such directory" in refusal(lambda: load_model(name))


def test_a_hub_id_without_network_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal(lambda: load_model("no-such-organisation/no-such-model"))
    assert "no-such-organisation/no-such-model" in message
    assert "nor reachable" in message


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    message = refusal(lambda: load_model(str(tmp_path)))
    assert str(tmp_path) in message
    assert "no config.json" in message


@pytest.mark.parametrize("text", ["{", "[1]", '"llada"', ""])
def test_an_unreadable_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refusal(lambda: load_model(str(tmp_path)))


@pytest.mark.parametrize("model_type", ["llama", "LLADA", None, 3])
def test_another_model_type_is_refused(checkpoint: Checkpoint, model_type: object) -> None:
    checkpoint.config["model_type"] = model_type
    message = refusal(checkpoint.load)
    assert f"model_type {model_type!r} is not supported" in message
    assert "llada, Dream, sdar" in message


@pytest.mark.parametrize("field", ["d_model", "n_layers", "rope_theta", "mask_token_id"])
def test_a_config_that_lacks_a_field_is_refused(checkpoint: Checkpoint, field: str) -> None:
    del checkpoint.config[field]
    assert f"config.json lacks {field!r}" in refusal(checkpoint.load)


@pytest.mark.parametrize(
    ("field", "value"),
    [("alibi", True), ("block_type", "sequential"), ("layer_norm_type", "low_precision")],
)
def test_a_llada_variant_that_we_would_compute_wrongly_is_refused(
    checkpoint: Checkpoint, field: str, value: object
) -> None:
    checkpoint.config[field] = value
    assert f"{field} = {value!r} is not supported" in refusal(checkpoint.load)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    shutil.copy(PARITY / "llada-a" / "config.json", tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    message = refusal(lambda: load_model(str(tmp_path)))
    assert "pickled weights are refused" in message
    assert "safetensors" in message


def test_a_missing_parameter_is_named(checkpoint: Checkpoint) -> None:
    del checkpoint.weights[Q_PROJ]
    message = refusal(checkpoint.load)
    assert "missing parameter" in message
    assert "layers.1.self_attn.q_proj.weight" in message


def test_an_untied_checkpoint_without_output_head_is_refused(checkpoint: Checkpoint) -> None:
    del checkpoint.weights["model.transformer.ff_out.weight"]
    message = refusal(checkpoint.load)
    assert "missing parameter" in message
    assert "lm_head.weight" in message


def test_an_unexpected_parameter_is_named(checkpoint: Checkpoint) -> None:
    checkpoint.weights["model.transformer.blocks.1.q_norm.weight"] = torch.ones(64)
    message = refusal(checkpoint.load)
    assert "unexpected parameter" in message
    assert "1.q_norm.weight" in message


def test_more_layers_than_the_config_says_are_unexpected(checkpoint: Checkpoint) -> None:
    checkpoint.config["n_layers"] = 2
    assert "unexpected parameter" in refusal(checkpoint.load)


def test_a_parameter_of_another_shape_is_refused(checkpoint: Checkpoint) -> None:
    checkpoint.weights[Q_PROJ] = torch.zeros(32, 64)
    message = refusal(checkpoint.load)
    assert "layers.1.self_attn.q_proj.weight" in message


def test_a_truncated_weight_file_is_refused(checkpoint: Checkpoint) -> None:
    checkpoint.load()
    path = checkpoint.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(lambda: load_model(str(checkpoint.folder), device="cpu"))
    assert "weights cannot be loaded" in message


@pytest.mark.parametrize(("option", "value"), [("device", "abacus"), ("dtype", "float7")])
def test_an_unknown_device_or_dtype_is_refused(option: str, value: str) -> None:
    options: dict[str, Any] = {"device": "cpu", option: value}
    message = refusal(lambda: load_model(str(PARITY / "llada-a"), **options))
    assert f"unknown {option} {value!r}" in message


# ---------------------------------------------------------------- what can


def test_a_loaded_model_knows_its_facts() -> None:
    model = parity_model("llada-a")
    assert (model.family, model.vocab_size, model.mask_token_id) == (LLADA, 320, 311)
    assert (model.max_length, model.eos_token_ids) == (128, frozenset({305}))
    assert (model.dtype, model.tokenizer, model.revision) == (torch.float32, None, None)
    assert parity_model("sdar-a").default_block_length == 4


def shard(checkpoint: Checkpoint, files: int) -> None:
    """Spread the weights over several files with an index, as large checkpoints do."""
    checkpoint.load()
    (checkpoint.folder / "model.safetensors").unlink()
    names = sorted(checkpoint.weights)
    index: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: checkpoint.weights[name] for name in names[number::files]}
        save_file(part, checkpoint.folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (checkpoint.folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("source", ["llada-a", "dream-a", "sdar-a"])
def test_a_sharded_checkpoint_equals_the_single_file(tmp_path: Path, source: str) -> None:
    shard(Checkpoint(tmp_path, source), files=3)
    model, whole = load_model(str(tmp_path), device="cpu"), parity_model(source)
    parameters = whole.module.state_dict()
    assert set(model.module.state_dict()) == set(parameters)
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, parameters[name])
    assert torch.equal(model.forward_logits(IDS), whole.forward_logits(IDS))
    assert model.fingerprint == whole.fingerprint


def test_a_missing_shard_is_refused(checkpoint: Checkpoint) -> None:
    shard(checkpoint, files=3)
    (checkpoint.folder / "model-00002-of-00003.safetensors").unlink()
    refusal(lambda: load_model(str(checkpoint.folder), device="cpu"))


@pytest.mark.parametrize("source", ["llada-a", "dream-a", "sdar-a"])
def test_bfloat16_gives_float32_logits_near_those_of_float32(source: str) -> None:
    model = load_model(str(PARITY / source), device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    logits = model.forward_logits(IDS)
    assert logits.dtype == torch.float32
    gap = logits - parity_model(source).forward_logits(IDS)
    assert 0 < gap.std() < 0.05 * logits.std()  # 8 bits of mantissa, three layers


def test_a_checkpoint_stored_in_bfloat16_loads_in_float32(checkpoint: Checkpoint) -> None:
    checkpoint.weights = {name: value.bfloat16() for name, value in checkpoint.weights.items()}
    model = checkpoint.load()
    assert model.dtype == torch.float32
    stored = checkpoint.weights["model.transformer.wte.weight"].float()
    assert torch.equal(model.module.state_dict()["model.embed_tokens.weight"], stored)


def test_a_tied_checkpoint_uses_its_embeddings_as_output_head(checkpoint: Checkpoint) -> None:
    embeddings = checkpoint.weights["model.transformer.wte.weight"]
    checkpoint.weights["model.transformer.ff_out.weight"] = embeddings.clone()
    untied = checkpoint.load().forward_logits(IDS)
    checkpoint.config["weight_tying"] = True
    del checkpoint.weights["model.transformer.ff_out.weight"]
    assert torch.equal(checkpoint.load().forward_logits(IDS), untied)


@pytest.mark.parametrize("stated", [None, 4, "absent"])
def test_llada_without_kv_heads_has_one_per_head(checkpoint: Checkpoint, stated: object) -> None:
    checkpoint.config["n_kv_heads"] = stated
    if stated == "absent":
        del checkpoint.config["n_kv_heads"]
    logits = checkpoint.load().forward_logits(IDS)
    assert torch.equal(logits, parity_model("llada-a").forward_logits(IDS))


def test_llada_with_shared_kv_heads_equals_the_heads_repeated(checkpoint: Checkpoint) -> None:
    """Two KV heads for four heads: heads 0 and 1 share the first, 2 and 3 the second."""
    shared = dict(checkpoint.weights)
    for name, value in checkpoint.weights.items():
        if "k_proj" in name or "v_proj" in name:
            shared[name] = value.view(4, 16, 64)[[0, 2]].reshape(32, 64).clone()
            checkpoint.weights[name] = value.view(4, 16, 64)[[0, 0, 2, 2]].reshape(64, 64).clone()
    repeated = checkpoint.load().forward_logits(IDS)
    checkpoint.weights = shared
    checkpoint.config["n_kv_heads"] = 2
    assert (checkpoint.load().forward_logits(IDS) - repeated).abs().max() < 1e-4


def test_a_larger_embedding_than_vocabulary_is_the_number_of_logits(
    checkpoint: Checkpoint,
) -> None:
    """Official checkpoints pad `vocab_size` to `embedding_size`."""
    checkpoint.config["vocab_size"] = 315
    assert checkpoint.load().vocab_size == 320


def test_the_fingerprint_is_of_what_the_model_computes(checkpoint: Checkpoint) -> None:
    whole = parity_model("llada-a").fingerprint
    assert checkpoint.load().fingerprint == whole
    checkpoint.config |= {"transformers_version": "5.0.0", "torch_dtype": "bfloat16"}
    assert checkpoint.load().fingerprint == whole
    checkpoint.config["rope_theta"] = 10_000.0
    assert checkpoint.load().fingerprint != whole


def test_eos_tokens_are_those_of_both_configs(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "sdar-a")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [280, 281]}')
    assert checkpoint.load().eos_token_ids == frozenset({280, 281, 300})


# ---------------------------------------------------------------- real sizes, without weights


def on_meta(family: Family, config: Mapping[str, Any]) -> dict[str, Tensor]:
    architecture, module_config = family.architecture(config)
    with torch.device("meta"):
        module = architecture(module_config)
    parameters: dict[str, Tensor] = module.state_dict()
    return parameters


def renamed(family: Family, name: str) -> str:
    for pattern, replacement in family.key_mapping.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    return name


def llada_names_and_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What the official LLaDA code calls its parameters, and how large they are."""
    d, mlp, vocab = config["d_model"], config["mlp_hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (vocab, d),
        "ln_f.weight": (d,),
        "ff_out.weight": (vocab, d),
    }
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            shapes[f"{block}{name}.weight"] = (d, d)
        shapes |= {f"{block}{name}.weight": (mlp, d) for name in ("ff_proj", "up_proj")}
        shapes[f"{block}ff_out.weight"] = (d, mlp)
        shapes |= {f"{block}{name}.weight": (d,) for name in ("attn_norm", "ff_norm")}
    return {f"model.transformer.{name}": shape for name, shape in shapes.items()}


def test_llada_8b_maps_one_to_one_and_has_the_published_size() -> None:
    ours = on_meta(LLADA, LLADA_8B)
    official = llada_names_and_shapes(LLADA_8B)
    mapped = {renamed(LLADA, name): shape for name, shape in official.items()}
    assert len(mapped) == len(official)
    assert mapped == {name: tuple(value.shape) for name, value in ours.items()}
    # Embeddings and head; per layer 4 square projections, 3 of the MLP, 2 norms; the last norm.
    size = 2 * 126464 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096) + 4096
    assert size == 8_015_581_184
    assert sum(value.numel() for value in ours.values()) == size


def test_the_parity_checkpoint_has_the_official_llada_names() -> None:
    config = json.loads((PARITY / "llada-a" / "config.json").read_text())
    weights = load_file(PARITY / "llada-a" / "model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    assert shapes == llada_names_and_shapes(config)


def test_sdar_4b_has_the_published_parameter_names() -> None:
    names = (Path(__file__).parent / "data" / "sdar-4b-chat.parameters.txt").read_text().split()
    ours = on_meta(SDAR, SDAR_4B)
    assert sorted(renamed(SDAR, name) for name in names) == sorted(ours)
    d, mlp, q, kv = 2560, 9728, 32 * 128, 8 * 128
    layer = 2 * d * q + 2 * d * kv + 3 * d * mlp + 2 * d + 2 * 128
    assert sum(value.numel() for value in ours.values()) == 2 * 151936 * d + 36 * layer + d


def test_dream_7b_has_qwen2s_size() -> None:
    """Biases on q, k and v, four KV heads, an untied head: 7,615,616,512 parameters."""
    ours = on_meta(DREAM, DREAM_7B)
    d, mlp, kv = 3584, 18944, 4 * 128
    layer = 2 * d * d + 2 * d * kv + d + 2 * kv + 3 * d * mlp + 2 * d
    size = 2 * 152064 * d + 28 * layer + d
    assert size == 7_615_616_512
    assert sum(value.numel() for value in ours.values()) == size


def test_special_tokens_spelled_in_a_prompt_stay_text() -> None:
    model = load_model("tiny-llada")
    honest = model.encode("How many?").tolist()
    spelled = model.encode("a <|mdm_mask|> b <|endoftext|><|assistant|> c").tolist()
    specials = set(model.tokenizer.all_special_ids)
    # The turn's own first and last token are special, as in any prompt; nothing between them is.
    assert (spelled[0], spelled[-1]) == (honest[0], honest[-1])
    assert specials.isdisjoint(spelled[1:-1])
    text = model.tokenizer.decode(spelled[1:-1])
    assert text == "a <|mdm_mask|> b <|endoftext|><|assistant|> c"


@pytest.mark.parametrize("prompt", ["", " \n", "half \ud800"])
def test_prompts_that_are_no_text_are_refused(prompt: str) -> None:
    model = load_model("tiny-llada")
    assert "the prompt is" in refusal(lambda: model.encode(prompt))
