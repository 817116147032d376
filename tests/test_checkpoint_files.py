"""Checkpoints as people have them: files that cannot be read, saved again, named otherwise."""

from __future__ import annotations

import ast
import errno
import json
import logging
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import PARITY, a_graph_of, of_another_model, parity_model, random_prompt, refusal
from huggingface_hub import constants
from loopback_hub import LoopbackHub, connect
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from spiffy.calib.store import TraceFile
from spiffy.cli import decode
from spiffy.runtime import ALIASES, DiffusionLM, decoding_settings, generate, load_model
from spiffy.runtime.models.block_size import stated_block_size
from spiffy.schemas import DraftGraph, ModelRecord

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors",
)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7053488\n"


def copied(folder: Path, name: str = "tiny-llada") -> Path:
    """A shipped checkpoint whose files may be replaced; nothing is copied until then."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(ALIASES[name]).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def rewrite(path: Path, content: object) -> None:
    path.unlink(missing_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def edit(path: Path, *drop: str, **entries: Any) -> None:
    content = {**json.loads(path.read_text()), **entries}
    rewrite(path, {key: value for key, value in content.items() if key not in drop})


@cache
def shipped(name: str) -> DiffusionLM:
    return load_model(name, device="cpu")


def load(folder: Path) -> DiffusionLM:
    return load_model(str(folder), device="cpu")


# ---------------------------------------------------------------- what is absent, what unreadable


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def a_dead_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


def a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (a_pipe, "not a regular file"),
        (a_folder, "cannot be read (Is a directory)"),
        (a_dead_link, "a link that leads nowhere"),
        (lambda path: rewrite(path, POINTER), "a git-lfs pointer"),
    ],
)
def test_a_file_that_is_there_and_cannot_be_read_is_not_absent(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = copied(tmp_path)
    spoil(folder / name)
    assert refusal(lambda: load(folder)).startswith(f"{folder / name}: {reason}")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read_is_not_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, opened = copied(tmp_path), Path.open
    if not (folder / name).exists():
        rewrite(folder / name, {})

    def forbidding(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == folder / name:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidding)
    assert f"{folder / name}: cannot be read (Permission denied)" in refusal(lambda: load(folder))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_json_that_is_none_is_refused_in_every_file(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = copied(tmp_path)
    rewrite(folder / name, content)
    assert refusal(lambda: load(folder)).startswith(f"{folder / name}: ")


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    found = LoopbackHub()
    connect(found, tmp_path, monkeypatch)
    found.put("org/model", files_in(PARITY / "llada-a"))
    yield found
    found.stop()


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *(("tokenizer_config.json", status) for status in (401, 403, 429, 500, 503)),
        *((name, 403) for name in ("config.json", "generation_config.json", "model.safetensors")),
        *((name, 429) for name in ("chat_template.jinja", "tokenizer.json")),
        ("special_tokens_map.json", 503),
    ],
)
def test_an_error_of_the_hub_is_not_absence(hub: LoopbackHub, name: str, status: int) -> None:
    hub.put("org/model", files_in(Path(ALIASES["tiny-llada"])))
    hub.fails[f"/{name}"] = status
    message = refusal(lambda: load_model("org/model", device="cpu"))
    assert message.startswith(f"org/model: {name} cannot be had from the hub: ")
    assert str(status) in message


def test_what_the_hub_does_not_have_is_absent_then_and_later_without_it(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(6)[None]
    expected = parity_model("llada-a").forward_logits(ids)
    assert torch.equal(load_model("org/model", device="cpu").forward_logits(ids), expected)
    hub.stop()
    again = load_model("org/model", device="cpu")
    assert torch.equal(again.forward_logits(ids), expected)
    assert again.revision == hub.repositories["org/model"][-1][0]
    # A cache that does not know what the hub lacks may itself lack what the hub has.
    repository = Path(constants.HF_HUB_CACHE) / "models--org--model"
    shutil.rmtree(repository / ".no_exist")
    message = refusal(lambda: load_model("org/model", device="cpu"))
    assert "is not in the cache folder" in message
    assert "cannot be asked whether there is one" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_model("org/model", device="cpu").forward_logits(ids), expected)


def test_a_cache_that_knows_what_the_hub_has_tells_absent_from_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As downloads of whole repositories leave a list since huggingface_hub 2."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--model"
    snapshot = repository / "snapshots" / "c0ffee"
    shutil.copytree(PARITY / "llada-a", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    listed = [SimpleNamespace(path=path.name) for path in snapshot.iterdir()]
    ask = "huggingface_hub.get_cached_repo_tree"
    monkeypatch.setattr(ask, lambda *_, **__: listed, raising=False)
    assert load_model("org/model", device="cpu").tokenizer is None
    listed.append(SimpleNamespace(path="tokenizer.json"))
    message = refusal(lambda: load_model("org/model", device="cpu"))
    assert f"tokenizer.json is not in the cache folder {tmp_path}" in message


def test_an_adapter_beside_weights_is_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(tmp_path)
    rewrite(folder / "adapter_config.json", {})
    load(folder)
    assert "holds an adapter (LoRA) beside its weights: it is not applied" in caplog.text


def test_an_artifact_that_the_hub_refuses_is_not_absent(hub: LoopbackHub) -> None:
    message = refusal(lambda: DraftGraph.from_pretrained("org/model"))
    assert message == "org/model: the hub has no draft_graph.json there"
    hub.fails["/draft_graph.json"] = 403
    message = refusal(lambda: DraftGraph.from_pretrained("org/model"))
    assert "no draft_graph.json to be had" in message


def test_a_chat_template_in_a_file_goes_before_the_settings(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    rewrite(folder / "chat_template.jinja", "{{ messages[0]['content'] }}!")
    assert load(folder).tokenizer.chat_template == "{{ messages[0]['content'] }}!"


# ---------------------------------------------------------------- the same model


def test_a_model_saved_again_is_the_same(tmp_path: Path) -> None:
    """As transformers 5 does: RoPE in one entry, the template in a file, shards, another dtype."""
    ours = shipped("tiny-sdar")
    folder = copied(tmp_path / "another-name", "tiny-sdar")
    for file in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / file).unlink()
    ours.tokenizer.save_pretrained(folder)
    assert (folder / "chat_template.jinja").is_file()
    weights = load_file(Path(ALIASES["tiny-sdar"]) / "model.safetensors")
    shards = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
    for file, names in shards.items():
        save_file({name: weights[name].half() for name in names}, folder / file)
    index = {name: file for file, names in shards.items() for name in names}
    rewrite(folder / "model.safetensors.index.json", {"weight_map": index})
    edit(
        folder / "config.json",
        *("rope_theta", "rope_scaling", "torch_dtype", "attention_bias"),
        _name_or_path="org/else",
        dtype="float16",
        rope_parameters={"rope_type": "default", "rope_theta": 10000},
        transformers_version="5.24.0",
    )
    assert load(folder).fingerprint == ours.fingerprint


def normaliser(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


def merges(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][::-1]


@pytest.mark.parametrize("change", [normaliser, merges])
def test_text_that_becomes_other_ids_is_of_another_model(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = copied(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    rewrite(folder / "tokenizer.json", content)
    assert load(folder).fingerprint != shipped("tiny-llada").fingerprint


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_theta": 9999.0},
        {"rms_norm_eps": 1e-6},
        {"max_sequence_length": 256},
        {"mask_token_id": 5},
        {"eos_token_id": 7},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_what_is_computed_otherwise_is_of_another_model(
    tmp_path: Path, entries: dict[str, Any]
) -> None:
    folder = copied(tmp_path)
    edit(folder / "config.json", **entries)
    assert load(folder).fingerprint != shipped("tiny-llada").fingerprint


def test_families_of_the_same_shape_are_different_models() -> None:
    names = ("tiny-llada", "tiny-dream", "tiny-sdar")
    assert len({shipped(name).fingerprint for name in names}) == 3


# ---------------------------------------------------------------- block sizes


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("models/SDAR-8B-Chat-b32", {"block_size": 4}, 32),
        ("models/sdar-b8-sft", {}, 8),
        ("models/sdar_b8_sft/checkpoint-500", {}, 8),
        ("models/run-b16/sft/final", {"block_size": 16}, 16),
        ("models/sdar-b8/checkpoint-b16", {}, 16),
        ("models/sdar-block-size-8", {}, 8),
        ("models/sdar-8b-sft", {"bd_size": 8}, 8),
        ("models/sdar-8b-sft", {"block_length": 8, "block_size": 8}, 8),
        ("models/sdar-8b-sft", {}, None),
        ("models/b200/sdar-8b", {}, None),  # a GPU
        ("models/b200-runs/sdar-8b", {"block_size": 4}, 4),
        ("models/b16/sweeps/sft/final", {}, None),  # too far above to be about it
        ("models/models--org--SDAR-8B-Chat-b64/snapshots/c0ffee", {"block_size": 4}, 64),
        ("org/SDAR-1.7B-Chat-b16-math", {}, 16),
        ("sdar-4b-b16", {"block_size": 4}, 16),
    ],
)
def test_a_block_size_is_read_from_names_and_config(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    config: dict[str, Any],
    expected: int | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    if name.startswith("models/"):
        (tmp_path / name).mkdir(parents=True)
    assert stated_block_size(name, config) == expected


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("models/run-b16/sft", {"block_size": 8}, "folder's name says blocks of 16, config.json 8"),
        ("models/sdar-b8-b16", {}, "names several block sizes"),
        ("models/sft", {"block_size": 8, "bd_size": 4}, "contradicts itself (block_size 8, bd_si"),
    ],
)
def test_block_sizes_that_contradict_each_other_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    message = refusal(lambda: stated_block_size(name, config))
    assert words in message
    assert "give --block-length" in message


def test_a_fine_tune_without_block_size_is_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tmp_path / "sft", "tiny-sdar")
    edit(folder / "config.json", "block_size")
    command = ["spiffy-decode", "--model", str(folder), "--prompt", "Tom", "--gen-length", "8"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        decode.main()
    assert stop.value.code == 2
    assert "comes in several: give --block-length" in " ".join(capsys.readouterr().err.split())
    assert decoding_settings(load(folder), block_length=8).block_length == 8


# ---------------------------------------------------------------- end of sequence


def without_ends(folder: Path) -> Path:
    edit(folder / "config.json", "eos_token_id")
    edit(folder / "tokenizer_config.json", "eos_token", "pad_token")
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", {"eos_token_id": [0]}),
        ("special_tokens_map.json", {"eos_token": "<|endoftext|>"}),
        ("special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>", "lstrip": False}}),
        ("tokenizer_config.json", {"eos_token": {"content": "<|endoftext|>"}}),
        ("config.json", {"eos_token_id": 0}),
    ],
)
def test_the_end_of_a_sequence_is_found_in_any_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: dict[str, Any]
) -> None:
    folder = without_ends(copied(tmp_path))
    before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    rewrite(folder / name, {**before, **content})
    assert load(folder).eos_token_ids == {0}
    assert caplog.messages == []


def test_an_end_that_no_file_names_is_taken_by_its_usual_name_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = without_ends(copied(tmp_path))
    edit(folder / "config.json", eos_token_id=-1)  # no token
    assert load(folder).eos_token_ids == {0}
    assert "names no end-of-sequence token: <|endoftext|> is taken as one" in caplog.text


def test_a_model_without_an_end_is_said_to_have_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = without_ends(copied(tmp_path))
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|nothing|>")
    rewrite(folder / "tokenizer.json", text)
    with caplog.at_level(logging.WARNING, "spiffy"):
        assert load(folder).eos_token_ids == frozenset()
    assert f"{folder} has no end-of-sequence token" in caplog.text


# ---------------------------------------------------------------- the true reason


def adapter(folder: Path) -> None:
    rewrite(folder / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    (folder / "model.safetensors").unlink()


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").unlink()


def mixture(folder: Path) -> None:
    edit(folder / "config.json", num_experts=64, architectures=["LLaDAMoEModelLM"])


def smaller_embedding(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=1000, embedding_size=1000)


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Any:
    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_file(change(found), folder / "model.safetensors")

    return spoil


def as_type(kind: torch.dtype) -> Any:
    return weights(lambda w: {k: v.to(kind) if v.dim() == 2 else v for k, v in w.items()})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (adapter, "is an adapter (LoRA) of org/base"),
        (adapter_alone, "is an adapter (LoRA) of org/base"),
        (mixture, "LLaDA-MoE is not supported"),
        (smaller_embedding, "larger than the embedding: 'ns' has id 1023, and there are 1000 rows"),
        (as_type(torch.int8), "(stored as I8) is of quantized weights"),
        (as_type(torch.float8_e4m3fn), "(stored as F8_E4M3) is of quantized weights"),
        (
            weights(lambda w: {**w, "model.a.scales": torch.zeros(1)}),
            "model.a.scales (stored as F32) is of quantized weights",
        ),
        (
            weights(lambda w: {f"module.{key}": value for key, value in w.items()}),
            "starts with 'module.', as DistributedDataParallel does: save model.module",
        ),
        (
            weights(lambda w: {**w, "model.a.lora_A.weight": torch.zeros(1)}),
            "model.a.lora_A.weight is an adapter's (LoRA)",
        ),
    ],
)
def test_a_refusal_says_the_true_reason(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = copied(tmp_path)
    spoil(folder)
    assert words in refusal(lambda: load(folder))


# ---------------------------------------------------------------- graphs of other models


def test_a_graph_of_the_family_is_taken_on_demand_and_an_old_one_with_a_note(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fits(stated: str, vocabulary: int, any_model: bool = False) -> None:
        record = ModelRecord(family="llada", id=stated, fingerprint=stated, vocab_size=320)
        graph = DraftGraph.model_construct(model=record)
        graph.check_fits("llada", "m1-ours", vocabulary, any_model)

    fits("m1-ours", 320)
    message = refusal(lambda: fits("m1-other", 320))
    assert "fingerprint of config and tokenizer m1-other, this model has m1-ours" in message
    assert "--any-model" in message
    fits("m1-other", 352, any_model=True)
    assert caplog.messages == []
    fits("0ld", 320)
    assert "the graph of 0ld was made by an older version" in caplog.text
    assert "vocabulary size 320" in refusal(lambda: fits("0ld", 352))


def test_a_graph_of_another_model_of_the_family_drafts_and_changes_no_token() -> None:
    model = parity_model("llada-a", "float64")
    prompt = random_prompt(model, 9)
    settings: dict[str, Any] = {"gen_length": 8, "block_length": 4, "stop_at_eos": False}
    other = of_another_model(a_graph_of(model, **settings))
    message = refusal(lambda: generate(model, prompt, graph=other))
    assert "fingerprint of config and tokenizer m1-other" in message
    drafted = generate(model, prompt, graph=other, any_model=True, budget=3, trace=True)
    plain = generate(model, prompt, trace=True, **settings)
    assert drafted.states == plain.states
    assert drafted.stats.drafted > 0


def test_another_family_is_refused_whatever_is_asked() -> None:
    record = ModelRecord(family="llada", id="x", fingerprint="m1-x", vocab_size=320)
    graph = DraftGraph.model_construct(model=record)
    message = refusal(lambda: graph.check_fits("dream", "m1-x", 320, any_model=True))
    assert "family llada, this model has dream" in message
    assert "take this one" not in message
    assert message.endswith("(--any-model takes those of the same family)")
    assert "--any-model" not in refusal(lambda: graph.check_fits("dream", "m1-x", 320))


# ---------------------------------------------------------------- process-wide state


def test_threads_load_models_and_leave_nothing_behind() -> None:
    def state() -> tuple[object, ...]:
        return (
            dict(os.environ),
            torch.get_default_dtype(),
            transformers_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
            *(getattr(PreTrainedModel, name) for name in ("tie_weights", "init_weights")),
            torch.nn.init.normal_,
        )

    before, failed = state(), []

    def attempt(source: str) -> None:
        try:
            load_model(str(PARITY / source), device="cpu")
        except Exception as error:
            failed.append(error)

    sources = ("llada-a", "sdar-a", "dream-a", "a2d-mdlm-a") * 2
    threads = [threading.Thread(target=attempt, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert state() == before


@pytest.mark.parametrize("source", ["llada-a", "llada2-a"])
def test_a_model_can_be_pickled(source: str) -> None:
    model = parity_model(source)
    again = pickle.loads(pickle.dumps(model))
    ids = torch.arange(6)[None]
    assert torch.equal(again.forward_logits(ids), model.forward_logits(ids))
    assert again.family == model.family


def test_a_spread_model_says_that_it_cannot_be_pickled() -> None:
    parts = ("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm")
    places = dict.fromkeys(parts, "cpu") | {"lm_head": "disk"}
    model = load_model(str(PARITY / "sdar-a"), dtype="float32", device_map=places)
    assert "a model cannot be pickled or copied" in refusal(lambda: pickle.dumps(model))


def test_what_needs_posix_says_so_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    message = refusal(lambda: TraceFile(tmp_path / "traces"))
    assert "work directories need POSIX file locks" in message
    assert not (tmp_path / "traces").exists()


def test_where_no_locks_can_be_had_it_goes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    TraceFile(tmp_path / "traces").close()
    assert (tmp_path / "traces").exists()


def test_no_module_needs_posix_to_be_imported() -> None:
    root, found = Path(__file__).parent.parent, []
    for folder in ("schemas", "runtime", "graphs", "calib", "bench", "cli"):
        for path in (root / folder).rglob("*.py"):
            for statement in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(statement, ast.Import):
                    found += [(path, alias.name) for alias in statement.names]
                elif isinstance(statement, ast.ImportFrom):
                    found.append((path, str(statement.module)))
    assert any(name == "torch" for _, name in found)
    posix = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios"}
    assert [(path, name) for path, name in found if name.split(".")[0] in posix] == []


def test_a_folder_that_decides_is_named_and_where_the_package_lies_decides_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": "llada2_moe"}
    (tmp_path / "proj-b4" / "model").mkdir(parents=True)
    assert stated_block_size(str(tmp_path / "proj-b4" / "model"), config) == 4
    assert "as a folder's name says" in caplog.text
    monkeypatch.setitem(ALIASES, "shipped", str(tmp_path / "proj-b4" / "model"))
    assert stated_block_size("shipped", config) is None
