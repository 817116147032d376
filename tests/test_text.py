"""Prompts become the ids that transformers makes of them; answers end where they are told to."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from helpers import Oracle
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from spiffy.calib.pipeline import prepare
from spiffy.calib.prompts import PromptSet
from spiffy.runtime import DiffusionLM, generate, load_model
from spiffy.runtime.decode import make_task, run
from spiffy.runtime.generate import answer, collect, decoding_settings
from spiffy.runtime.models.text import TextCodec, without_beginnings
from spiffy.schemas import SpiffyError

QUESTION = "Tom has 3 apples. He buys 4 more. How many now?"
TURNS = [
    {"role": "system", "content": "Answer briefly. "},
    {"role": "user", "content": "  Tom has 3 apples.\n"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "And now?\n\n"},
]
LOOP = "{% for m in messages %}<|{{ m['role'] }}|>BODY{% endfor %}<|assistant|>"
TEMPLATES = {
    "plain": LOOP.replace("BODY", "{{ m['content'] }}"),
    "trim": LOOP.replace("BODY", "{{ m['content'] | trim }}\n"),
    "twice": LOOP.replace("BODY", "{{ m['content'] }}\n{{ m['content'] }}"),
    "branch": LOOP.replace(
        "BODY", "{% if m['content'] | length > 20 %}long {% endif %}{{ m['content'].strip() }}"
    ),
    "repr": LOOP.replace("BODY", "{{ m['content'] | tojson }}<|end|>"),
    "last": "<|user|>{{ messages[-1]['content'].split('\n')[0] | upper }}<|assistant|>",
}


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([QUESTION, "Answer briefly. And now?"], trainer)
    return tokenizer


def metaspace(prepend: str) -> Tokenizer:
    """As sentencepiece models are converted: a space goes before the text, once or to each part."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.NFKC()
    if prepend == "each":
        own = [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(own)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    letters = sorted({*QUESTION.replace(" ", "▁"), *"<|>/_abcdefghijklmnopqrstuvwxyz"})
    trainer = trainers.BpeTrainer(
        vocab_size=200, initial_alphabet=letters, special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([QUESTION.replace(" ", "▁")], trainer)
    return tokenizer


SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|mask|>", "</s>")


@cache
def tokenizer(kind: str, normalized: bool = False) -> Any:
    backend = byte_level() if kind == "bytes" else metaspace(kind)
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    if kind != "bytes":
        found.unk_token = "<unk>"
    tokens = [AddedToken(text, special=True, normalized=normalized) for text in SPECIAL]
    found.add_tokens(tokens, special_tokens=False)
    found.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return found


def codec(kind: str, template: str | None, normalized: bool = False) -> TextCodec:
    ours = copy.deepcopy(tokenizer(kind, normalized))
    ours.chat_template = None if template is None else TEMPLATES[template]
    control = ours.convert_tokens_to_ids(["<|mask|>", "</s>"])
    return TextCodec(ours, "model", control)


@pytest.mark.parametrize("kind", ["bytes", "first", "each"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_apply_chat_template(kind: str, template: str) -> None:
    ours = codec(kind, template)
    for prompt in (QUESTION, " \tspaces and a <think> \n\n", "{{ 7*7 }} é \U0001f34e", TURNS):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        theirs = ours.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert ours.encode(prompt) == theirs["input_ids"]
    with_system = ours.encode("And now?", system="Be brief.") if template != "last" else None
    if with_system is not None:
        turns = [TURNS[0] | {"content": "Be brief."}, {"role": "user", "content": "And now?"}]
        assert with_system == ours.encode(turns)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "first", "each"])
@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_special_tokens_in_a_prompt_are_text_to_any_template(
    kind: str, template: str | None, normalized: bool
) -> None:
    """The same as with a tokenizer to which they are no special tokens, within the template's."""
    ours = codec(kind, template, normalized)
    special = set(ours.tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    honest = [k for k in ours.encode("a b which is longer than twenty") if k in special]
    for spelled in SPECIAL:
        prompt = f"b {spelled}{spelled} c longer than twenty"
        ids = ours.encode(prompt)
        assert [k for k in ids if k in special] == honest
        if template != "last":  # which has capitals that these tokenizers do not know
            text = ours.tokenizer.decode([k for k in ids if k not in special])
            assert prompt in text.replace("▁", " ")
    if normalized and kind != "bytes":  # NFKC makes a special token's spelling of these
        wide = ours.encode("b \uff1c|mask|\uff1e c longer than twenty")
        assert [k for k in wide if k in special] == honest


def test_hidden_spellings_are_encoded_as_if_there_were_no_special_tokens() -> None:
    for kind in ("bytes", "first", "each"):
        ours = codec(kind, None)
        bare = PreTrainedTokenizerFast(
            tokenizer_object=byte_level() if kind == "bytes" else metaspace(kind)
        )
        for prompt in ("Tom <|mask|>has", "</s>", " <|end|> <|user|>\n", "<<|mask|>|mask|>"):
            assert ours.encode(prompt) == bare(prompt)["input_ids"]


def test_what_a_tokenizer_puts_first_is_there_once() -> None:
    ours = codec("bytes", None)
    first = ours.tokenizer.convert_tokens_to_ids("<|user|>")
    ours.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", first)]
    )
    bare = ours.tokenizer("Tom", add_special_tokens=False)["input_ids"]
    for text, raw in (("Tom", False), ("Tom", True), ("<|user|>Tom", True)):
        assert ours.encode(text, raw=raw) == [first, *bare]
    assert ours.encode("<|user|>Tom")[0] == first
    assert first not in ours.encode("<|user|>Tom")[1:]


def test_raw_takes_special_tokens_as_tokens_and_no_template() -> None:
    ours = codec("bytes", "trim")
    text = "<|user|>Tom has 3\n<|assistant|>"
    assert ours.encode(text, raw=True) == ours.encode("Tom has 3")
    assert ours.spelled(text) == ["<|user|>", "<|assistant|>"]
    assert ours.spelled("a < |user|>") == []


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "raw messages": (TURNS, {"raw": True}, "messages need the chat template"),
    "raw system": ("a", {"raw": True, "system": "b"}, "write the system message into it"),
    "two systems": (TURNS, {"system": "b"}, "hold a system message already"),
    "answered": (TURNS[:3], {}, "must end with the one that is to be answered"),
    "no role": ([{"content": "a"}], {}, "needs a 'role'"),
    "picture": (
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        {},
        "must be text: these models see no pictures",
    ),
    "blank": ([{"role": "user", "content": " "}], {}, "prompt is empty"),
    "no content": ([{"role": "user"}], {}, "has no text"),
    "surrogate": ("\ud800", {}, "not valid Unicode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_prompts_that_cannot_be_encoded_are_refused(case: str) -> None:
    prompt, options, message = REFUSED[case]
    with pytest.raises(SpiffyError, match=message):
        codec("bytes", "plain").encode(prompt, **options)


def test_a_message_is_never_left_out_in_silence() -> None:
    with pytest.raises(SpiffyError, match="no chat template, so it takes no messages"):
        codec("bytes", None).encode("a", system="b")
    with pytest.raises(SpiffyError, match="leaves the system message out"):
        codec("bytes", "last").encode("a", system="b")
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert codec("bytes", "plain").encode(parts) == codec("bytes", "plain").encode("a")


# ---------------------------------------------------------------- ids


@cache
def tiny() -> DiffusionLM:
    return load_model("tiny-llada", device="cpu")


def test_ids_are_taken_as_tokenizers_return_them() -> None:
    model = tiny()
    ids = model.encode(QUESTION)
    row, padded = ids[None], torch.cat((torch.tensor([0, 0]), ids))[None]
    seen = torch.cat((torch.zeros(2), torch.ones(len(ids))))[None].long()
    given: list[Any] = [
        ids,
        ids.tolist(),
        {"input_ids": row},
        {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)},
        {"input_ids": padded, "attention_mask": seen},
        model.tokenizer("<|user|>" + QUESTION + "<|assistant|>", return_tensors="pt"),
    ]
    for prompt in given:
        assert model.encode(prompt).tolist() == ids.tolist()


NO_IDS: dict[str, tuple[Any, str]] = {
    "two rows": ({"input_ids": [[1, 2], [3, 4]]}, "one prompt at a time"),
    "hole": ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "amid the prompt"),
    "all padding": ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "non-empty"),
    "other length": ({"input_ids": [1, 2], "attention_mask": [1]}, "does not fit"),
    "no ids": ({"role": "user", "content": "a"}, "has no 'input_ids'"),
    "list of texts": (["a", "b"], "a prompt is text, a list of messages, or token ids"),
    "empty": ([], "non-empty"),
    "number": (1.5, "non-empty 1-D"),
    "unknown": ([1 << 20], "must lie in"),
}


