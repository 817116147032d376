"""Many prompts, and one piece by piece, in Python: what `generate` gives, and bad input refused."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chain_graph, parity_model, random_prompt, refusal, shown

from spiffy.runtime import (
    DiffusionLM,
    Stream,
    decoding_settings,
    generate,
    generate_many,
    load_model,
    stream,
)
from spiffy.runtime.decode import Task, denoise, driver, make_task
from spiffy.runtime.decode.loop import Decoding
from spiffy.runtime.generate import TaskMaker, in_order, settled
from spiffy.runtime.models.slots import Slots
from spiffy.runtime.step.canvas import Cursor
from spiffy.runtime.streaming import NewText

PROMPTS = [f"Tom has {k} apples. He buys 4 more. How many now?" for k in (1, 2, 3)]
SETTINGS: dict[str, Any] = {"gen_length": 8, "block_length": 4, "cache": "dual"}


class Forwards:
    """Counts forwards, and lets none be made where it is told so."""

    def __init__(self) -> None:
        self.made, self.forbidden, self.forward = 0, False, driver.forward

    def __call__(self, *args: Any) -> Any:
        assert not self.forbidden
        self.made += 1
        return self.forward(*args)


def _rest(made: Decoding, rows: Any) -> Decoding:
    """What a decode goes on with, from rows that it has yielded."""
    while True:
        outputs = yield rows
        try:
            rows = made.send(outputs)
        except StopIteration:
            return


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    counted = Forwards()
    monkeypatch.setattr(driver, "forward", counted)
    return counted


def test_all_options_of_generate_hold_for_many_prompts_and_streams() -> None:
    one, many = (inspect.signature(of).parameters for of in (generate, TaskMaker.__init__))
    assert {n: p.default for n, p in one.items() if n not in ("model", "prompt")} == {
        n: p.default for n, p in many.items() if n not in ("self", "model")
    }


@pytest.mark.parametrize(("drafts", "temperature"), [("none", 0.7), ("auto", 0.0), (2, 0.7)])
def test_many_prompts_come_in_order_as_generate_decodes_each(
    drafts: Any, temperature: float, forwards: Forwards
) -> None:
    model = load_model("tiny-llada", device="cpu", dtype="float64")
    options = {**SETTINGS, "temperature": temperature, "seed": 3}
    if drafts != "none":
        graph = chain_graph("tiny-llada", **SETTINGS)
        options |= {"graph": graph, "budget": drafts, "temperature": temperature}
    prompts = [PROMPTS[0], [{"role": "user", "content": PROMPTS[1]}], model.encode(PROMPTS[2])]
    alone = [
        generate(model, prompt, sequence=5 + number, **options)
        for number, prompt in enumerate(prompts)
    ]
    forwards.made = 0
    together = list(generate_many(model, iter(prompts), batch_size=2, sequence=5, **options))
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    assert [out.text for out in together] == [out.text for out in alone]
    assert forwards.made < sum(out.stats.nfe for out in together)
    if drafts == 2:
        assert sum(out.stats.accepted for out in together) > 0


def test_who_finishes_later_is_waited_for_and_others_join_meanwhile(forwards: Forwards) -> None:
    """With `stop_at_eos` answers are of different lengths; forwards are no more than needed."""
    model = parity_model("llada-a", "float64")
    whole = generate(model, random_prompt(model, 5), gen_length=16, block_length=4)
    model = model.replaced(eos_token_ids=frozenset(whole.token_ids[:1]))
    prompts = [random_prompt(model, length) for length in (7, 5, 9)]
    options: dict[str, Any] = {"gen_length": 16, "block_length": 4, "trace": True}
    alone = [generate(model, prompt, **options) for prompt in prompts]
    short, long = alone[1], alone[0]
    assert short.stats.nfe < long.stats.nfe
    forwards.made = 0
    outputs = generate_many(model, prompts, batch_size=2, **options)
    assert forwards.made == 0
    assert next(outputs).states == long.states
    assert forwards.made == long.stats.nfe  # the second one has come, too, and the third has joined
    assert [out.states for out in outputs] == [out.states for out in alone[1:]]
    assert list(in_order("abc", [("b", 2), ("c", 3), ("a", 1)])) == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("no more of it"), "no more of it"), (MemoryError(), "MemoryError")],
)
def test_a_prompt_that_fails_amid_its_decode_is_named_after_the_outputs_before_it(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is done when it does not fit; the first, which is longer, still comes.

    Until its turn comes, the error holds no frame of the forward.
    """
    model = parity_model("llada-a", "float64")
    prompts = [random_prompt(model, length) for length in (9, 7, 5)]
    options: dict[str, Any] = {"gen_length": 16, "block_length": 4}
    alone = [generate(model, prompt, **options) for prompt in prompts]

    def failing(task: Task, kv: Slots | None = None) -> Decoding:
        made = denoise(task, kv)
        rows = next(made)
        for _ in range(2):
            outputs = yield rows
            if task.sequence == 1:
                raise error
            rows = made.send(outputs)
        yield from _rest(made, rows)

    monkeypatch.setattr(driver, "denoise", failing)
    outputs = generate_many(model, prompts, batch_size=3, **options)
    assert next(outputs).token_ids == alone[0].token_ids
    assert error.__traceback__ is None
    assert refusal(lambda: next(outputs)) == f"prompt 1: {reason}"


