"""The artifact: a calibrated draft graph as versioned JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)

from spiffy.schemas.decoding import CacheName, DecodingSettings, PolicyName, first_problem
from spiffy.schemas.errors import SpiffyError
from spiffy.schemas.io import MAX_BYTES, canonical_json, is_unicode, read_json, write_atomically

FORMAT = "spiffy.draft-graph"
MAJOR, MINOR = 1, 2
MAX_NODES = 4096
MAX_RANK = 1023

#: Drafts per forward where nobody asked for a number: a graph that holds more may be hostile, and
#: would make every forward that much longer.
MOST_UNASKED = 128

MAX_PROMPTS = 1 << 16
_MAX_COUNT = (1 << 53) - 1  # what JSON readers agree on
_MAX_TEXT = 1000
_MAX_PROFILES = 64
_MAX_FEATURES = 1024
_MAX_PAIRS = 1 << 23  # in the fills of all nodes' parents together: what checking them takes


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
Objective = Literal["expected-steps", "paper"]


class _Record(BaseModel):
    # Unknown fields of a newer minor version are accepted and dropped.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, protected_namespaces=())


class Node(_Record):
    """One draft state, "the root with these tokens filled in".

    Attributes
    ----------
    fill
        (position rank, token rank) pairs, sorted, position ranks distinct. Position rank 0 is the
        most confident masked position of the root under the logits that produced it; token rank 0
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


class ModelRecord(_Record):
    """Which model a graph belongs to."""

    family: Text
    id: Text
    revision: Text | None = None
    fingerprint: Text
    vocab_size: int = Field(ge=1, le=1 << 31)


class CalibrationRecord(_Record):
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


class Provenance(_Record):
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

    versions: dict[Text, Text] = Field(default_factory=dict, max_length=_MAX_PROFILES)
    git: Text | None = None
    command: tuple[Text, ...] = Field(default=(), max_length=256)


Coefficients = Annotated[
    dict[Text, Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]],
    Field(max_length=_MAX_FEATURES),
]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Pair = tuple[Token, Token, Annotated[int, Field(ge=1, le=_MAX_COUNT >> 16)]]  # their sum: exact


class ExpectedSteps(_Record):
    """Denoising steps per forward with at most `drafts` drafts."""

    drafts: Drafts
    steps: Steps


class AcceptanceModel(_Record):
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


class CostPoint(_Record):
    """Seconds of one packed forward over the root and `drafts` drafts, on one device."""

    drafts: Drafts
    seconds: Seconds


Curve = Annotated[tuple[CostPoint, ...], Field(min_length=1, max_length=MAX_NODES + 1), FailFast()]
Curves = Annotated[dict[Text, Curve], Field(max_length=_MAX_PROFILES)]


