"""What is sent back: answers in OpenAI's shape, whole or in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from spiffy.integrations.serve.engine import Done
from spiffy.schemas.io import canonical_json

Way = Literal["chat", "text"]
_OBJECTS = {"chat": "chat.completion", "text": "text_completion"}
_PREFIXES = {"chat": "chatcmpl", "text": "cmpl"}


#: What JSON leaves in strings as it is, and Python's `splitlines` ends a line with.
_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def sent(content: Any) -> bytes:
    """A server-sent event: one line, whatever its reader takes for the end of one."""
    return f"data: {canonical_json(content).translate(_LINE_ENDS)}\n\n".encode()


#: What OpenAI's streams end with, and what keeps a connection open that has nothing to say.
THE_END = b"data: [DONE]\n\n"
STILL_HERE = b": waiting\n\n"


@dataclass
class Answers:
    """The answers to one request.

    Attributes
    ----------
    way
        Of a conversation, or of text that is continued.
    prompt_tokens
        Tokens of its prompts.
    """

    way: Way
    model: str
    prompt_tokens: int
    done: list[Done] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{_PREFIXES[self.way]}-{uuid.uuid4().hex}"

    def whole(self) -> dict[str, Any]:
        """All of them, when they are done."""
        choices = [
            self._choice(done.job.number, self._content(done.text, "message"), done.reason)
            for done in sorted(self.done, key=lambda done: done.job.number)
        ]
        return self._body(_OBJECTS[self.way], choices) | self.costs()

    def piece(
        self, number: int, text: str | None = None, reason: str | None = None, first: bool = False
    ) -> dict[str, Any]:
        """A chunk of a stream: text, or the end of an answer."""
        content = self._content(text, "delta")
        if first and self.way == "chat":
            content["delta"]["role"] = "assistant"
        return self._body(self._chunk, [self._choice(number, content, reason)])

    def last(self) -> dict[str, Any]:
        """The chunk that counts."""
        return self._body(self._chunk, []) | self.costs()

    def costs(self) -> dict[str, Any]:
        """Tokens as OpenAI counts them, and forwards and drafts."""
        written = sum(len(done.ids) for done in self.done)
        return {
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": written,
                "total_tokens": self.prompt_tokens + written,
            },
            "spiffy": counts(self.done),
        }

    @property
    def _chunk(self) -> str:
        return _OBJECTS[self.way] + (".chunk" if self.way == "chat" else "")

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _content(self, text: str | None, key: str) -> dict[str, Any]:
        if self.way == "text":
            return {"text": text or ""}
        content: dict[str, Any] = {} if text is None else {"content": text}
        if key == "message":
            content = {"role": "assistant", "refusal": None, **content}
        return {key: content}

    def _choice(self, number: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": number, **content, "logprobs": None, "finish_reason": reason}


def counts(done: Sequence[Done]) -> dict[str, int]:
    """What answers cost, shared forwards counted for each of them."""
    stats = [one.stats for one in done]
    return {
        "nfe": sum(s.nfe for s in stats),
        "steps": sum(s.steps for s in stats),
        "accepted": sum(s.accepted for s in stats),
        "drafts": sum(s.drafted for s in stats),
    }


def ending(done: Done) -> dict[str, Any]:
    """The end of a decode that was watched: the whole answer and what it cost."""
    stats = done.stats
    return {
        "type": "end",
        "text": done.text,
        "tokens": len(done.ids),
        "finish_reason": done.reason,
        **counts([done]),
        "plain": done.job.task.plain_nfe,
        "positions": stats.positions_computed,
        "seconds": stats.seconds,
        "why": stats.why,
    }