def test_no_prompts_have_no_outputs() -> None:
    assert list(generate_many(parity_model("llada-a"), [])) == []


@pytest.mark.parametrize(
    ("act", "message"),
    {
        "a text": (lambda m: generate_many(m, PROMPTS[0]), "prompts of type str: give a list"),
        "a tokenizer's": (lambda m: generate_many(m, {"input_ids": [[1]]}), "of type dict: give"),
        "nothing": (lambda m: generate_many(m, None), "prompts of type NoneType: give a list"),
        "empty": (lambda m: generate_many(m, [PROMPTS[0], " "]), "prompt 1: the prompt is empty"),
        "foreign": (
            lambda m: generate_many(m, [[5], [10**9]]),
            "prompt 1: prompt ids must lie",
        ),
        "long": (
            lambda m: generate_many(m, [PROMPTS[0], "a " * 999]),
            "prompt 1: prompt of .* tok",
        ),
        "no batch": (lambda m: generate_many(m, PROMPTS, batch_size=0), "batch size 0: at least 1"),
        "half": (lambda m: generate_many(m, PROMPTS, batch_size=1.5), "batch size 1.5: at least"),
        "budget": (lambda m: generate_many(m, PROMPTS, budget=8), "budget 8 counts drafts"),
        "no budget": (
            lambda m: generate_many(m, PROMPTS, graph=chain_graph("tiny-llada"), budget=0),
            "^budget 0: must be at least 1",
        ),
        "stop": (lambda m: generate_many(m, PROMPTS, stop=[""]), "^stop \\[''\\]: every stop"),
        "sequence": (lambda m: generate_many(m, PROMPTS, sequence=0.5), "^sequence 0.5: give a"),
        "option": (lambda m: stream(m, PROMPTS[0], gen_lenght=8), "gen_lenght"),
        "prompt": (lambda m: stream(m, " "), "^the prompt is empty"),
    }.values(),
)
def test_bad_prompts_and_options_are_refused_before_a_forward(
    act: Callable[[Any], object], message: str, forwards: Forwards
) -> None:
    forwards.forbidden = True
    model = load_model("tiny-llada", device="cpu")
    assert re.search(message, refusal(lambda: act(model)))


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("stop", [(), "apple"])
def test_a_stream_is_the_text_of_generate_block_by_block(
    drafted: bool, stop: Any, forwards: Forwards
) -> None:
    model = load_model("tiny-llada", device="cpu")
    options: dict[str, Any] = {"cache": "dual", "gen_length": 24, "block_length": 8, "stop": stop}
    options["trace"] = True
    whole = generate(model, PROMPTS[0], **options)
    assert ("apple" in whole.text) is not bool(stop)
    if drafted:
        options |= {"graph": chain_graph("tiny-llada", **SETTINGS), "budget": 2}
    forwards.made = 0
    pieces = stream(model, PROMPTS[0], **options)
    assert isinstance(pieces, Iterator)
    assert forwards.made == 0
    found = [next(pieces)]
    first = forwards.made
    assert "not whole yet" in refusal(lambda: pieces.output)
    found += pieces
    assert 0 < first < forwards.made == pieces.output.stats.nfe
    assert len(found) > 1
    assert all(found)
    assert "".join(found) == pieces.output.text == whole.text
    assert pieces.output.token_ids == whole.token_ids
    assert pieces.output.states == whole.states
    assert pieces.output.stats.steps == whole.stats.steps
    assert list(pieces) == []


