"""Answers to a file of prompts: kept as they come, then put together in order.

While there are answers missing they lie in a `RecordFolder` beside the file that they will be in.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from spiffy.calib.folder import MANIFEST, RecordFolder, parts_of
from spiffy.calib.frames import AppendFile, Place, Scan, read_record, scan_records
from spiffy.calib.prompts import PromptSet
from spiffy.calib.workdir import run_facts
from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.models.base import DiffusionLM
from spiffy.schemas import Budget, DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.io import write_atomically
from spiffy.schemas.records import COUNTS
from spiffy.schemas.workdir import AnswersManifest

_RUN = 64  # characters of the manifest's digest, in front of the line


class AnswerFile(AppendFile):
    """A file of answers that one process appends to."""

    records = "answers"
    option = "--out"


@dataclass(frozen=True)
class About:
    """What a record says of its answer: the prompt's number, and under which manifest it is."""

    number: int
    run: str


def failed(number: int, problem: str) -> dict[str, Any]:
    """What is kept in place of an answer that failed, so that nobody decodes it again."""
    return {"index": number, "error": problem}


def _about(payload: bytes) -> About:
    return About(int(json.loads(payload[_RUN:])["index"]), payload[:_RUN].decode())


def answers_manifest(
    model: DiffusionLM,
    prompts: PromptSet,
    settings: DecodingSettings,
    graph: DraftGraph | None,
    drafts: Budget | None,
    stop: Sequence[str],
    seed: int,
    edges: BlockEdges,
) -> AnswersManifest:
    """What a run decodes with; `drafts` is the budget, None if there is none."""
    return AnswersManifest(
        **run_facts(model, prompts, settings, seed, edges),
        graph=None if graph is None else graph.digest(),
        drafts=drafts,
        stop=tuple(stop),
        prompts=len(prompts.texts),
    )


class Answers(RecordFolder[AnswersManifest, About]):
    """Answers that this process records on their way into a file of JSON lines.

    Parameters
    ----------
    out
        Where all of them will be; until then they are in a folder of that name and `.parts`.
    manifest, rank
        See `RecordFolder`.

    """

    file = AnswerFile

    def __init__(self, out: Path, manifest: AnswersManifest, rank: int = 0) -> None:
        self.out = out
        super().__init__(parts_of(out), manifest, rank)
        self._run = self.manifest.digest().encode()

    @staticmethod
    def scan(path: Path) -> Scan[About]:
        """Find the answers of one file."""
        return scan_records(path, _about)

    def append(self, line: Mapping[str, Any]) -> None:
        """Keep an answer, whose prompt's number is `index`; on disk when this returns.

        Raises
        ------
        SpiffyError
            If the disk is full.
        """
        self._file.append(self._run + json.dumps(line, ensure_ascii=False).encode())
        self._file.sync()

    def merge(self, numbers: Sequence[int]) -> tuple[Counter[str], dict[int, str]]:
        """Write the answers to these prompts in order, all or nothing, and remove the folder.

        Returns the sums of their counts by name, `answers` and `tokens` among them; and of prompts
        whose answers failed, which are left out, why, by their numbers.

        Raises
        ------
        SpiffyError
            If one is missing, all failed, or the file cannot be written.
        """
        places = self.recorded(self.folder, self.manifest)
        missing = [number for number in numbers if number not in places]
        if missing:
            raise SpiffyError(
                f"{self.folder}: {len(missing)} of {len(numbers)} answers are missing (the first "
                f"is number {missing[0]}): run the same command again"
            )
        sums: Counter[str] = Counter()
        problems: dict[int, str] = {}
        lines = _lines((places[number] for number in numbers), sums, problems)
        if (first := next(lines, None)) is not None:
            write_atomically(self.out, chain([first], lines))
        (self.folder / MANIFEST).unlink(missing_ok=True)  # first: nothing goes on from a part of it
        shutil.rmtree(self.folder, ignore_errors=True)
        if first is None:
            raise SpiffyError(
                f"none of the {len(numbers)} prompts could be decoded; the first: "
                f"{problems[numbers[0]]}"
            )
        return sums, problems


def _lines(
    places: Iterable[Place[About]], sums: Counter[str], problems: dict[int, str]
) -> Iterator[bytes]:
    for place in places:
        line = read_record(place)[_RUN:]
        answer = json.loads(line)
        if "error" in answer:
            problems[answer["index"]] = answer["error"]
            continue
        sums["answers"] += 1
        sums["tokens"] += len(answer["token_ids"])
        for name in COUNTS:
            sums[name] += answer[name]
        yield line + b"\n"
