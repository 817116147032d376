"""What `push --beside-weights` leaves beside a model changes nothing for who never asks for it."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, a_graph_of, parity_model, random_prompt
from loopback_hub import LoopbackHub, connect
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    Qwen3ForCausalLM,
)

import spiffy.integrations
from spiffy.integrations.hub import beside_weights
from spiffy.integrations.transformers import call, generate_with
from spiffy.runtime import generate, load_model
from spiffy.schemas import DraftGraph, SpiffyError


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "m")])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that transformers loads by itself, with what push puts there."""
    place, model = tmp_path / "weights", parity_model("sdar-a")
    place.mkdir()
    shutil.copy(PARITY / "sdar-a" / "model.safetensors", place)
    config = json.loads((PARITY / "sdar-a" / "config.json").read_text())
    for key in ("auto_map", "use_cache", "attn_implementation"):
        del config[key]
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (place / "config.json").write_text(json.dumps(config))
    for name, content in beside_weights(str(place)).items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(content)
    a_graph_of(model, block_length=4, stop_at_eos=False).save(place / "draft_graph.json")
    return place


def loaded(folder: Path, trust: bool = True, kind: Any = AutoModelForCausalLM) -> Any:
    """The user's trust in this folder is what transformers asks for; our code never asks for it."""
    return kind.from_pretrained(folder, trust_remote_code=trust)


def ids() -> torch.Tensor:
    return random_prompt(parity_model("sdar-a"), 6)[None]


@pytest.fixture
def answer() -> list[int]:
    """Of the decoding with drafts, of 8 tokens."""
    options: dict[str, Any] = {"gen_length": 8, "block_length": 4, "stop_at_eos": False}
    return generate(parity_model("sdar-a"), ids()[0], **options).token_ids


def test_who_does_not_ask_gets_the_models_own_generate(folder: Path) -> None:
    plain, module = loaded(folder, trust=False), loaded(folder)
    assert "generate" in vars(module)  # transformers put this folder's there
    for arguments, options in (
        ((ids(),), {"max_new_tokens": 8}),
        ((), {"input_ids": ids(), "max_new_tokens": 8, "num_beams": 2}),
        ((ids(), GenerationConfig(max_new_tokens=5, return_dict_in_generate=True)), {}),
        ((ids(),), {"max_new_tokens": 8, "custom_generate": None, "assistant_model": None}),
        # Of another's decoding than ours.
        ((ids(),), {"max_new_tokens": 8, "custom_generate": GenerationMixin._sample}),
    ):
        expected, got = (each.generate(*arguments, **options) for each in (plain, module))
        assert type(got) is type(expected)
        if not isinstance(got, torch.Tensor):
            expected, got = expected.sequences, got.sequences
        assert torch.equal(got, expected)


class OwnGenerate(Qwen3ForCausalLM):
    """As remote code has it: a function of its own by that name."""

    def generate(self, inputs: Any, gen_length: int = 3, *, budget: int = 0) -> Any:
        return [inputs, gen_length, budget, self]


def test_a_class_with_a_generate_of_its_own_keeps_it(folder: Path, answer: list[int]) -> None:
    module = loaded(folder, kind=OwnGenerate)
    assert module.generate("a") == ["a", 3, 0, module]
    assert module.generate("a", gen_length=4, budget=2) == ["a", 4, 2, module]
    asked = {"custom_generate": str(folder), "trust_remote_code": True, "max_new_tokens": 8}
    assert module.generate(ids(), **asked)[0, 6:].tolist() == answer


def test_who_asks_gets_drafts(
    folder: Path, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, drafted = loaded(folder), []

    def noted(*arguments: Any, **options: Any) -> Any:
        drafted.append(options["graph"])
        return spiffy.integrations.custom_generate(*arguments, **options)

    noted.__signature__ = inspect.signature(call.custom_generate)  # type: ignore[attr-defined]
    monkeypatch.setattr(call, "custom_generate", noted)
    graph = DraftGraph.load(folder / "draft_graph.json")
    named: dict[str, Any] = {"custom_generate": str(folder), "trust_remote_code": True}
    for arguments, options in (
        ((ids(),), named),
        ((), {"input_ids": ids(), "attention_mask": torch.ones_like(ids()), **named}),
        ((ids(), GenerationConfig(max_new_tokens=8)), named),
        ((ids(),), {"budget": 2}),
        ((), {"inputs": ids(), "graph": graph}),
        ((ids(),), {"decoding": {"policy": "static"}}),
    ):
        if len(arguments) < 2:
            options = {**options, "max_new_tokens": 8}
        assert module.generate(*arguments, **options)[0, 6:].tolist() == answer
        assert drafted.pop() == graph
        assert not drafted
    with pytest.raises(TypeError, match="multiple values for argument 'inputs'"):
        module.generate(ids(), inputs=ids(), budget=2)
    with pytest.raises(ValueError, match="trust_remote_code"):
        module.generate(ids(), custom_generate=str(folder), trust_remote_code=False)


def test_without_spiffy_models_load_and_only_drafts_are_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "spiffy"]:
        monkeypatch.setitem(sys.modules, name, None)

    def absent(name: str) -> str:  # what a requirements.txt would be checked by
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    module = loaded(folder)
    assert module.generate(ids(), max_new_tokens=3).shape == (1, 9)
    for options in ({"budget": 2}, {"custom_generate": str(folder), "trust_remote_code": True}):
        with pytest.raises(ImportError, match="need spiffy: pip install spiffy-dllm"):
            module.generate(ids(), max_new_tokens=3, **options)