class CostProfile(_Record):
    """What verification costs on a device, and what it was measured for; not part of the digest.

    Attributes
    ----------
    points
        Seconds of a forward over the root and that many drafts, from 0 drafts up.
    step_seconds
        What one denoising step costs besides the forward: output head, softmax, unmasking policy.
        The same number of steps is made with and without drafts.
    drafting
        Seconds spent on choosing at most that many drafts, by who chooses them.
    turns
        Seconds of drafting and of the forward after it, averaged over roots, of which some have
        fewer drafts; where missing, take `points` and `drafting` together.
    largest
        Number of drafts that was asked for; the points end earlier where no draft can pay, or where
        measuring took too long.
    threads, torch, model, block_length, cache, policy, prefix_length
        Conditions: threads of a CPU, torch's version, fingerprint of config and tokenizer, decoding
        settings, and positions outside the block that its queries attend to.
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
    policy: PolicyName | None = None
    prefix_length: Count | None = None

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
            for who, points in curves.items():
                yield f"{field}.{who}", points


class DraftGraph(_Record):
    """A draft graph and everything needed to use it, to judge it and to make it again.

    Nodes are in growth order and every prefix of the list is a graph connected to the root, so a
    graph calibrated for 32 drafts also serves any smaller budget: take the first nodes.

    Attributes
    ----------
    exact
        Whether decoding with this cache is lossless; false for the prefix cache only.
    expected_steps
        Denoising steps per forward at budgets 0, 1, ... len(nodes), replayed on calibration
        prompts that were held out from growing the graph.
    acceptance
        Chooses the drafts at run time; without one the nodes are the drafts.
    """

    model: ModelRecord
    decoding: DecodingSettings
    calibration: CalibrationRecord
    exact: bool
    nodes: Annotated[tuple[Node, ...], Field(max_length=MAX_NODES), FailFast()]
    expected_steps: Annotated[tuple[Steps, ...], Field(max_length=MAX_NODES + 1), FailFast()] = ()
    acceptance: AcceptanceModel | None = None
    cost_profiles: Annotated[
        tuple[CostProfile, ...], Field(max_length=_MAX_PROFILES), FailFast()
    ] = ()
    provenance: Provenance | None = None

    @model_validator(mode="after")
    def _is_a_graph(self) -> DraftGraph:
        if self.exact != self.decoding.exact:
            raise ValueError(f"exact: {self.exact} contradicts cache {self.decoding.cache!r}")
        fills: list[frozenset[int]] = [frozenset()]
        seen = {fills[0]}
        work = 0
        for number, node in enumerate(self.nodes, start=1):
            fill = frozenset(i << 10 | j for i, j in node.fill)  # quick to compare
            ranks = [i for i, _ in node.fill]
            if list(node.fill) != sorted(node.fill) or len(set(ranks)) != len(ranks):
                raise ValueError(f"node {number}: position ranks are not distinct and sorted")
            if fill in seen:
                raise ValueError(f"node {number}: the same fill occurs twice")
            if len(set(node.parents)) != len(node.parents):
                raise ValueError(f"node {number}: names a parent twice")
            for parent in node.parents:
                if not 0 <= parent < number:
                    raise ValueError(
                        f"node {number}: parent {parent} does not come before it, so a prefix of "
                        "the list is not connected"
                    )
                work += len(fills[parent])
                if work > _MAX_PAIRS:
                    raise ValueError(f"node {number}: too many parents in all to check")
                if not fills[parent] < fill:
                    raise ValueError(f"node {number}: does not extend its parent {parent}")
            fills.append(fill)
            seen.add(fill)
        if self.expected_steps and len(self.expected_steps) != len(self.nodes) + 1:
            raise ValueError(
                f"expected_steps: {len(self.expected_steps)} values for budgets 0 to "
                f"{len(self.nodes)}"
            )
        return self

    @property
    def budget(self) -> int:
        """Number of drafts, the root not counted."""
        return len(self.nodes)

    def differences(self, settings: DecodingSettings) -> tuple[str, ...]:
        """Settings, in words, for which the graph's expected steps do not hold.

        Those that decide what a denoising step commits or knows; not how long an answer may be.
        """
        fields = ["policy", "block_length", "cache", "temperature", "score"]
        if settings.steps_per_block is None:
            fields += ["tokens_per_step", "steps_per_block"]
        else:
            fields += ["steps_per_block", "schedule"]
        if settings.policy == "threshold":
            fields.append("threshold")
        pairs = [(f, getattr(settings, f), getattr(self.decoding, f)) for f in fields]
        return tuple(f"{name} {ours} ({theirs})" for name, ours, theirs in pairs if ours != theirs)

    def digest(self) -> str:
        """SHA-256 over the canonical JSON of everything but cost profiles and provenance.

        What only newer minor versions know is left out where it is not given, so that the digests
        of older files stay what they were.
        """
        content = self.model_dump(mode="json", exclude={"cost_profiles", "provenance"})
        for field in ("prompts", "prompt_digests", "edges"):
            if content["calibration"][field] is None:
                del content["calibration"][field]
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    def to_json(self) -> str:
        """UTF-8 JSON text, one node a line; the same graph always gives the same bytes."""
        body = self.model_dump(mode="json")
        nodes = body.pop("nodes")
        head = {"format": FORMAT, "version": f"{MAJOR}.{MINOR}", "digest": self.digest(), **body}
        fields = [f"  {canonical_json(key)}: {canonical_json(head[key])}" for key in head]
        lines = ",\n".join(f"    {canonical_json(node)}" for node in nodes)
        fields.append('  "nodes": [\n' + lines + "\n  ]" if nodes else '  "nodes": []')
        return "{\n" + ",\n".join(fields) + "\n}\n"

    def save(self, path: str | Path) -> None:
        """Write the artifact, whole or not at all.

        Raises
        ------
        SpiffyError
            If the file cannot be written, or would be larger than one that can be read.
        """
        text = self.to_json()
        if len(text.encode()) > MAX_BYTES:
            raise SpiffyError(
                f"{path}: the graph takes more than the {MAX_BYTES} bytes an artifact may be: give "
                "it fewer nodes"
            )
        write_atomically(Path(path), text)

    @classmethod
    def load(cls, path: str | Path) -> DraftGraph:
        """Read and validate an artifact.

        Raises
        ------
        SpiffyError
            In one sentence: not JSON, not an artifact, newer than this version reads, damaged, or
            not a graph.
        """
        path = Path(path)
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise SpiffyError(f'{path}: not a draft graph (no "format": "{FORMAT}")')
        minor = _minor_version(path, content.get("version"))
        if isinstance(content.get("decoding"), dict):  # a newer minor version may know more
            known = DecodingSettings.model_fields
            content["decoding"] = {k: v for k, v in content["decoding"].items() if k in known}
        stated = content.get("digest")
        try:
            text = canonical_json({key: content[key] for key in content if key in cls.model_fields})
        except RecursionError:
            raise SpiffyError(f"{path}: nested too deeply") from None
        except ValueError:
            raise SpiffyError(f"{path}: holds a number that is not finite") from None
        if not is_unicode(text):
            raise SpiffyError(f"{path}: holds half a character (lone surrogate)")
        try:
            # pydantic's JSON mode stays strict and still takes arrays for tuples.
            graph = cls.model_validate_json(text)
        except ValidationError as error:
            raise SpiffyError(f"{path}: {first_problem(error)}") from None
        if 1 <= minor <= MINOR and stated not in (None, graph.digest()):
            raise SpiffyError(
                f"{path}: content and digest disagree: the file was edited or damaged; calibrate "
                "again, or remove the digest if you edited it on purpose"
            )
        return graph

    @classmethod
    def from_pretrained(cls, repo_or_dir: str, *, revision: str | None = None) -> DraftGraph:
        """Load `draft_graph.json` from a checkpoint directory or a hub repository.

        Raises
        ------
        SpiffyError
            If there is none, or it is invalid.
        """
        if Path(repo_or_dir).is_dir():
            return cls.load(Path(repo_or_dir) / "draft_graph.json")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = hf_hub_download(repo_or_dir, "draft_graph.json", revision=revision)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise SpiffyError(f"{repo_or_dir}: no draft_graph.json to be had ({reason})") from None
        return cls.load(path)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of the artifact, envelope included."""
        schema = cls.model_json_schema()
        schema["properties"] |= {
            "format": {"const": FORMAT},
            "version": {"type": "string", "pattern": rf"^{MAJOR}\.\d+$"},
            "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        }
        schema["required"] = ["format", "version", *schema["required"]]
        return schema

    def check_fits(self, family: str, fingerprint: str, vocab_size: int) -> None:
        """Refuse a graph that was calibrated for another model.

        Raises
        ------
        SpiffyError
            Names what differs.
        """
        ours = self.model
        for what, expected, received in (
            ("family", ours.family, family),
            ("vocabulary size", ours.vocab_size, vocab_size),
            ("fingerprint of config and tokenizer", ours.fingerprint, fingerprint),
        ):
            if expected != received:
                raise SpiffyError(
                    f"the graph was calibrated for {ours.id}: {what} {expected}, this model has "
                    f"{received}; calibrate one for this model"
                )


def _minor_version(path: Path, version: Any) -> int:
    parts = version.split(".") if isinstance(version, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise SpiffyError(f'{path}: "version" must look like "{MAJOR}.{MINOR}", got {version!r}')
    major = parts[0].lstrip("0")
    if len(major) > 3 or int(major or 0) > MAJOR:
        raise SpiffyError(
            f"{path}: format version {version[:20]} is newer than this program reads ({MAJOR}.x): "
            "upgrade spiffy-dllm"
        )
    if int(major or 0) < MAJOR:
        raise SpiffyError(f"{path}: format version {version[:20]} was never published")
    minor = parts[1].lstrip("0")
    return int(minor or 0) if len(minor) <= 3 else 1000
