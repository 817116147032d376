"""What may be asked, field by field: OpenAI's, and what of it is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from spiffy.schemas.decoding import FILTERS, MAX_POSITIONS
from spiffy.schemas.errors import printable

_MOST_ANSWERS = 128  # per prompt, as OpenAI's
_MOST_STOPS = 16

# Fields that ask for nothing with these values, and with others for what is not done here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0, 0.0),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Of a message in a conversation, such as one that this server or another gave.
_NEUTRAL_OF_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}
# Labels for whoever keeps books; nothing here does.
_LABELS = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
)


class ApiError(Exception):
    """A refusal or failure in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = {"error": error}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Part(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None  # a label


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None

    def as_template(self) -> dict[str, Any]:
        """As chat templates know it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": self.role.replace("developer", "system"), "content": content}


# The first wrong item is enough: a body of one megabyte has room for half a million of them.
_Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


_Stop = Annotated[str, Field(min_length=1)]


class _Drawn(_Strict):
    """How tokens are drawn."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_POSITIONS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)

    @property
    def filters(self) -> dict[str, float | None]:
        """Those that are asked for; `top_k` is off where it is -1 or 0, as for vLLM and SGLang."""
        given = {name: getattr(self, name) for name in FILTERS}
        asked = {name: value for name, value in given.items() if value is not None}
        return asked | ({"top_k": None} if asked.get("top_k", 1) < 1 else {})


class _Asked(_Drawn):
    """What all ways of asking share."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _NEUTRAL

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_POSITIONS)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)] = []
    n: int = Field(1, ge=1, le=_MOST_ANSWERS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def length(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens


class ChatRequest(_Asked):
    """`POST /v1/chat/completions`."""

    messages: _Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_POSITIONS)

    @property
    def length(self) -> int | None:
        """Most tokens of an answer; the newer name goes first."""
        return self.max_completion_tokens or self.max_tokens


_Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class CompletionRequest(_Asked):
    """`POST /v1/completions`: text or token ids, one or several, that are continued as they are."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | _Ids
        | Annotated[list[_Ids], Field(min_length=1, fail_fast=True)]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, as several."""
        prompt: Any = self.prompt
        alone = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if alone else prompt


class WatchRequest(_Drawn):
    """`POST /spiffy/decode`: one answer, told forward by forward, with and without drafts."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str | None = None
    messages: _Messages
    max_tokens: int | None = Field(None, ge=1, le=MAX_POSITIONS)
    drafts: bool = True


Asked = TypeVar("Asked", ChatRequest, CompletionRequest, WatchRequest)


def parse(kind: type[Asked], body: bytes) -> Asked:
    """Read a request's body.

    Raises
    ------
    ApiError
        If it is no JSON object, or a field is unknown, wrong, or asks for what is not done here.
    """
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object")
    fields = _given(content, kind.neutral, "")
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [
            _given(turn, _NEUTRAL_OF_MESSAGE, f"messages.{number}.")
            if isinstance(turn, dict)
            else turn
            for number, turn in enumerate(messages)
        ]
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _given(
    content: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], place: str
) -> dict[str, Any]:
    """The fields that ask for something; null is as good as none."""
    given = {}
    for name, value in content.items():
        if value is None or (not place and name in _LABELS):
            continue
        if name not in neutral:
            given[name] = value
        elif not any(type(value) is type(known) and value == known for known in neutral[name]):
            raise ApiError(
                400, f"{place}{name} is not supported here", param=place + name, code="unsupported"
            )
    return given


def _refusal(error: ValidationError) -> ApiError:
    """The first problem, with the field it is in.

    Where one of several types would do, pydantic tells what is wrong by each of them, and names the
    type among the places: what is wrong further in, or with a value, is by the type that was meant.
    """
    problem = max(
        error.errors(include_url=False, include_context=False),
        key=lambda one: (len(one["loc"]), one["type"] not in _OTHER_TYPE),
    )
    *within, last = problem["loc"]
    place = [str(part) for part in within if str(part) in _names or isinstance(part, int)]
    if problem["type"] == "extra_forbidden":
        name = printable(".".join([*place, str(last)]))[:200]
        return ApiError(400, f"unknown field: {name}", param=name, code="unknown_parameter")
    if str(last) in _names or isinstance(last, int):
        place.append(str(last))
    param = printable(".".join(place))[:200]
    return ApiError(400, f"{param}: {problem['msg']}", param=param, code="invalid_value")


_OTHER_TYPE = frozenset({"string_type", "int_type", "list_type"})
_names = {
    name
    for kind in (ChatRequest, CompletionRequest, WatchRequest, Message, Part, StreamOptions)
    for name in kind.model_fields
}