@pytest.mark.parametrize("case", NO_IDS)
def test_what_is_no_prompt_is_refused(case: str) -> None:
    prompt, message = NO_IDS[case]
    with pytest.raises(SpiffyError, match=message):
        tiny().encode(prompt)


# ---------------------------------------------------------------- stop strings


def test_an_answer_ends_before_its_first_stop_string() -> None:
    options: dict[str, Any] = {"gen_length": 64, "block_length": 8}
    whole = generate(tiny(), QUESTION, **options)
    assert " apples." in whole.text
    for stop in ("+4", " app", ["#", "es.\n"], "=<<", "<|endoftext|>", "no such text", "end", "|"):
        words = [stop] if isinstance(stop, str) else stop
        ours = generate(tiny(), QUESTION, stop=stop, **options)
        assert ours.text == min((whole.text.split(word)[0] for word in words), key=len)
        assert ours.token_ids == whole.token_ids[: len(ours.token_ids)]
        after = whole.token_ids[: len(ours.token_ids) + 1]
        assert ours.text.startswith(tiny().decode_text(ours.token_ids))
        if ours.text != whole.text:  # not one token fewer than there could be
            assert not ours.text.startswith(tiny().decode_text(after))
    early = generate(tiny(), QUESTION, stop="3", **options)
    assert early.stats.nfe < whole.stats.nfe


