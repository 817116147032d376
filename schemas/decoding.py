"""How a sequence is decoded: the settings shared by decoding, calibration and the artifact."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from spiffy.schemas.errors import SpiffyError

PolicyName = Literal["static", "threshold", "sequential", "entropy-bounded", "joint"]
ScoreName = Literal["confidence", "margin", "entropy"]
ScheduleName = Literal["even", "timestep", "round"]
CacheName = Literal["none", "prefix", "prefix-shared", "dual", "block"]

#: Names of policies that are not shipped, `module:object`. Naming one imports nothing.
OWN_POLICY = r"^[A-Za-z_][A-Za-z0-9_.]{0,199}:[A-Za-z_][A-Za-z0-9_]{0,99}$"
_POLICIES = get_args(PolicyName)


def _check_policy(name: str) -> str:
    if name not in _POLICIES and not is_own_policy(name):
        raise ValueError(f"choose {', '.join(_POLICIES)}, or module:object of your own")
    return name


def is_own_policy(name: str) -> bool:
    """Whether a policy is named as one that is not shipped."""
    return re.fullmatch(OWN_POLICY, name) is not None


#: A policy that is shipped, or the name of another one.
AnyPolicy = Annotated[
    str,
    AfterValidator(_check_policy),
    WithJsonSchema(
        {"anyOf": [{"enum": list(_POLICIES)}, {"pattern": OWN_POLICY}], "type": "string"}
    ),
]

#: More than any model was trained for: settings come from artifacts, too.
MAX_POSITIONS = 1 << 20

#: Settings that filter what is drawn.
FILTERS = ("top_k", "top_p")
#: Of each, the values that filter nothing.
NO_FILTER: dict[str, tuple[float | None, ...]] = {"top_k": (None,), "top_p": (None, 1.0)}


class DecodingSettings(BaseModel):
    """Everything besides the model, the prompt and the noise seed that decides the tokens.

    The seed is left out on purpose: a draft graph calibrated with one seed serves them all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    policy: AnyPolicy = Field(
        "static",
        description="Unmasking policy: the most confident positions (static), all above the "
        "threshold (threshold), left to right (sequential), the most certain ones within a bound "
        "on their entropy (entropy-bounded), all above the threshold while tokens committed in "
        "the block may still be replaced (joint), or one that is not shipped (module:object).",
    )
    tokens_per_step: int = Field(
        1, ge=1, le=MAX_POSITIONS, description="Tokens a static step commits."
    )
    steps_per_block: int | None = Field(
        None,
        ge=1,
        le=MAX_POSITIONS,
        description="Denoising steps per block, at most 16 per position; replaces tokens_per_step "
        "if given.",
    )
    threshold: float = Field(0.9, ge=0.0, le=1.0, description="Confidence to commit at once.")
    entropy_bound: float = Field(
        0.1,
        ge=0.0,
        allow_inf_nan=False,
        description="Most entropy, in nats and without the largest, that positions committed at "
        "once have together.",
    )
    edit_threshold: float = Field(
        0.9, ge=0.0, le=1.0, description="Confidence above which a committed token is replaced."
    )
    max_post_steps: int = Field(
        16,
        ge=0,
        le=1024,
        description="Most denoising steps that a block without masks goes on for, as long as they "
        "replace tokens.",
    )
    score: ScoreName = Field(
        "confidence", description="What ranks the masked positions (entropy-bounded: entropy)."
    )
    schedule: ScheduleName = Field(
        "even",
        description="How steps_per_block splits a block: evenly (LLaDA, SDAR), by Dream's "
        "timesteps, or as masks left over steps left, rounded (A2D).",
    )
    block_length: int = Field(32, ge=1, le=MAX_POSITIONS, description="Positions decoded together.")
    sub_block_length: int | None = Field(
        None,
        ge=1,
        le=MAX_POSITIONS,
        description="Positions of a block that are finished before the next ones of it are begun.",
    )
    gen_length: int = Field(
        256, ge=1, le=MAX_POSITIONS, description="Positions reserved for the answer."
    )
    cache: CacheName = Field("none", description="Which keys and values are frozen in a block.")
    temperature: float = Field(
        0.0, ge=0.0, le=1000.0, allow_inf_nan=False, description="0 is greedy."
    )
    top_k: int | None = Field(
        None,
        ge=1,
        le=MAX_POSITIONS,
        description="Draw from so many of the likeliest tokens; null: from all.",
    )
    top_p: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Draw from the fewest of the likeliest tokens (of those that top_k leaves) "
        "whose probabilities at this temperature add up to such a share; null, as 1: from all.",
    )
    stop_at_eos: bool = Field(True, description="End after the first block with an EOS token.")

    @field_validator("top_p")
    @classmethod
    def _none_for_all(cls, top_p: float | None) -> float | None:
        return None if top_p == 1.0 else top_p

    @model_validator(mode="after")
    def _combinations(self) -> DecodingSettings:
        if self.cache != "block" and self.gen_length % self.block_length:
            raise ValueError(
                f"block_length {self.block_length} does not divide gen_length {self.gen_length}"
            )
        if self.sub_block_length is not None and self.block_length % self.sub_block_length:
            raise ValueError(
                f"sub_block_length {self.sub_block_length} does not divide block_length "
                f"{self.block_length}"
            )
        if self.policy == "joint" and self.score != "confidence":
            raise ValueError(f"policy 'joint' compares confidences: it takes no {self.score!r}")
        if self.policy == "joint" and self.cache not in ("none", "block"):
            raise ValueError(f"policy 'joint' decodes with cache none or block, not {self.cache}")
        if self.steps_per_block is not None and self.steps_per_block > 16 * self.block_length:
            raise ValueError(
                f"steps_per_block {self.steps_per_block} is more than 16 steps for each of "
                f"{self.block_length} positions"
            )
        if self.schedule != "even" and self.steps_per_block is None:
            raise ValueError(f"schedule {self.schedule!r} needs steps_per_block")
        for name in FILTERS:
            if self.temperature == 0 and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name} {value} filters what is drawn, and at temperature 0 nothing is: give "
                    "a temperature above 0 too"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not read, of what came later: older artifacts keep their digests."""
        content: dict[str, Any] = handler(self)
        if self.policy != "entropy-bounded":
            content.pop("entropy_bound", None)
        if self.policy != "joint":
            content.pop("edit_threshold", None)
            content.pop("max_post_steps", None)
        for name in ("sub_block_length", *FILTERS):
            if getattr(self, name) is None:
                content.pop(name, None)
        return content

    def changed(self, **changes: object) -> DecodingSettings:
        """The same with other values; a temperature of 0 takes filters along, if none are given.

        Raises
        ------
        SpiffyError
            As `parse`.
        """
        if changes.get("temperature") == 0:
            changes = dict.fromkeys(FILTERS) | changes
        return DecodingSettings.parse(**{**self.model_dump(), **changes})

    @property
    def sampling(self) -> str:
        """How tokens are chosen, in words."""
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"{name} {getattr(self, name):g}" for name in FILTERS if getattr(self, name)]
        return ", ".join(parts)

    @property
    def own_policy(self) -> bool:
        """Whether the policy is not shipped: it has to be registered (docs/extending.md)."""
        return ":" in self.policy

    @property
    def edits_full_blocks(self) -> bool:
        """Whether a block without masks takes more denoising steps."""
        return self.policy == "joint" and self.max_post_steps > 0

    @property
    def exact(self) -> bool:
        """Whether drafts cannot change a token; false for `prefix-shared` only."""
        return self.cache != "prefix-shared"

    @property
    def plain_cache(self) -> CacheName:
        """The cache that freezes what this one does, and decodes the same without drafts."""
        return "prefix" if self.cache == "prefix-shared" else self.cache

    @classmethod
    def parse(cls, **options: object) -> DecodingSettings:
        """Validate `options`.

        Raises
        ------
        SpiffyError
            Names the first option that is wrong and why.
        """
        try:
            return cls(**options)  # type: ignore[arg-type]
        except ValidationError as error:
            raise SpiffyError(f"decoding settings: {first_problem(error)}") from None


def check_setting(name: str, value: object) -> None:
    """Refuse a value that no settings can have, whatever the others are.

    Raises
    ------
    SpiffyError
        Names the command's option, and what it takes.
    """
    try:
        DecodingSettings(**{name: value})  # type: ignore[arg-type]
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            if problem["loc"] != (name,):  # may be right beside others
                continue
            takes = problem["msg"].removeprefix("Value error, ")
            takes = takes.replace("Input should be", "must be")
            if problem["type"] == "literal_error":
                takes = f"choose {problem['ctx']['expected'].replace(chr(39), '')}"
            raise SpiffyError(f"--{name.replace('_', '-')} {value}: {takes}") from None


def first_problem(error: ValidationError) -> str:
    """Describe the first problem of a pydantic error in one line, with where it is."""
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
