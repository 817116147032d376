"""Work directories: calibration that goes on where it was stopped, and shards that are joined.

A directory is a `RecordFolder` of traces.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spiffy.calib.folder import PROVENANCE, RecordFolder, check_same, read_manifest
from spiffy.calib.frames import Place, Scan
from spiffy.calib.pipeline import (
    Origin,
    Traces,
    failures_in_a_row,
    groups,
    model_facts,
    traces_of,
)
from spiffy.calib.prompts import DATASETS, MERGED, PromptSet
from spiffy.calib.record import Trace
from spiffy.calib.store import About, Stored, TraceFile, encode, scan, tokens_digest
from spiffy.runtime.decode import Task
from spiffy.runtime.forward.cache import BlockEdges
from spiffy.runtime.models.base import DiffusionLM
from spiffy.runtime.models.stored import stored_tensors
from spiffy.schemas import DecodingSettings, SpiffyError
from spiffy.schemas.io import canonical_json
from spiffy.schemas.workdir import Manifest

_LONG = 500  # characters of the name of joined sets: an artifact takes 1000
_SAMPLED = 64  # values of each parameter that the digest of the weights looks at


def manifest_of(
    model: DiffusionLM,
    prompts: PromptSet,
    settings: DecodingSettings,
    tasks: int,
    batch_size: int,
    seed: int = 0,
    edges: BlockEdges = BlockEdges(),  # noqa: B008 (frozen)
) -> Manifest:
    """What a run records with; `tasks` prompts of the set can be decoded."""
    return Manifest(
        **run_facts(model, prompts, settings, seed, edges),
        batch_size=batch_size,
        prompts=tasks,
        drawn=len(prompts.texts),
        prompt_digests=prompts.digests,
    )


def run_facts(
    model: DiffusionLM,
    prompts: PromptSet,
    settings: DecodingSettings,
    seed: int,
    edges: BlockEdges,
) -> dict[str, Any]:
    """The fields of `RunManifest`."""
    return {
        "model": model_facts(model),
        "weights": weights_digest(model),
        "dtype": model.arithmetic,
        "decoding": settings,
        "edges": asdict(edges),
        "seed": seed,
        "dataset": prompts.dataset,
        "dataset_sha256": prompts.sha256,
        "raw": prompts.raw,
        "system": prompts.system,
    }


def weights_digest(model: DiffusionLM) -> str:
    """SHA-256 over a sample of every parameter's values."""
    digest = hashlib.sha256()
    module = model.module
    whole = [
        (name, buffer) for name, buffer in module.named_buffers() if not buffer.is_floating_point()
    ]
    for name, parameter in sorted([*module.named_parameters(), *whole], key=lambda pair: pair[0]):
        for weight in stored_tensors(parameter.detach()):
            if weight.is_meta:  # offloaded by a device map
                continue
            values = weight.flatten()[:: max(1, weight.numel() // _SAMPLED)][:_SAMPLED]
            digest.update(name.encode() + values.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


class WorkDir(RecordFolder[Manifest, About]):
    """A work directory that this process records into."""

    file = TraceFile

    @staticmethod
    def scan(path: Path) -> Scan[About]:
        """Find the traces of one file."""
        return scan(path)

    def missing(self, tasks: Sequence[Task]) -> list[Sequence[Task]]:
        """Groups of tasks of which not all are recorded yet.

        Raises
        ------
        SpiffyError
            If what is recorded of a task began with other ids. The manifest knows the texts, and a
            chat template may write the date, or be rendered otherwise by another transformers.
        """
        known = self.places
        for task in tasks:
            place = known.get(task.sequence)
            if place is not None and place.about.tokens != tokens_digest(task.prompt):
                raise SpiffyError(
                    f"{place.path}: prompt {task.sequence} had other token ids when it was "
                    "recorded (a chat template that writes the date, or another version of "
                    "transformers?): record all into another --workdir"
                )
        whole = groups(tasks, self.manifest.batch_size)
        return [group for group in whole if any(t.sequence not in known for t in group)]

    def record(
        self,
        model: DiffusionLM,
        todo: Iterable[Sequence[Task]],
        on_prompt: Callable[[int], None] = lambda done: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Decode groups of prompts and append their traces, until all are or `stopped` says so.

        `on_prompt` is called with the number of prompts decoded so far in this call. What failed is
        recorded, too, so that it is not tried whenever recording goes on; but not where many do in
        a row.

        Raises
        ------
        SpiffyError, or what says that memory is short
            If the disk is full. If all decodes fail, or many in a row.
        """
        done = 0
        failed: Sequence[Task] = ()
        waiting: list[tuple[Task, Trace]] = []  # of those
        for group in todo:
            for task, trace in traces_of(model, group):
                done += 1
                if task.error is None:
                    self._append(task, trace)
                else:
                    waiting.append((task, trace))
                on_prompt(done)
            failed = failures_in_a_row(failed, group, self.manifest.prompts)
            if not failed:
                self._append_all(waiting)
            self._file.sync()
            if stopped():
                return
        self._append_all(waiting)
        self._file.sync()

    def _append_all(self, traces: list[tuple[Task, Trace]]) -> None:
        """Keep traces, and empty the list."""
        for each in traces:
            self._append(*each)
        traces.clear()

    def _append(self, task: Task, trace: Trace) -> None:
        """Keep a trace, unless it is there: of a group that a crash left unfinished."""
        if task.sequence in self.places:
            return
        cost = (0, 0) if task.error else (task.stats.nfe, task.stats.positions_computed)
        digest = self.manifest.digest()
        about = About(task.sequence, tokens_digest(task.prompt), *cost, digest)
        payload = encode(trace, about)
        at = self._file.append(payload)
        self.places[task.sequence] = Place(self._file.path, at, len(payload), about)

    def traces(self) -> Traces:
        """All traces, in the order of the prompts; read when they are needed.

        Raises
        ------
        SpiffyError
            If some prompts are not recorded.
        """
        if any(k not in self.places for k in range(self.manifest.prompts)):  # others have recorded
            self.places = self.recorded(self.folder, self.manifest)
        _check_complete([self.folder], self.places, self.manifest.prompts)
        places = [self.places[k] for k in range(self.manifest.prompts)]
        failed = frozenset(k for k, place in enumerate(places) if not place.about.is_decoded)
        return _traces([self.folder], places, failed)


def _check_complete(folders: Sequence[Path], places: dict[int, Place[About]], prompts: int) -> None:
    missing = [k for k in range(prompts) if k not in places]
    if missing:
        names = ", ".join(map(str, folders))
        raise SpiffyError(
            f"{names}: {len(missing)} of {prompts} prompts are not recorded (the first is number "
            f"{missing[0]}): finish recording, or name all shards"
        )


def _traces(
    folders: Sequence[Path], places: Sequence[Place[About]], failed: frozenset[int] = frozenset()
) -> Traces:
    """The traces of prompts that were decoded."""
    decoded = [place for place in places if place.about.is_decoded]
    if not decoded:
        names = ", ".join(map(str, folders))
        raise SpiffyError(
            f"{names}: none of the {len(places)} prompts could be decoded: where that was for want "
            "of memory, give another --workdir"
        )
    return Traces(
        Stored(decoded),
        nfe=sum(place.about.nfe for place in decoded),
        positions_computed=sum(place.about.positions_computed for place in decoded),
        failed=failed,
    )


@dataclass(frozen=True)
class Joined:
    """Several work directories as one.

    Attributes
    ----------
    manifest
        Of one of them: model and settings are the same in all.
    repeated
        Traces left out because the same prompt is there already.
    failed
        Prompts left out because their decode failed.
    """

    manifest: Manifest
    origin: Origin
    traces: Traces
    repeated: int
    failed: int


_DATA = frozenset({"dataset", "dataset_sha256", "prompts", "drawn", "prompt_digests"})
_MAY_DIFFER = _DATA | PROVENANCE | {"batch_size"}


def join(folders: Sequence[Path]) -> Joined:
    """Join work directories made with the same model and settings.

    Shards of one set of prompts are put back into its order, so the result is that of one run. Of
    different sets every prompt is taken once and their order is that of the prompts' digests: which
    prompt was in which directory changes nothing.

    Raises
    ------
    SpiffyError
        If settings differ, or a shard is missing.
    """
    manifests = {folder: read_manifest(folder, Manifest) for folder in folders}
    sets: defaultdict[str, list[Path]] = defaultdict(list)
    for folder, manifest in manifests.items():
        first = manifests[folders[0]]
        check_same(folder, manifest, first, _MAY_DIFFER)
        sets[manifest.dataset_sha256].append(folder)
    found: list[Place[About]] = []
    repeated = 0
    for same in sets.values():
        places: dict[int, Place[About]] = {}
        for folder in sorted(same, key=lambda folder: manifests[folder].digest()):
            ours = WorkDir.recorded(folder, manifests[folder])
            repeated += len(ours.keys() & places.keys())
            decoded = {k: place for k, place in places.items() if place.about.is_decoded}
            places = places | ours | decoded
        prompts = manifests[same[0]].prompts
        _check_complete(same, places, prompts)
        found += [places[k] for k in range(prompts)]
    names = {manifest.dataset for manifest in manifests.values()}
    manifest = min(manifests.values(), key=lambda manifest: manifest.digest())
    if len(sets) == 1:
        origin = Origin(min(names), min(sets), manifest.drawn, manifest.prompt_digests)
        traces = _traces(folders, found)
        return Joined(manifest, origin, traces, repeated, len(found) - len(traces.prompts))
    once: dict[str, Place[About]] = {}
    for place in sorted(found, key=_order):
        once.setdefault(place.about.tokens, place)
    # Files have any names; which they are must not decide anything.
    of_hub = {name for name in names if name in DATASETS or "/" in name}
    name = MERGED + "+".join(sorted(of_hub | {"jsonl" for _ in names - of_hub}))
    if len(name) > _LONG:
        name = f"{MERGED}{len(sets)} sets"
    digest = hashlib.sha256(canonical_json(list(once)).encode()).hexdigest()
    traces = _traces(folders, list(once.values()))
    failed = len(once) - len(traces.prompts)
    texts = {text for manifest in manifests.values() for text in manifest.prompt_digests}
    origin = Origin(name, digest, len(texts), tuple(sorted(texts)))
    return Joined(manifest, origin, traces, repeated + len(found) - len(once), failed)


def _order(place: Place[About]) -> tuple[str, bool, str]:
    """By prompt; of one, what was decoded comes first."""
    return place.about.tokens, not place.about.is_decoded, place.about.run
