"""Manifests: what the records in a folder, traces or answers, were made with."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from spiffy.schemas.decoding import DecodingSettings
from spiffy.schemas.io import canonical_json
from spiffy.schemas.records import Budget, ModelRecord


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

    def record(self) -> ModelRecord:
        """What of it artifacts and benchmarks state."""
        return ModelRecord(
            family=self.family,
            id=self.id,
            revision=self.revision,
            fingerprint=self.fingerprint,
            vocab_size=self.vocab_size,
        )


#: Compared last, in this order: numbers say better than digests that there are more prompts now.
_LAST = ("drawn", "prompts", "dataset_sha256", "prompt_digests")
_OF_WEIGHTS = {"weights": "--model, --revision, --adapter, --quantize"}
_SHOWN = 40  # characters of a value
_IN_PYTHON = ("score", "steps_per_block", "schedule", "stop_at_eos")  # settings without an option


class RunManifest(_Record):
    """What a run that can go on was begun with; one with anything else is refused.

    Attributes
    ----------
    unusual
        Fields that are written only where they are not as given here.
    weights
        Digest over a sample of the weights: the model's fingerprint does not cover them.
    dataset_sha256
        Digest of the prompt texts.
    raw, system
        How prompts were encoded, if not by themselves and with the chat template.
    """

    unusual: ClassVar[dict[str, object]] = {}
    #: Options that decide fields of other names.
    options: ClassVar[dict[str, str]] = {}

    format: str  # these two come first: of another kind of folder, or version, nothing else is said
    version: Literal[1] = 1
    model: ModelFacts
    weights: str
    dtype: str
    decoding: DecodingSettings
    edges: dict[str, bool]
    seed: int
    dataset: str
    dataset_sha256: str
    raw: bool = False
    system: str | None = None

    def content(self) -> dict[str, Any]:
        """What is written."""
        usual = {name for name, value in self.unusual.items() if getattr(self, name) == value}
        return self.model_dump(mode="json", exclude=usual)

    def digest(self) -> str:
        """SHA-256 over the canonical JSON."""
        return hashlib.sha256(canonical_json(self.content()).encode()).hexdigest()

    def difference(self, other: RunManifest, free: frozenset[str] = frozenset()) -> str | None:
        """The first setting that differs, in words: "batch_size 8, not 4 (--batch-size)".

        None if none does. `free` names fields that may differ.
        """
        ours, theirs = _flat(self), _flat(other)
        names = {**ours, **theirs}  # what is None may be left out of one of them
        for name in sorted(names, key=lambda name: _LAST.index(name) + 1 if name in _LAST else 0):
            if ours.get(name) != theirs.get(name) and name not in free:
                return self._in_words(name, ours.get(name), theirs.get(name))
        return None

    def _in_words(self, name: str, ours: object, theirs: object) -> str:
        group, _, setting = name.rpartition(".")
        option = f"--{group if group in ('model', 'edges') else setting.replace('_', '-')}"
        option = self.options.get(name, "" if setting in _IN_PYTHON else option)
        if name in ("weights", "dataset_sha256"):
            said = f"other {'weights' if name == 'weights' else 'prompts'}"
        elif name in ("drawn", "prompts"):
            said = f"{ours} prompts{' drawn' if name == 'drawn' else ''}, not {theirs}"
        else:
            said = f"{name} {_value(ours)}, not {_value(theirs)}"
        return f"{said} ({option})" if option else said


class Manifest(RunManifest):
    """Everything that decides what is recorded; budget and objective come later and are free.

    Attributes
    ----------
    prompts, drawn
        How many prompts can be decoded, and how many there are.
    prompt_digests
        A short digest of every prompt, for the artifact's record.
    """

    unusual = {"raw": False, "system": None}  # as before there were such options
    options = {
        **_OF_WEIGHTS,
        "drawn": "--samples",
        "prompts": "",
        "dataset_sha256": "--dataset, --field, --seed",
    }

    format: Literal["spiffy.workdir"] = "spiffy.workdir"
    batch_size: int = Field(ge=1)
    prompts: int = Field(ge=1)
    drawn: int = Field(ge=1)
    prompt_digests: tuple[str, ...]


class AnswersManifest(RunManifest):
    """Everything that decides what answers to a file of prompts are, and what they cost.

    Attributes
    ----------
    graph
        Digest of the draft graph, if there is one.
    drafts
        The budget; None: decoded plainly.
    prompts
        How many there are.
    """

    options = {
        **_OF_WEIGHTS,
        "drafts": "--budget",
        "dataset": "--prompts",
        "prompts": "--prompts, --samples",
        "dataset_sha256": "--prompts, --field, --seed",
    }

    format: Literal["spiffy.answers"] = "spiffy.answers"
    graph: str | None
    drafts: Budget | None
    stop: tuple[str, ...]
    prompts: int = Field(ge=1)


def _flat(manifest: RunManifest) -> dict[str, object]:
    """Settings by name, those of records inside as `model.id`."""
    flat: dict[str, object] = {}
    for name, value in manifest.model_dump(mode="json").items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": item for key, item in inner.items()} or {name: value}
    return flat


def _value(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
