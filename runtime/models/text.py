"""From prompts to token ids, as transformers encodes them, and from ids back to text."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, TypeGuard

import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor

from spiffy.schemas import SpiffyError
from spiffy.schemas.io import is_unicode

Message = Mapping[str, Any]  # `role` and `content`, as chat templates take them
Prompt = str | Sequence[Message] | Tensor | Sequence[int] | Mapping[str, Any]

_Render = Callable[[Sequence[Message]], str]

# Stand for the first characters of spelled special tokens while a template sees them: private-use
# characters, which no template trims, cases or splits, one for each.
_STAND_INS = (0xF_8000, 0x10_8000)


_SPELLING = 8  # tokens that one character may take


class TextCodec:
    """A checkpoint's tokenizer and chat template.

    Special tokens come from the template and from the tokenizer, never from what a prompt spells:
    in a prompt they are text, except with `raw`.

    Parameters
    ----------
    tokenizer
        A fast tokenizer of transformers.
    name
        Of the model, for messages.
    control
        Token ids that text must not turn into, beside those that the tokenizer declares special:
        the mask, and what ends an answer.
    """

    def __init__(self, tokenizer: Any, name: str, control: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._given = frozenset(control)
        self._plain_tokenizers: dict[int, Tokenizer] = {}  # by plane

    def encode(
        self, prompt: str | Sequence[Message], *, raw: bool = False, system: str | None = None
    ) -> list[int]:
        """Token ids of a prompt, ready for the answer to follow.

        Parameters
        ----------
        prompt
            A user's message, or a conversation that ends with one. They equal transformers'
            `apply_chat_template(messages, add_generation_prompt=True)` where they spell no special
            token.
        raw
            The text is all there is: no template, and special tokens that it spells are tokens.
        system
            System message to put in front.

        Raises
        ------
        SpiffyError
            If the prompt is empty or not Unicode, or the template fails, is missing, or leaves the
            message out.
        """
        if raw:
            return self._raw(prompt, system)
        messages = _conversation(prompt, system)
        if self._has_template:
            last = len(messages) - 1
            return self._tokens(self._rendered, messages, {last} if system is None else {0, last})
        if len(messages) > 1 or not isinstance(prompt, str):
            raise SpiffyError(
                f"{self.name} has no chat template, so it takes no messages and no system message: "
                "give text"
            )
        return self._tokens(lambda messages: str(messages[0]["content"]), messages, {0})

    def spelled(self, prompt: str | Sequence[Message]) -> list[str]:
        """Special tokens that a prompt spells, each once, in the order in which they come."""
        texts = [prompt] if isinstance(prompt, str) else _texts(prompt)
        spelling = self._spelling(texts)
        found = [match[1] for text in texts for match in spelling.finditer(text)]
        return list(dict.fromkeys(found))

    def decode(self, token_ids: Sequence[int], *, with_special: bool = False) -> str:
        """Text of token ids; special tokens, however they are declared, are left out."""
        if with_special:
            return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))
        kept = [token_id for token_id in token_ids if token_id not in self._given]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def before_stop(
        self, token_ids: Sequence[int], stop: Sequence[str]
    ) -> tuple[str, list[int]] | None:
        """Text and ids of an answer in front of the first stop string in it; None: there is none.

        The ids are those whose text ends there or earlier; the text ends right there, also where
        that is within a token. Special tokens are looked for too, if a stop string spells one.
        """
        found, spelling = [], [word for word in stop if self.spelled(word)]
        for with_special, words in ((False, stop), (True, spelling)):
            text = self.decode(token_ids, with_special=with_special)
            at = min((k for word in words if (k := text.find(word)) >= 0), default=None)
            if at is None:
                continue
            ids, start = self._within(token_ids, text[:at], with_special)
            found.append((len(ids), self.decode(ids) + text[len(start) : at], ids))
        if not found:
            return None
        _, shown, ids = min(found)
        return shown, ids

    def _within(
        self, token_ids: Sequence[int], text: str, with_special: bool
    ) -> tuple[list[int], str]:
        """As many of the first ids as spell a beginning of the text, and that beginning."""

        def spelled(count: int) -> str:
            return self.decode(token_ids[:count], with_special=with_special)

        # Text grows with the tokens, but for characters that several of them spell; to decode it
        # for every number of them would hold up whoever shares the thread.
        counts = range(len(token_ids) + 1)
        longer = bisect_right(counts, len(text), key=lambda count: len(spelled(count)))
        for count in reversed(counts[: longer + _SPELLING]):
            if text.startswith(start := spelled(count)):
                break
        return list(token_ids[:count]), start

    def _raw(self, prompt: str | Sequence[Message], system: str | None) -> list[int]:
        if not isinstance(prompt, str):
            raise SpiffyError("messages need the chat template: give text, or drop raw")
        if system is not None:
            raise SpiffyError("raw takes the prompt as it is: write the system message into it")
        _check_text(prompt)
        ids = list(self.tokenizer(prompt)["input_ids"])
        bare = list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        first = next((k for k in range(len(ids)) if ids[k : k + len(bare)] == bare), 0)
        # A prompt that spells the first token has it already.
        return ids[first:] if first and bare[:first] == ids[:first] else ids

    def _rendered(self, messages: Sequence[Message]) -> str:
        """What the chat template makes of a conversation."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, tokenize=False
                )
            )
        except Exception as error:  # a template is a program that came with the checkpoint
            raise SpiffyError(f"{self.name}: its chat template fails: {error}") from None

    def _tokens(self, render: _Render, messages: Sequence[Message], shown: Set[int]) -> list[int]:
        """Ids of a rendered conversation, what it spells of special tokens as plain text."""
        spelled = self.spelled(messages)
        if not spelled and not self._matches_normalized:
            text = render(messages)
            self._check_whole(render, messages, text, shown)
            ids = list(self.tokenizer(text, add_special_tokens=not self._has_template)["input_ids"])
        else:
            ids = self._escaped_tokens(render, messages, shown)
        if self._unmarked.isdisjoint(ids):
            return ids
        for text in _texts(messages):
            alone = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not self._unmarked.isdisjoint(alone):
                raise self._cannot_escape()
        return ids

    def _escaped_tokens(
        self, render: _Render, messages: Sequence[Message], shown: Set[int]
    ) -> list[int]:
        texts = _texts(messages)
        planes = [p for p in _STAND_INS if not any(p <= ord(c) < p + 0x400 for c in "".join(texts))]
        if not planes or self._backend is None:
            raise self._cannot_escape()
        plane, spelling = planes[0], self._spelling(texts)
        stands = {char: chr(plane + k) for k, char in enumerate(self._first_characters)}

        def escape(text: str) -> str:
            return spelling.sub(lambda match: stands[match[1][0]], text)

        def escaped(part: Any) -> Any:
            if isinstance(part, str):
                return escape(part)
            if isinstance(part, Mapping):
                return {key: escaped(value) for key, value in part.items()}
            return [*map(escaped, part)] if isinstance(part, list) else part

        safe = [escaped(dict(message)) for message in messages]
        text = render(safe)
        self._check_whole(render, safe, text, shown)
        found = self._plain_tokenizer(plane).encode(text, add_special_tokens=not self._has_template)
        for token_id, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if token_id in self._control and not set(stands.values()).isdisjoint(text[start:stop]):
                raise self._cannot_escape()
        return list(found.ids)

    def _check_whole(
        self, render: _Render, messages: Sequence[Message], text: str, shown: Set[int]
    ) -> None:
        """Refuse a template that leaves out one of the messages that are to be shown."""
        for index in shown:
            message, content = messages[index], messages[index]["content"]
            if not isinstance(content, str) or content.strip() in text:
                continue
            # A template may trim, split and change what it shows: it shows something if the result
            # depends on it.
            for other in ("x" + content, content + "x"):
                changed = [*messages[:index], {**message, "content": other}]
                if render([*changed, *messages[index + 1 :]]) != text:
                    break
            else:
                which = "message" if index == len(messages) - 1 else "system message"
                raise SpiffyError(f"{self.name}: its chat template leaves the {which} out")

    def _cannot_escape(self) -> SpiffyError:
        return SpiffyError(
            f"the prompt spells a special token in a way that the tokenizer of {self.name} cannot "
            "take as plain text: remove it"
        )

    @property
    def _has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @cached_property
    def _control(self) -> frozenset[int]:
        """Tokens that text must not turn into; what is unknown to the tokenizer may be unknown."""
        declared = {k for k, token in self._added.items() if token.special}
        special = {*declared, *self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        return frozenset(special | self._given)

    @cached_property
    def _added(self) -> Mapping[int, Any]:
        """Added tokens by id: those that a tokenizer looks for before anything else."""
        added: Mapping[int, Any] = self.tokenizer.added_tokens_decoder
        return added

    @cached_property
    def _unmarked(self) -> frozenset[int]:
        """Control tokens that are ordinary entries of the vocabulary."""
        return self._control - self._added.keys()

    @cached_property
    def _special_texts(self) -> list[str]:
        """Spellings of the control tokens, and of the token for what is unknown."""
        unknown = {self.tokenizer.unk_token_id}
        ids = (self._control | unknown) & self._added.keys()
        return [text for k in sorted(ids) if (text := self._added[k].content)]

    @cached_property
    def _first_characters(self) -> list[str]:
        return sorted({text[0] for text in self._special_texts})

    def _spelling(self, texts: Sequence[str]) -> re.Pattern[str]:
        """Matches the first character of every special token's spelling, also of overlapping ones.

        Group 1 is the whole spelling. Of special tokens, of which there may be a thousand, those
        are looked for that are in the texts.
        """
        there = [special for special in self._special_texts if any(special in t for t in texts)]
        spellings = "|".join(map(re.escape, sorted(there, key=len, reverse=True))) or r"(?!)"
        return re.compile(rf"(?=({spellings})).", re.DOTALL)

    @cached_property
    def _matches_normalized(self) -> bool:
        """Whether other spellings than its own can become a control token."""
        loose = any(self._added[k].normalized for k in self._control & self._added.keys())
        return loose and self._backend is not None and self._backend.normalizer is not None

    @property
    def _backend(self) -> Tokenizer | None:
        """The tokenizers library's object, which tokenizers in pure Python do not have."""
        return getattr(self.tokenizer, "backend_tokenizer", None)

    def _plain_tokenizer(self, plane: int) -> Tokenizer:
        """The tokenizer, for text in which stand-ins hide spelled special tokens.

        Special tokens are found before the stand-ins are resolved, by the normalizer, so what they
        hid is plain text to it, in the midst of what surrounds it.
        """
        if plane not in self._plain_tokenizers:
            content = json.loads(self.tokenizer.backend_tokenizer.to_str())
            for token in content["added_tokens"]:
                if token["id"] in self._control:
                    token["normalized"] = False
            content["truncation"] = content["padding"] = None
            plain = Tokenizer.from_str(json.dumps(content))
            resolved = [
                normalizers.Replace(chr(plane + k), char)
                for k, char in enumerate(self._first_characters)
            ]
            own = [plain.normalizer] if plain.normalizer is not None else []
            plain.normalizer = normalizers.Sequence([*resolved, *own])
            self._plain_tokenizers[plane] = plain
        return self._plain_tokenizers[plane]


def _check_text(text: str) -> None:
    if not is_unicode(text):
        raise SpiffyError("the prompt is not valid Unicode text: is it UTF-8?")
    if not text.strip():
        raise SpiffyError("the prompt is empty: give it at least one word")


def _conversation(prompt: str | Sequence[Message], system: str | None) -> list[Message]:
    """Check a prompt, as messages."""
    messages: list[Message] = []
    if isinstance(prompt, str):
        messages.append({"role": "user", "content": prompt})
    else:
        messages += [_checked(message) for message in prompt]
        if not messages or messages[-1]["role"] == "assistant":
            raise SpiffyError("the messages must end with the one that is to be answered")
    last = messages[-1]["content"]
    if not isinstance(last, str):
        raise SpiffyError("the last message has no text: there is nothing to answer")
    if system is not None:
        if messages[0]["role"] == "system":
            raise SpiffyError("the messages hold a system message already: give no other")
        messages.insert(0, {"role": "system", "content": system})
    for text in _texts(messages):
        if not is_unicode(text):
            _check_text(text)
    _check_text(last)
    return messages


def _checked(message: Any) -> Message:
    """A message whose content is one text, or none (a call of a tool)."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise SpiffyError("a message needs a 'role' and a 'content', as in chat templates")
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return {**message, "content": content}
    parts = content if isinstance(content, list | tuple) else [content]
    if not all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in parts):
        raise SpiffyError(
            "the content of a message must be text: these models see no pictures and hear no sound"
        )
    return {**message, "content": "".join(part["text"] for part in parts)}


def _texts(part: Any) -> list[str]:
    """All strings in messages, keys left out."""
    if isinstance(part, str):
        return [part]
    if isinstance(part, Mapping):
        part = list(part.values())
    inner = part if isinstance(part, list | tuple) else []
    return [text for deeper in inner for text in _texts(deeper)]


def is_text(prompt: object) -> TypeGuard[str | Sequence[Message]]:
    """Whether a prompt is text or messages, instead of token ids."""
    if isinstance(prompt, list | tuple):
        return bool(prompt) and isinstance(prompt[0], Mapping)
    return isinstance(prompt, str)


def given_ids(prompt: Any, vocab_size: int) -> Tensor:
    """Token ids int64 [length] of a prompt that is encoded already.

    Parameters
    ----------
    prompt
        1-D integers, or what a tokenizer of transformers returns for one text: `input_ids`
        ([length] or [1, length]), and an `attention_mask` that may leave out padding at the ends.

    Raises
    ------
    SpiffyError
        If it is empty, of another shape, or holds ids outside the vocabulary.
    """
    if not isinstance(prompt, Mapping):
        return _row(prompt, vocab_size)
    if "input_ids" not in prompt:
        raise SpiffyError(
            f"a prompt with the keys {sorted(map(str, prompt))} has no 'input_ids': give text, a "
            "list of messages, or what a tokenizer returns"
        )
    ids = _one_row(prompt["input_ids"])
    if prompt.get("attention_mask") is not None:
        seen = _one_row(prompt["attention_mask"])
        if seen.shape != ids.shape:
            raise SpiffyError(
                f"attention_mask of shape {[*seen.shape]} does not fit input_ids of shape "
                f"{[*ids.shape]}"
            )
        kept = seen.nonzero()[:, 0]
        if len(kept) and int(kept[-1] - kept[0]) + 1 != len(kept):
            raise SpiffyError("attention_mask leaves out tokens amid the prompt: remove them")
        ids = ids[kept]
    return _row(ids, vocab_size)


def _one_row(values: Any) -> Tensor:
    found = _tensor(values)
    if found.dim() == 2 and len(found) == 1:
        return found[0]
    if found.dim() != 1:
        raise SpiffyError(f"input_ids of shape {[*found.shape]}: give one prompt at a time")
    return found


def _tensor(values: Any) -> Tensor:
    try:
        return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise SpiffyError(
            f"a prompt is text, a list of messages, or token ids, not {type(values).__name__}"
        ) from None


def _row(values: Any, vocab_size: int) -> Tensor:
    ids = _tensor(values)
    if ids.dim() != 1 or not len(ids) or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise SpiffyError(
            f"prompt ids must be a non-empty 1-D tensor of integers, got {ids.dtype} of shape "
            f"{[*ids.shape]}"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise SpiffyError(f"prompt ids must lie in [0, {vocab_size})")
    return ids.to(torch.long)


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings, one or several; None: none.

    Raises
    ------
    SpiffyError
        If one is empty or no text.
    """
    if stop is None:
        return ()
    if not isinstance(stop, str | list | tuple):
        raise SpiffyError(f"stop {stop!r}: give a string, or a list of strings")
    words = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(word, str) and word and is_unicode(word) for word in words):
        raise SpiffyError(f"stop {list(words)}: every stop string must be text, and not empty")
    return words


def without_beginnings(text: str, stop: Sequence[str]) -> str:
    """The text without an end in which a stop string may be beginning."""
    longest = max(map(len, stop), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(word.startswith(text[start:]) for word in stop):
            return text[:start]
    return text