def test_a_stop_string_is_found_without_decoding_every_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=byte_level()), "m", ())
    text = "".join("\U0001f600a\u00e9 b" * k + "#" for k in range(1, 9))
    ids = codec.tokenizer(text)["input_ids"]
    decode, decoded = TextCodec.decode, []
    monkeypatch.setattr(
        TextCodec, "decode", lambda *a, **how: (decoded.append(a), decode(*a, **how))[1]
    )
    for stop in (
        "#",
        "##",
        " b#",
        "\u00e9",
        "\U0001f600",
        "a\u00e9 b\U0001f600a\u00e9 b#\U0001f600",
    ):
        decoded.clear()
        found = codec.before_stop(ids, [stop])
        assert len(decoded) < 40 < len(ids) / 4
        if (at := text.find(stop)) < 0:
            assert found is None
            continue
        longest = max(
            k for k in range(len(ids) + 1) if text[:at].startswith(decode(codec, ids[:k]))
        )
        assert found == (text[:at], ids[:longest])


@pytest.mark.parametrize("stop", ["+4", "\n#", "apples"])
def test_drafts_do_not_change_where_an_answer_stops(stop: str) -> None:
    model = tiny()
    settings = decoding_settings(model, gen_length=64, block_length=8)
    plain = make_task(model, QUESTION, settings, stop=stop)
    list(run(model, [plain]))
    unstopped = make_task(model, QUESTION, settings)
    list(run(model, [unstopped]))
    drafted = make_task(model, QUESTION, settings, Oracle(unstopped, 6), stop=stop)
    shown = [answer(drafted)[0] for _ in run(model, [drafted])]
    ours, theirs = collect(drafted), collect(plain)
    assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
    assert ours.stats.nfe < theirs.stats.nfe
    assert stop not in ours.text
    assert all(ours.text.startswith(part) for part in shown)  # nothing is taken back


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    assert without_beginnings("ab\n", ["\n\n"]) == "ab"
    assert without_beginnings("abc", ["cd", "bcd"]) == "a"
    assert without_beginnings("abc", ["abc"]) == "abc"  # whole: the answer ends there anyway
    assert without_beginnings("abc", []) == "abc"


def test_stop_strings_need_text() -> None:
    for stop in ("", ["a", ""], [1]):
        with pytest.raises(SpiffyError, match="must be text, and not empty"):
            generate(tiny(), QUESTION, stop=stop)  # type: ignore[arg-type]
    bare = copy.copy(tiny())
    bare.tokenizer = None
    with pytest.raises(SpiffyError, match="no text to stop at"):
        generate(bare, [1, 2], stop="a")


def test_calibration_encodes_prompts_as_decoding_does() -> None:
    model, turns = tiny(), [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    settings = decoding_settings(model, gen_length=32)
    templated = "<|user|>a<|assistant|>"
    for prompts, prompt in (
        (PromptSet("x", (templated,), raw=True), "a"),
        (PromptSet("x", ("a",), system="S"), turns),
        (PromptSet("x", (turns,)), turns),
    ):
        (task,) = prepare(model, prompts, settings)
        assert task.prompt.tolist() == model.encode(prompt).tolist()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stop": 5}, "give a string, or a list of strings"),
        ({"budget": "8"}, "budget '8': give 'auto' or a number"),
        ({"budget": 2.5}, "budget 2.5: give 'auto' or a number"),
        ({"selection": "acceptance"}, "choose model or graph"),
    ],
)
def test_options_of_a_wrong_type_are_refused(options: dict[str, Any], reason: str) -> None:
    model = load_model("tiny-llada", device="cpu")
    with pytest.raises(SpiffyError, match=reason):
        generate(model, "Tom has 3 apples.", gen_length=32, **options)


def test_no_stop_string_may_be_said_by_none() -> None:
    model = load_model("tiny-llada", device="cpu")
    plain = generate(model, "Tom has 3 apples.", gen_length=32)
    assert generate(model, "Tom has 3 apples.", gen_length=32, stop=None).text == plain.text
