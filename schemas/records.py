"""What a draft graph's artifact is made of: its records, and the bounds on what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from spiffy.schemas.decoding import AnyPolicy, CacheName

MAX_NODES = 4096
MAX_RANK = 1023

#: Drafts per forward where nobody asked for a number: a graph that holds more may be hostile, and
#: would make every forward that much longer.
MOST_UNASKED = 128

MAX_PROMPTS = 1 << 16
_MAX_COUNT = (1 << 53) - 1  # what JSON readers agree on
_MAX_TEXT = 1000
MAX_PROFILES = 64
_MAX_FEATURES = 1024


def _is_plain(text: str) -> str:
    """Names are printed: no line ends, no escape sequences of a terminal."""
    if not text.isprintable():
        raise ValueError("holds characters that cannot be printed")
    return text


Text = Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(_is_plain)]
Count = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
Rank = Annotated[int, Field(ge=0, le=MAX_RANK)]
Fill = Annotated[tuple[tuple[Rank, Rank], ...], Field(min_length=1, max_length=1024), FailFast()]
Number = Annotated[int, Field(ge=-MAX_NODES, le=MAX_NODES)]  # of a node; the graph checks which
Drafts = Annotated[int, Field(ge=0, le=MAX_NODES)]
Seconds = Annotated[float, Field(ge=1e-9, le=1e6, allow_inf_nan=False)]
Steps = Annotated[float, Field(ge=1, le=MAX_NODES + 1, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
#: How a graph is grown.
Objective = Literal["expected-steps", "paper", "transitions"]
#: Formats of other graph tools.
ExportFormat = Literal["graphml", "dot", "json"]
#: What is counted of a decode and stated with every answer: fields of `runtime.decode.Stats`.
COUNTS = ("nfe", "positions_computed", "steps", "accepted")
#: Drafts per forward that somebody asks for.
Budget = int | Literal["auto"]


class Record(BaseModel):
    """A frozen part of an artifact; unknown fields, of a newer minor version, are dropped."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, protected_namespaces=())


class Node(Record):
    """One draft state, "the root with these tokens filled in".

    Attributes
    ----------
    fill
        (position rank, token rank) pairs, sorted, position ranks distinct. Position rank 0 is the
        best-scored masked position of the root under the logits that produced it; token rank 0
        is the most likely token there.
    parents
        Numbers of the nodes it follows by one denoising step; 0 is the root, node k of the list
        has number k + 1.
    count
        Roots of the calibration data whose true future passed through this state.
    """

    fill: Fill
    parents: Annotated[tuple[Number, ...], Field(min_length=1, max_length=MAX_NODES), FailFast()]
    count: Count


class ModelRecord(Record):
    """Which model a graph belongs to."""

    family: Text
    id: Text
    revision: Text | None = None
    fingerprint: Text
    vocab_size: int = Field(ge=1, le=1 << 31)


class CalibrationRecord(Record):
    """Where a graph comes from.

    Attributes
    ----------
    prompts
        How many were drawn; of these, `samples` and `held_out_samples` could be decoded.
    prompt_digests
        Of every prompt, the first 64 bits of its SHA-256 in hex, sorted: says whether a prompt was
        calibrated on.
    edges
        What may happen where a block ends (`BlockEdges`), by name.
    """

    dataset: Text
    dataset_sha256: Text
    samples: Count
    held_out_samples: Count = Field(description="0: measured on the prompts it grew on.")
    roots: Count
    seed: int = Field(ge=-_MAX_COUNT, le=_MAX_COUNT)
    objective: Text
    tool_version: Text
    prompts: Count | None = None  # since 1.2, like the next two
    prompt_digests: tuple[Digest, ...] | None = Field(default=None, max_length=MAX_PROMPTS)
    edges: tuple[Text, ...] | None = Field(default=None, max_length=16)


class Provenance(Record):
    """What made an artifact; not part of the digest, because it may differ for equal graphs.

    Attributes
    ----------
    versions
        By name: spiffy-dllm, python, torch, transformers.
    git
        Commit of the tool's source tree, with "-dirty" behind it if that was changed; null if the
        tool was installed from a package.
    command
        Command line, without the folders of local files and without where the output went.
    """

    versions: dict[Text, Text] = Field(default_factory=dict, max_length=MAX_PROFILES)
    git: Text | None = None
    command: tuple[Text, ...] = Field(default=(), max_length=256)


Coefficients = Annotated[
    dict[Text, Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]],
    Field(max_length=_MAX_FEATURES),
]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Pair = tuple[Token, Token, Annotated[int, Field(ge=1, le=_MAX_COUNT >> 16)]]  # their sum: exact


