"""Loading checkpoints in the official layouts, and refusing everything else in one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers import PARITY, Checkpoint, a_graph_of, parity_model, refusal
from packaging.version import Version
from safetensors.torch import save_file

from spiffy.calib.pipeline import model_facts
from spiffy.runtime import ALIASES, load_model
from spiffy.runtime.models.llada import LLADA
from spiffy.runtime.models.source import model_of_graph
from spiffy.schemas import DraftGraph
from spiffy.schemas.notes import note

IDS = torch.tensor([[5, 9, 311, 311, 7, 42]])
Q_PROJ = "model.transformer.blocks.1.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


# ---------------------------------------------------------------- which model a graph means


def of(name: str) -> DraftGraph:
    graph = a_graph_of(parity_model("sdar-a"))
    record = graph.model.model_copy(update={"id": name, "revision": "abc"})
    return graph.model_copy(update={"model": record})


def test_a_graph_names_an_alias_a_repository_or_a_folder_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_of_graph(of("sdar-8b"), "drafts.json") == ("sdar-8b", "abc")
    assert model_of_graph(of("some/model"), "drafts.json") == ("some/model", "abc")
    message = refusal(lambda: model_of_graph(of("my-finetune"), "drafts.json"))
    assert "drafts.json: the model that it was calibrated with is only known to be" in message
    assert "give --model (model= in Python)" in message
    for name in ("sdar-8b", "some/model", "my-finetune"):
        Path(name).mkdir(parents=True)
    assert model_of_graph(of("sdar-8b"), "drafts.json") == ("sdar-8b", "abc")
    assert model_of_graph(of("some/model"), "drafts.json") == ("some/model", None)
    assert model_of_graph(of("my-finetune"), "drafts.json") == ("my-finetune", None)


def test_a_checkpoint_beside_a_graph_is_the_one_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    graph = of("some/model")
    for folder in (Path(), Path("sdar-8b")):
        folder.mkdir(exist_ok=True)
        graph.save(folder / "llada.json")
        graph.save(folder / "draft_graph.json")
        (folder / "config.json").write_text("{}")
    named = ("some/model", "abc")
    assert model_of_graph(graph, "llada.json") == named  # many programs have a config.json
    assert model_of_graph(graph, "draft_graph.json") == (".", None)
    for place in ("sdar-8b", "sdar-8b/draft_graph.json"):
        assert model_of_graph(graph, place) == ("./sdar-8b", None)  # no alias
    Path("model-00001-of-00002.safetensors").touch()
    assert model_of_graph(graph, "llada.json") == (".", None)
    assert model_of_graph(graph, str(tmp_path / "sdar-8b/llada.json")) == named


def test_a_folder_is_recorded_as_one_even_if_it_is_called_like_an_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    note.cache_clear()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ALIASES["tiny-llada"], "tiny-llada")
    shutil.copytree(ALIASES["tiny-llada"], "mine")
    names = {"tiny-llada": "tiny-llada", "./tiny-llada": "./tiny-llada", "./mine": "mine"}
    names[ALIASES["tiny-sdar"]] = "tiny-sdar"
    for name, recorded in names.items():
        assert model_facts(load_model(name, device="cpu")).id == recorded
    assert caplog.text.count("./tiny-llada is the folder") == 1


# ---------------------------------------------------------------- what cannot be loaded


def test_an_unknown_alias_is_refused_with_the_known_ones() -> None:
    message = refusal(lambda: load_model("tiny-lama"))
    assert "unknown model 'tiny-lama'" in message
    assert "tiny-llada" in message


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "a/b/c"])
def test_a_missing_directory_is_refused(name: str) -> None:
    assert "no such directory" in refusal(lambda: load_model(name))


@pytest.mark.parametrize("name", ["", "nobody's", "tiny-llada-lora"])
def test_an_unknown_adapter_is_refused_as_an_adapter(name: str) -> None:
    message = refusal(lambda: load_model("tiny-llada", adapter=name))
    assert message == f"unknown adapter {name!r}: no such directory; give one, or a hub id"


@pytest.mark.parametrize("dtype", ["float8", torch.int64])
def test_an_unknown_dtype_is_refused(dtype: Any) -> None:
    message = refusal(lambda: load_model("tiny-llada", dtype=dtype))
    assert message.startswith(f"unknown dtype {dtype!r}: choose auto or one of float32, ")


def test_a_revision_of_what_is_a_folder_here_is_refused() -> None:
    shipped = refusal(lambda: load_model("tiny-llada", revision="v2"))
    assert "tiny-llada ships with the package and has no revisions" in shipped
    folder = str(PARITY / "llada-a")
    wanted = f"{folder} is a folder here, which has no revision 'v2': drop it, or give a hub id"
    assert wanted in refusal(lambda: load_model(folder, revision="v2"))
    assert "no revision 'v2'" in refusal(lambda: DraftGraph.from_pretrained(folder, revision="v2"))


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def cached_snapshot(hub_cache: Path, hub_id: str, commit: str = "c0ffee") -> Path:
    """Where the hub's client keeps the files of a repository's main branch."""
    repository = hub_cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [("no-such/model", "no-such/model"), ("sdar-8b-b32", "JetLM/SDAR-8B-Chat-b32")],
)
def test_a_hub_id_without_network_is_refused(hub_cache: Path, name: str, hub_id: str) -> None:
    message = refusal(lambda: load_model(name))
    assert f"model {hub_id!r} is neither in the cache folder {hub_cache} nor reachable" in message
    assert "pass the directory of a local copy" in message


def test_a_cached_config_without_weights_is_refused(hub_cache: Path) -> None:
    snapshot = cached_snapshot(hub_cache, "some/model")
    shutil.copy(PARITY / "llada-a" / "config.json", snapshot)
    message = refusal(lambda: load_model("some/model", device="cpu"))
    assert f"'some/model' is neither in the cache folder {hub_cache}" in message
    assert "no weights in safetensors" in message


def test_a_cached_model_loads_without_network(hub_cache: Path) -> None:
    snapshot = cached_snapshot(hub_cache, "some/model-b32")
    shard(Checkpoint(snapshot, "sdar-a"), files=3)
    for name in ("some/model-b32", str(snapshot)):
        model = load_model(name, device="cpu")
        assert model.revision == "c0ffee"
        assert load_model(name, device="cpu", revision="c0ffee").revision == "c0ffee"
        assert model.default_block_length == 32  # the name's: config.json says 4
        assert torch.equal(model.forward_logits(IDS, 4), parity_model("sdar-a").forward_logits(IDS))
    mapped = load_model("some/model-b32", device_map="cpu", dtype="float32")
    assert torch.equal(mapped.forward_logits(IDS, 4), parity_model("sdar-a").forward_logits(IDS))
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    assert "nor reachable" in refusal(lambda: load_model("some/model-b32", device="cpu"))


def test_all_files_are_of_the_commit_that_the_hub_names(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = "0" * 40, "1" * 40
    Checkpoint(cached_snapshot(hub_cache, "some/model", old)).load()
    (hub_cache / "models--some--model" / "snapshots" / new).mkdir()
    Checkpoint(hub_cache / "models--some--model" / "snapshots" / new, "dream-a").load()
    main = SimpleNamespace(sha=new)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: main)
    model = load_model("some/model", device="cpu")
    assert (model.revision, model.family.name) == (new, "dream")


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
    message = refusal(lambda: load_model(str(checkpoint.folder), device="cpu"))
    assert "has no model-00002-of-00003.safetensors" in message


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_of_shards_is_refused(checkpoint: Checkpoint, content: str) -> None:
    shard(checkpoint, files=3)
    (checkpoint.folder / "model.safetensors.index.json").write_text(content)
    message = refusal(lambda: load_model(str(checkpoint.folder), device="cpu"))
    assert "model.safetensors.index.json: " in message


def test_a_loaded_model_does_not_depend_on_its_file(checkpoint: Checkpoint) -> None:
    """Weights are read, not mapped: mapped pages would count twice while others are converted."""
    model = checkpoint.load()
    before = model.forward_logits(IDS)
    path = checkpoint.folder / "model.safetensors"
    with path.open("r+b") as file:  # the same inode, as a mapping would see
        file.write(bytes(path.stat().st_size))
    assert torch.equal(model.forward_logits(IDS), before)


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
    tied = checkpoint.load()
    assert torch.equal(tied.forward_logits(IDS), untied)
    parameters = tied.module.state_dict()
    head, first = parameters["lm_head.weight"], parameters["model.embed_tokens.weight"]
    assert head.data_ptr() == first.data_ptr()  # one copy in memory


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


def test_without_a_mask_token_in_the_config_it_is_the_tokenizers(tmp_path: Path) -> None:
    shipped = load_model("tiny-sdar", device="cpu")
    folder = Path(ALIASES["tiny-sdar"])
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    del config["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(str(tmp_path), device="cpu")
    assert model.mask_token_id == shipped.mask_token_id
    assert model.fingerprint == shipped.fingerprint


# ---------------------------------------------------------------- device maps

SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.norm": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", SPLIT, {"": "disk"}])
@pytest.mark.parametrize("source", ["dream-a", "sdar-a"])
def test_a_device_map_places_layers_and_changes_no_logits(source: str, device_map: Any) -> None:
    if device_map == {"": "disk"} and Version(transformers.__version__) < Version("5.13"):
        message = refusal(lambda: load_model(str(PARITY / source), device_map=device_map))
        assert "cannot leave a whole model on disk: upgrade it" in message
        return
    model = load_model(str(PARITY / source), dtype="float32", device_map=device_map)
    placed = model.module.state_dict()["model.layers.1.mlp.up_proj.weight"].device.type
    offloaded = isinstance(device_map, dict) and "disk" in device_map.values()
    if offloaded or not torch.cuda.is_available():
        assert placed == ("meta" if offloaded else "cpu")
    gap = model.forward_logits(IDS).cpu() - parity_model(source).forward_logits(IDS)
    assert gap.abs().max() < 1e-3
    hidden, tokens = torch.randn(3, 2, model.module.config.hidden_size), torch.tensor([[1], [7]])
    few = model.head_of(hidden, tokens)
    if model.module.lm_head.weight.is_meta:
        assert few is None
    else:
        assert few is not None
        whole = model.head(hidden.to(model.device)).cpu()
        assert (few.cpu()[..., 0] - whole[:, [0, 1], [1, 7]]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_a_few_tokens_are_those_of_the_head(dtype: str) -> None:
    model = load_model(str(PARITY / "llada-a"), dtype=dtype)
    last_bit = 1e-5 if dtype == "float32" else 2**-7
    head = model.module.lm_head
    hidden = torch.randn(3, 4, model.module.config.hidden_size, dtype=model.dtype)
    tokens = torch.randint(model.vocab_size, (4, 5))
    for bias in (None, torch.randn(model.vocab_size, dtype=model.dtype)):
        head.bias = None if bias is None else torch.nn.Parameter(bias)
        few = model.head_of(hidden, tokens)
        assert few is not None
        whole = model.head(hidden).gather(-1, tokens.expand(3, 4, 5))
        # The last bit may differ, of the product and again where the bias is added.
        assert (few - whole).abs().max() <= whole.abs().max() * last_bit

    class Quantized(torch.nn.Linear):
        """Whose weights are not what they seem."""

    model.module.lm_head = Quantized(1, 1)
    assert model.head_of(hidden, tokens) is None


def test_a_device_map_that_names_no_device_is_refused() -> None:
    message = refusal(lambda: load_model(str(PARITY / "llada-a"), device_map="everywhere"))
    assert "everywhere" in message


def test_a_device_map_without_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    message = refusal(lambda: load_model(str(PARITY / "llada-a"), device_map="auto"))
    assert message == "device_map needs accelerate: pip install 'spiffy-dllm[large]'"


# ---------------------------------------------------------------- other libraries


@pytest.mark.parametrize(
    ("option", "library", "extra"),
    [("adapter", "peft", "adapters"), ("quantize", "torchao", "quantize")],
)
def test_what_an_option_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, option: str, library: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    options: dict[str, Any] = {option: "int8"}
    message = refusal(lambda: load_model(str(PARITY / "llada-a"), **options))
    named = f"--{option} ({option}= in Python)"
    assert message == f"{named} needs {library}: pip install 'spiffy-dllm[{extra}]'"


# ---------------------------------------------------------------- prompts


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
