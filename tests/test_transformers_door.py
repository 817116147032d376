"""`module.generate(custom_generate=...)` gives what `spiffy.runtime.generate` does, or refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, a_graph_of, of_another_model, parity_model, random_prompt, refusal
from torch import Tensor
from transformers import (
    AttentionInterface,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StopStringCriteria,
    TemperatureLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import spiffy.integrations
from spiffy.integrations.hub import beside_weights
from spiffy.integrations.transformers import call
from spiffy.integrations.transformers.rows import Row
from spiffy.runtime import DiffusionLM, generate, load_model, wrap
from spiffy.runtime.budget import auto
from spiffy.runtime.decode import Task

FAMILIES = (
    *("llada-a", "dream-a", "sdar-a", "llada2-a", "illada-a", "sdc-a", "a2d-mdlm-a"),
    *("a2d-bd3lm-a", "fastdllm2-a"),
)
PAD = 3


def batch(model: DiffusionLM, *lengths: int) -> dict[str, Tensor]:
    """Random prompts, padded on the left."""
    longest = max(lengths)
    rows = [random_prompt(model, length, seed=7) for length in lengths]
    fill = [torch.full((longest - len(row),), PAD) for row in rows]
    mask = [torch.arange(longest) >= len(pad) for pad in fill]
    ids = [torch.cat(pair) for pair in zip(fill, rows, strict=True)]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask).long()}


def drafted(module: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": 8, "pad_token_id": PAD, **options}
    return module.generate(**inputs, custom_generate=spiffy.integrations.custom_generate, **options)


def plainly(model: DiffusionLM, prompt: Tensor, **options: Any) -> list[int]:
    options = {"gen_length": 8, "block_length": 4, "stop_at_eos": False, **options}
    if model.family.name == "fast-dllm":
        options.setdefault("sub_block_length", 4)
    return generate(model, prompt, **options).token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_padded_batch_are_what_generate_gives(name: str) -> None:
    model = parity_model(name)
    graph, inputs = a_graph_of(model, block_length=4, stop_at_eos=False), batch(model, 5, 9)
    prompts = [random_prompt(model, length, seed=7) for length in (5, 9)]
    expected = torch.cat(
        [inputs["input_ids"], torch.tensor([plainly(model, prompt) for prompt in prompts])], 1
    )
    assert torch.equal(drafted(model.module, inputs, graph=graph), expected)
    mask = inputs["attention_mask"].bool()  # as `ids != pad` gives it
    as_bool = {**inputs, "attention_mask": mask}
    assert torch.equal(drafted(model.module, as_bool, graph=graph), expected)
    out = drafted(model.module, inputs, graph=graph, budget=2, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    ours = [generate(model, prompt, graph=graph, budget=2).stats for prompt in prompts]
    assert out.forwards.tolist() == [stats.nfe for stats in ours]
    assert out.positions_computed.tolist() == [stats.positions_computed for stats in ours]
    assert out.tokens_per_forward.tolist() == pytest.approx([8 / stats.nfe for stats in ours])
    native = copy.deepcopy(model.module)  # which nobody has seen yet
    assert DiffusionLM.of(native) is None
    told = {"graph": graph, "budget": 2, "mask_token_id": model.mask_token_id}
    assert torch.equal(drafted(native, inputs, **told), expected)


@pytest.mark.parametrize("name", ["llada-a", "sdar-a"])
def test_an_answer_of_no_whole_blocks_is_cut(name: str) -> None:
    model, inputs = parity_model(name), batch(parity_model(name), 6)
    whole = plainly(model, inputs["input_ids"][0])
    decoding = {"block_length": 4, "stop_at_eos": False}
    got = drafted(model.module, inputs, max_new_tokens=7, decoding=decoding)
    assert got[0, 6:].tolist() == whole[:7]


def test_rows_end_at_their_end_tokens_and_are_padded_on_the_right() -> None:
    model, inputs = parity_model("llada-a"), batch(parity_model("llada-a"), 5, 9)
    prompts = [random_prompt(model, length, seed=7) for length in (5, 9)]
    answers = [plainly(model, prompt) for prompt in prompts]
    end = answers[0][2]
    cut = [ids[: ids.index(end) + 1] if end in ids else ids for ids in answers]
    assert len(cut[0]) < len(cut[1])
    for options in (
        {"eos_token_id": end},
        {"generation_config": GenerationConfig(eos_token_id=[end, 1], max_new_tokens=8)},
    ):
        decoding = {"block_length": 4}
        out = drafted(model.module, inputs, decoding=decoding, **options)[:, 9:].tolist()
        assert out[1] == cut[1]
        assert out[0] == cut[0] + [PAD] * (len(cut[1]) - len(cut[0]))


def test_of_an_answer_no_states_are_kept_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model, output_of = parity_model("sdar-a"), call.output_of
    tasks: list[Task] = []

    def noting(rows: list[Row], *rest: Any) -> Any:
        tasks.extend(row.task for row in rows)
        return output_of(rows, *rest)

    monkeypatch.setattr(call, "output_of", noting)
    drafted(model.module, batch(model, 5, 9), decoding={"block_length": 4, "stop_at_eos": False})
    assert [len(task.path) for task in tasks] == [1, 1]
    assert all(task.stats.steps >= 8 for task in tasks)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_block_by_block() -> None:
    model, inputs = parity_model("sdar-a"), batch(parity_model("sdar-a"), 8)
    streamer, graph = Recorder(), a_graph_of(model, block_length=4, stop_at_eos=False)
    out = drafted(model.module, inputs, graph=graph, streamer=streamer)
    prompt, *blocks = streamer.got
    assert prompt == inputs["input_ids"][0].tolist()
    assert blocks == [out[0, 8:12].tolist(), out[0, 12:].tolist()]
    assert streamer.ended


class EndsWith(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: None, **_: Any) -> Tensor:
        return input_ids[:, -1] == self.token


def test_stopping_criteria_end_an_answer_where_they_would_token_by_token() -> None:
    model, inputs = parity_model("llada-a"), batch(parity_model("llada-a"), 6)
    whole = plainly(model, inputs["input_ids"][0])
    graph, streamer = a_graph_of(model, block_length=4, stop_at_eos=False), Recorder()
    for place in (1, 6):
        first = whole.index(whole[place])
        criteria = [EndsWith(whole[place])]
        out = drafted(
            model.module,
            inputs,
            graph=graph,
            stopping_criteria=criteria,
            streamer=streamer,
            return_dict_in_generate=True,
        )
        assert out.sequences[0, 6:].tolist() == whole[: first + 1]
        assert [*chain(*streamer.got[1:])] == whole[: first + 1]
        assert (out.steps.item() <= 4) == (first < 4)  # a block that is not needed is not decoded
        streamer = Recorder()
    assert drafted(model.module, inputs, graph=graph, max_time=0.0)[0, 6:].tolist() == whole[:4]


def test_what_is_drawn_follows_torchs_seed_or_the_one_given() -> None:
    model, inputs = parity_model("llada-a"), batch(parity_model("llada-a"), 6, 6)
    options: dict[str, Any] = {
        "graph": a_graph_of(model, block_length=4, stop_at_eos=False),
        "do_sample": True,
        "temperature": 1.5,
    }
    out = drafted(model.module, inputs, seed=11, **options)[:, 6:].tolist()
    for row, ids in enumerate(out):
        prompt = inputs["input_ids"][row]
        assert ids == plainly(model, prompt, temperature=1.5, seed=11, sequence=row)
    torch.manual_seed(5)
    first, second = (drafted(model.module, inputs, **options) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(drafted(model.module, inputs, **options), first)
    assert not torch.equal(first, second)


def test_filters_are_followed_and_transformers_own_default_is_not() -> None:
    model, inputs = parity_model("llada-a"), batch(parity_model("llada-a"), 6)
    graph = a_graph_of(model, block_length=4, stop_at_eos=False, temperature=0.3, top_p=0.4)
    drawn = {"do_sample": True, "temperature": 1.5, "seed": 11, "graph": graph}

    def expected(**filters: Any) -> list[int]:
        prompt = inputs["input_ids"][0]
        return plainly(model, prompt, temperature=1.5, seed=11, **filters)

    def got(**filters: Any) -> list[int]:
        ids: list[int] = drafted(model.module, inputs, **drawn, **filters)[0, 6:].tolist()
        return ids

    assert got(top_k=3, top_p=0.8) == expected(top_k=3, top_p=0.8)
    assert got(top_p=0.5) == expected(top_p=0.5) != expected()
    assert got() == got(top_k=0) == got(top_p=1.0) == got(top_k=50) == expected()
    fifty = {"block_length": 4, "stop_at_eos": False, "top_k": 50}
    assert got(decoding=fifty) == expected(top_k=50)


def test_a_top_p_that_filters_nothing_needs_no_sampling() -> None:
    model, inputs = parity_model("llada-a"), batch(parity_model("llada-a"), 6)
    settings = {"block_length": 4, "stop_at_eos": False}
    expected = drafted(model.module, inputs, decoding=settings)
    assert torch.equal(drafted(model.module, inputs, decoding={**settings, "top_p": 1.0}), expected)


def test_several_answers_of_a_prompt_are_drawn_each_by_its_number() -> None:
    model, inputs = parity_model("llada-a"), batch(parity_model("llada-a"), 5, 9)
    options = {"do_sample": True, "temperature": 1.5, "seed": 11, "num_return_sequences": 2}
    graph = a_graph_of(model, block_length=4, stop_at_eos=False)
    out = drafted(model.module, inputs, graph=graph, **options)
    assert torch.equal(out[:, :9], inputs["input_ids"].repeat_interleave(2, 0))
    prompts = [random_prompt(model, length, seed=7) for length in (5, 5, 9, 9)]
    expected = [
        plainly(model, prompt, temperature=1.5, seed=11, sequence=number)
        for number, prompt in enumerate(prompts)
    ]
    assert out[:, 9:].tolist() == expected
    assert expected[0] != expected[1]


def test_a_length_of_prompt_and_answer_may_be_given_instead() -> None:
    """The batch's longest prompt counts, as in transformers."""
    model, inputs = parity_model("llada-a"), batch(parity_model("llada-a"), 5, 9)
    decoding = {"block_length": 4, "stop_at_eos": False}
    expected = drafted(model.module, inputs, max_new_tokens=6, decoding=decoding)
    limits = {"max_new_tokens": None, "max_length": 15}
    assert torch.equal(drafted(model.module, inputs, decoding=decoding, **limits), expected)
    assert expected[1, 9:].tolist() == plainly(model, inputs["input_ids"][1])[:6]