class ExpectedSteps(Record):
    """Denoising steps per forward with at most `drafts` drafts.

    Attributes
    ----------
    replayed
        Of measured steps, what a replay of the very prompts that were decoded says.
    """

    drafts: Drafts
    steps: Steps
    replayed: Steps | None = None  # since 1.5

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `replayed` where it is not given: the digests of older files stay."""
        content: dict[str, Any] = write(self)
        if self.replayed is None:
            content.pop("replayed", None)
        return content


class AcceptanceModel(Record):
    """Two regressions that say which future states come next, and what they were fitted with.

    Attributes
    ----------
    position
        Coefficients by feature name: softmax over the masked positions, which one is committed
        next. A reader that does not know all features drafts the graph's nodes instead.
    commit
        With threshold unmasking: log-odds per position of being committed next, and `spread`, the
        standard deviation of an offset that all positions of a state share.
    token
        Softmax over a position's most likely tokens.
    bigrams
        (left token, right token, count) in the calibration answers, most frequent first.
    expected_steps
        Replayed on the held-out prompts.
    """

    position: Coefficients
    commit: Coefficients | None = None
    token: Coefficients
    bigrams: Annotated[tuple[Pair, ...], Field(max_length=65536), FailFast()]
    expected_steps: Annotated[tuple[ExpectedSteps, ...], Field(max_length=256), FailFast()] = ()

    @model_validator(mode="after")
    def _ascends(self) -> AcceptanceModel:
        drafts = [point.drafts for point in self.expected_steps]
        if drafts != sorted(set(drafts)):
            raise ValueError("expected_steps: numbers of drafts must ascend")
        return self


class CostPoint(Record):
    """Seconds of one packed forward over the root and `drafts` drafts, on one device."""

    drafts: Drafts
    seconds: Seconds


Curve = Annotated[tuple[CostPoint, ...], Field(min_length=1, max_length=MAX_NODES + 1), FailFast()]
Curves = Annotated[dict[Text, Curve], Field(max_length=MAX_PROFILES)]


class CostProfile(Record):
    """What verification costs on a device, and what it was measured for; not part of the digest.

    Attributes
    ----------
    points
        Seconds of a forward over the root and that many drafts, from 0 drafts up. A large output
        head, which several states pass at once, is part of it.
    step_seconds
        What one denoising step costs besides the forward: softmax, unmasking policy, and the output
        head if it is small. The same number of steps is made with and without drafts.
    drafting
        Seconds spent on choosing at most that many drafts, by who chooses them.
    turns
        Seconds of drafting and of the forward after it, averaged over roots, of which some have
        fewer drafts; where missing, take `points` and `drafting` together.
    largest
        Number of drafts that was asked for; the points end earlier where no draft can pay, or where
        measuring took too long.
    threads, torch, model, block_length, cache, policy, prefix_length, suffix_length
        Conditions: threads of a CPU, torch's version (and numba, if code that it compiled searched
        for drafts), fingerprint of config and tokenizer, decoding settings, and positions outside
        the block that its queries attend to; with the prefix caches those before it, and apart from
        them those behind it, which every forward computes anew.
    """

    device: Text
    dtype: Text
    points: Curve
    step_seconds: float = Field(default=0.0, ge=0, le=1e6, allow_inf_nan=False)
    drafting: Curves = Field(default_factory=dict)
    turns: Curves = Field(default_factory=dict)
    largest: Drafts | None = None
    threads: int | None = Field(default=None, ge=1, le=1 << 20)
    torch: Text | None = None
    model: Text | None = None
    block_length: Count | None = Field(default=None, ge=1)
    cache: CacheName | None = None
    policy: AnyPolicy | None = None
    prefix_length: Count | None = None
    suffix_length: Count | None = None

    @model_validator(mode="after")
    def _is_a_curve(self) -> CostProfile:
        if self.points[0].drafts != 0:
            raise ValueError("points: must start at 0 drafts")
        for name, points in self._curves():
            drafts = [point.drafts for point in points]
            if not drafts or drafts != sorted(set(drafts)):
                raise ValueError(f"{name}: numbers of drafts must ascend")
        return self

    def _curves(self) -> Iterator[tuple[str, tuple[CostPoint, ...]]]:
        yield "points", self.points
        for field, curves in (("drafting", self.drafting), ("turns", self.turns)):
            for way, points in curves.items():
                yield f"{field}.{way}", points