@pytest.mark.parametrize("where", ["argument", "config", "both"])
def test_stop_strings_of_a_config_are_found_too(tmp_path: Path, where: str) -> None:
    model, prompt = load_model("tiny-sdar", device="cpu"), "Lily has 9 old pens."
    a_graph_of(model, block_length=8, gen_length=24).save(tmp_path / "draft_graph.json")
    whole = generate(model, prompt, gen_length=24).text
    stop = whole[6:9]
    config = GenerationConfig(max_new_tokens=24)
    options: dict[str, Any] = {"generation_config": config, "tokenizer": model.tokenizer}
    if where != "argument":
        config.stop_strings = stop if where == "config" else "not this"
    if where != "config":
        options["stop_strings"] = [stop]
    asked = model.encode(prompt)[None]
    out = generate_with(str(tmp_path), model.module, asked, **options)
    text = model.tokenizer.decode(out[0, asked.shape[1] :])
    assert whole.startswith(text)
    assert stop in text
    assert len(text) < len(whole)
    assert config.stop_strings == {"argument": None, "config": stop, "both": "not this"}[where]
    del options["tokenizer"]
    with pytest.raises(SpiffyError, match="give tokenizer= too"):
        generate_with(str(tmp_path), model.module, asked, **options)


def test_what_the_code_is_downloaded_with_the_graph_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = LoopbackHub()
    connect(hub, tmp_path, monkeypatch)
    model = load_model("tiny-sdar", device="cpu")
    graph = a_graph_of(model, block_length=8, gen_length=16)
    code = {name: text.encode() for name, text in beside_weights("some/model").items()}
    first = hub.put("some/model", {**code, "draft_graph.json": graph.to_json().encode()})
    hub.put("some/model", {"draft_graph.json": b"of another revision"})
    asked, options = model.encode("Tom has 3 apples.")[None], {"max_new_tokens": 16}
    options |= {"custom_generate": "some/model", "trust_remote_code": True, "revision": first}  # type: ignore[dict-item]
    there = {"token": "hf_given", "cache_dir": str(tmp_path / "elsewhere")}
    out = model.module.generate(asked, **options, **there)  # type: ignore[operator]
    assert hub.tokens == {"Bearer hf_given"}
    assert not (tmp_path / "hub" / "models--some--model" / "snapshots").exists()
    hub.stop()
    call._graph_of.cache_clear()
    there = {"cache_dir": str(tmp_path / "elsewhere"), "local_files_only": True}  # type: ignore[dict-item]
    again = model.module.generate(asked, **options, **there)  # type: ignore[operator]
    assert torch.equal(again, out)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_end_tokens_may_be_a_list_a_tuple_or_a_tensor(kind: Any) -> None:
    model = parity_model("llada-a")
    inputs = random_prompt(model, 6)[None]
    options: dict[str, Any] = {"gen_length": 8, "block_length": 4, "stop_at_eos": False}
    whole = generate(model, inputs[0], **options).token_ids
    end = whole[1]
    config = GenerationConfig(max_new_tokens=8, pad_token_id=3)
    config.eos_token_id = kind([end, 319 if end != 319 else 318])
    out = model.module.generate(  # type: ignore[operator]
        inputs,
        generation_config=config,
        custom_generate=spiffy.integrations.custom_generate,
        decoding={"block_length": 4},
        return_dict_in_generate=True,
    )
    assert out.sequences[0, 6:].tolist() == whole[: whole.index(end) + 1]
    assert out.steps.item() <= 4  # the second block is not decoded