NOTHING = "has no meaning for a denoising decode"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, f"generate: num_beams=2 {NOTHING}: drop it"),
    ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
    ({"do_sample": True, "min_p": 0.1}, "min_p=0.1"),
    ({"do_sample": True, "typical_p": 0.5}, "typical_p=0.5"),
    ({"do_sample": True, "top_p": 0.0}, "top_p: Input should be greater than 0"),
    ({"top_p": 0.5}, "top_p=0.5 needs do_sample=True"),
    ({"top_k": 5}, "top_k=5 needs do_sample=True"),
    ({"temperature": 0.7}, "temperature=0.7 needs do_sample=True"),
    ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
    ({"use_cache": False}, "give decoding={'cache': 'none'}"),
    ({"min_new_tokens": 4}, "min_new_tokens=4"),
    ({"prompt_lookup_num_tokens": 4}, "prompt_lookup_num_tokens=4"),
    ({"logits_processor": [TemperatureLogitsWarper(0.5)]}, "TemperatureLogitsWarper"),
    ({"prefix_allowed_tokens_fn": lambda *_: [1]}, "prefix_allowed_tokens_fn"),
    ({"generation_config": GenerationConfig(steps=3)}, "steps=3"),
    ({"position_ids": torch.arange(3, 9)[None]}, "position_ids must count from 0"),
    ({"token_type_ids": torch.ones(1, 6, dtype=torch.long)}, "token_type_ids"),
    ({"decoding": {"gen_length": 8}}, "give max_new_tokens="),
    ({"decoding": {"temperature": 1.0}}, "give do_sample=True and temperature="),
    ({"decoding": {"polcy": "static"}}, "polcy"),
    ({"decoding": {"block_length": "four"}}, "block_length"),
    ({"decoding": {"block_length": 0}}, "block_length"),
    ({"budget": 4}, "budget 4 counts drafts: give a graph"),
    ({"budget": 2.5}, "budget 2.5: give 'auto'"),
    ({"selection": "both"}, "selection 'both'"),
    ({"family": "sdar"}, "sdar is computed by"),
    ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, "row 0: padding must be on the left"),
    ({"attention_mask": torch.zeros(1, 6)}, "row 0: its attention_mask leaves no token"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_has_no_meaning_is_refused(options: dict[str, Any], said: str) -> None:
    model = parity_model("llada-a")
    inputs = {**batch(model, 6), **options}
    assert said in refusal(lambda: drafted(model.module, inputs))


def test_what_takes_several_rows_or_another_model_is_refused() -> None:
    model = parity_model("llada-a")
    inputs, module = batch(model, 5, 9), model.module
    assert "takes one row, the batch has 2" in refusal(
        lambda: drafted(module, inputs, streamer=Recorder())
    )
    assert "assistant_model" in refusal(lambda: drafted(module, inputs, assistant_model=module))
    apart = {"stopping_criteria": [EndsWith(1)], "pad_token_id": None, "eos_token_id": None}
    assert "nothing says what pads them" in refusal(lambda: drafted(module, inputs, **apart))
    other = a_graph_of(parity_model("dream-a"), block_length=4)
    assert "family dream" in refusal(lambda: drafted(module, inputs, graph=other))


def test_what_came_with_a_checkpoint_is_refused_only_if_it_changes_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = parity_model("llada-a")
    inputs, settings = batch(model, 6), model.module.generation_config
    expected = drafted(model.module, inputs)
    for name, value in (("top_p", 0.8), ("use_cache", False), ("steps", 128)):
        monkeypatch.setattr(settings, name, value, raising=False)
    assert torch.equal(drafted(model.module, inputs), expected)
    monkeypatch.setattr(settings, "repetition_penalty", 1.1)
    said = refusal(lambda: drafted(model.module, inputs))
    assert "repetition_penalty=1.1 (of the module's generation_config)" in said
    assert "give repetition_penalty=1.0" in said
    assert torch.equal(drafted(model.module, inputs, repetition_penalty=1.0), expected)


# ------------------------------------------------------------------------ which model a module is


def test_a_graph_of_another_model_is_taken_on_demand() -> None:
    model, inputs = parity_model("llada-a"), batch(parity_model("llada-a"), 6)
    graph = a_graph_of(model, block_length=4, stop_at_eos=False)
    other = of_another_model(graph, vocab_size=7)
    assert "vocabulary size 7" in refusal(lambda: drafted(model.module, inputs, graph=other))
    got = drafted(model.module, inputs, graph=other, any_model=True, budget=2)
    assert got[0, 6:].tolist() == plainly(model, inputs["input_ids"][0])


def native(folder: Path) -> Any:
    """A module that only transformers has seen."""
    config = Qwen3Config.from_pretrained(folder)
    module = Qwen3ForCausalLM.from_pretrained(folder, config=config, attn_implementation="sdpa")
    module.generation_config.do_sample = False
    module.config.model_type = "qwen3"  # SDAR's, and that of others
    return module


def test_a_native_module_is_of_the_graphs_family_or_the_one_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, module = parity_model("sdar-a"), native(PARITY / "sdar-a")
    inputs = batch(model, 6)
    graph = a_graph_of(model, block_length=4, stop_at_eos=False)
    expected = plainly(model, inputs["input_ids"][0])
    assert "may be of several families" in refusal(lambda: drafted(module, inputs))
    said = refusal(lambda: drafted(module, inputs, do_sample=True, min_p=0.1))
    assert "min_p=0.1" in said
    own = module.generation_config
    assert (own.temperature, own.top_k, own.top_p) == (0.6, 20, 0.95)
    sampled = drafted(module, inputs, graph=graph, do_sample=True, seed=3)
    assert sampled[0, 6:].tolist() == plainly(
        model, inputs["input_ids"][0], temperature=0.6, top_k=20, top_p=0.95, seed=3
    )
    assert drafted(module, inputs, graph=graph)[0, 6:].tolist() == expected
    decoding = {"block_length": 4, "stop_at_eos": False}
    assert drafted(module, inputs, decoding=decoding)[0, 6:].tolist() == expected  # known by now
    # Its tokenizer is not known: the graph of a model with one cannot be compared.
    record = graph.model.model_copy(update={"fingerprint": "m1-other", "id": "with a tokenizer"})
    other = graph.model_copy(update={"model": record})
    assert drafted(module, inputs, graph=other)[0, 6:].tolist() == expected
    assert "nothing tells whether the graph of with a tokenizer is of this very" in caplog.text
    small = record.model_copy(update={"vocab_size": 7})
    said = refusal(lambda: drafted(module, inputs, graph=graph.model_copy(update={"model": small})))
    assert "vocabulary size 7" in said


def test_the_mask_token_of_a_native_module_can_be_given() -> None:
    model, module = parity_model("sdar-a"), native(PARITY / "sdar-a")
    module.config.mask_token_id = None
    inputs, decoding = batch(model, 6), {"block_length": 4, "stop_at_eos": False}
    assert "mask_token_id" in refusal(lambda: drafted(module, inputs, family="sdar"))
    options = {"family": "sdar", "mask_token_id": model.mask_token_id, "decoding": decoding}
    out = drafted(module, inputs, **options)
    assert out[0, 6:].tolist() == plainly(model, inputs["input_ids"][0])
    assert wrap(module, None, "sdar", mask_token_id=9).mask_token_id == 9


def test_a_module_stays_known_without_its_model_and_learns_from_call_to_call() -> None:
    module = load_model(str(PARITY / "sdar-a"), device="cpu").module
    known = DiffusionLM.of(module)
    assert known is not None
    graph = a_graph_of(known, block_length=4, stop_at_eos=False)
    counted = []
    for _ in range(2):
        drafted(module, batch(known, 6), graph=graph)
        (budget,) = auto._known._kept[module].values()
        counted.append(budget.shared.current.forwards)
    assert counted[1] > counted[0] > 0
    before = len(auto._known._kept)
    del module, known, budget
    import gc

    gc.collect()
    assert len(auto._known._kept) < before


def test_importing_the_door_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "import spiffy.integrations; assert not hasattr(spiffy.integrations, 'nothing')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_beside_the_weights_decodes_with_its_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's trust in this folder is what transformers asks for; our code never asks for it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "m")])
    model, folder = load_model("tiny-sdar", device="cpu"), tmp_path / "weights"
    graph = a_graph_of(model, block_length=8, gen_length=48)
    for name, content in beside_weights(str(folder)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    graph.save(folder / "draft_graph.json")
    prompt = "Lily has 9 old pens and buys 2 new pens. How many pens are there now?"
    ids = model.encode(prompt)[None]
    expected = generate(model, prompt, gen_length=48)
    options: dict[str, Any] = {
        "inputs": ids,
        "custom_generate": str(folder),
        "trust_remote_code": True,
        "max_new_tokens": 48,
        "return_dict_in_generate": True,
        "streamer": (streamer := Recorder()),
    }
    out = model.module.generate(**options)
    answer = out.sequences[0, ids.shape[1] :].tolist()
    assert answer == expected.token_ids
    assert [*chain(*streamer.got[1:])] == answer
    assert out.forwards.item() <= expected.stats.nfe
    del options["streamer"]
    tokenizer = model.tokenizer
    out = model.module.generate(**options, tokenizer=tokenizer, stop_strings=["=<<"])
    text = tokenizer.decode(out.sequences[0, ids.shape[1] :])
    assert expected.text.startswith(text)
    assert text.endswith("=<<")
    criteria = [StopStringCriteria(tokenizer, ["=<<"])]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    same = drafted(model.module, inputs, max_new_tokens=48, stopping_criteria=criteria)
    assert torch.equal(same, out.sequences)
    assert "give tokenizer= too" in refusal(
        lambda: model.module.generate(**options, stop_strings=["=<<"])
    )


def test_another_mask_token_is_one_calls_alone() -> None:
    model = parity_model("llada-a")
    inputs, decoding = batch(model, 6), {"block_length": 4, "stop_at_eos": False}
    prompt, module = inputs["input_ids"][0], copy.deepcopy(model).module
    ends = DiffusionLM.of(module).eos_token_ids  # type: ignore[union-attr]
    other = wrap(copy.deepcopy(model.module), None, "llada", mask_token_id=5)
    out = drafted(module, inputs, mask_token_id=5, decoding=decoding)
    assert out[0, 6:].tolist() == plainly(other, prompt) != plainly(model, prompt)
    out = drafted(module, inputs, decoding=decoding)
    assert out[0, 6:].tolist() == plainly(model, prompt)
    assert DiffusionLM.of(module).eos_token_ids == ends != frozenset()  # type: ignore[union-attr]


def test_a_module_in_training_is_so_again_after_a_call() -> None:
    model = parity_model("llada-a")
    module, inputs = copy.deepcopy(model.module), batch(model, 6)
    module.train()
    module.model.layers[0].eval()  # such as a frozen part
    modes = [part.training for part in module.modules()]
    seen: list[bool] = []
    module.lm_head.register_forward_hook(lambda head, *_: seen.append(head.training))
    options = {"family": "llada", "mask_token_id": model.mask_token_id}
    for _ in range(2):  # not known, then known
        drafted(module, inputs, decoding={"block_length": 4}, **options)
        assert [part.training for part in module.modules()] == modes
    assert not any(seen)


def test_attention_that_was_refused_is_refused_again() -> None:
    def blind(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        return sdpa_attention_forward(module, q, k, v, None, **{**options, "is_causal": False})

    AttentionInterface.register("blind", blind)
    model = parity_model("llada-a")
    module, inputs = copy.deepcopy(model.module), batch(model, 6)
    module.set_attn_implementation("blind")
    options = {"family": "llada", "mask_token_id": model.mask_token_id}
    for _ in range(2):
        assert "does not keep to the mask" in refusal(lambda: drafted(module, inputs, **options))
    assert DiffusionLM.of(module) is None
    module.set_attn_implementation("sdpa")
    expected = drafted(model.module, inputs, decoding={"block_length": 4})
    got = drafted(module, inputs, decoding={"block_length": 4}, **options)
    assert torch.equal(got, expected)
    module.set_attn_implementation("blind")  # of a module that is known by now
    for _ in range(2):
        assert "does not keep to the mask" in refusal(lambda: drafted(module, inputs, **options))
    module.set_attn_implementation("eager")
    got = drafted(module, inputs, decoding={"block_length": 4}, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, "no row"),
        ({"attention_mask": torch.tensor([[0, 2, 2, 2, 2]])}, "other values than 0 and 1"),
        (
            {"attention_mask": torch.ones(1, 4)},
            "of shape [1, 4] does not fit input_ids of shape [1",
        ),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "attention_mask of shape [1, 4]"),
        (
            {"attention_mask": torch.ones(2, 5)},
            "of shape [2, 5] does not fit input_ids of shape [1",
        ),
        ({"position_ids": torch.arange(5)[None, None]}, "position_ids of shape [1, 1, 5]"),
        ({"graph": "llada.json"}, "graph of type str: give a DraftGraph"),
        ({"decoding": "threshold"}, "decoding='threshold': give settings by their names"),
        ({"decoding": {1: 2}}, "decoding={1: 2}"),
        ({"decoding": {"top_k": 5}}, "decoding: top_k filters what is drawn: give do_sample=True"),
        ({"budget": True}, "budget True"),
        ({"do_sample": True, "seed": "a"}, "seed 'a': give a whole number"),
        ({"mask_token_id": 320}, "mask_token_id 320 is not a token of 320"),
    ],
)
def test_what_is_no_such_thing_is_named(options: dict[str, Any], said: str) -> None:
    model = parity_model("llada-a")
    inputs = {"input_ids": random_prompt(model, 5)[None], **options}
    if "budget" in options:
        inputs["graph"] = a_graph_of(model, block_length=4)
    assert said in refusal(lambda: drafted(model.module, inputs))
