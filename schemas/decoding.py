"""How a sequence is decoded: the settings shared by decoding, calibration and the artifact."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from spiffy.schemas.errors import SpiffyError

PolicyName = Literal["static", "threshold", "sequential", "entropy-bounded"]
ScoreName = Literal["confidence", "margin", "entropy"]
ScheduleName = Literal["even", "timestep", "round"]
CacheName = Literal["none", "prefix", "prefix-shared", "dual", "block"]

#: More than any model was trained for: settings come from artifacts, too.
MAX_POSITIONS = 1 << 20


class DecodingSettings(BaseModel):
    """Everything besides the model, the prompt and the noise seed that decides the tokens.

    The seed is left out on purpose: a draft graph calibrated with one seed serves them all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    policy: PolicyName = Field(
        "static",
        description="Unmasking policy: the most confident positions (static), all above the "
        "threshold (threshold), left to right (sequential), or the most certain ones within a "
        "bound on their entropy (entropy-bounded).",
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
    score: ScoreName = Field(
        "confidence", description="What ranks the masked positions (entropy-bounded: entropy)."
    )
    schedule: ScheduleName = Field(
        "even",
        description="How steps_per_block splits a block: evenly (LLaDA, SDAR), by Dream's "
        "timesteps, or as masks left over steps left, rounded (A2D).",
    )
    block_length: int = Field(32, ge=1, le=MAX_POSITIONS, description="Positions decoded together.")
    gen_length: int = Field(
        256, ge=1, le=MAX_POSITIONS, description="Positions reserved for the answer."
    )
    cache: CacheName = Field("none", description="Which keys and values are frozen in a block.")
    temperature: float = Field(
        0.0, ge=0.0, le=1000.0, allow_inf_nan=False, description="0 is greedy."
    )
    stop_at_eos: bool = Field(True, description="End after the first block with an EOS token.")

    @model_validator(mode="after")
    def _combinations(self) -> DecodingSettings:
        if self.cache != "block" and self.gen_length % self.block_length:
            raise ValueError(
                f"block_length {self.block_length} does not divide gen_length {self.gen_length}"
            )
        if self.steps_per_block is not None and self.steps_per_block > 16 * self.block_length:
            raise ValueError(
                f"steps_per_block {self.steps_per_block} is more than 16 steps for each of "
                f"{self.block_length} positions"
            )
        if self.schedule != "even" and self.steps_per_block is None:
            raise ValueError(f"schedule {self.schedule!r} needs steps_per_block")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what one policy alone reads: older artifacts keep their digests."""
        content: dict[str, Any] = handler(self)
        if self.policy != "entropy-bounded":
            del content["entropy_bound"]
        return content

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


def first_problem(error: ValidationError) -> str:
    """Describe the first problem of a pydantic error in one line, with where it is."""
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
