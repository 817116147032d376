"""The manifest of a work directory: what the traces in it were recorded with."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from spiffy.schemas.decoding import DecodingSettings
from spiffy.schemas.io import canonical_json


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class ModelFacts(_Record):
    """What growing, fitting and replaying have to know of a model; none of them runs it."""

    family: str
    id: str
    revision: str | None
    fingerprint: str
    vocab_size: int = Field(ge=1)
    mask_token_id: int = Field(ge=0)
    eos_token_ids: tuple[int, ...]


class Manifest(_Record):
    """Everything that decides what is recorded; budget and objective come later and are free.

    Attributes
    ----------
    weights
        Digest over a sample of the weights: the model's fingerprint does not cover them.
    dataset_sha256, prompts, drawn
        Digest of the prompt texts, how many of them can be decoded, and how many there are.
    prompt_digests
        A short digest of every prompt, for the artifact's record.
    raw, system
        How prompts were encoded, if not by themselves and with the chat template.
    """

    format: Literal["spiffy.workdir"] = "spiffy.workdir"
    version: Literal[1] = 1
    model: ModelFacts
    weights: str
    dtype: str
    decoding: DecodingSettings
    edges: dict[str, bool]
    seed: int
    batch_size: int = Field(ge=1)
    dataset: str
    dataset_sha256: str
    prompts: int = Field(ge=1)
    drawn: int = Field(ge=1)
    prompt_digests: tuple[str, ...]
    raw: bool = False
    system: str | None = None

    def content(self) -> dict[str, Any]:
        """What is written: how prompts were encoded is only there if it is not as usual."""
        usual = {
            name
            for name, value in (("raw", False), ("system", None))
            if getattr(self, name) == value
        }
        return self.model_dump(mode="json", exclude=usual)

    def digest(self) -> str:
        """SHA-256 over the canonical JSON."""
        return hashlib.sha256(canonical_json(self.content()).encode()).hexdigest()

    def difference(self, other: Manifest, free: frozenset[str] = frozenset()) -> str | None:
        """The first setting that differs, in words, "batch_size 8, not 4"; None if none does.

        `free` names fields that may differ.
        """
        for name, ours in _flat(self).items():
            theirs = _flat(other).get(name)
            if ours != theirs and name not in free:
                return f"{name} {ours}, not {theirs}"
        return None


def _flat(manifest: Manifest) -> dict[str, object]:
    """Settings by name, those of records inside as `model.id`."""
    flat: dict[str, object] = {}
    for name, value in manifest.model_dump(mode="json").items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": item for key, item in inner.items()} or {name: value}
    return flat