@pytest.mark.parametrize("stop", [(), ("ab", "é日")])
def test_new_text_is_that_of_all_blocks_so_far_though_only_the_last_are_decoded(
    stop: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rng = load_model("tiny-llada", device="cpu"), random.Random(0)
    spelled = model.codec.tokenizer("né 日本 a \U0001f600 b", add_special_tokens=False)["input_ids"]
    special = {model.mask_token_id, *model.eos_token_ids, *model.codec.tokenizer.all_special_ids}
    others = [token for token in range(model.vocab_size) if token not in special]
    lengths: list[int] = []

    def decode_text(ids: list[int]) -> str:
        lengths.append(len(ids))
        return model.codec.decode(ids)

    for _ in range(4):
        settings = decoding_settings(model, gen_length=400, block_length=4, cache="dual")
        task = make_task(model, torch.tensor([5, 6]), settings, stop=stop)
        cursor, new, told = task.canvas.start(task.prompt, model.mask_token_id), NewText(task), ""
        for block in range(task.canvas.blocks):
            span = task.canvas.span(block)
            drawn = [rng.choice(rng.choice((spelled, others))) for _ in span]
            cursor.ids[span.start : span.stop] = torch.tensor(drawn)
            ids = cursor.ids[2 : span.stop].tolist()
            stops = bool(stop) and model.codec.before_stop(ids, stop) is not None
            finished = stops or block + 1 == task.canvas.blocks
            task.path[:] = [Cursor(cursor.ids, block + 1, finished=finished)]
            with monkeypatch.context() as patch:
                patch.setattr(model, "decode_text", decode_text)
                told += new.more()
            if finished:
                break
            whole = settled(model.codec.decode(ids), stop)
            assert told == whole if len(told) <= len(whole) else told.startswith(whole)
            assert max(lengths) <= 2 * 64 + 4
        lengths.clear()
        cut = model.codec.before_stop(ids, stop) if stop else None
        assert told == (model.codec.decode(ids) if cut is None else cut[0])


def told_block_by_block(model: DiffusionLM, ids: list[int], stop: tuple[str, ...] = ()) -> str:
    """What `NewText` tells of an answer; of its last block nothing is finished."""
    settings = decoding_settings(
        model, gen_length=len(ids), block_length=4, cache="dual", stop_at_eos=False
    )
    task = make_task(model, torch.tensor([5, 6]), settings, stop=stop)
    cursor, new = task.canvas.start(task.prompt, model.mask_token_id), NewText(task)
    cursor.ids[2:] = torch.tensor(ids)
    told = ""
    for block in range(1, task.canvas.blocks):
        task.path[:] = [Cursor(cursor.ids, block)]
        told += new.more()
    task.path[:] = [Cursor(cursor.ids, task.canvas.blocks, finished=True)]
    return told + new.more()


def test_many_tokens_without_text_do_not_hide_where_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a tokenizer that leaves out the space in front of all."""
    model = load_model("tiny-llada", device="cpu")

    def spelled(ids: list[int]) -> str:
        return "".join(f" w{k}" for k in ids if k < 90).removeprefix(" ")

    monkeypatch.setattr(model, "decode_text", spelled)
    ids = [1, 2, 3, 4, *[99] * 200, 5, 6, 7, 8, 9, 10, 11, 12]
    assert told_block_by_block(model, ids) == spelled(ids)


def test_nothing_is_told_behind_a_stop_string_with_special_tokens_amid_it() -> None:
    """Where they are so many that decoding goes on behind it."""
    model = load_model("tiny-llada", device="cpu")
    a, b = (model.codec.tokenizer(c, add_special_tokens=False)["input_ids"] for c in ("9", "+"))
    (special,) = {*model.eos_token_ids}
    ids = [*a, *b, *a, *[special] * 60, *b, *a, *a, *a, *a]
    assert model.codec.decode(ids) == "9+9+9999"
    assert told_block_by_block(model, ids, ("9+9+",)) == ""
    assert told_block_by_block(model, ids, ("+99",)) == "9+9"


def test_a_model_without_text_has_none_to_stream() -> None:
    model = load_model("tiny-llada", device="cpu").replaced(tokenizer=None)
    assert "no text to stream" in refusal(lambda: stream(model, [5]))
    assert "no text to stop at" in refusal(lambda: generate_many(model, [[5]], stop="x"))


def test_a_stream_that_fails_ends_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("tiny-llada", device="cpu")
    monkeypatch.setattr(model, "hidden_states", lambda *_: torch.full((1,), torch.nan).fail())
    pieces = stream(model, PROMPTS[0], **SETTINGS)
    assert type(pieces) is Stream
    with pytest.raises(AttributeError, match="fail"):
        next(pieces)
    assert "not whole yet" in refusal(lambda: pieces.output)


def test_the_python_of_the_page_on_integrations_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chain_graph("tiny-llada", 2, gen_length=32, cache="dual").save(tmp_path / "llada.json")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for line in ("for prompt, output in", "pieces = stream"):
        exec(compile(shown("docs/integrations.md", line), "integrations.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert [f"#### {k + 2}" in printed for k in scope["have"]] == [True] * len(scope["have"])
    assert scope["pieces"].output.text in printed
